"""A denoiser that computes only what must be computed again. Knows no policy and no schedule.

What can be kept without an error is decided by who sees whom: a position's features stay right as long as
nothing changed that it sees, directly or through others. Where every position sees every other one, that is
never; everything else that is kept there is an approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, overload

import torch
from torch import Tensor

from mmdlm.canvas import Canvas, Part, Predict, Rows
from mmdlm.sampling.order import rank
from mmdlm.sampling.plan import blocks_of, first_of

T = TypeVar("T")


class Remembered(Protocol):
    """What a model remembers of a canvas (`mmdlm.model.Memory`)."""

    tokens: Tensor  # (B, L) long   what a position held when it was last computed
    masked: Tensor  # (B, L) bool
    known: Tensor  # (B, L) bool   whether it ever was
    notes: dict[str, Tensor]  # (B, ...) each: what a cache writes down for itself


class Remembering(Protocol):
    """A model that can compute some positions and remember the others (`mmdlm.model.Predictor`)."""

    def remember(self, canvas: Canvas) -> Remembered: ...
    def recall(self, canvas: Canvas, rows: Rows, memory, index: Tensor | None, *, reduce=None) -> list: ...


class Cache(Protocol):
    """Which positions are computed again; `exact` says that the answers are those of no cache."""

    exact: bool

    def check(self, canvas: Canvas) -> None:
        """Raises ValueError where the cache cannot keep its promise on such a canvas."""
        ...

    def stale(self, canvas: Canvas, rows: Rows, memory: Remembered, call: int) -> Tensor:
        """(B, L) bool: what is computed at this call, the `call`-th of the generation from 0."""
        ...


@dataclass(frozen=True)
class Unchanged:
    """A row in which no token changed is not computed again; any other one is, as a whole. Exact."""

    exact = True

    def check(self, canvas: Canvas) -> None:
        pass

    def stale(self, canvas: Canvas, rows: Rows, memory: Remembered, call: int) -> Tensor:
        return changed(canvas, memory).any(dim=1, keepdim=True).expand(canvas.shape)


@dataclass(frozen=True)
class Committed:
    """Blocks that nothing before them or in them changed are kept: exact under block-causal attention.

    So are prompts that do not see their answers (two blocks: prefix-causal). A block that was just finished
    is computed once more, from its clean tokens, together with the first step of the next one.
    """

    exact = True

    def check(self, canvas: Canvas) -> None:
        if canvas.block is None:
            raise ValueError(
                "where all positions see each other no block can be kept exactly, for every change reaches "
                "every position; wanted a canvas with a `block` column, or a cache that approximates"
            )

    def stale(self, canvas: Canvas, rows: Rows, memory: Remembered, call: int) -> Tensor:
        assert canvas.block is not None
        last = torch.iinfo(torch.long).max
        first_changed = canvas.block.masked_fill(~changed(canvas, memory), last).amin(dim=1, keepdim=True)
        asked = where(rows, canvas)
        last_asked = canvas.block.masked_fill(~asked, -1).amax(dim=1, keepdim=True)
        # what lies behind a change and is not asked now is not right any more
        behind = (canvas.block > last_asked) & (first_changed <= last_asked)
        memory.known = memory.known & ~behind
        return (canvas.block >= first_changed) & (canvas.block <= last_asked) & (canvas.segment >= 0)


class Selector(Protocol):
    """Which positions an approximate cache computes again between two refreshes.

    `hear(parts, canvas, memory)`, where a selector has it, is told what the model answered.
    """

    def select(self, canvas: Canvas, rows: Rows, memory: Remembered) -> Tensor:
        """(B, L) bool."""
        ...

    def turn(self, canvas: Canvas, rows: Rows) -> Tensor | None:
        """(B,) long: in a row in which this number changes all is computed again; None: nowhere."""
        ...


@dataclass(frozen=True)
class Approximate:
    """Computes what a selector says, and everything now and then: at each `every`-th call, at the first ones.

    Not exact, and asked for by name: keys, values and features of all other positions are those of an earlier
    canvas. `every` 1 is no cache, 0 refreshes only where the selector turns.
    """

    selector: Selector
    every: int = 0
    first: int = 1
    exact = False

    def __post_init__(self) -> None:
        if self.every < 0 or self.first < 1:
            raise ValueError(f"wanted every >= 0 and first >= 1, got {self.every} and {self.first}")

    def check(self, canvas: Canvas) -> None:
        pass

    @property
    def hear(self) -> Callable[[list[Part], Canvas, Remembered], None] | None:
        """The selector's, where it has one."""
        return getattr(self.selector, "hear", None)

    def stale(self, canvas: Canvas, rows: Rows, memory: Remembered, call: int) -> Tensor:
        inside, turn = canvas.segment >= 0, self.selector.turn(canvas, rows)
        turned = torch.zeros_like(canvas.segment[:, 0], dtype=torch.bool)
        if turn is not None:
            turned = turn != memory.notes.get("turn", turn - 1)
            memory.notes["turn"] = turn
        if call < self.first or (self.every and call % self.every == 0):
            return inside
        chosen = self.selector.select(canvas, rows, memory) | (where(rows, canvas) & ~memory.known)
        return inside & (chosen | turned.unsqueeze(1))


