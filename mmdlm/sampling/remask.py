"""How often what is written becomes a hole again: ReMDM's laws. Knows no model and no draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdlm.sampling.order import count
from mmdlm.sampling.state import State, Step

_SURE = "decided"  # in a state's memory: the probability with which a position was written


class Remask(Protocol):
    """A law of remasking for the step from noise time t to s (ReMDM, arXiv:2503.00307, section 4)."""

    def chances(
        self, state: State, t: Tensor, s: Tensor, clean_t: Tensor, clean_s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_t, alpha_s and sigma, (B, L) float64 each: alphas as they were given, or the law's own."""
        ...

    def remember(self, step: Step, write: Tensor) -> dict[str, Tensor]:
        """What `chances` wants to find in the memory of the next state."""
        ...


class _Forgetful:
    def remember(self, step: Step, write: Tensor) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Capped(_Forgetful):
    """sigma = min(eta, (1 - alpha_s) / alpha_t). eta 0 is no remasking."""

    eta: float = 0.008

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    def chances(
        self, state: State, t: Tensor, s: Tensor, clean_t: Tensor, clean_s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return clean_t, clean_s, largest(clean_t, clean_s).clamp(max=self.eta)


@dataclass(frozen=True)
class Rescaled(_Forgetful):
    """sigma = eta * its largest value, min(1, (1 - alpha_s) / alpha_t)."""

    eta: float = 0.02

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    def chances(
        self, state: State, t: Tensor, s: Tensor, clean_t: Tensor, clean_s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return clean_t, clean_s, self.eta * largest(clean_t, clean_s)


@dataclass(frozen=True)
class ForwardBackward(_Forgetful):
    """sigma = (alpha_s - alpha_t) / alpha_t: the forward-backward corrector (arXiv:2205.14987)."""

    def chances(
        self, state: State, t: Tensor, s: Tensor, clean_t: Tensor, clean_s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        safe = clean_t.clamp(min=torch.finfo(torch.float64).tiny)
        return clean_t, clean_s, torch.where(clean_t > 0, (clean_s - clean_t) / safe, 1.0).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Doubtful:
    """sigma = eta * its largest value * n * softmax(-p) over the n tokens of a run that are written.

    p is the probability with which a token was drawn: what was doubtful then is looked at again. The mean
    over a run is that of `Rescaled`.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    def chances(
        self, state: State, t: Tensor, s: Tensor, clean_t: Tensor, clean_s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        sure = state.memory.get(_SURE, torch.zeros(state.canvas.shape, device=state.canvas.device)).double()
        doubt = torch.where(state.written, (-sure).exp(), 0.0)
        runs, sums = state.runs + 1, doubt.new_zeros(doubt.shape[0], doubt.shape[1] + 1)
        total = sums.scatter_add(1, runs, doubt).gather(1, runs)
        share = doubt / total.clamp(min=torch.finfo(torch.float64).tiny) * count(state.written, state.runs)
        return clean_t, clean_s, (self.eta * largest(clean_t, clean_s) * share).clamp(max=1.0)

    def remember(self, step: Step, write: Tensor) -> dict[str, Tensor]:
        before = step.state.memory.get(_SURE, torch.zeros_like(step.proposal.logp))
        return {_SURE: torch.where(write, step.proposal.logp.exp(), before)}


@dataclass(frozen=True)
class Loop(_Forgetful):
    """Between times `on` and `off` alpha rests at `clean` and sigma is eta; before and after, no remasking.

    The walk from 1 to `on` and from `off` to 0 is squeezed so that it ends and begins there. For a linear
    schedule.
    """

    on: float = 0.55
    off: float = 0.05
    clean: float = 0.9
    eta: float = 0.02

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        if not 0.0 <= self.off < self.on < 1.0 or not 0.0 < self.clean < 1.0:
            raise ValueError(f"wanted 0 <= off < on < 1 and clean in (0, 1), got {self}")

    def chances(
        self, state: State, t: Tensor, s: Tensor, clean_t: Tensor, clean_s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        during, alphas = (t <= self.on) & (t > self.off), []
        for time in (t, s):
            early = (1 - time) * self.clean / (1 - self.on)
            late = 1 - time * (1 - self.clean) / max(self.off, torch.finfo(torch.float64).tiny)
            alphas.append(torch.where(during, self.clean, torch.where(t > self.on, early, late)))
        return alphas[0], alphas[1], torch.where(during, self.eta, 0.0).double()


def largest(clean_t: Tensor, clean_s: Tensor) -> Tensor:
    """The most that sigma may be: min(1, (1 - alpha_s) / alpha_t), and 1 where nothing is clean."""
    safe = clean_t.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(clean_t > 0, ((1 - clean_s) / safe).clamp(max=1.0), 1.0)


def _check_eta(eta: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is a chance in [0, 1], got {eta}")
