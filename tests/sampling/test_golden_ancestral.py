"""MDLM, ReMDM, block diffusion and UniDisc's ancestral sampler, canvas by canvas as released.

There the mask competes with the tokens in one draw; ours draws twice, which has the same law. Replayed here
is the one draw, with the chances that ours computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from replay import Case, Stub, Tape, cases, shown, text_canvas, without_repeats
from torch import Tensor

from mmdlm.canvas import Part, Rows
from mmdlm.diffusion import Linear, LogLinear
from mmdlm.sampling import (
    Ancestral,
    Capped,
    ForwardBackward,
    Loop,
    Move,
    Proposal,
    Rescaled,
    State,
    Step,
    denoise,
)
from mmdlm.sampling.state import UNSETTLED


@dataclass(frozen=True)
class MixedCosine:
    """MDLM's cosine noise: alpha = eps + (1 - eps) cos(pi t / 2)."""

    eps: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return self.eps + (1 - self.eps) * torch.cos(t * math.pi / 2)


@dataclass(frozen=True)
class OneDraw(Ancestral):
    """Tokens and the mask in one race per position, the last step the most probable token."""

    tape: Tape | None = None
    times: Callable[[int], tuple[float, float] | None] = field(default=lambda step: None)
    mask_id: int = 13
    size: int = 14  # ids
    nucleus: float = 1.0
    now: list[int] = field(default_factory=lambda: [0])  # the step that is being made
    early: ClassVar[bool] = False  # whether a row is done that is full

    def ask(self, state: State) -> Rows:
        self.now[0] = int(state.step[0])
        return Rows.of(state.open)

    def _transition(self, state: State) -> tuple[Tensor, Tensor] | None:
        times = self.times(int(state.step.max()))
        if times is None:
            return None
        t, s = (torch.full(state.canvas.shape, time, dtype=torch.float64) for time in times)
        return self.transition(state, t, s)

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        moves = self._transition(state)
        canvas = state.canvas
        # what is written stays, unless the mask wins
        law = (torch.arange(self.size) == canvas.tokens.unsqueeze(2)).double()
        for part in parts:
            own = torch.zeros(part.rows.index.shape[0], self.size, dtype=torch.float64)
            own[:, part.ids] = cut(part.logits.softmax(dim=1), self.nucleus)
            law = part.rows.scatter(own, law)
        zeros = torch.zeros(canvas.shape, dtype=torch.float64)
        if moves is None:
            return Proposal(law.argmax(dim=2), zeros, zeros, canvas.masked)
        reveal, again = moves
        stays = torch.where(canvas.masked, 1 - reveal, again)
        law = law * (1 - stays).unsqueeze(2)
        law[..., self.mask_id] = stays
        chosen = (law / noise(self.tape.next())).argmax(dim=2)
        return Proposal(chosen, zeros, zeros, torch.ones(canvas.shape, dtype=torch.bool))

    def move(self, step: Step) -> Move:
        masked = step.state.canvas.masked
        hidden = step.proposal.tokens == self.mask_id
        write = masked & step.proposal.valid & ~hidden
        noised = (
            ~masked & hidden & step.proposal.valid if self.remask is not None else torch.zeros_like(write)
        )
        return Move(write, noised, {} if self.early else {UNSETTLED: step.state.initial})


def noise(u: Tensor) -> Tensor:
    return 1e-10 - (u.double() + 1e-10).log()


def cut(law: Tensor, nucleus: float) -> Tensor:
    """ReMDM's nucleus: it drops the token that crosses, unless it is the first."""
    if nucleus >= 1.0:
        return law
    ordered, place = law.sort(dim=-1, descending=True)
    keep = ordered.cumsum(dim=-1) <= nucleus
    keep[..., 0] = True
    kept = torch.zeros_like(law).scatter(-1, place, ordered * keep)
    return kept / kept.sum(dim=-1, keepdim=True)


def run(case: Case, policy: OneDraw, steps: int, tokens: Tensor, given: int = 0) -> list[State]:
    stub = Stub("stub_ancestral", mask=policy.mask_id)
    canvas = text_canvas(tokens, given, policy.mask_id)
    return list(denoise(stub, canvas, policy=policy, steps=steps, mask=policy.mask_id))


def grid(steps: int, eps: float) -> Callable[[int], tuple[float, float] | None]:
    """Times from 1 to eps in even steps; after them the last, greedy one."""

    def times(step: int) -> tuple[float, float] | None:
        return None if step == steps else (1 - (1 - eps) * step / steps, 1 - (1 - eps) * (step + 1) / steps)

    return times


def ddpm() -> list[Case]:
    return [case for case in cases("ancestral_mdlm") if case.params["predictor"] != "analytic"]


