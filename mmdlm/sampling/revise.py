"""What becomes of tokens that stand already: planning, editing, checking. Knows no model and no draw."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT
from mmdlm.sampling.draw import NOISE
from mmdlm.sampling.order import Drawn, Order, Peak, count, rank
from mmdlm.sampling.plan import Plan, Windows, check_whole
from mmdlm.sampling.quota import Rule
from mmdlm.sampling.state import UNSETTLED, State, Step

_AFTER = "after"  # in a state's memory: steps since the run of a position was full


class Revision(ABC):
    """Looks again at what is written; by default at nothing.

    `needs` names the columns of `Proposal` that a revision reads beside the usual ones.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, plan: Plan, orders: Sequence[Order], rules: Sequence[Rule | None]) -> None:
        """Raises ValueError where it does not go with the plan, or an order or rule of a modality."""
        return

    def begin(self, state: State) -> State:
        """The state before the first step."""
        return state

    def widen(self, state: State, windows: Windows) -> Windows:
        """The windows, with what else takes part in the order and in the rule."""
        return windows

    def looks(self, state: State, windows: Windows) -> Tensor:
        """(B, L) bool: the written positions that the model is asked about."""
        return torch.zeros_like(state.initial)

    @abstractmethod
    def revise(
        self, step: Step, score: Tensor, windows: Windows, write: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is written and what is noised, (B, L) bool each.

        `write` says which holes would be filled without a revision, `number` (B, L) how many are due in each
        run, `score` (B, L) the order's.
        """
        ...

    def remember(self, step: Step, windows: Windows, write: Tensor) -> dict[str, Tensor]:
        """What the revision wants to find in the memory of the next state."""
        return {}

    def filler(self, state: State) -> Tensor | None:
        """(B, L) long: what a position holds that is noised at this step; None: the mask."""
        return None


@dataclass(frozen=True)
class Planned(Revision):
    """Path planning (P2, arXiv:2502.03540): all of a run is ranked anew, and what comes last is noised again.

    A hole counts with its score, a written token with eta times its log-probability now, if all others stand:
    eta 0 never noises one, and large ones are doubted. As many stay written as the quota says, and a row
    takes all its steps. The score must be a log-probability (`Drawn`, `Peak`), and there is no rule.
    """

    eta: float = 1.0
    needs = frozenset({"current"})

    def __post_init__(self) -> None:
        if not self.eta >= 0.0:
            raise ValueError(f"eta must be at least 0, got {self.eta}")

    def check(self, plan: Plan, orders: Sequence[Order], rules: Sequence[Rule | None]) -> None:
        check_whole(plan, self)
        if any(rule is not None for rule in rules):
            raise ValueError(f"{self} ranks all positions anew, and heeds no rule")
        if not all(isinstance(order, Drawn | Peak) for order in orders):
            raise ValueError(f"{self} wants an order by log-probability, Drawn or Peak")

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

    def remember(self, step: Step, windows: Windows, write: Tensor) -> dict[str, Tensor]:
        return {UNSETTLED: step.state.initial}


@dataclass(frozen=True)
class Edited(Revision):
    """A written token gives way to another one that has at least this probability (LLaDA2.1).

    arXiv:2602.08676, token editing. Holes are filled as they would be without it. When a run is full it is
    looked at for up to `after` more steps, until one edits nothing; its next block waits for that.
    """

    probability: float = 0.9
    after: int = 0

    def __post_init__(self) -> None:
        if not self.probability > 0.0:
            raise ValueError(f"the probability must be above 0 (above 1: no edits), got {self.probability}")
        if self.after < 0:
            raise ValueError(f"a full run is looked at 0 times or more, got {self.after}")

    def looks(self, state: State, windows: Windows) -> Tensor:
        worked = count(windows.active, windows.runs) > 0
        return state.written & (worked | self._unsettled(state))

    def revise(
        self, step: Step, score: Tensor, windows: Windows, write: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        return write | self._edits(step, windows), torch.zeros_like(write)

    def remember(self, step: Step, windows: Windows, write: Tensor) -> dict[str, Tensor]:
        state, runs = step.state, windows.runs
        if not self.after:
            return {}
        was_full = count(state.open, runs) == 0
        is_full = count(state.open & ~write, runs) == 0
        edited = count(self._edits(step, windows), runs) > 0
        taken = state.memory.get(_AFTER, torch.zeros_like(runs)) + (was_full & self._unsettled(state))
        goes_on = torch.where(was_full, self._unsettled(state) & edited & (taken < self.after), is_full)
        return {UNSETTLED: state.initial & goes_on, _AFTER: taken}

    def _edits(self, step: Step, windows: Windows) -> Tensor:
        other = step.proposal.tokens != step.state.canvas.tokens
        sure = step.proposal.logp.double().exp() >= self.probability
        return self.looks(step.state, windows) & step.proposal.valid & other & sure

    @staticmethod
    def _unsettled(state: State) -> Tensor:
        return state.memory.get(UNSETTLED, torch.zeros_like(state.initial))


@dataclass(frozen=True)
class Verified(Revision):
    """What has less than this probability, given all others, becomes a hole again (WINO, arXiv:2507.18578).

    Of a run always fewer than are written at the same step, the least probable first, so that it fills up.
    What a token has "given all others" is what the model says where it is shown a hole there: ask it through
    `Shadowed`, which does that in the same forward.
    """

    probability: float = 0.9
    needs = frozenset({"current"})

    def __post_init__(self) -> None:
        if not 0.0 < self.probability <= 1.0:
            raise ValueError(f"a token is kept for a probability in (0, 1], got {self.probability}")

    def looks(self, state: State, windows: Windows) -> Tensor:
        ends = count(windows.active & (windows.after >= 1.0), windows.runs) > 0
        return state.written & (count(windows.active, windows.runs) > 1) & ~ends

    def revise(
        self, step: Step, score: Tensor, windows: Windows, write: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        current = step.proposal.column("current")
        doubted = self.looks(step.state, windows) & step.proposal.valid
        doubted = doubted & (current < math.log(self.probability))
        most = count(write, windows.runs) - 1
        return write, doubted & (rank(-current, doubted, windows.runs) < most)


@dataclass(frozen=True)
class Uniform(Revision):
    """Random tokens instead of holes, and all of a run is drawn anew at every step (DiffusionGemma).

    What order, quota and rule take then stands until the next step; the rest becomes a random id again, from
    `text` or `image`, the first id and the one behind the last. A row in which all is taken is done. For
    models of uniform noise; the quota counts what stands (`Fixed`), and scales of guidance are constant, for
    there are no holes to tell the level of noise.
    """

    text: tuple[int, int] | None = None
    image: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for ids in (self.text, self.image):
            if ids is not None and not 0 <= ids[0] < ids[1]:
                raise ValueError(f"ids are (first, behind the last), got {ids}")

    def check(self, plan: Plan, orders: Sequence[Order], rules: Sequence[Rule | None]) -> None:
        check_whole(plan, self)

    def begin(self, state: State) -> State:
        """Raises ValueError where holes have a modality without ids."""
        for modality, name in ((TEXT, "text"), (IMAGE, "image")):
            missing = getattr(self, name) is None
            if missing and bool((state.initial & (state.canvas.modality == modality)).any()):
                raise ValueError(f"{self} has no ids for {name}, and the canvas has holes there")
        tokens = torch.where(state.initial, self.filler(state), state.canvas.tokens)
        masked = state.canvas.masked & ~state.initial
        return replace(state, canvas=state.canvas.replace(tokens=tokens, masked=masked))

    def widen(self, state: State, windows: Windows) -> Windows:
        again = state.written & (windows.after > windows.before)
        return replace(windows, active=windows.active | again, led=windows.led | again)

    def revise(
        self, step: Step, score: Tensor, windows: Windows, write: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        return write, windows.active & ~write

    def remember(self, step: Step, windows: Windows, write: Tensor) -> dict[str, Tensor]:
        waits = step.state.initial & (windows.after <= windows.before)
        return {UNSETTLED: waits | (windows.active & ~write)}

    def filler(self, state: State) -> Tensor:
        u, tokens = state.uniform(NOISE), torch.zeros_like(state.canvas.tokens)
        for modality, ids in ((TEXT, self.text), (IMAGE, self.image)):
            if ids is not None:
                random = ids[0] + (u * (ids[1] - ids[0])).floor().long()
                tokens = torch.where(state.canvas.modality == modality, random, tokens)
        return tokens
