"""Strengths that change on the way: of guidance, of the noise on a choice. Knows no canvas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Scale(Protocol):
    """A strength that depends on a noise level in [0, 1], 1 at the start."""

    def __call__(self, level: Tensor) -> Tensor:
        """Elementwise, float64."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same at every level."""

    scale: float

    def __call__(self, level: Tensor) -> Tensor:
        return torch.full_like(level, self.scale)


@dataclass(frozen=True)
class Ramp:
    """From `start` at level 1 to `stop` at level 0. Strong guidance early hurts (arXiv:2507.08965)."""

    start: float
    stop: float

    def __call__(self, level: Tensor) -> Tensor:
        return self.stop + (self.start - self.stop) * level


@dataclass(frozen=True)
class During:
    """`scale` at noise levels in [low, high], none elsewhere (arXiv:2404.07724)."""

    scale: float
    low: float = 0.0
    high: float = 1.0

    def __call__(self, level: Tensor) -> Tensor:
        return torch.where((level >= self.low) & (level <= self.high), self.scale, 0.0).double()


def scaled(scale: float | Scale, level: Tensor) -> Tensor:
    """Float64 like `level`: the scale there; a number is the same everywhere."""
    level = level.double()
    return torch.full_like(level, scale) if isinstance(scale, (int, float)) else scale(level)
