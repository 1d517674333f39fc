"""How many holes a step fills: by the clock, and by what the model is sure of. Knows no model and no draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdlm.diffusion.schedule import Cosine, Schedule
from mmdlm.sampling.order import count, rank, running
from mmdlm.sampling.plan import Windows
from mmdlm.sampling.state import State, Step

_STEADY = "steady"  # in a state's memory


class Quota(Protocol):
    """How many holes of a run a step fills at least, whatever the model says."""

    def number(self, state: State, windows: Windows) -> Tensor:
        """(B, L) long: the number for each position's run; capped by the holes that are active."""
        ...


@dataclass(frozen=True)
class Scheduled:
    """Follows a schedule: at its time c a run that had n holes keeps floor(n * (1 - alpha(1 - c))) of them.

    At least one goes a step. Linear is LLaDA's, cosine MaskGIT's (arXiv:2202.04200, section 3.2).
    """

    schedule: Schedule = Cosine()

    def number(self, state: State, windows: Windows) -> Tensor:
        holes, planned = count(state.open, windows.runs), count(state.initial, windows.runs)
        level = 1.0 - self.schedule.alpha(1.0 - windows.after)
        keep = (planned * level + 1e-9).floor().long()  # the small number: 0.3 * 10 is 3
        return (holes - keep).clamp(min=1)


@dataclass(frozen=True)
class Even:
    """As many at each step of a run, the remainder among its first ones (LLaDA's `get_num_transfer_tokens`).

    Where a run has more steps than holes, one a step.
    """

    def number(self, state: State, windows: Windows) -> Tensor:
        planned, steps = count(state.initial, windows.runs), windows.steps.round().long().clamp(min=1)
        taken = (windows.before * windows.steps).round().long()
        return (planned // steps + (taken < planned % steps)).clamp(min=1)


@dataclass(frozen=True)
class Fixed:
    """The same number at every step: 1 is one position at a time, and the rest is up to a rule."""

    num: int = 1

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"at least 1 hole is filled at a step, got {self.num}")

    def number(self, state: State, windows: Windows) -> Tensor:
        return torch.full_like(windows.runs, self.num)


@dataclass(frozen=True)
class Proportional:
    """The share of the holes left that the clock passes: times fall evenly from 1 to `eps` (Dream).

    From time t to s, int(holes * (1 - s / t)); at least one, where Dream's first steps may fill none.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 <= self.eps < 1.0:
            raise ValueError(f"the walk ends at a time in [0, 1), got eps {self.eps}")

    def number(self, state: State, windows: Windows) -> Tensor:
        t, s = (1.0 - (1.0 - self.eps) * clock for clock in (windows.before, windows.after))
        share = 1.0 - s / t.clamp(min=torch.finfo(torch.float64).tiny)
        return (count(state.open, windows.runs) * share + 1e-9).floor().long().clamp(min=1)


class Rule(Protocol):
    """Which holes are filled beside the quota, for what the model says of them.

    `needs`, where a rule has it, names the columns of `Proposal` that it reads beside the usual ones;
    `remember(step)`, where it has that, what it wants to find in the memory of the next state.
    """

    def sure(self, step: Step, score: Tensor, windows: Windows) -> Tensor:
        """(B, L) bool; heeded only at active holes that were asked. `score` (B, L) is the order's."""
        ...


@dataclass(frozen=True)
class Threshold:
    """Whose most probable token has at least this probability, before temperature.

    Fast-dLLM (arXiv:2505.22618) with `Fixed(1)`; LLaDA2 and SDAR with an even quota. Whatever was drawn: a
    rule that looked at the draw would sharpen the law.
    """

    probability: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 < self.probability <= 1.0:
            raise ValueError(f"a threshold is a probability in (0, 1], got {self.probability}")

    def sure(self, step: Step, score: Tensor, windows: Windows) -> Tensor:
        return step.proposal.peak.double().exp() >= self.probability


@dataclass(frozen=True)
class EntropyBelow:
    """Whose law has less entropy than this, in nats (dParallel, d3LLM)."""

    nats: float = 0.5
    needs = frozenset({"entropy"})

    def __post_init__(self) -> None:
        if not self.nats >= 0.0:
            raise ValueError(f"an entropy is at least 0 nats, got a bound of {self.nats}")

    def sure(self, step: Step, score: Tensor, windows: Windows) -> Tensor:
        return step.proposal.column("entropy") < self.nats


@dataclass(frozen=True)
class Factor:
    """The n surest of a run, n the largest number with (n + 1) (1 - p_n) <= factor (Fast-dLLM, theorem 1).

    p_n is the probability of the most probable token of the n-th surest. The released code takes one more.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor > 0.0:
            raise ValueError(f"the factor must be above 0, got {self.factor}")

    def sure(self, step: Step, score: Tensor, windows: Windows) -> Tensor:
        peak = step.proposal.peak.double()
        where = windows.active & step.proposal.valid
        place = rank(peak, where, windows.runs) + 1
        # p falls with the place and the bound rises, so those that pass are the first ones
        return peak.exp() >= 1.0 - self.factor / (place + 1)


@dataclass(frozen=True)
class Bounded:
    """In the order, as long as the entropies of what is filled but for the largest sum to at most `nats`.

    EB-Sampler (arXiv:2505.24857, equation 6): the sum bounds the joint dependence that filling them at once
    neglects. 0 is one at a time, and whatever has no entropy.
    """

    nats: float = 0.1
    needs = frozenset({"entropy"})

    def __post_init__(self) -> None:
        if not self.nats >= 0.0:
            raise ValueError(f"an entropy is at least 0 nats, got a bound of {self.nats}")

    def sure(self, step: Step, score: Tensor, windows: Windows) -> Tensor:
        entropy = step.proposal.column("entropy").double()
        where = windows.active & step.proposal.valid
        total, largest = running(entropy, score, where, windows.runs)
        return total - largest <= self.nats


@dataclass(frozen=True)
class Stable:
    """Whose most probable token has `probability`, and whose law moved at most `kl` nats `steps` times.

    KLASS (arXiv:2511.05664): the divergence is KL(now || the step before), and the steps are the last ones in
    a row.
    """

    probability: float = 0.9
    kl: float = 0.01
    steps: int = 2
    needs = frozenset({"kl"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0 or not self.kl >= 0.0 or self.steps < 1:
            raise ValueError(f"wanted a probability in [0, 1], kl >= 0 and steps >= 1, got {self}")

    def sure(self, step: Step, score: Tensor, windows: Windows) -> Tensor:
        steady = self.remember(step)[_STEADY] >= self.steps
        return steady & (step.proposal.peak.double().exp() >= self.probability)

    def remember(self, step: Step) -> dict[str, Tensor]:
        """For how many steps in a row the law of a position has hardly moved."""
        before = step.state.memory.get(_STEADY, torch.zeros_like(step.state.canvas.tokens))
        return {_STEADY: torch.where(step.proposal.column("kl") <= self.kl, before + 1, 0)}
