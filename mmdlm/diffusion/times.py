"""The law over noise levels: what is live, given or hidden, how noisy. Knows no loss and no model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, MODALITIES, TEXT, Canvas


@dataclass(frozen=True)
class Strata:
    """Which part of an optimizer step a batch is: part `index` of `count` (micro-batches times ranks).

    Group number r of the N groups of one kind in this part takes the stratum r * count + p(index) of N *
    count, p being a permutation of the parts, so that parts of equal size together hold one level per
    stratum. Every decision has its own permutation, the same in all parts, drawn anew for each `step`:
    without it, parts of a single row would see equal levels of text and image, and noisy captions only.
    """

    index: int = 0
    count: int = 1
    step: int = 0  # the same for all parts of an optimizer step, another one at the next

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"part {self.index} of {self.count}: the index must be in 0 .. count - 1")

    def offsets(self, decision: int, num_kinds: int) -> Tensor:
        """(num_kinds,) long on the CPU: p(index) of each kind, for the decision numbered 0 .. 7."""
        rng = torch.Generator().manual_seed(8 * self.step + decision)
        return torch.rand(num_kinds, self.count, generator=rng).argsort(dim=1)[:, self.index]

    def inside(self, number: int) -> Strata:
        """The strata of law `number` inside a mixture; their permutations are unrelated to the mixture's."""
        return replace(self, step=(self.step * 1_000_003 + number + 1) % 2**40)


WHOLE = Strata()


@dataclass(frozen=True)
class Draw:
    """Noise levels of one batch.

    A group is a set of positions of one document that share a level and are in the loss. Group numbers are
    below `num_groups` and need not be consecutive; `num_groups` is known to the host without a look at the
    device.
    """

    level: Tensor  # (B, L) float32  0 given, 1 hidden; inside a group its level in (0, 1]
    group: Tensor  # (B, L) long     -1: not in the loss (given, hidden, structure, padding)
    num_groups: int


class Times(Protocol):
    """A law over noise levels: what training draws instead of a task.

    Only positions that are fillable and not already masked are ever given a group; a position that comes
    masked is unknown, counts as hidden and is never in the loss. Levels are uniform on (0, 1] for every
    group, and spread evenly over the groups of a kind (the same law, the same modalities, partners alike
    given or hidden).
    """

    def draw(self, canvas: Canvas, rng: torch.Generator, strata: Strata = WHOLE) -> Draw:
        """Levels for `canvas`, which lies whole; random numbers come from `rng` alone."""
        ...


