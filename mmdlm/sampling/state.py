"""What the sampler carries from step to step: State, Proposal, Move, Step. Knows no model and no policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from mmdlm.canvas import Canvas
from mmdlm.sampling.draw import uniform

T = TypeVar("T")

UNSETTLED = "unsettled"  # in a state's memory, (B, L) bool: written, and may change all the same


@dataclass(frozen=True)
class State:
    """A batch of B rows on their way from noise to data, each with its own clock and its own random stream.

    Only positions of `initial` ever change. A row's randomness depends on (seed, sample, step, position)
    alone, where position is the index in the row, so a row gives the same tokens in any batch and at any
    padding on the right.
    """

    canvas: Canvas
    step: Tensor  # (B,) long   steps taken
    num_steps: Tensor  # (B,) long   steps planned
    done: Tensor  # (B,) bool   nothing left to fill, or no step left
    seed: Tensor  # (B,) long
    sample: Tensor  # (B,) long   index of the sample within its seed
    initial: Tensor  # (B, L) bool   fillable positions that were masked at the start
    # (B, L, ...) each: what the policy left behind at the last step, 0 where it was not there
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def start(
        canvas: Canvas, *, steps: int | Tensor, seeds: int | Tensor = 0, samples: int | Tensor | None = None
    ) -> State:
        """The state before the first step, for a policy's `begin`; `denoise` does both.

        One number holds for every row; `samples` is 0, 1, ... by default.

        Raises ValueError for steps below 1, for columns of the wrong size, and for a canvas with a `level`
        column, which this sampler does not keep up to date.
        """
        if canvas.level is not None:
            raise ValueError("sampling does not walk the `level` column: hand in a canvas without it")
        size = canvas.shape[0]
        if samples is None:
            samples = torch.arange(size)
        columns = {}
        for name, value in (("steps", steps), ("seeds", seeds), ("samples", samples)):
            column = torch.as_tensor(value, dtype=torch.long).to(canvas.device)
            if column.ndim > 1 or (column.ndim == 1 and column.shape[0] != size):
                raise ValueError(f"{name} must be one number or {size} of them, got {tuple(column.shape)}")
            columns[name] = column.expand(size).contiguous()
        if size and int(columns["steps"].min()) < 1:  # one host sync a generation
            raise ValueError(f"steps must be at least 1, got {int(columns['steps'].min())}")
        initial = canvas.fillable & canvas.masked
        return State(
            canvas=canvas,
            step=torch.zeros_like(columns["steps"]),
            num_steps=columns["steps"],
            done=~initial.any(dim=1),
            seed=columns["seeds"],
            sample=columns["samples"],
            initial=initial,
        )

    @property
    def open(self) -> Tensor:
        """(B, L) bool: the holes that are still to be filled, in rows that are not done."""
        return self.canvas.masked & self.initial & ~self.done.unsqueeze(1)

    @property
    def written(self) -> Tensor:
        """(B, L) bool: what was a hole at the start and is filled, in rows that are not done."""
        return self.initial & ~self.canvas.masked & ~self.done.unsqueeze(1)

    @property
    def before(self) -> Tensor:
        """(B,) float64: the row's time in [0, 1] as the step begins; 0 is all noise, 1 all data."""
        return self.step.double() / self.num_steps

    @property
    def after(self) -> Tensor:
        """(B,) float64: the row's time as the step ends."""
        return (self.step + 1).double() / self.num_steps

    def uniform(self, kind: int) -> Tensor:
        """(B, L) float64 in (0, 1): the random numbers of this step and kind, from each row's own stream."""
        position = torch.arange(self.canvas.shape[1], device=self.canvas.device).unsqueeze(0)
        seed, sample, step = (column.unsqueeze(1) for column in (self.seed, self.sample, self.step))
        return uniform(seed, sample, step, position, kind)

    @property
    def runs(self) -> Tensor:
        """(B, L) long: the span of each position, -1 outside; without that column a modality is one span."""
        return self.canvas.modality.long() - 1 if self.canvas.span is None else self.canvas.span

    def form(self, owner: object, make: Callable[[], T]) -> T:
        """What `owner` makes of this state, made at the first call and kept with the state alone."""
        forms = vars(self).setdefault("_forms", {})
        if id(owner) not in forms or forms[id(owner)][0] is not owner:
            forms[id(owner)] = owner, make()
        return forms[id(owner)][1]

    def remaining(self) -> int:
        """Steps until every row is done at the latest. Syncs with the device."""
        left = (self.num_steps - self.step).masked_fill(self.done, 0)
        return int(left.max()) if left.numel() else 0

    def advance(self, canvas: Canvas, memory: Mapping[str, Tensor] | None = None) -> State:
        """One step later, with `canvas` as it stands then: rows that were done stay as they were.

        A row is done that has no hole and nothing that is unsettled, or that has taken all its steps.
        """
        memory = {} if memory is None else memory
        step = torch.where(self.done, self.step, self.step + 1)
        left = canvas.masked | memory[UNSETTLED] if UNSETTLED in memory else canvas.masked
        done = self.done | (step >= self.num_steps) | ~(left & self.initial).any(dim=1)
        return replace(self, canvas=canvas, step=step, done=done, memory=memory)

    def select(self, rows: Tensor) -> State:
        """The rows named by `rows`, (N,) long or (B,) bool; they go on exactly as they would have."""
        values = {column.name: getattr(self, column.name) for column in fields(self)}
        canvas = values.pop("canvas").select(rows)
        memory = {name: column[rows] for name, column in values.pop("memory").items()}
        return State(canvas=canvas, memory=memory, **{name: value[rows] for name, value in values.items()})

    @staticmethod
    def join(first: State, second: State) -> State:
        """The rows of both, each with its own clock and stream; shorter rows are padded on the right."""
        canvas = Canvas.concat([first.canvas, second.canvas])
        length = canvas.shape[1]
        columns = {}
        for column in fields(State):
            if column.name in ("canvas", "initial", "memory"):
                continue
            columns[column.name] = torch.cat([getattr(first, column.name), getattr(second, column.name)])
        initial = [_widen(state.initial, length) for state in (first, second)]
        memory = {
            name: torch.cat([_recall(state, name, length, of=column) for state in (first, second)])
            for name, column in {**first.memory, **second.memory}.items()
        }
        return State(canvas=canvas, initial=torch.cat(initial), memory=memory, **columns)


