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

T = TypeVar("T")


class Remembered(Protocol):
    """What a model remembers of a canvas (`mmdlm.model.Memory`)."""

    tokens: Tensor  # (B, L) long   what a position held when it was last computed
    masked: Tensor  # (B, L) bool
    known: Tensor  # (B, L) bool   whether it ever was


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
    is computed once more, from its clean tokens, together with the first step of the next one (`fused`), or
    in a forward of its own.
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
        return (canvas.block >= first_changed) & (canvas.block <= last_asked) & (canvas.segment >= 0)


class Selector(Protocol):
    """Which positions an approximate cache computes again between two refreshes."""

    def select(self, canvas: Canvas, rows: Rows, memory: Remembered) -> Tensor:
        """(B, L) bool."""
        ...

    def turn(self, canvas: Canvas, rows: Rows) -> Tensor | None:
        """(B,) long: where this number changes all is computed again (a new block, say); None: nowhere."""
        ...


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
        return self._cached.model.recall(canvas, rows, self._memory, index, reduce=reduce)


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
