"""Denoisers around denoisers: guidance, and a count of what is forwarded. Knows no policy and no schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, TypeVar, overload

import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas, Denoiser, Part, Predict, Rows
from mmdlm.sampling.draw import ORDER, uniform
from mmdlm.sampling.order import count, rank
from mmdlm.sampling.scale import Scale, scaled

T = TypeVar("T")

_PARTNER = {TEXT: IMAGE, IMAGE: TEXT}


@dataclass(frozen=True)
class Shown:
    """What a branch is shown, and where in its rows the positions of the canvas stand."""

    canvas: Canvas
    place: Tensor | None = None  # (L,) long: a column of the branch's canvas, -1 none; None: each its own


class Branch(Protocol):
    """Another view of the canvas, of any length, that lacks what guidance is to strengthen."""

    def __call__(self, canvas: Canvas, mask: int) -> Shown: ...


@dataclass(frozen=True)
class Without:
    """Every span of a modality hidden, given or generated alike; the frame around them stays."""

    modality: int

    def __call__(self, canvas: Canvas, mask: int) -> Shown:
        return Shown(hide(canvas, self.modality, mask))


@dataclass(frozen=True)
class WithoutGiven:
    """What may not be filled is hidden, as LLaDA hides the prompt; the frame around spans stays."""

    def __call__(self, canvas: Canvas, mask: int) -> Shown:
        inside = canvas.segment >= 0 if canvas.span is None else canvas.span >= 0
        return Shown(canvas.hide(inside & ~canvas.fillable, mask))


@dataclass(frozen=True)
class Renoised:
    """A modality masked anew to a level, the same positions at every step: a partner that tells less.

    Of every span the `level`, rounded to a whole number of positions, is hidden, those first whose number in
    a shuffle by `seed` is lowest.
    """

    modality: int
    level: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.level <= 1.0:
            raise ValueError(f"a noise level is in [0, 1], got {self.level}")

    def __call__(self, canvas: Canvas, mask: int) -> Shown:
        where = _spans(canvas, self.modality)
        place = torch.arange(canvas.shape[1], device=canvas.device).expand(canvas.shape)
        seed = place.new_full((), self.seed)
        chance = uniform(seed, seed, seed, place, ORDER)
        runs = canvas.modality.long() - 1 if canvas.span is None else canvas.span
        number = (count(where, runs) * self.level).round()
        return Shown(canvas.hide(where & (rank(chance, where, runs) < number), mask))


@dataclass(frozen=True)
class Instead:
    """Other ids in the first columns: a negative prompt, or none, of the same length (MMaDA)."""

    tokens: Tensor  # (B, n) long

    def __call__(self, canvas: Canvas, mask: int) -> Shown:
        tokens = canvas.tokens.clone()
        num = self.tokens.shape[1]
        tokens[:, :num] = self.tokens
        masked = canvas.masked.clone()
        masked[:, :num] = self.tokens == mask
        return Shown(canvas.replace(tokens=tokens, masked=masked))


@dataclass(frozen=True)
class Spliced:
    """Another beginning, of any length, in the place of the first `start` columns (Lumina-DiMOO)."""

    prefix: Canvas  # (B, P)
    start: int

    def __call__(self, canvas: Canvas, mask: int) -> Shown:
        ahead, length = self.prefix.shape[1], canvas.shape[1]
        columns = {}
        for column in fields(Canvas):
            first, rest = getattr(self.prefix, column.name), getattr(canvas, column.name)
            if rest is not None:
                rest = rest[:, self.start :]
                if column.name == "position":  # offsets run on from the prefix's
                    rest = rest - rest[:, :1].amin() + ahead
                columns[column.name] = torch.cat([first.to(rest.dtype), rest], dim=1)
        place = torch.arange(length, device=canvas.device) - self.start
        return Shown(Canvas(**columns), torch.where(place >= 0, place + ahead, -1))


@dataclass(frozen=True)
class Term:
    """Rows of `modality` (None: all; of one `span` only, where it is given) are pushed away from a branch.

    The branch is asked at every `every`-th step; in between its last logits serve, an approximation.
    """

    branch: Branch
    scale: float | Scale
    modality: int | None = None
    span: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"a branch is asked at every n-th step, n at least 1, got {self.every}")

    def where(self, canvas: Canvas) -> Tensor:
        """(B, L) bool: the positions that are guided."""
        where = canvas.segment >= 0
        if self.modality is not None:
            where = where & (canvas.modality == self.modality)
        if self.span is not None:
            if canvas.span is None:
                raise ValueError(f"guidance of span {self.span}, but the canvas has no spans")
            where = where & (canvas.span == self.span)
        return where


def partners(*, text: float | Scale = 0.0, image: float | Scale = 0.0) -> tuple[Term, ...]:
    """Each modality guided by the other: text away from text without images, images from those without text.

    A scale of 0 is no term. Classifier-free guidance, arXiv:2207.12598.
    """
    scales = {TEXT: text, IMAGE: image}
    return tuple(Term(Without(_PARTNER[m]), scale, m) for m, scale in scales.items() if scale != 0.0)


class Guided:
    """Guidance: logits c + sum over terms of w (c - u), u the term's branch, on log-probabilities.

    For one term that is (1 + w) c - w u, so w = 0 is no guidance. A branch is forwarded only where its scale
    is not 0 and, on the CPU, when one of its rows is asked; it is asked only for those rows. `batched`: all
    branches go through the model as one batch, at every step. `mask` is the mask id.
    """

    def __init__(
        self, denoiser: Denoiser, terms: Sequence[Term], *, mask: int, batched: bool = False
    ) -> None:
        self.denoiser = denoiser
        self.terms = tuple(terms)
        self.mask = mask
        self.batched = batched
        if batched and any(term.every > 1 for term in terms):
            raise ValueError("branches in one batch are all asked at every step; every=n wants batched=False")

    def begin(self, canvas: Canvas) -> Predict:
        """One state for the main branch and one for each other one."""
        terms = []
        for term in self.terms:
            branch = term.branch
            # without a partner both branches are one; asking that is one host sync a generation
            if not isinstance(branch, Without) or bool(_spans(canvas, branch.modality).any()):
                terms.append((term, branch(canvas, self.mask).canvas))
        holes = canvas.masked & canvas.fillable
        if not self.batched or not terms:
            branches = [(term, self.denoiser.begin(shown)) for term, shown in terms]
            return _GuidedPredict(self.mask, self.denoiser.begin(canvas), branches, holes)
        together = self.denoiser.begin(Canvas.concat([canvas, *(shown for _, shown in terms)]))
        return _GuidedPredict(self.mask, together, [(term, None) for term, _ in terms], holes)


class _GuidedPredict:
    def __init__(
        self, mask: int, main: Predict, branches: Sequence[tuple[Term, Predict | None]], holes: Tensor
    ) -> None:
        self._mask, self._main, self._branches, self._holes = mask, main, branches, holes
        self._calls = 0
        self._kept: dict[int, list[Part]] = {}  # by term: what its branch said last, at all rows it was asked

    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: None = None) -> list[Part]: ...
    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T]) -> list[T]: ...
    def __call__(
        self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T] | None = None
    ) -> list[Part] | list[T]:
        asked = [self._asked(term, canvas, rows) for term, _ in self._branches]
        if any(branch is None for _, branch in self._branches):
            parts, free = self._together(canvas, rows, [each[0] for each in asked])
        else:
            parts = self._main(canvas, rows)
            free = [self._apart(n, canvas, *each) for n, each in enumerate(asked)]
        self._calls += 1
        guided = parts
        for (_, scale), branch in zip(asked, free, strict=True):
            by_ids = {(part.ids.start, part.ids.stop): part for part in branch}
            guided = [
                _guide(part, own, by_ids.get((own.ids.start, own.ids.stop)), scale, canvas)
                for part, own in zip(guided, parts, strict=True)
            ]
        return guided if reduce is None else [reduce(part) for part in guided]

    def _asked(self, term: Term, canvas: Canvas, rows: Rows) -> tuple[Rows, Tensor]:
        """The rows that a term guides now, and (B,) its scale in every sample."""
        where = term.where(canvas)
        holes = (self._holes & where).sum(dim=1)
        value = scaled(term.scale, (canvas.masked & self._holes & where).sum(dim=1) / holes.clamp(min=1))
        return rows.where(where & (value != 0.0).unsqueeze(1)), value

    def _apart(self, number: int, canvas: Canvas, rows: Rows, scale: Tensor) -> list[Part]:
        term, branch = self._branches[number]
        assert branch is not None
        if rows.index.shape[0] == 0:
            return []
        if self._calls % term.every == 0 or number not in self._kept:
            shown = term.branch(canvas, self._mask)
            self._kept[number] = _back(branch(shown.canvas, _moved(rows, shown, canvas)), shown, canvas)
        return self._kept[number]

    def _together(self, canvas: Canvas, rows: Rows, asked: list[Rows]) -> tuple[list[Part], list[list[Part]]]:
        views = [Shown(canvas), *(term.branch(canvas, self._mask) for term, _ in self._branches)]
        whole = Canvas.concat([view.canvas for view in views])
        batch, length = canvas.shape[0], whole.shape[1]
        index, valid = [], []
        for number, (view, wanted) in enumerate(zip(views, [rows, *asked], strict=True)):
            moved = _moved(wanted, view, canvas)
            sample, column = moved.index // view.canvas.shape[1], moved.index % view.canvas.shape[1]
            index.append((sample + number * batch) * length + column)
            valid.append(moved.valid)
        parts = self._main(whole, Rows(torch.cat(index), torch.cat(valid)))
        answers: list[list[Part]] = [[] for _ in views]
        for part in parts:
            number = part.rows.index // (batch * length)
            for which, view in enumerate(views):
                answers[which] += _back(_of_view(part, number == which, length, view, batch), view, canvas)
        main, *free = answers
        return main, free


def hide(canvas: Canvas, modality: int, mask: int) -> Canvas:
    """The canvas with every span of `modality` turned into holes; the frame around them stays."""
    return canvas.hide(_spans(canvas, modality), mask)


def _spans(canvas: Canvas, modality: int) -> Tensor:
    where = canvas.modality == modality
    return where if canvas.span is None else where & (canvas.span >= 0)


def _moved(rows: Rows, shown: Shown, canvas: Canvas) -> Rows:
    """Rows of the canvas as rows of what a branch is shown."""
    if shown.place is None:
        return rows
    return rows.moved(shown.place.expand(canvas.shape), shown.canvas.shape[1])


def _of_view(part: Part, mine: Tensor, length: int, view: Shown, batch: int) -> list[Part]:
    """What is `mine` (M,) bool of a part on views under one another, `batch` rows of `length` each."""
    local = part.rows.index % (batch * length)
    at = (local // length * view.canvas.shape[1] + local % length).clamp(max=view.canvas.masked.numel() - 1)
    if mine.device.type != "cpu":  # a choice by data would be a host sync: the others stay, not valid
        return [Part(Rows(at, part.rows.valid & mine), part.ids, part.logits)]
    own = Part(Rows(at[mine], part.rows.valid[mine]), part.ids, part.logits[mine])
    return [own] if own.rows.index.shape[0] else []


def _back(parts: list[Part], shown: Shown, canvas: Canvas) -> list[Part]:
    """Parts of a branch as parts of the canvas."""
    if shown.place is None:
        return parts
    length = shown.canvas.shape[1]
    home = torch.zeros(length, dtype=torch.long, device=canvas.device)
    there = shown.place >= 0
    home[shown.place[there]] = torch.arange(canvas.shape[1], device=canvas.device)[there]
    home = home.expand(canvas.shape[0], length)
    return [Part(part.rows.moved(home, canvas.shape[1]), part.ids, part.logits) for part in parts]


def _guide(part: Part, own: Part, free: Part | None, scale: Tensor, canvas: Canvas) -> Part:
    """`part` plus scale (own - free) at the rows that are also in `free`; the others as they were."""
    if free is None:
        return part
    place = torch.full(canvas.shape, -1, dtype=torch.long, device=canvas.device)
    place = free.rows.scatter(torch.arange(free.rows.index.shape[0], device=canvas.device), place)
    where = part.rows.gather(place)
    partner = _normalised(free.logits).to(part.logits.device)[where.clamp(min=0)]
    main = _normalised(own.logits)
    weight = scale.to(main.dtype)[part.rows.index // canvas.shape[1]].unsqueeze(1)
    base = main if part is own else part.logits.to(main.dtype)
    guided = base + weight * (main - partner)
    illegal = main.isneginf() | partner.isneginf()
    guided = torch.where(illegal, -torch.inf, guided)  # inf - inf is no number
    chosen = (where >= 0) & (weight.squeeze(1) != 0.0)
    return Part(part.rows, part.ids, torch.where(chosen.unsqueeze(1), guided, part.logits.to(main.dtype)))


def _normalised(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=1)


class Counted:
    """Counts what the denoiser inside is asked to do: wrap the innermost one, and guidance is counted too."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.calls = 0  # passes through the model
        self.forwards = 0  # rows of canvases, on the CPU those with something asked, summed over the passes
        self.positions = 0  # their positions, padding too, summed over the passes

    def begin(self, canvas: Canvas) -> Predict:
        return _CountedPredict(self, self.denoiser.begin(canvas))


class _CountedPredict:
    def __init__(self, counter: Counted, inner: Predict) -> None:
        self._counter, self._inner = counter, inner

    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: None = None) -> list[Part]: ...
    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T]) -> list[T]: ...
    def __call__(
        self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T] | None = None
    ) -> list[Part] | list[T]:
        size, length = canvas.shape
        asked = rows.samples(length)
        size = size if asked is None else len(asked)
        self._counter.calls += 1
        self._counter.forwards += size
        self._counter.positions += size * length
        return self._inner(canvas, rows) if reduce is None else self._inner(canvas, rows, reduce=reduce)
