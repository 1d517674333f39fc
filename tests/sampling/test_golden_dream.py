"""Dream, canvas by canvas as its released sampler made it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from replay import Case, Stub, Tape, cases, proposal_of, shown, text_canvas, walk, without_repeats
from torch import Tensor

from mmdlm.canvas import Part, Rows
from mmdlm.sampling import (
    ByModality,
    Drawn,
    Margin,
    Move,
    NegativeEntropy,
    Policy,
    Proportional,
    Proposal,
    State,
    Step,
    Unmask,
)
from mmdlm.sampling.order import rank

ORDERS = {"maskgit_plus": Drawn(), "topk_margin": Margin(), "entropy": NegativeEntropy()}


class Shifted(Stub):
    """The logits for a position are those of the one before it."""

    def logits(self, tokens: Tensor) -> Tensor:
        logits = super().logits(tokens)
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def race(state: State, part: Part, params: dict, tape: Tape) -> Proposal:
    """Draws from the tape: the law is tempered and cut, and its probability is the confidence."""
    law = part.logits if params["temperature"] == 0.0 else part.logits / params["temperature"]
    if params["temperature"] == 0.0:
        law = law.softmax(dim=1)
        return proposal_of(state, part, law.argmax(dim=1), law.amax(dim=1).log())
    law = truncated(law, params.get("top_p"), params.get("top_k")).softmax(dim=1)
    chosen = (law / tape.next().double()).argmax(dim=1)
    return proposal_of(state, part, chosen, law.gather(1, chosen[:, None])[:, 0].log())


@dataclass(frozen=True)
class Origin(Policy):
    """Every hole is revealed with its own coin, and only what is revealed is drawn."""

    params: dict
    tape: Tape

    def ask(self, state: State) -> Rows:
        t, s = times(state, self.params["eps"])
        holes = Rows.of(state.open)
        coins = holes.scatter(self.tape.next().double().flatten(), torch.ones(state.canvas.shape).double())
        return Rows.of(state.open & ((coins < 1 - s / t) | (state.after >= 1.0)[:, None]))

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        if parts:
            return race(state, parts[0], self.params, self.tape)
        if self.params["temperature"] > 0.0:
            self.tape.next()  # a draw of nothing
        return super().propose(state, parts)

    def move(self, step: Step) -> Move:
        return Move(step.proposal.valid, torch.zeros_like(step.proposal.valid))


@dataclass(frozen=True)
class Carried(Policy):
    """Fast-dLLM's Dream: at most the quota and what was refused before it, and of that the sure ones."""

    threshold: float
    steps: int
    carry: list[int] = field(default_factory=lambda: [0])

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        return race(state, parts[0], {"temperature": 0.0}, Tape([]))

    def move(self, step: Step) -> Move:
        state = step.state
        base = int(state.initial.sum()) // self.steps if int(state.step[0]) < self.steps else 0
        number = base + self.carry[0]
        place = rank(step.proposal.logp, state.open, state.runs)
        wanted = state.open & (place < number)
        write = wanted & ((place == 0) | (step.proposal.logp.exp() >= self.threshold))
        self.carry[0] = int(wanted.sum() - write.sum())
        return Move(write, torch.zeros_like(write))


@dataclass(frozen=True)
class Quota(Proportional):
    """The released rounding: the mean number of holes of a batch, in float32, and perhaps none."""

    def number(self, state: State, windows) -> Tensor:
        t, s = times(state, self.eps)
        mean = state.open.sum() / state.open.shape[0]
        number = (mean * (1 - s / t)).to(torch.int64)
        return number.expand(state.open.shape)


@dataclass(frozen=True)
class Dreamed(Unmask):
    params: dict = field(default_factory=dict)
    tape: Tape | None = None

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        if self.params["temperature"] == 0.0:
            return super().propose(state, parts)
        return race(state, parts[0], self.params, self.tape)

    def _scores(self, state, proposal, windows):
        scores = super()._scores(state, proposal, windows)
        if proposal is None or "alg_temp" not in self.params:
            return scores
        chance = (scores.text.double() / self.params["alg_temp"]).masked_fill(~state.open, -torch.inf)
        noisy = chance - self.tape.next().double().log()  # the n largest p / q
        return ByModality(noisy, noisy)


def times(state: State, eps: float) -> tuple[Tensor, Tensor]:
    grid = torch.linspace(1, eps, int(state.num_steps[0]) + 1)  # float32, as released
    step = int(state.step[0])
    return grid[step], grid[step + 1] if step + 1 < int(state.num_steps[0]) else torch.tensor(0.0)


def truncated(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    if top_p is not None and top_p < 1:
        ordered, place = logits.sort(dim=1, descending=True)
        mass = ordered.softmax(dim=1).cumsum(dim=1)
        drop = (mass > top_p).roll(1, dims=1)
        drop[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, place, drop), -torch.inf)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    return logits


@pytest.mark.parametrize("case", cases("dream"), ids=str)
def test_golden_sampler_dream(case: Case) -> None:
    params, tape = case.params, Tape(case.noise)
    mask, prompt = params["mask_token_id"], torch.tensor(params["prompt"])
    stub = Shifted(mask=mask, scale=params.get("logit_scale", 1.0))
    if params["alg"] == "origin":
        policy = Origin(params, tape)
    elif params["alg"] == "confidence_threshold":
        policy = Carried(params["threshold"], params["steps"])
    else:
        policy = Dreamed(
            quota=Quota(params.get("eps", 1e-3)),
            order=ORDERS[params["alg"]],
            temperature=params["temperature"],
            params=params,
            tape=tape,
        )
    tokens = torch.cat([prompt, torch.full((len(prompt), params["max_new_tokens"]), mask)], dim=1)
    canvas = text_canvas(tokens, prompt.shape[1], mask, given=case.name != "mask_inside_prompt")
    spare = params["max_new_tokens"] if isinstance(policy, Carried) else 0  # what it refuses takes longer
    states = list(walk(stub, canvas, policy, params["steps"] + spare))
    assert shown(states, mask) == without_repeats([*case.expected["calls"], case.expected["final"]])
