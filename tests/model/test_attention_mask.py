"""Visibility, rule by rule, against the sentence of the architecture written as plain Python."""

from __future__ import annotations

import pytest
import torch

from mmdlm.canvas import NOISY, PLAIN, SHADOW, TEXT, Canvas
from mmdlm.model import AttentionMask


def canvas(segment: list[list[int]], **columns: torch.Tensor) -> Canvas:
    ids = torch.tensor(segment)
    index = torch.arange(ids.shape[1]).expand_as(ids)
    hole = torch.zeros_like(ids, dtype=torch.bool)
    modality = torch.where(ids >= 0, TEXT, 0).to(torch.uint8)
    return Canvas(ids.clamp(min=0), modality, hole, hole, torch.stack([index, index], -1), ids, **columns)


def seen(segment, block, copy, position, i: int, j: int) -> bool:
    """Does i see j? One row's columns as lists."""
    if i == j:
        return True
    if segment[j] < 0 or segment[i] != segment[j] or block[j] > block[i]:
        return False
    if copy[j] == PLAIN:
        if copy[i] == NOISY:
            return block[j] < block[i]
        return copy[i] == PLAIN or position[j] != position[i]
    return copy[i] == copy[j] and block[i] == block[j]


def test_every_rule_against_plain_python() -> None:
    rng = torch.Generator().manual_seed(1)
    shape = (40, 9)
    segment = torch.randint(-1, 2, shape, generator=rng)
    block = torch.randint(0, 3, shape, generator=rng)
    copy = torch.randint(0, 3, shape, generator=rng).to(torch.uint8)
    position = torch.randint(0, 3, (*shape, 2), generator=rng)
    dense = AttentionMask(segment, block, copy, position).dense()
    assert dense.shape == (40, 1, 9, 9)
    for row in range(40):
        columns = [column[row].tolist() for column in (segment, block, copy, position)]
        want = [[seen(*columns, i, j) for j in range(9)] for i in range(9)]
        assert dense[row, 0].tolist() == want


def test_none_exactly_where_everything_sees_everything() -> None:
    assert AttentionMask.of(canvas([[0, 0, 0], [7, 7, 7]])) is None
    for other in (
        canvas([[0, 0, 0], [0, 0, -1]]),
        canvas([[0, 0, 1], [0, 0, 0]]),
        canvas([[-1, -1, -1]]),
        canvas([[0, 0, 0]], block=torch.tensor([[0, 0, 1]])),
        canvas([[0, 0, 0]], copy=torch.tensor([[PLAIN, NOISY, SHADOW]], dtype=torch.uint8)),
    ):
        mask = AttentionMask.of(other)
        assert mask is not None
        assert not mask.dense().all()


def test_block_columns_give_the_known_shapes() -> None:
    index = torch.arange(6)[None]
    row = torch.zeros_like(index)
    causal = AttentionMask(row, index).dense()[0, 0]
    assert torch.equal(causal, torch.ones(6, 6).tril().bool())
    halves = AttentionMask(row, index // 3).dense()[0, 0]
    assert halves[:3].sum(-1).tolist() == [3] * 3
    assert halves[3:].sum(-1).tolist() == [6] * 3


def test_copies_need_positions() -> None:
    with pytest.raises(ValueError, match="positions"):
        AttentionMask(torch.zeros(1, 3).long(), copy=torch.zeros(1, 3, dtype=torch.uint8))
