"""When and where a step may write: walks through the square of noise levels, in blocks. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdlm.sampling.modality import ByModality, spread
from mmdlm.sampling.order import ahead, count
from mmdlm.sampling.state import UNSETTLED, State

_SPENT = "spent"  # in a state's memory: steps that the run of a position has been worked on


@dataclass(frozen=True)
class Windows:
    """What is worked on at a step. A run is a span or one block of it, named by its first position."""

    runs: Tensor  # (B, L) long     the run of each position, -1 where there is none
    active: Tensor  # (B, L) bool     holes that this step may write
    led: Tensor  # (B, L) bool     of these, where the quota is due; elsewhere only what a rule allows
    before: Tensor  # (B, L) float64  the run's own time in [0, 1] as the step begins; 0 is all noise
    after: Tensor  # (B, L) float64  ... as it ends; at 1 everything that is left is written
    steps: Tensor  # (B, L) float64  steps that are planned for the run


class Plan(Protocol):
    """Says what a step may write to, and how far each run has come."""

    def windows(self, state: State) -> Windows:
        """The windows of the step that begins at `state`. Pure, and row by row."""
        ...

    def remember(self, state: State, windows: Windows) -> dict[str, Tensor]:
        """What `windows` wants to find in the memory of the next state."""
        ...


@dataclass(frozen=True)
class Blocks:
    """A span is filled in blocks of `length` positions, from the left (LLaDA, arXiv:2502.09992).

    The next block is begun when all earlier ones are full and settled, or, with `ahead`, when this share of
    the holes of each is filled; until `lead` of them are, the quota is not due there and only a rule fills it
    (several blocks in flight: D2F, arXiv:2508.09192). A block that is done early hands its time on to nobody:
    the row is done sooner.
    """

    length: int
    ahead: float = 1.0
    lead: float = 0.95

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"a block has at least 1 position, got a length of {self.length}")
        for name, value in (("ahead", self.ahead), ("lead", self.lead)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{name} is a share of the holes of a block in (0, 1], got {value}")


@dataclass(frozen=True)
class Path:
    """The walk through the square of noise levels: each modality's stretch of a row's time [0, 1].

    Both over (0, 1) is simultaneous; text (0, .5) and image (.5, 1) is text first. Within its stretch a span
    goes as a whole, or block by block; its steps are shared evenly among its blocks that have holes. With
    `ticks` a modality moves at so many of its steps only, evenly spread: MMaDA-Parallel's interleave is
    image (.25, 1) with fewer ticks than the text has steps. `together`: all spans of a row are one run, in
    which text and image compete (UniDisc).
    """

    text: tuple[float, float] = (0.0, 1.0)
    image: tuple[float, float] = (0.0, 1.0)
    blocks: Blocks | ByModality[Blocks | None] | None = None
    ticks: int | ByModality[int | None] | None = None
    together: bool = False

    def __post_init__(self) -> None:
        for name, (start, stop) in (("text", self.text), ("image", self.image)):
            if not 0.0 <= start < stop <= 1.0:
                raise ValueError(
                    f"the {name} window must satisfy 0 <= start < stop <= 1, got ({start}, {stop})"
                )

        for ticks in ByModality.of(self.ticks).both:
            if ticks is not None and ticks < 1:
                raise ValueError(f"a modality moves at 1 step or more, got ticks {ticks}")
        if self.together and (self.blocks is not None or self.text != self.image):
            raise ValueError("together: spans that are one run share their window and go as a whole")

    def clocks(self, time: Tensor) -> ByModality[Tensor]:
        """Row time -> each modality's own time in [0, 1], 0 before its window and 1 after it."""
        windows, ticks = (self.text, self.image), ByModality.of(self.ticks).both
        clocks = (((time - start) / (stop - start)).clamp(0.0, 1.0) for start, stop in windows)
        return ByModality(
            *(
                clock if num is None else (clock * num + 1e-9).floor() / num
                for clock, num in zip(clocks, ticks, strict=True)
            )
        )

    def windows(self, state: State) -> Windows:
        before, after = (_by_row(self.clocks(time), state) for time in (state.before, state.after))
        spans = (self.text, self.image)
        steps = _by_row(ByModality(*(state.num_steps * (stop - start) for start, stop in spans)), state)
        moved = state.open & (after > before)
        runs = torch.where(state.runs >= 0, 0, -1) if self.together else state.runs
        whole = Windows(first_of(runs), moved, moved, before, after, steps)
        if self.blocks is None:
            return whole
        if isinstance(self.blocks, Blocks):
            return _in_blocks(state, whole, self.blocks)
        text, image = (
            whole if blocks is None else _in_blocks(state, whole, blocks) for blocks in self.blocks.both
        )
        columns = zip(vars(text).values(), vars(image).values(), strict=True)
        return Windows(*(spread(ByModality(*pair), state.canvas) for pair in columns))

    def remember(self, state: State, windows: Windows) -> dict[str, Tensor]:
        if self.blocks is None:
            return {}
        worked = count(windows.active, windows.runs) > 0
        return {_SPENT: state.memory.get(_SPENT, torch.zeros_like(windows.runs)) + worked}