def uniform(num: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """(num,) float64 uniform in [0, 1), drawn on the generator's own device."""
    return torch.rand(num, generator=rng, device=rng.device, dtype=torch.float64).to(device)


def shuffle(group: Tensor, num_groups: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random order inside every group, without a host sync.

    For (N,) long group numbers in -1 .. num_groups - 1 the (N,) long rank 0, 1, ... of each member and the
    (N,) long size of its group; -1 is a group like any other.
    """
    bucket = group + 1
    order = uniform(len(group), rng, group.device).argsort()
    order = order[bucket[order].argsort(stable=True)]
    size = bucket.new_zeros(num_groups + 1).index_add(0, bucket, torch.ones_like(bucket))
    start = size.cumsum(0) - size
    place = torch.empty_like(bucket).scatter(0, order, torch.arange(len(group), device=group.device))
    return place - start[bucket], size[bucket]


@dataclass(frozen=True)
class Square:
    """Every span has its own level: the text's and the image's fill the unit square."""

    def draw(self, canvas: Canvas, rng: torch.Generator, strata: Strata = WHOLE) -> Draw:
        span = _spans(canvas)
        num = span.numel()
        kind = _once(span, num, canvas.modality)
        level = _levels(kind, strata.offsets(0, _KINDS), rng, strata)
        return _draw(canvas, span, _spread(level, span, _resting(canvas)), num)


@dataclass(frozen=True)
class Diagonal:
    """All fillable positions of a document (a row, unless it is packed) share one level."""

    def draw(self, canvas: Canvas, rng: torch.Generator, strata: Strata = WHOLE) -> Draw:
        document = _documents(canvas)
        num = document.numel()
        level = _levels(_composition(canvas, document), strata.offsets(0, _COMPOSITIONS), rng, strata)
        return _draw(canvas, document, _spread(level, document, _resting(canvas)), num)


@dataclass(frozen=True)
class Edges:
    """One fillable span of a document is live; the others are given, or hidden with probability `hide`.

    A span is live with probability proportional to the weight of its modality, `text` or `image`; a document
    in which all weights are 0 chooses evenly. So a pair learns captioning (text live), drawing (image live)
    and, hidden, the unconditional branches that guidance needs; a canvas with one fillable span learns that
    span.
    """

    text: float = 1.0
    image: float = 1.0
    hide: float = 0.1

    def __post_init__(self) -> None:
        if self.text < 0 or self.image < 0 or not 0 <= self.hide <= 1:
            raise ValueError(f"{self}: text and image must be at least 0, hide must be in [0, 1]")

    def draw(self, canvas: Canvas, rng: torch.Generator, strata: Strata = WHOLE) -> Draw:
        document, span = _documents(canvas), _spans(canvas)
        num = span.numel()
        home = _once(span, num, document)  # by span: its document, -1 if there is no such span
        kind = _once(span, num, canvas.modality)
        live = self._choose(home, kind, _composition(canvas, document), rng, strata)  # by document
        live_kind = torch.where(live >= 0, kind[live.clamp_min(0)], -1)
        # what has no partner has nothing to hide, and must not take up the strata of those who have
        lonely = _add(home, (home >= 0).long()) < 2
        coin = _levels(torch.where(lonely, -1, live_kind), strata.offsets(1, _KINDS), rng, strata)
        hidden = (coin <= self.hide) & ~lonely
        branch = torch.where(live_kind < 0, -1, 2 * live_kind + hidden)
        level = _levels(branch, strata.offsets(0, 2 * _KINDS), rng, strata)

        is_live = (span >= 0) & (live[document.clamp_min(0)] == span)
        partner = _spread(hidden.double(), document, _resting(canvas))
        level = torch.where(is_live, _spread(level, document, partner), partner)
        return _draw(canvas, torch.where(is_live, span, -1), level, num)

    def _choose(
        self, home: Tensor, kind: Tensor, composition: Tensor, rng: torch.Generator, strata: Strata
    ) -> Tensor:
        """(num,) long, the live span of each document or -1: cumulated weights cut at a stratified point."""
        exists = home >= 0
        weight = torch.where(kind == TEXT, self.text, torch.where(kind == IMAGE, self.image, 0.0)).double()
        weight = torch.where(_add(home, weight)[home.clamp_min(0)] > 0, weight, 1.0).masked_fill(~exists, 0.0)
        total = _add(home, weight)
        before = weight.cumsum(0) - weight  # the spans of a document are neighbours
        spare = torch.where(exists, home, len(home))
        start = before.new_full((len(home) + 1,), torch.inf).scatter_reduce(0, spare, before, "amin")
        point = _levels(composition, strata.offsets(2, _COMPOSITIONS), rng, strata) * total
        reached = (weight > 0) & (before - start[spare] < point[home.clamp_min(0)])
        slot = torch.arange(len(home), device=home.device)
        last = home.new_full((len(home) + 1,), -1)
        return last.scatter_reduce(0, torch.where(reached, home, len(home)), slot, "amax")[:-1]


@dataclass(frozen=True)
class Raised:
    """Another law with its levels squeezed into (floor, 1]: what is decided first is seen more often.

    With `only`, a modality, just the levels of its positions. The mean over these levels is no bound on a
    likelihood.
    """

    times: Times
    floor: float
    only: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must be in [0, 1), got {self.floor}")

    def draw(self, canvas: Canvas, rng: torch.Generator, strata: Strata = WHOLE) -> Draw:
        drawn = self.times.draw(canvas, rng, strata)
        raised = self.floor + (1 - self.floor) * drawn.level
        if self.only is None:
            return replace(drawn, level=torch.where(drawn.group >= 0, raised, drawn.level))
        wanted = (drawn.group >= 0) & (canvas.modality == self.only)
        # a group has one level, so what is raised of one is a group of its own
        group = torch.where(wanted, drawn.group + drawn.num_groups, drawn.group)
        return Draw(torch.where(wanted, raised, drawn.level), group, 2 * drawn.num_groups)


@dataclass(frozen=True)
class Mixture:
    """Every document follows one of several laws: pairs (weight, law), drawn in proportion to the weights."""

    parts: tuple[tuple[float, Times], ...]

    def __post_init__(self) -> None:
        if not self.parts or any(weight <= 0 for weight, _ in self.parts):
            raise ValueError(f"a mixture needs laws with weights above 0, got {self.parts}")

    def draw(self, canvas: Canvas, rng: torch.Generator, strata: Strata = WHOLE) -> Draw:
        document = _documents(canvas)
        weight = torch.tensor([weight for weight, _ in self.parts], dtype=torch.float64)
        edges = (weight.cumsum(0) / weight.sum())[:-1].to(canvas.device)
        point = _levels(_composition(canvas, document), strata.offsets(2, _COMPOSITIONS), rng, strata)
        choice = torch.bucketize(point, edges)[document.clamp_min(0)].masked_fill(document < 0, -1)
        choice = choice.reshape(canvas.shape)

        level = _resting(canvas).reshape(canvas.shape).float()
        group = torch.full_like(canvas.tokens, -1)
        num_groups = 0
        for number, (_, times) in enumerate(self.parts):
            mine = choice == number
            drawn = times.draw(canvas.replace(fillable=canvas.fillable & mine), rng, strata.inside(number))
            level = torch.where(mine, drawn.level, level)
            group = torch.where(mine & (drawn.group >= 0), drawn.group + num_groups, group)
            num_groups += drawn.num_groups
        return Draw(level, group, num_groups)


# Below, positions are flat (B * L,), and so are documents and spans: a document is number row * L + segment,
# a span row * L + span, so that num = B * L slots do for both. A slot that no position names is empty.

_KINDS = 1 + max(MODALITIES.values())
_COMPOSITIONS = 2 ** len(MODALITIES)


def _open(canvas: Canvas) -> Tensor:
    return (canvas.fillable & ~canvas.masked).reshape(-1)


def _numbered(canvas: Canvas, column: Tensor) -> Tensor:
    num_rows, length = canvas.shape
    row = torch.arange(num_rows, device=canvas.device)[:, None] * length
    return torch.where(_open(canvas), (row + column).reshape(-1), -1)


def _documents(canvas: Canvas) -> Tensor:
    return _numbered(canvas, canvas.segment)


def _spans(canvas: Canvas) -> Tensor:
    if canvas.span is None:
        raise ValueError("this law gives levels to spans, but the canvas has none; Diagonal() needs none")
    return _numbered(canvas, canvas.span)


def _resting(canvas: Canvas) -> Tensor:
    """(B * L,) float64: the level of what is in no group, 1 where the canvas came masked, 0 elsewhere."""
    return canvas.masked.reshape(-1).double()


def _once(unit: Tensor, num: int, column: Tensor) -> Tensor:
    """(num,) long: the value that a unit's positions share in `column`, -1 for a unit without positions."""
    target = torch.where(unit >= 0, unit, num)
    return unit.new_full((num + 1,), -1).scatter(0, target, column.reshape(-1).long())[:-1]


def _add(unit: Tensor, values: Tensor) -> Tensor:
    """(num,) sums of `values` (num,) over the units they belong to, -1 belonging to none; num units."""
    target = torch.where(unit >= 0, unit, len(unit))
    return values.new_zeros(len(unit) + 1).index_add(0, target, values)[:-1]


def _composition(canvas: Canvas, document: Tensor) -> Tensor:
    """(num,) long: which modalities are open in a document, as bits; -1 where nothing is."""
    modality = canvas.modality.reshape(-1)
    bits = torch.zeros_like(document)
    for number, value in enumerate(MODALITIES.values()):
        bits = bits + (2**number) * (_add(document, (modality == value).long()) > 0)
    return torch.where(bits > 0, bits, -1)


def _levels(kind: Tensor, offsets: Tensor, rng: torch.Generator, strata: Strata) -> Tensor:
    """(num,) float64 in (0, 1]: a level for each unit, stratified among the units of its kind (-1: none)."""
    rank, size = shuffle(kind, len(offsets), rng)
    offset = offsets.to(kind.device, non_blocking=True)[kind.clamp_min(0)]
    jitter = 1 - uniform(len(kind), rng, kind.device)
    return (rank * strata.count + offset + jitter) / (size * strata.count)


def _spread(value: Tensor, unit: Tensor, elsewhere: Tensor) -> Tensor:
    """(B * L,): of each position the `value` of its unit."""
    return torch.where(unit >= 0, value[unit.clamp_min(0)], elsewhere)


def _draw(canvas: Canvas, group: Tensor, level: Tensor, num_groups: int) -> Draw:
    # the smallest level in float64 could round to 0 in float32, which means "given"
    tiny = torch.finfo(torch.float32).tiny
    level = torch.where(group >= 0, level.clamp_min(tiny), level)
    return Draw(level.float().reshape(canvas.shape), group.reshape(canvas.shape), num_groups)