@dataclass(frozen=True)
class Proposal:
    """What the model would write, where it was asked."""

    tokens: Tensor  # (B, L) long      ids of the vocabulary
    logp: Tensor  # (B, L) float32   log-probability of the proposed token, before temperature and truncation
    peak: Tensor  # (B, L) float32   log-probability of the most probable token: depends on no draw
    valid: Tensor  # (B, L) bool      where a proposal was made; elsewhere the others mean nothing
    # (B, L) float32 each, where somebody needs them: of the model's law the "margin" of the most probable
    # token over the next, the "entropy", the "kl" from its law at the step before (infinite without one), and
    # the log-probability of the "current" token
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # (B, L, ...) each, for the next state

    def column(self, name: str) -> Tensor:
        """One of `columns`. Raises KeyError with advice where nobody said that it is needed."""
        if name not in self.columns:
            raise KeyError(f"the proposal has no {name!r}: an order or rule names in `needs` what it reads")
        return self.columns[name]


@dataclass(frozen=True)
class Move:
    """What becomes of each position. Where both are True noise wins; where neither is, it stays."""

    write: Tensor  # (B, L) bool   takes the proposed token
    noise: Tensor  # (B, L) bool   becomes a hole again
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # (B, L, ...) each, for the next state
    # (B, L) long   what a noised position holds, and then it is no hole; below 0, or without it, the mask
    filler: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What a policy decides upon."""

    state: State
    proposal: Proposal


def apply(state: State, proposal: Proposal, move: Move, mask: int) -> Canvas:
    """The canvas after the move: only what was a hole at the start, in rows that are not done, changes."""
    live = state.initial & ~state.done.unsqueeze(1)
    noise = live & move.noise
    write = live & move.write & proposal.valid & ~noise
    tokens = torch.where(write, proposal.tokens, state.canvas.tokens)
    holes, filler = noise, tokens.new_full((), mask)
    if move.filler is not None:
        holes, filler = noise & (move.filler < 0), torch.where(move.filler < 0, mask, move.filler)
    masked = (state.canvas.masked & ~write & ~noise) | holes
    return state.canvas.replace(tokens=torch.where(noise, filler, tokens), masked=masked)


def _widen(column: Tensor, length: int) -> Tensor:
    """(B, L, ...) -> (B, length, ...), with zeros on the right."""
    wide = column.new_zeros(column.shape[0], length, *column.shape[2:])
    wide[:, : column.shape[1]] = column
    return wide


def _recall(state: State, name: str, length: int, of: Tensor) -> Tensor:
    """A column of a state's memory, widened; zeros like those `of` another state where it has none."""
    column = state.memory.get(name, of.new_zeros(*state.canvas.shape, *of.shape[2:]))
    return _widen(column, length)