def check_whole(plan: Plan, who: object) -> None:
    """Raises ValueError for blocks, on behalf of what opens again what is written."""
    if isinstance(plan, Path) and plan.blocks is not None:
        raise ValueError(f"{who} opens again what is written: it wants spans as wholes, got {plan.blocks}")


def first_of(runs: Tensor) -> Tensor:
    """(B, L) long: the first position of each position's run, -1 outside of runs."""
    place = torch.arange(runs.shape[1], device=runs.device).expand_as(runs)
    firsts = place.new_full((runs.shape[0], runs.shape[1] + 1), runs.shape[1])
    firsts = firsts.scatter_reduce(1, runs + 1, place, "amin")
    return torch.where(runs >= 0, firsts.gather(1, runs + 1), -1)


def blocks_of(first: Tensor, length: int) -> Tensor:
    """(B, L) long: the first position of each position's block, given that of its span; -1 outside."""
    place = torch.arange(first.shape[1], device=first.device)
    return torch.where(first >= 0, place - (place - first) % length, -1)


def _in_blocks(state: State, whole: Windows, blocks: Blocks) -> Windows:
    """The windows of spans, given the windows of these spans as wholes."""
    span, inside = whole.runs, whole.runs >= 0
    runs = blocks_of(span, blocks.length)
    unsettled = state.memory.get(UNSETTLED, torch.zeros_like(inside))
    planned, left = count(state.initial, runs), count(state.open | (state.initial & unsettled), runs)
    filled = torch.where(planned > 0, 1.0 - left.double() / planned.clamp(min=1), 1.0)

    def waits(share: float) -> Tensor:
        """(B, L) bool: some earlier block of the span has less than this share of its holes filled."""
        return _before(inside & (filled < share), runs) > _before(inside & (filled < share), span)

    # one position of each block that has holes stands for it
    begins = state.initial & (ahead(state.initial) == _before(state.initial, runs))
    steps = whole.steps / count(begins, span).clamp(min=1)
    spent = state.memory.get(_SPENT, torch.zeros_like(runs)).double()
    late = whole.after >= 1.0
    active = whole.active & (late | ~waits(blocks.ahead))
    after = torch.where(late, 1.0, ((spent + 1) / steps).clamp(max=1.0))
    return Windows(
        runs=runs,
        active=active,
        led=active & (late | ~waits(blocks.lead)),
        before=(spent / steps).clamp(max=1.0),
        after=torch.where(active, after, 0.0),
        steps=steps,
    )


def _before(where: Tensor, runs: Tensor) -> Tensor:
    """(B, L) long: how many positions of `where` lie before the run of each position."""
    return ahead(where).gather(1, runs.clamp(min=0))


def _by_row(values: ByModality[Tensor], state: State) -> Tensor:
    """(B,) for each modality -> (B, L)."""
    return spread(ByModality(*(value.unsqueeze(1) for value in values.both)), state.canvas)
