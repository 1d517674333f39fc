"""The denoising loop: ask, propose, move, write, until every row is done. Knows no task and no model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.canvas import Canvas, Denoiser, Part
from mmdlm.sampling.caching import Cached
from mmdlm.sampling.guidance import Counted
from mmdlm.sampling.policy import Policy
from mmdlm.sampling.state import State, Step, apply

_POLL = 8  # steps between two looks at an accelerator, whether every row is done


def denoise(
    denoiser: Denoiser,
    canvas: Canvas,
    *,
    policy: Policy,
    steps: int | Tensor,
    seeds: int | Tensor = 0,
    samples: int | Tensor | None = None,
    mask: int,
) -> Iterator[State]:
    """Fills the holes of `canvas`: yields the state before the first step and after each; the last is done.

    `steps`, `seeds` and `samples` are one number for all rows or one a row; `samples` is 0, 1, ... where not
    given. To cancel, stop iterating: nothing runs between two states. Raises ValueError as `State.start`
    and the policy's `begin` do.
    """
    state = policy.begin(State.start(canvas, steps=steps, seeds=seeds, samples=samples))
    return resume(denoiser, state, policy=policy, mask=mask)


def resume(denoiser: Denoiser, state: State, *, policy: Policy, mask: int) -> Iterator[State]:
    """Goes on from `state`, which may have lost rows (`State.select`) or gained some (`State.join`).

    A new row is `policy.begin(State.start(...))`. What counts calls (an approximate cache, a branch that is
    asked at every n-th step) counts from here.
    """
    with torch.no_grad():
        # as it stood at the start: what guides by the level of noise must find the same one again
        predict = denoiser.begin(state.canvas.hide(state.initial, mask))
    yield state
    for number in range(1, 1 + state.remaining()):
        with torch.no_grad():
            rows = policy.ask(state)
            parts = predict(state.canvas, rows) if rows.index.shape[0] else []
            proposal = policy.propose(state, _forbid(parts, mask))
            move = policy.move(Step(state, proposal))
            canvas = apply(state, proposal, move, mask)
            state = state.advance(canvas, move.memory)
        yield state
        # free on the CPU, a sync on an accelerator
        if (state.done.device.type == "cpu" or number % _POLL == 0) and bool(state.done.all()):
            return


@dataclass(frozen=True)
class Result:
    """What a generation came to, and what it cost."""

    canvas: Canvas
    forwards: int  # passes through the model, whatever their size
    positions: int  # positions computed in them, summed; with a cache those that were computed
    tokens: int  # holes that were filled
    syncs: int  # looks of the host at the device, in the loop; those of a cache are not counted
    seconds: float
    trajectory: tuple[State, ...]  # the states, where they were asked for

    @property
    def tokens_per_forward(self) -> float:
        """Of a row: holes filled in one pass, if all rows take part in all of them."""
        return self.tokens / max(1, self.forwards) / max(1, self.canvas.shape[0])


def sample(
    denoiser: Denoiser,
    canvas: Canvas,
    *,
    policy: Policy,
    steps: int | Tensor,
    seeds: int | Tensor = 0,
    samples: int | Tensor | None = None,
    mask: int,
    trajectory: bool = False,
) -> Result:
    """`denoise` to its end. Raises ValueError as it does."""
    began, counted = time.perf_counter(), Counted(denoiser)
    cached = denoiser if isinstance(denoiser, Cached) else None
    before = 0 if cached is None else cached.positions
    walk = denoise(counted, canvas, policy=policy, steps=steps, seeds=seeds, samples=samples, mask=mask)
    last, number = next(walk), 0
    holes, states = int(last.initial.sum()), [last]
    for last in walk:
        number += 1
        if trajectory:
            states.append(last)
    left = int((last.canvas.masked & last.initial).sum())  # the end of the work on a device, too
    return Result(
        canvas=last.canvas,
        forwards=counted.calls,
        positions=counted.positions if cached is None else cached.positions - before,
        tokens=holes - left,
        syncs=0 if canvas.device.type == "cpu" else 2 + number // _POLL,
        seconds=time.perf_counter() - began,
        trajectory=tuple(states) if trajectory else (),
    )


def _forbid(parts: list[Part], mask: int) -> list[Part]:
    """The mask id can never be drawn, whatever a model says."""
    return [
        _without(part, mask - part.ids.start) if part.ids.start <= mask < part.ids.stop else part
        for part in parts
    ]


def _without(part: Part, column: int) -> Part:
    logits = part.logits.clone()
    logits[:, column] = -torch.inf
    return Part(part.rows, part.ids, logits)
