"""Which positions of a group are masked, and what each counts. Knows no model, no canvas and no modality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdlm.diffusion.schedule import Cosine, Schedule
from mmdlm.diffusion.times import Draw, shuffle, uniform


@dataclass(frozen=True)
class Selection:
    """The masked positions of the groups of a `Draw`; weights are 0 elsewhere and in the dtype of the levels.

    The sum over a group of weight times cross-entropy is what is trained on; with `bound` in place of weight
    it is, in expectation, the negative evidence lower bound (NELBO) of the group in nats.
    """

    where: Tensor  # (B, L) bool
    weight: Tensor  # (B, L) float
    bound: Tensor  # (B, L) float


class Estimator(Protocol):
    """Turns levels into masked positions and their weights."""

    def mask(self, draw: Draw, rng: torch.Generator) -> Selection:
        """Only positions with `draw.group` >= 0 are chosen."""
        ...


@dataclass(frozen=True)
class ExactCount:
    """k = ceil(level * n) of a group's n positions are masked, all k-subsets alike, each with weight n / k.

    With uniform levels k is uniform on 1 .. n and the estimate of the NELBO unbiased, without a cut-off in
    time (the any-order form of the bound: arXiv:2406.03736, arXiv:2502.09992 appendix).
    """

    def mask(self, draw: Draw, rng: torch.Generator) -> Selection:
        return self.choose(draw, *_shuffled(draw, rng))

    def choose(self, draw: Draw, rank: Tensor, size: Tensor) -> Selection:
        """The selection when each group's members stand in the order `rank` (B, L); `size` (B, L) is n."""
        count = _count(draw.level.double(), size)
        where = (draw.group >= 0) & (rank < count)
        weight = torch.where(where, size.double() / count, 0.0).to(draw.level.dtype)
        return Selection(where, weight, weight)


@dataclass(frozen=True)
class MaskGIT:
    """k = ceil(n (1 - alpha(level))), at least 1, each masked position weighted by n / k (arXiv:2202.04200).

    A group's sum is n times the mean cross-entropy of its masked positions. No bound, as k is not uniform;
    `Selection.bound` corrects by the ratio of the laws of k (exactly, if the schedule ends at alpha(1) = 0).
    """

    schedule: Schedule = Cosine()

    def mask(self, draw: Draw, rng: torch.Generator) -> Selection:
        return self.choose(draw, *_shuffled(draw, rng))

    def choose(self, draw: Draw, rank: Tensor, size: Tensor) -> Selection:
        """The selection when each group's members stand in the order `rank` (B, L); `size` (B, L) is n."""
        count = _count(1 - self.schedule.alpha(draw.level.double()), size)
        where = (draw.group >= 0) & (rank < count)
        upper = self.schedule.inverse(1 - count.double() / size).clamp(0, 1)
        lower = self.schedule.inverse(1 - (count - 1).double() / size).clamp(0, 1)
        dtype = draw.level.dtype
        weight = torch.where(where, size.double() / count, 0.0).to(dtype)
        # levels in (lower, upper] give this count; under the bound's own law a count has probability 1 / n
        bound = torch.where(where, 1 / (count * (upper - lower)), 0.0).to(dtype)
        return Selection(where, weight, bound)


@dataclass(frozen=True)
class Bernoulli:
    """Each position is masked on its own with probability 1 - alpha(t), weight -alpha'(t) / (1 - alpha(t)).

    The continuous-time form (arXiv:2406.07524, equation 10) with t = eps + (1 - eps) level, uniform on (eps,
    1]: for eps > 0 the expectation is that of the integrand over (eps, 1], a little off the NELBO; for eps =
    0 it is the NELBO, with a heavy tail.
    """

    schedule: Schedule
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"the smallest time is eps = {self.eps}, it must be in [0, 1)")

    def mask(self, draw: Draw, rng: torch.Generator) -> Selection:
        probability, weight = self.rates(draw.level)
        coin = uniform(draw.level.numel(), rng, draw.level.device).reshape(draw.level.shape)
        where = (draw.group >= 0) & (coin < probability)
        weight = torch.where(where, weight, 0.0).to(draw.level.dtype)
        return Selection(where, weight, weight)

    def rates(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of being masked and weight if masked, float64, at each level."""
        time = self.eps + (1 - self.eps) * level.double()
        return 1 - self.schedule.alpha(time), self.schedule.weight(time)


def _shuffled(draw: Draw, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    rank, size = shuffle(draw.group.reshape(-1), draw.num_groups, rng)
    return rank.reshape(draw.group.shape), size.reshape(draw.group.shape)


def _count(fraction: Tensor, size: Tensor) -> Tensor:
    """(B, L) long in 1 .. size."""
    return torch.minimum((fraction * size).ceil().long().clamp_min(1), size)