@dataclass(frozen=True)
class Suffix:
    """The block that is worked on and all behind it: Fast-dLLM's prefix cache (arXiv:2505.22618).

    Blocks of `length` positions from the start of each span, as the plan has them.
    """

    length: int

    def select(self, canvas: Canvas, rows: Rows, memory: Remembered) -> Tensor:
        place = torch.arange(canvas.shape[1], device=canvas.device)
        return place >= self.turn(canvas, rows).unsqueeze(1)

    def turn(self, canvas: Canvas, rows: Rows) -> Tensor:
        return _first_block(canvas, rows, self.length)


@dataclass(frozen=True)
class Window:
    """The block that is worked on alone: Fast-dLLM's dual cache."""

    length: int

    def select(self, canvas: Canvas, rows: Rows, memory: Remembered) -> Tensor:
        return _blocks(canvas, self.length) == self.turn(canvas, rows).unsqueeze(1)

    def turn(self, canvas: Canvas, rows: Rows) -> Tensor:
        return _first_block(canvas, rows, self.length)


@dataclass(frozen=True)
class Holes:
    """The holes, and what was filled since: a token is kept one step after it was written (dKV-Cache).

    arXiv:2505.15781, decoding with a delay of one.
    """

    def select(self, canvas: Canvas, rows: Rows, memory: Remembered) -> Tensor:
        return canvas.masked | changed(canvas, memory)

    def turn(self, canvas: Canvas, rows: Rows) -> None:
        return None


@dataclass(frozen=True)
class Faintest:
    """The `share` of a row's positions whose largest logit was lowest when last asked (Lumina-DiMOO).

    arXiv:2510.06308; positions that were never asked count as faint.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        _check_share(self.share)

    def select(self, canvas: Canvas, rows: Rows, memory: Remembered) -> Tensor:
        peak = memory.notes.get("peak", torch.zeros(canvas.shape, device=canvas.device))
        return _most(-peak, self.share, canvas)

    def turn(self, canvas: Canvas, rows: Rows) -> None:
        return None

    def hear(self, parts: list[Part], canvas: Canvas, memory: Remembered) -> None:
        """Writes down the largest logit of each position that was asked."""
        peak = memory.notes.get("peak", torch.zeros(canvas.shape, device=canvas.device))
        for part in parts:
            peak = part.rows.scatter(part.logits.amax(dim=1).float(), peak)
        memory.notes["peak"] = peak


@dataclass(frozen=True)
class Drifting:
    """What was written since, and the `share` of positions whose features moved most when last computed.

    After dLLM-Cache (arXiv:2506.06295), which measures the cosine of first values at every step; here it is
    that of the last features, between the last two times that a position was computed. What was computed
    once comes first, from the left.
    """

    share: float = 0.25

    def __post_init__(self) -> None:
        _check_share(self.share)

    def select(self, canvas: Canvas, rows: Rows, memory: Remembered) -> Tensor:
        still = memory.notes.setdefault("similarity", torch.zeros(canvas.shape, device=canvas.device))
        return _most(-still, self.share, canvas) | changed(canvas, memory)

    def turn(self, canvas: Canvas, rows: Rows) -> None:
        return None


def _most(score: Tensor, share: float, canvas: Canvas) -> Tensor:
    """(B, L) bool: the `share` of each row's positions with the highest score."""
    inside, runs = canvas.segment >= 0, torch.zeros_like(canvas.segment)
    number = (inside.sum(dim=1, keepdim=True) * share).ceil()
    return inside & (rank(score, inside, runs) < number)


