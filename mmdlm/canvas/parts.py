"""What a model is asked and what it answers: rows, parts, two protocols. Knows no network and no sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, overload

import torch
from torch import Tensor

from mmdlm.canvas.canvas import Canvas

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Some positions of a canvas, named without a host sync.

    On the CPU M is exact and all of `valid` is True. On an accelerator M is a bound the host knows
    beforehand; entries that are not `valid` point at some position and must not count.
    """

    index: Tensor  # (M,) long   flat positions b * L + i
    valid: Tensor  # (M,) bool

    @staticmethod
    def of(where: Tensor, bound: int | None = None) -> Rows:
        """The positions where `where` (B, L) is True, row-major; `bound` is the M of an accelerator."""
        flat = where.reshape(-1)
        if flat.device.type == "cpu":
            index = flat.nonzero().squeeze(1)
            return Rows(index, torch.ones_like(index, dtype=torch.bool))
        size = flat.numel() if bound is None else min(bound, flat.numel())
        index = torch.argsort(flat.logical_not().to(torch.uint8), stable=True)[:size]
        return Rows(index, flat[index])

    def where(self, keep: Tensor) -> Rows:
        """The rows that are also True in `keep` (B, L) bool; M stays a bound on an accelerator."""
        kept = self.valid & keep.reshape(-1)[self.index]
        if kept.device.type == "cpu":
            index = self.index[kept]
            return Rows(index, torch.ones_like(index, dtype=torch.bool))
        return Rows(self.index, kept)

    def samples(self, length: int) -> Tensor | None:
        """(N,) long: the samples (rows of a canvas of this length) that have a position here, ascending.

        None on an accelerator: there the host does not know how many they are.
        """
        if self.index.device.type != "cpu":
            return None
        return self.index.div(length, rounding_mode="floor").unique()

    def moved(self, place: Tensor, length: int) -> Rows:
        """The same positions in rows of `length`; `place` (B, L) long says which they are there."""
        sample, column = self.index // place.shape[1], self.index % place.shape[1]
        return Rows(sample * length + place[sample, column], self.valid)

    def gather(self, column: Tensor) -> Tensor:
        """(B, L, ...) -> (M, ...)."""
        return column.reshape(-1, *column.shape[2:])[self.index]

    def scatter(self, values: Tensor, into: Tensor) -> Tensor:
        """A copy of `into` (B, L, ...) with `values` (M, ...) written at the valid rows."""
        flat = into.reshape(-1, *into.shape[2:])
        if self.index.device.type == "cpu":
            return flat.index_copy(0, self.index, values.to(into.dtype)).reshape(into.shape)
        # an invalid entry writes to a spare last row, so that no data-dependent shape is needed
        target = torch.where(self.valid, self.index, flat.shape[0])
        spare = torch.cat([flat, flat[:1]])
        return spare.index_copy(0, target, values.to(into.dtype))[:-1].reshape(into.shape)

    def chunks(self, size: int) -> list[Rows]:
        """The same rows in pieces of at most `size`."""
        pairs = zip(self.index.split(size), self.valid.split(size), strict=True)
        return [Rows(index, valid) for index, valid in pairs]


@dataclass(frozen=True)
class Part:
    """Logits over one vocabulary range, at the rows whose token comes from that range."""

    rows: Rows
    ids: slice  # the ids that may stand there
    logits: Tensor  # (M, ids.stop - ids.start) float; -inf at illegal ids, the mask always among them

    def local(self, tokens: Tensor) -> Tensor:
        """Vocabulary ids -> columns of `logits`."""
        return tokens - self.ids.start


class Predict(Protocol):
    """One generation's view of a model: asks for logits at some rows of a canvas."""

    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: None = None) -> list[Part]: ...
    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T]) -> list[T]: ...
    def __call__(
        self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T] | None = None
    ) -> list[Part] | list[T]:
        """Logits at `rows`, one `Part` a vocabulary range; or what `reduce` makes of them in chunks."""
        ...


class Denoiser(Protocol):
    """A model, or a wrapper of one (guidance, caches): `begin` opens the state of one generation."""

    def begin(self, canvas: Canvas) -> Predict: ...
