"""Vectors become codes, and back. Knows no picture and no network."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn


class Quantizer(Protocol):
    """The seam between an encoder and its codes.

    `levels` are the sizes of the digits of a factorised code, first digit fastest, or None where a code has
    no digits.
    """

    @property
    def size(self) -> int:
        """Number of codes."""
        ...

    @property
    def levels(self) -> tuple[int, ...] | None: ...

    @property
    def dim(self) -> int:
        """Channels of the vectors that are quantised."""
        ...

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(..., dim) to quantised vectors (..., dim), with a gradient to z, and codes (...) long."""
        ...

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """(...) long to (..., dim): the very vectors that `__call__` gave for these codes."""
        ...


class FSQ(nn.Module):
    """Finite scalar quantisation (arXiv:2309.15505): each channel is bounded and rounded to a level.

    It has no parameters and no codebook to collapse. A code is the mixed-radix number of its digits, first
    digit fastest: d0 + L0 * (d1 + L1 * (d2 + ...)). Digit d of a channel with L levels stands for the value
    (d - L // 2) / (L // 2).
    """

    counts: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...] = (8, 8, 8)) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(
                f"FSQ wants one or more channels with at least 2 levels each, got levels {tuple(levels)}"
            )
        self._levels = tuple(levels)
        basis = [math.prod(levels[:channel]) for channel in range(len(levels))]
        # Integers only: a module that is cast to bfloat16 casts its floating buffers, and a level must not
        # move.
        self.register_buffer("counts", torch.tensor(levels, dtype=torch.long), persistent=False)
        self.register_buffer("basis", torch.tensor(basis, dtype=torch.long), persistent=False)

    @property
    def levels(self) -> tuple[int, ...]:
        return self._levels

    @property
    def size(self) -> int:
        return math.prod(self._levels)

    @property
    def dim(self) -> int:
        return len(self._levels)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(..., dim) to quantised (..., dim) float32 and codes (...) long; rounding passes gradients on.

        Raises ValueError when the last dimension is not `dim`.
        """
        if z.shape[-1] != self.dim:
            raise ValueError(
                f"{self.dim} levels quantise vectors of {self.dim} channels, got shape {tuple(z.shape)}"
            )
        bounded = self.bound(z)
        quantised = self.quantise(bounded)
        return bounded + (quantised - bounded).detach(), self.vectors_to_codes(quantised)

    def bound(self, z: Tensor) -> Tensor:
        """(..., dim) to float32 within half a level of the outermost levels: here a level is decided."""
        # The bound reaches just beyond the outermost level, so that rounding can reach it (section 3.1, eps =
        # 1e-3); an even number of levels is shifted by half a level, and z = 0 gives 0 all the same.
        reach = (self.counts - 1).float() * (1 + 1e-3) / 2
        offset = 0.5 * (self.counts % 2 == 0)
        bounded = torch.tanh(z.float() + torch.atanh(offset / reach)) * reach - offset
        return bounded / (self.counts // 2)

    def quantise(self, bounded: Tensor) -> Tensor:
        """The nearest level of each bounded value; a level is its own nearest, exactly."""
        scale = self.counts // 2
        return torch.round(bounded * scale) / scale

    def vectors_to_codes(self, quantised: Tensor) -> Tensor:
        """(..., dim) of levels to codes (...) long; the inverse of `codes_to_vectors`."""
        scale = self.counts // 2
        digits = torch.round(quantised * scale).long() + scale
        return (digits * self.basis).sum(-1)

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """(...) long in [0, size) to (..., dim) float32."""
        digits = codes.unsqueeze(-1) // self.basis % self.counts
        scale = self.counts // 2
        return (digits - scale) / scale
