"""Documents of any length share rows, so that little is padding. Knows no model, noise or tokenizer."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmdlm.canvas.canvas import PADDING, Canvas

T = TypeVar("T")


def pack(documents: Sequence[Canvas], length: int) -> Canvas:
    """All rows of `documents`, each one document, side by side in few rows of at most `length` positions.

    A row's own padding is left out; the rows are filled evenly and as long as the longest of them, what is
    over comes at the end (`pad_to` gives them one length always). `segment` becomes the number of a document
    in its row and `span` is numbered on through the row; positions and all other columns stay, so that every
    document starts anew. See `place` for which goes where; documents keep their order inside a row, and rows
    that of their first documents. All on the CPU, nothing left to chance.

    Raises ValueError for a document longer than `length`, for a row that holds several documents already, for
    an optional column that only some have, and where there is nothing to pack.
    """
    if not documents:
        raise ValueError("there is no document to pack")
    whole = Canvas.concat(documents)
    live = whole.segment >= 0
    sizes = live.sum(dim=1).tolist()
    if max(sizes) > length:
        number = next(number for number, size in enumerate(sizes) if size > length)
        raise ValueError(f"document {number} has {sizes[number]} positions, a row has {length}")
    first = whole.segment.amax(dim=1, keepdim=True)
    if bool((live & (whole.segment != first)).any()):
        row = int((live & (whole.segment != first)).any(dim=1).nonzero()[0])
        raise ValueError(f"row {row} holds several documents already, wanted one in each")
    rows = place(sizes, length)
    if not rows:
        raise ValueError(f"{len(sizes)} documents hold not one position")
    width = max(sum(sizes[number] for number in row) for row in rows)

    order = torch.tensor([number for row in rows for number in row])
    whole, live = whole.select(order), live[order]
    target = (
        live.cumsum(dim=1)
        - 1
        + _column(
            at * width + start
            for at, row in enumerate(rows)
            for start in accumulate((sizes[number] for number in row[:-1]), initial=0)
        )
    )
    number = _column(number for row in rows for number in range(len(row)))
    columns: dict[str, Tensor | None] = {"segment": number.expand_as(live)}
    if whole.span is not None:
        columns["span"] = torch.where(whole.span >= 0, whole.span + _numbered_on(whole.span, rows), -1)
    whole, target = whole.replace(**columns), target[live]
    packed: dict[str, Any] = {}
    for column in fields(Canvas):
        value = getattr(whole, column.name)
        if value is not None:
            shape = (len(rows) * width, *value.shape[2:])
            flat = value.new_full(shape, PADDING.get(column.name, 0)).index_copy(0, target, value[live])
            packed[column.name] = flat.unflatten(0, (len(rows), width))
    return Canvas(**packed)


def efficiency(canvas: Canvas) -> float:
    """The share of positions that are no padding, in [0, 1]."""
    return float((canvas.segment >= 0).double().mean())


@dataclass(frozen=True)
class Packed(Generic[T]):
    """A function for the `collate` of `Batches`: the documents that `collate` makes of a batch, packed.

    A batch then has a set number of documents and, of rows, what they fill. As nothing is held back for the
    next batch, there is no state and a run resumes exactly. Long rows have less padding, and they cost
    attention no more, which stays inside each document.
    """

    collate: Callable[[list[T], np.random.Generator], Canvas | Sequence[Canvas]]
    length: int  # of the longest row that there may be

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")

    def __call__(self, items: list[T], rng: np.random.Generator) -> Canvas:
        made = self.collate(items, rng)
        return pack([made] if isinstance(made, Canvas) else made, self.length)


def place(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Numbers of `sizes` by row, none longer than `length` in all; sizes of 0 are left out.

    First-fit decreasing says how many rows there are (at most 11/9 of the fewest and 2/3 of one; G. Dosa,
    2007). They are then filled evenly, each document, the longest first, where least is; should that not fit,
    as first fit has them.
    """
    order = sorted((n for n, size in enumerate(sizes) if size), key=lambda n: (-sizes[n], n))
    rows: list[list[int]] = []
    filled: list[int] = []
    for number in order:
        at = next((at for at, size in enumerate(filled) if size + sizes[number] <= length), len(rows))
        if at == len(rows):
            rows.append([])
            filled.append(0)
        rows[at].append(number)
        filled[at] += sizes[number]
    heap = [(0, at) for at in range(len(rows))]
    even: list[list[int]] = [[] for _ in rows]
    for number in order:
        size, at = heapq.heappop(heap)
        even[at].append(number)
        heapq.heappush(heap, (size + sizes[number], at))
    fits = max(size for size, _ in heap) <= length if heap else False
    return sorted(sorted(row) for row in (even if fits else rows))


def _column(values: Iterator[int]) -> Tensor:
    return torch.tensor(list(values))[:, None]


def _numbered_on(span: Tensor, rows: list[list[int]]) -> Tensor:
    """(N, 1) long: what is added to the spans of each document, in the order of `rows`."""
    counts = iter((span.amax(dim=1) + 1).tolist())
    by_row = [[next(counts) for _ in row] for row in rows]
    return _column(before for row in by_row for before in accumulate(row[:-1], initial=0))
