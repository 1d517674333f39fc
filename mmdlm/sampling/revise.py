"""What becomes of tokens that are written already: planning, editing. Knows no model and no draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdlm.sampling.order import count, rank
from mmdlm.sampling.plan import Windows
from mmdlm.sampling.state import State, Step


class Revision(Protocol):
    """Looks again at what is written.

    `needs`, where a revision has it, names the columns of `Proposal` that it reads beside the usual ones.
    """

    noises: bool  # whether it makes holes again: a row then takes all its steps

    def looks(self, state: State, windows: Windows) -> Tensor:
        """(B, L) bool: the written positions that the model is asked about."""
        ...

    def revise(
        self, step: Step, score: Tensor, windows: Windows, write: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is written and what is noised, (B, L) bool each.

        `write` says which holes would be filled without a revision, `number` (B, L) how many are due in each
        run, `score` (B, L) the order's.
        """
        ...


@dataclass(frozen=True)
class Planned:
    """Path planning (P2, arXiv:2502.03540): all of a run is ranked anew, and what comes last is noised again.

    A hole counts with its score, a written token with eta times its log-probability now, if all others stand:
    eta 0 never noises one, and large ones are doubted. As many stay written as the quota says. The score must
    be a log-probability (`Drawn`, `Peak`).
    """

    eta: float = 1.0
    needs = frozenset({"current"})
    noises = True

    def __post_init__(self) -> None:
        if not self.eta >= 0.0:
            raise ValueError(f"eta must be at least 0, got {self.eta}")

    def looks(self, state: State, windows: Windows) -> Tensor:
        return state.written & (windows.after < 1.0) & (windows.after > windows.before)

    def revise(
        self, step: Step, score: Tensor, windows: Windows, write: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        written = self.looks(step.state, windows) & step.proposal.valid
        candidates = (windows.active & step.proposal.valid) | written
        stands = torch.where(written, self.eta * step.proposal.column("current"), score)
        keep = count(step.state.written, windows.runs) + number
        kept = rank(stands, candidates, windows.runs) < keep
        ends = windows.after >= 1.0
        return torch.where(ends, write, candidates & kept & ~written), written & ~kept


@dataclass(frozen=True)
class Edited:
    """A written token gives way to another one that has at least this probability (LLaDA2.1).

    arXiv:2602.08676, token editing. Holes are filled as they would be without it.
    """

    probability: float = 0.9
    noises = False

    def __post_init__(self) -> None:
        if not self.probability > 0.0:
            raise ValueError(f"the probability must be above 0 (above 1: no edits), got {self.probability}")

    def looks(self, state: State, windows: Windows) -> Tensor:
        worked = count(windows.active, windows.runs) > 0
        return state.written & worked

    def revise(
        self, step: Step, score: Tensor, windows: Windows, write: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        other = step.proposal.tokens != step.state.canvas.tokens
        sure = step.proposal.logp.double().exp() >= self.probability
        edit = self.looks(step.state, windows) & step.proposal.valid & other & sure
        return write | edit, torch.zeros_like(write)
