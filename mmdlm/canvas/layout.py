"""Runs of text and image become the columns of a row, and are read back. Knows no tokenizer and no task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmdlm.canvas.canvas import IMAGE, TEXT, Canvas


@dataclass(frozen=True)
class Run:
    """One span of a row and its structure tokens. Give `length` for text, `grid` (h, w) for an image."""

    length: int = 0
    grid: tuple[int, int] | None = None
    before: tuple[int, ...] = ()  # ids of structure tokens
    after: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Positions of the span itself."""
        return self.length if self.grid is None else self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Fill:
    """What stands in one run of a batch of B rows.

    `holes` (B, n) bool says which positions are not known; `open` (B, n) bool which may be noised or
    generated, by default the holes. A hole that is not open stays unknown. Ids under holes are not kept.
    """

    ids: Tensor  # (B, n) long
    holes: Tensor | None = None
    open: Tensor | None = None


@dataclass(frozen=True)
class Frame:
    """The fixed columns of rows that hold the same runs: every row of a task has this one shape."""

    runs: tuple[Run, ...]

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """Where each run's span lies in the row."""
        places, offset = [], 0
        for run in self.runs:
            offset += len(run.before)
            places.append(slice(offset, offset + run.size))
            offset += run.size + len(run.after)
        return tuple(places)

    @cached_property
    def length(self) -> int:
        return sum(len(run.before) + run.size + len(run.after) for run in self.runs)

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens (L,), modality (L,), position (L, 2) and span (L,); tokens of spans are 0."""
        tokens, modality, span = [], [], []
        position, offset = [torch.empty(0, 2, dtype=torch.long)], 0
        for number, run in enumerate(self.runs):
            inside = IMAGE if run.grid is not None else TEXT
            tokens += [*run.before, *([0] * run.size), *run.after]
            modality += [TEXT] * len(run.before) + [inside] * run.size + [TEXT] * len(run.after)
            span += [-1] * len(run.before) + [number] * run.size + [-1] * len(run.after)
            offset = _advance(position, len(run.before), offset)
            if run.grid is None:
                offset = _advance(position, run.length, offset)
            else:
                rows, columns = (offset + torch.arange(side) for side in run.grid)
                position.append(torch.cartesian_prod(rows, columns).reshape(-1, 2))
                offset += max(run.grid)
            offset = _advance(position, len(run.after), offset)
        return (
            torch.tensor(tokens),
            torch.tensor(modality, dtype=torch.uint8),
            torch.cat(position),
            torch.tensor(span),
        )

    def canvas(self, fills: Sequence[Fill], *, mask: int) -> Canvas:
        """A canvas of B rows; one `Fill` a run. Holes hold the id `mask`."""
        if len(fills) != len(self.runs):
            raise ValueError(f"{len(fills)} fills for {len(self.runs)} runs")
        batch = fills[0].ids.shape[0]
        tokens, modality, position, span = (column.expand(batch, *column.shape) for column in self._columns)
        tokens = tokens.clone()
        fillable = torch.zeros(batch, self.length, dtype=torch.bool)
        masked = torch.zeros_like(fillable)
        for run, place, fill in zip(self.runs, self.places, fills, strict=True):
            if fill.ids.shape != (batch, run.size):
                raise ValueError(f"a run of {batch} x {run.size} ids was given {tuple(fill.ids.shape)}")
            tokens[:, place] = fill.ids
            if fill.holes is not None:
                masked[:, place] = fill.holes
            opened = fill.open if fill.open is not None else fill.holes
            if opened is not None:
                fillable[:, place] = opened
        segment = torch.zeros_like(tokens)
        canvas = Canvas(tokens, modality, fillable, masked, position, segment, span=span)
        return canvas.hide(masked, mask)

    def read(self, canvas: Canvas, span: int) -> Tensor:
        """The ids of one run: (B, n) of text, (B, h, w) of an image. `canvas` may be padded on the right."""
        ids = canvas.tokens[:, self.places[span]]
        grid = self.runs[span].grid
        return ids if grid is None else ids.unflatten(1, grid)


def _advance(position: list[Tensor], count: int, offset: int) -> int:
    position.append(torch.arange(offset, offset + count)[:, None].expand(count, 2))
    return offset + count