@pytest.mark.parametrize("case", ddpm(), ids=str)
def test_golden_sampler_ancestral_mdlm(case: Case) -> None:
    params = case.params
    schedule = LogLinear() if params["noise"] == "loglinear" else MixedCosine()
    schedule = Linear() if params["predictor"] == "ddpm_cache" else schedule  # this one moves with t itself
    steps = params["num_steps"]
    policy = OneDraw(schedule=schedule, tape=Tape(case.noise), times=grid(steps, params["eps"]))
    tokens = torch.full((params["batch"], params["length"]), params["mask_index"])
    states = run(case, policy, steps + 1, tokens)
    assert shown(states, 13) == without_repeats([*case.expected["calls"], case.expected["final"]])


@pytest.mark.parametrize("case", cases("ancestral_remdm"), ids=str)
def test_golden_sampler_ancestral_remdm(case: Case) -> None:
    params = case.params
    laws = {
        "remdm-cap": lambda: Capped(params["eta"]),
        "remdm-rescale": lambda: Rescaled(params["eta"]),
        "forward-backward": lambda: ForwardBackward(),
        "remdm-loop": lambda: Loop(params["t_on"], params["t_off"], params["alpha_on"], params["eta"]),
        "mdlm": lambda: None,
    }
    steps = params["num_steps"]
    policy = OneDraw(
        schedule=Linear(),
        remask=laws[params["sampler"]](),
        tape=Tape(case.noise),
        times=grid(steps, params["eps"]),
        nucleus=params.get("nucleus_p", 1.0),
    )
    tokens = torch.full((params["batch"], params["length"]), params["mask_index"])
    states = run(case, policy, steps + 1, tokens)
    assert shown(states, 13) == without_repeats([*case.expected["calls"], case.expected["final"]])


@pytest.mark.parametrize("case", cases("ancestral_bd3lm"), ids=str)
def test_golden_sampler_ancestral_bd3lm(case: Case) -> None:
    params, tape = case.params, Tape(case.noise)
    steps, block, mask = params["num_steps"], params["block_size"], params["mask_index"]
    starts = torch.linspace(1, 0, steps)

    def times(step: int) -> tuple[float, float] | None:
        t = float(starts[step])
        return (t, t - 1 / steps) if t > 0 else None  # at time 0 the rest is taken greedily

    policy = OneDraw(schedule=Linear(), tape=tape, times=times, nucleus=params["nucleus_p"])
    if params["first_hitting"]:
        policy = FirstHitting(tape=tape)
    policy = Block(**vars(policy), block=block) if not params["first_hitting"] else policy
    tokens, seen = torch.full((params["batch"], 1), params["bos_id"]), []
    for number in range(params["num_blocks"]):
        given = tokens.shape[1]
        holes = (number + 1) * block - given
        tokens = torch.cat([tokens, torch.full((len(tokens), holes), mask)], dim=1)
        states = run(case, policy, steps, tokens, given)
        states = [state for state in states if state.canvas.masked.any()] + [
            next(state for state in states if not state.canvas.masked.any())
        ]
        seen += shown(states[:-1], mask)
        tokens = states[-1].canvas.tokens
    assert seen == without_repeats(case.expected["calls"])
    assert tokens.tolist() == case.expected["final"]


@dataclass(frozen=True)
class Block(OneDraw):
    """A row is done when its block is full."""

    block: int = 4

    early = True

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        if self.times(int(state.step.max())) is not None:
            drawn, ahead = self.tape.left[0], state.canvas.shape[1] - self.block
            self.tape.left[0] = torch.cat([torch.full((len(drawn), ahead, self.size), 0.5), drawn], dim=1)
        return super().propose(state, parts)


@dataclass(frozen=True)
class FirstHitting(Block):
    """One hole at a time, any of them alike. The times, which nothing else depends on, are drawn too."""

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        if self.tape.left[0].shape == (1,):
            self.tape.next()
        (part,) = parts
        number = part.rows.index.shape[0]
        canvas = state.canvas
        law = torch.zeros(*canvas.shape, self.size, dtype=torch.float64)
        law = part.rows.scatter(part.logits.softmax(dim=1), law)
        drawn = [self.tape.next(), self.tape.next()]
        race = next(each for each in drawn if each.ndim == 3)
        at = next(each for each in drawn if each.ndim == 1)
        chosen = part.rows.index[int(at.double() * number)]
        full = torch.full((1, canvas.shape[1], self.size), 0.5)
        full[:, canvas.shape[1] - self.block :] = race
        tokens = (law / noise(full)).argmax(dim=2)
        valid = torch.zeros(canvas.shape, dtype=torch.bool)
        valid.view(-1)[chosen] = True
        zeros = torch.zeros(canvas.shape, dtype=torch.float64)
        return Proposal(tokens, zeros, zeros, valid)
