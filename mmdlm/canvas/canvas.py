"""The record that flows: a batch of token sequences with holes. Knows no model, noise or tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

PAD, TEXT, IMAGE = 0, 1, 2
MODALITIES = {"text": TEXT, "image": IMAGE}
PLAIN, NOISY, SHADOW = 0, 1, 2

# What a padded position holds in each column; a column that is absent here is padded with 0.
PADDING = {"segment": -1, "span": -1}


@dataclass(frozen=True)
class Canvas:
    """A batch of B rows of L positions, some of them fillable (noised in training, generated in sampling).

    `masked` says which positions are not clean yet; it is authoritative and never re-derived from the ids.
    `span` numbers the runs of a row 0, 1, ... from the left: each text and each image is one run; -1 is
    structure (begin-of-image and its kin) and padding. `segment` is the document inside a packed row, -1 at
    padding.
    """

    tokens: Tensor  # (B, L) long     ids of the one vocabulary
    modality: Tensor  # (B, L) uint8    PAD, TEXT, IMAGE; structure tokens count as TEXT
    fillable: Tensor  # (B, L) bool     may be noised (training) / generated (sampling)
    masked: Tensor  # (B, L) bool     not clean yet
    position: Tensor  # (B, L, 2) long   text (i, i); image at running offset o: (o + row, o + column)
    segment: Tensor  # (B, L) long     attention stays inside; -1 at padding
    span: Tensor | None = None  # (B, L) long     run number, -1 structure and padding
    level: Tensor | None = None  # (B, L) float32  noise level, 0 where given
    block: Tensor | None = None  # (B, L) long     i sees j only if block[j] <= block[i]
    copy: Tensor | None = None  # (B, L) uint8    PLAIN, NOISY, SHADOW
    soft: Tensor | None = None  # (B, L, D) float added to the embeddings

    def __post_init__(self) -> None:
        shape = self.tokens.shape
        assert len(shape) == 2, f"tokens must be (B, L), got {tuple(shape)}"
        for column in fields(self):
            value = getattr(self, column.name)
            assert value is None or value.shape[:2] == shape, (
                f"{column.name}: {tuple(value.shape)} against {tuple(shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def replace(self, **columns: Tensor | None) -> Canvas:
        """A copy with some columns exchanged."""
        return replace(self, **columns)

    def to(self, device: torch.device | str) -> Canvas:
        """The same canvas on `device`."""
        ahead = torch.device(device).type != "cpu"  # the host could read such a copy before it has arrived
        return self._map(lambda column: column.to(device, non_blocking=ahead))

    def select(self, rows: Tensor) -> Canvas:
        """The rows named by `rows`: (N,) long indices (repeats allowed) or a (B,) bool mask."""
        return self._map(lambda column: column[rows])

    def pad_to(self, length: int) -> Canvas:
        """The same rows, padded on the right to `length` positions that nothing sees."""
        extra = length - self.shape[1]
        if extra < 0:
            raise ValueError(f"cannot pad a canvas of {self.shape[1]} positions to {length}")
        if extra == 0:
            return self
        columns = {}
        for column in fields(self):
            value = getattr(self, column.name)
            if value is not None:
                filler = value.new_full(
                    (value.shape[0], extra, *value.shape[2:]), PADDING.get(column.name, 0)
                )
                value = torch.cat([value, filler], dim=1)
            columns[column.name] = value
        return Canvas(**columns)

    @staticmethod
    def concat(canvases: Sequence[Canvas]) -> Canvas:
        """All rows under one another, padded to the longest.

        Raises ValueError for an optional column that some have and others lack.
        """
        length = max(canvas.shape[1] for canvas in canvases)
        padded = [canvas.pad_to(length) for canvas in canvases]
        columns = {}
        for column in fields(Canvas):
            values = [getattr(canvas, column.name) for canvas in padded]
            present = [value for value in values if value is not None]
            if present and len(present) != len(values):
                raise ValueError(
                    f"column {column.name!r} is present in {len(present)} of {len(values)} canvases"
                )
            columns[column.name] = torch.cat(present) if present else None
        return Canvas(**columns)

    def hide(self, where: Tensor, mask_id: int) -> Canvas:
        """The canvas with the positions `where` (B, L) bool turned into holes; their ids are gone."""
        return replace(self, tokens=self.tokens.masked_fill(where, mask_id), masked=self.masked | where)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Canvas:
        columns: dict[str, Any] = {}
        for column in fields(self):
            value = getattr(self, column.name)
            columns[column.name] = None if value is None else change(value)
        return Canvas(**columns)
