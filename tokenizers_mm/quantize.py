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


class Compact(nn.Module):
    """FSQ without the codes that nothing uses: a smaller vocabulary for what reads and draws the codes.

    Neighbouring channels are taken together, `groups` of them at a time; the levels of a group make a number,
    first channel fastest, and `used` lists the numbers of each group that have a code. The digits of a code
    are places in these lists, first group fastest. A vector that falls on an unlisted number gets the nearest
    listed one of its group (Euclidean; among equals the first).
    """

    counts: Tensor
    basis: Tensor

    def __init__(self, fsq: FSQ, groups: tuple[int, ...], used: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.fsq = fsq
        self.groups = groups
        self.used = used
        parts = _parts(fsq, groups)
        self._sizes = [part.size for part in parts]
        if len(used) != len(groups):
            raise ValueError(f"{len(groups)} groups of channels want as many lists, got {len(used)}")
        for number, (part, some) in enumerate(zip(parts, used, strict=True)):
            if not some or list(some) != sorted(set(some)) or not 0 <= some[0] <= some[-1] < part.size:
                raise ValueError(
                    f"group {number} wants some of 0..{part.size - 1}, ascending, got {list(some)[:8]}"
                )
            every = part.codes_to_vectors(torch.arange(part.size)).double()
            listed = every[list(some)]
            place = (every[:, None] - listed[None]).square().sum(-1).argmin(dim=1)
            self.register_buffer(f"place{number}", place, persistent=False)
            # A level, not its value: a module that is cast to bfloat16 casts its floating buffers.
            level = torch.tensor(some)[:, None] // part.basis % part.counts
            self.register_buffer(f"level{number}", level, persistent=False)
        basis = [math.prod(self.levels[:number]) for number in range(len(groups))]
        self.register_buffer("counts", torch.tensor(self.levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    @staticmethod
    def seen(fsq: FSQ, groups: tuple[int, ...], codes: Tensor) -> tuple[tuple[int, ...], ...]:
        """The `used` of the codes of `fsq`, (...) long, that were seen."""
        numbers = _numbers([part.size for part in _parts(fsq, groups)], codes.unique())
        return tuple(tuple(number.unique().tolist()) for number in numbers)

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(map(len, self.used))

    @property
    def size(self) -> int:
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        return self.fsq.dim

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(..., dim) to quantised (..., dim) float32 and codes (...) long; gradients pass as through FSQ."""
        vectors, codes = self.fsq(z)
        numbers = _numbers(self._sizes, codes)
        places = [self.get_buffer(f"place{i}")[number] for i, number in enumerate(numbers)]
        codes = (torch.stack(places, dim=-1) * self.basis).sum(-1)
        return vectors + (self.codes_to_vectors(codes) - vectors).detach(), codes

    def codes_to_vectors(self, codes: Tensor) -> Tensor:
        """(...) long in [0, size) to (..., dim) float32."""
        places = (codes.unsqueeze(-1) // self.basis % self.counts).unbind(-1)
        levels = torch.cat([self.get_buffer(f"level{i}")[place] for i, place in enumerate(places)], dim=-1)
        scale = self.fsq.counts // 2
        return (levels - scale) / scale


def _parts(fsq: FSQ, groups: tuple[int, ...]) -> list[FSQ]:
    """The quantiser of each group's channels."""
    if not groups or min(groups) < 1 or sum(groups) != fsq.dim:
        raise ValueError(f"groups of channels must be of 1 or more and {fsq.dim} in all, got {groups}")
    starts = [sum(groups[:number]) for number in range(len(groups))]
    return [FSQ(fsq.levels[start : start + size]) for start, size in zip(starts, groups, strict=True)]


def _numbers(sizes: list[int], codes: Tensor) -> list[Tensor]:
    """The number of each group, (...) long each."""
    numbers = []
    for size in sizes:
        numbers.append(codes % size)
        codes = codes // size
    return numbers