def _check_share(share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a share of the positions is in [0, 1], got {share}")


def _blocks(canvas: Canvas, length: int) -> Tensor:
    """(B, L) long: the first position of each position's block, -1 outside of spans."""
    runs = canvas.modality.long() - 1 if canvas.span is None else canvas.span
    return blocks_of(first_of(runs), length)


def _first_block(canvas: Canvas, rows: Rows, length: int) -> Tensor:
    """(B,) long: the first position of the first block that is asked about; L where none is."""
    asked = where(rows, canvas)
    return _blocks(canvas, length).masked_fill(~asked, canvas.shape[1]).amin(dim=1)


def changed(canvas: Canvas, memory: Remembered) -> Tensor:
    """(B, L) bool: what holds something else than when it was computed, or never was; padding never."""
    other = (canvas.masked != memory.masked) | (~canvas.masked & (canvas.tokens != memory.tokens))
    return (other | ~memory.known) & (canvas.segment >= 0)


def where(rows: Rows, canvas: Canvas) -> Tensor:
    """(B, L) bool: the positions of `rows`."""
    nothing = torch.zeros(canvas.shape, dtype=torch.bool, device=canvas.device)
    return rows.scatter(rows.valid, nothing)


class Cached:
    """A model that remembers: `cache` says what is computed again at each call.

    It stands inside of guidance, next to the model, so that every branch remembers its own view. The columns
    of a canvas but its tokens and holes must stay what they were at `begin`.
    """

    def __init__(self, model: Remembering, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.positions = 0  # computed so far, in all generations

    @property
    def exact(self) -> bool:
        return self.cache.exact

    def begin(self, canvas: Canvas) -> Predict:
        """A memory for one generation. Raises ValueError where the cache cannot keep its promise."""
        self.cache.check(canvas)
        return _CachedPredict(self, canvas)


class _CachedPredict:
    def __init__(self, cached: Cached, canvas: Canvas) -> None:
        self._cached, self._memory = cached, cached.model.remember(canvas)
        self._calls = 0

    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: None = None) -> list[Part]: ...
    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T]) -> list[T]: ...
    def __call__(
        self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T] | None = None
    ) -> list[Part] | list[T]:
        stale = self._cached.cache.stale(canvas, rows, self._memory, self._calls)
        index = padded(stale)
        self._cached.positions += 0 if index is None else index.numel()
        self._calls += 1
        hear = getattr(self._cached.cache, "hear", None)
        if hear is None:
            return self._cached.model.recall(canvas, rows, self._memory, index, reduce=reduce)
        parts = self._cached.model.recall(canvas, rows, self._memory, index)
        hear(parts, canvas, self._memory)
        return parts if reduce is None else [reduce(part) for part in parts]


def padded(chosen: Tensor) -> Tensor | None:
    """(B, M) long: the chosen positions of each row of (B, L) bool, and L for nothing in shorter rows.

    None where nothing is chosen. One host sync on an accelerator.
    """
    number = chosen.sum(dim=1)
    most = int(number.max())
    if most == 0:
        return None
    order = chosen.logical_not().long().argsort(dim=1, stable=True)[:, :most]
    column = torch.arange(most, device=chosen.device).expand(order.shape)
    return torch.where(column < number.unsqueeze(1), order, chosen.shape[1])
