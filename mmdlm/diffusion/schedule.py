"""How much is still clean at time t, for four schedules. Knows no canvas, no random numbers and no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """The probability alpha(t) that a position is still clean at time t in [0, 1]; alpha falls from 1.

    All three functions are elementwise, compute in float64 and answer in the dtype they were given.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Probability of being clean at `t`."""
        ...

    def weight(self, t: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)), the weight of a masked position in the bound; infinite at t = 0.

        arXiv:2406.07524 (equation 10), arXiv:2406.04329 (equation 5).
        """
        ...

    def inverse(self, alpha: Tensor) -> Tensor:
        """The time at which `alpha` is reached."""
        ...


@dataclass(frozen=True)
class Linear:
    """alpha = 1 - t: a position is masked with probability t."""

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t.double()).to(t.dtype)

    def weight(self, t: Tensor) -> Tensor:
        return t.double().reciprocal().to(t.dtype)

    def inverse(self, alpha: Tensor) -> Tensor:
        return (1 - alpha.double()).to(alpha.dtype)


@dataclass(frozen=True)
class Cosine:
    """alpha = 1 - sin(pi t / 2): MaskGIT's masking ratio cos(pi r / 2) with r = 1 - t (arXiv:2202.04200)."""

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - torch.sin(t.double() * (math.pi / 2))).to(t.dtype)

    def weight(self, t: Tensor) -> Tensor:
        angle = t.double() * (math.pi / 2)
        return (math.pi / 2 * torch.cos(angle) / torch.sin(angle)).to(t.dtype)

    def inverse(self, alpha: Tensor) -> Tensor:
        return (torch.asin((1 - alpha.double()).clamp(0, 1)) * (2 / math.pi)).to(alpha.dtype)


@dataclass(frozen=True)
class Polynomial:
    """alpha = 1 - t ** power (arXiv:2406.04329, table 1)."""

    power: float = 2.0

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"the power of a polynomial schedule is {self.power}, it must be above 0")

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t.double() ** self.power).to(t.dtype)

    def weight(self, t: Tensor) -> Tensor:
        return (self.power / t.double()).to(t.dtype)

    def inverse(self, alpha: Tensor) -> Tensor:
        return ((1 - alpha.double()).clamp_min(0) ** (1 / self.power)).to(alpha.dtype)


@dataclass(frozen=True)
class LogLinear:
    """sigma(t) = -log(1 - (1 - eps) t), so alpha = exp(-sigma) = 1 - (1 - eps) t, which ends at eps, not 0.

    arXiv:2310.16834 (section 5.1). What is still clean at t = 1 makes bounds under this schedule miss a share
    of the order of `eps`.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"the eps of a log-linear schedule is {self.eps}, it must be in [0, 1)")

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - (1 - self.eps) * t.double()).to(t.dtype)

    def weight(self, t: Tensor) -> Tensor:
        return t.double().reciprocal().to(t.dtype)

    def inverse(self, alpha: Tensor) -> Tensor:
        return ((1 - alpha.double()) / (1 - self.eps)).to(alpha.dtype)
