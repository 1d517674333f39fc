"""Discrete schedulers of diffusers as policies of our loop. Imports no diffusers; knows no pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mmdlm.canvas import Part, Rows
from mmdlm.sampling import Blocks, Move, Path, Policy, Proposal, State, Step, Windows
from mmdlm.sampling.order import count
from mmdlm.sampling.state import UNSETTLED

_NOISE, _SEED = 64, 65  # what uniforms are drawn for: streams of their own, far from mmdlm.sampling.draw's
_COMMITTED = "committed"  # in a state's memory
_HOLE = -(1 << 40)  # the mask of schedulers that take any: no token minus the first id of its range


class Scheduler(Protocol):
    """What diffusers' discrete schedulers have in common (0.42)."""

    @property
    def config(self) -> Any: ...
    @property
    def timesteps(self) -> Any: ...
    @property
    def set_timesteps(self) -> Callable[..., None]: ...
    @property
    def step(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class SchedulerPolicy(Policy):
    """A scheduler that fills masks: `BlockRefinementScheduler` or `AmusedScheduler` of diffusers 0.42.

    It is called once a step for every span of every row or, with `block`, for the block of so many positions
    that is worked on (`Blocks`), and sees what is given there too. The steps of a row are shared evenly among
    its blocks; where they cannot be, ValueError. `options` are further arguments of its `set_timesteps` and
    `step`, by name: a temperature, say. A block that is full is not edited any more.

    Each call has a generator of its own, seeded from the row's stream, so a sample depends neither on its
    batch nor on its neighbours; it does on the kind of device. Ids count from the first one of the vocabulary
    range: the mask of an `AmusedScheduler` is the number of codes, or another id that no model emits. One
    scheduler serves one loop at a time. On an accelerator every call syncs with the host.
    """

    scheduler: Scheduler
    block: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for unknown options and for a scheduler that knows no mask."""
        _check_options(self.scheduler, self.options)
        if not self._takes_mask and "mask_token_id" not in self.scheduler.config:
            raise ValueError(
                f"{type(self.scheduler).__name__} knows no mask: it is one for a UniformSchedulerPolicy"
            )

    def ask(self, state: State) -> Rows:
        """All of the runs that are worked on."""
        return Rows.of(_worked(self._path.windows(state)))

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        """What the scheduler leaves there; no proposal where that is the mask."""
        left = []
        for turn in _turns(state, parts, self._path.windows(state)):
            mask, given = self._mask(turn), {}
            if self._takes_mask:
                given = {"mask_token_id": mask, "prompt_mask": ~state.initial[turn.row, turn.places]}
            sample = torch.where(state.canvas.masked[turn.row, turn.places], mask, turn.standing)
            ids = _step(self.scheduler, self.options, turn, sample, given).prev_sample[0]
            left.append((turn, ids, ids != mask))
        return _proposal(state, left)

    def move(self, step: Step) -> Move:
        windows, write = self._path.windows(step.state), step.proposal.valid
        return Move(write, _worked(windows) & ~write, self._path.remember(step.state, windows))

    @property
    def _path(self) -> Path:
        return Path(blocks=None if self.block is None else Blocks(self.block))

    @property
    def _takes_mask(self) -> bool:
        return "mask_token_id" in _arguments(self.scheduler.step)

    def _mask(self, turn: _Turn) -> int:
        if self._takes_mask:
            return _HOLE
        mask, number = self.scheduler.config["mask_token_id"], turn.logits.shape[1]
        if 0 <= mask < number and bool((turn.logits[:, mask] > -torch.inf).any()):
            raise ValueError(f"the scheduler's mask {mask} is an id that the model emits; wanted {number}")
        return mask


@dataclass(frozen=True)
class UniformSchedulerPolicy(Policy):
    """A scheduler of uniform noise: `EntropyBoundScheduler` or `DiscreteDDIMScheduler` of diffusers 0.42.

    Also `BlockRefinementScheduler`, which without a mask is one. `ids` are the first id and the one behind
    the last: random ones stand in the holes from the start, where the model reads them as tokens, so it must
    be one for such noise. The holes of a span go as one block. A row takes all its steps, and what the last
    one does not accept stays noise, as in a plain loop of diffusers. Options, chance and cost are those of
    `SchedulerPolicy`.
    """

    scheduler: Scheduler
    ids: tuple[int, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for unknown options, an empty range, and a scheduler that does more or less."""
        _check_options(self.scheduler, self.options)
        if not 0 <= self.ids[0] < self.ids[1]:
            raise ValueError(f"wanted the first id and the one behind the last, got {self.ids}")
        if "mask_token_id" in self.scheduler.config:
            raise ValueError(f"{type(self.scheduler).__name__} fills masks: it is one for a SchedulerPolicy")
        if self.scheduler.config.get("corrector_steps", 0):
            raise ValueError("corrector sweeps are not done: wanted a scheduler with corrector_steps=0")

    def begin(self, state: State) -> State:
        """Random ids in the holes, which from here on are none."""
        first, behind = self.ids
        noise = first + (state.uniform(_NOISE) * (behind - first)).floor().long()
        tokens = torch.where(state.initial, noise, state.canvas.tokens)
        masked = state.canvas.masked & ~state.initial
        return replace(state, canvas=state.canvas.replace(tokens=tokens, masked=masked))

    def ask(self, state: State) -> Rows:
        """All that was a hole at the start."""
        return Rows.of(state.written)

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        """What the scheduler leaves there, tokens and noise alike."""
        remembers = "mask_token_id" in _arguments(self.scheduler.step)
        committed = state.memory.get(_COMMITTED, torch.zeros_like(state.initial)).clone()
        left = []
        for turn in _turns(state, parts, Path().windows(state)):
            if (turn.ids.start, turn.ids.stop) != self.ids:
                raise ValueError(f"wanted a model of the ids {self.ids}, it answers with {turn.ids}")
            before = committed[turn.row, turn.places].unsqueeze(0) if remembers else None
            out = _step(self.scheduler, self.options, turn, turn.standing, {}, committed=before)
            if remembers:
                committed[turn.row, turn.places] |= out.transfer_index[0]
            left.append((turn, out.prev_sample[0], torch.ones_like(turn.places, dtype=torch.bool)))
        return replace(_proposal(state, left), memory={_COMMITTED: committed})

    def move(self, step: Step) -> Move:
        write = step.proposal.valid
        return Move(write, torch.zeros_like(write), {UNSETTLED: step.state.initial, **step.proposal.memory})


@dataclass(frozen=True)
class _Turn:
    """What one call of a scheduler is about: n positions of one run of one row."""

    row: int
    places: Tensor  # (n,) long   columns of the canvas
    standing: Tensor  # (n,) long   what stands there, counted from the first id
    ids: slice
    logits: Tensor  # (n, V)
    size: int  # of the run
    steps: int  # of the run
    taken: int
    seed: int


def _turns(state: State, parts: list[Part], windows: Windows) -> Iterator[_Turn]:
    """A turn for each run that was asked about. Raises ValueError where one has no whole number of steps."""
    length, tokens, chance = state.canvas.shape[1], state.canvas.tokens, state.uniform(_SEED)
    for part in parts:
        flat = part.rows.index
        first = torch.where(part.rows.valid, flat - flat % length + part.rows.gather(windows.runs), -1)
        for run in first.unique().tolist():
            if run < 0:
                continue
            row, place, mine = run // length, run % length, first == run
            places, steps = flat[mine] % length, float(windows.steps[row, place])
            if steps != round(steps):
                raise ValueError(
                    f"{int(state.num_steps[row])} steps give a block {steps:g}: wanted a multiple"
                )
            yield _Turn(
                row=row,
                places=places,
                standing=tokens[row, places] - part.ids.start,
                ids=part.ids,
                logits=part.logits[mine],
                size=int((windows.runs[row] == place).sum()),
                steps=round(steps),
                taken=round(float(windows.before[row, place]) * steps),
                seed=int(chance[row, place] * 2.0**52),
            )


def _step(
    scheduler: Scheduler,
    options: Mapping[str, Any],
    turn: _Turn,
    sample: Tensor,
    given: Mapping[str, Any],
    *,
    committed: Tensor | None = None,
) -> Any:
    """What the scheduler's `step` says of a batch of one, `sample` (n,) long.

    Those that go by blocks are told the step of the block, the others one of their `timesteps`.
    """
    setting, stepping = _arguments(scheduler.set_timesteps), _arguments(scheduler.step)
    told = {name: value for name, value in options.items() if name in setting}
    by_block = "block_length" in setting
    told |= {"block_length": turn.size} if by_block else {}
    scheduler.set_timesteps(turn.steps, device=sample.device, **told)
    if committed is not None:  # it keeps that in itself, and `set_timesteps` forgets it
        vars(scheduler)["_committed"] = committed
    return scheduler.step(
        turn.logits.unsqueeze(0),
        turn.taken if by_block else int(scheduler.timesteps[turn.taken]),
        sample.unsqueeze(0),
        generator=torch.Generator(device=sample.device).manual_seed(turn.seed),
        **{name: value for name, value in options.items() if name in stepping},
        **given,
    )


def _proposal(state: State, left: list[tuple[_Turn, Tensor, Tensor]]) -> Proposal:
    """From turns, the (n,) ids that are left, counted from the first one, and where they are tokens."""
    tokens, valid = state.canvas.tokens.clone(), torch.zeros_like(state.initial)
    logp = torch.zeros(tokens.shape, device=tokens.device)
    peak = torch.zeros_like(logp)
    for turn, ids, real in left:
        spot, law = (turn.row, turn.places), turn.logits.float().log_softmax(dim=1)
        column = ids.clamp(0, law.shape[1] - 1)  # a mask has none, and what is given need not have one
        tokens[spot], valid[spot] = ids + turn.ids.start, real
        logp[spot], peak[spot] = law.gather(1, column.unsqueeze(1)).squeeze(1), law.amax(dim=1)
    return Proposal(tokens, logp, peak, valid)


def _worked(windows: Windows) -> Tensor:
    """(B, L) bool: the runs that have a hole to fill at this step."""
    return (windows.runs >= 0) & (count(windows.active, windows.runs) > 0)


def _arguments(call: Callable[..., Any]) -> set[str]:
    """The names of its arguments."""
    return set(inspect.signature(call).parameters)


def _check_options(scheduler: Scheduler, options: Mapping[str, Any]) -> None:
    ours = {"num_inference_steps", "device", "block_length", "model_output", "timestep", "sample"}
    ours |= {"mask_token_id", "prompt_mask", "generator", "return_dict"}
    known = (_arguments(scheduler.set_timesteps) | _arguments(scheduler.step)) - ours
    unknown = sorted(set(options) - known)
    if unknown:
        name, offered = type(scheduler).__name__, ", ".join(sorted(known))
        raise ValueError(f"{name} has no option {', '.join(unknown)}: there are {offered}")
