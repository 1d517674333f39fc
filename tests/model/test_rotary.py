"""Rotary positions: relative, one-dimensional on text, both coordinates at all speeds on images."""

from __future__ import annotations

import torch

from mmdlm.model.rotary import rotary_table, rotate


def turned(x: torch.Tensor, position: list[tuple[int, int]]) -> torch.Tensor:
    table = rotary_table(torch.tensor([position]), x.shape[-1], base=100.0, dtype=x.dtype)
    return rotate(x, table)


def test_text_positions_give_ordinary_rotary() -> None:
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    out = turned(x, [(5, 5)])[0, 0, 0]
    for pair in range(4):
        angle = torch.tensor(5 * 100.0 ** (-2 * pair / 8), dtype=torch.float64)
        a, b = x[0, 0, 0, 2 * pair], x[0, 0, 0, 2 * pair + 1]
        want = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])
        torch.testing.assert_close(out[2 * pair : 2 * pair + 2], want)


def test_each_coordinate_turns_its_own_pairs() -> None:
    x = torch.ones(1, 1, 1, 8, dtype=torch.float64)
    still = turned(x, [(0, 0)])[0, 0, 0]
    row = turned(x, [(3, 0)])[0, 0, 0] != still
    column = turned(x, [(0, 3)])[0, 0, 0] != still
    assert row.tolist() == [True, True, False, False] * 2
    assert column.tolist() == [False, False, True, True] * 2


def test_scores_depend_on_differences_only() -> None:
    q, k = torch.randn(2, 1, 1, 3, 12, dtype=torch.float64)
    near = (turned(q, [(2, 5)]) * turned(k, [(7, 1)])).sum(-1)
    far = (turned(q, [(102, 35)]) * turned(k, [(107, 31)])).sum(-1)
    torch.testing.assert_close(near, far)
    other = (turned(q, [(2, 5)]) * turned(k, [(7, 2)])).sum(-1)
    assert (near - other).abs().min() > 1e-6


def test_half_precision_is_turned_in_single() -> None:
    x = torch.randn(1, 2, 1, 8)
    position = torch.tensor([[(900, 900), (901, 901)]])
    table = rotary_table(position, 8, base=1e4, dtype=torch.bfloat16)
    out = rotate(x.bfloat16(), table)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.bfloat16().float(), table).bfloat16())
