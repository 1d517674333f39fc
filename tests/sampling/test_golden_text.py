"""LLaDA, MMaDA's captions, Fast-dLLM and Dream, canvas by canvas as their released samplers made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from replay import Case, Stub, Tape, cases, proposal_of, shown, text_canvas, walk, without_repeats
from torch import Tensor

from mmdlm.canvas import Part, Rows
from mmdlm.sampling import (
    Blocks,
    Even,
    Factor,
    Fixed,
    Guided,
    Move,
    Path,
    Proposal,
    State,
    Step,
    Term,
    Threshold,
    Unmask,
    Windows,
    WithoutGiven,
)
from mmdlm.sampling.order import rank

EOS = 21  # of the stub


@dataclass(frozen=True)
class TapedOrder:
    """A uniform from the tape for every position."""

    tape: Tape

    def score(self, state, proposal):
        return None if proposal is None else self.tape.next().double()


@dataclass(frozen=True)
class ScoreAbove:
    """The released rule compares what it orders by, also where that is chance."""

    threshold: float

    def sure(self, step: Step, score: Tensor, windows: Windows) -> Tensor:
        return score >= self.threshold


@dataclass(frozen=True)
class Gumbelled(Unmask):
    """LLaDA's draw: argmax exp(l) / (-log u)^T, u for every logit of the canvas."""

    tape: Tape | None = None

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        if self.tape is None or self.temperature == 0.0:
            return super().propose(state, parts)
        (part,) = parts
        u = part.rows.gather(self.tape.next())
        chosen = (part.logits.exp() / (-u.log()) ** self.temperature).argmax(dim=1)
        logp = part.logits.log_softmax(dim=1).gather(1, chosen[:, None])[:, 0]
        return proposal_of(state, part, chosen, logp)


def canvas_of(case: Case, new: int) -> tuple[torch.Tensor, int, int]:
    mask = case.params.get("mask_id", case.params.get("mask_token_id"))
    prompt = torch.tensor(case.params["prompt"])
    return torch.cat([prompt, torch.full((len(prompt), new), mask)], dim=1), prompt.shape[1], mask


class Silenced(Stub):
    """One id is never chosen."""

    def __init__(self, silent: int, **settings) -> None:
        super().__init__(**settings)
        self.silent = silent

    def logits(self, tokens: Tensor) -> Tensor:
        return super().logits(tokens).index_fill(2, torch.tensor([self.silent]), -torch.inf)


@dataclass(frozen=True)
class Stolen(Gumbelled):
    """LLaDA's defect: masks in the prompt are candidates of every block, but are not counted in its quota."""

    block: int = 1
    prompt: int = 0

    def ask(self, state: State) -> Rows:
        return Rows.of(state.open)

    def move(self, step: Step) -> Move:
        state, place = step.state, torch.arange(step.state.canvas.shape[1])
        blocks = (state.canvas.shape[1] - self.prompt) // self.block
        each = int(state.num_steps[0]) // blocks
        number, taken = divmod(int(state.step[0]), each)
        start, stop = self.prompt + number * self.block, self.prompt + (number + 1) * self.block
        # the block's quota is split when it begins; what the masks of the prompt took of it is lost
        if taken == 0:
            self.planned[:] = [int((state.open & (place >= start) & (place < stop)).sum())]
        due = self.planned[0] // each + (taken < self.planned[0] % each)
        candidates = state.open & (place < stop)
        write = candidates & (rank(step.proposal.logp, candidates, torch.zeros_like(candidates).long()) < due)
        return Move(write, torch.zeros_like(write))

    planned: list[int] = field(default_factory=list)


def check(
    case: Case,
    policy: Unmask,
    steps: int,
    new: int,
    stub: Stub | None = None,
    ends: Callable[[State], bool] | None = None,
) -> None:
    tokens, prompt, mask = canvas_of(case, new)
    denoiser = stub = stub or Stub(mask=mask, scale=case.params.get("logit_scale", 1.0))
    if scale := case.params.get("cfg_scale", 0.0):
        denoiser = Guided(stub, [Term(WithoutGiven(), scale)], mask=mask)
    canvas = text_canvas(tokens, prompt, mask, given=not isinstance(policy, Stolen))
    states = []
    for state in walk(denoiser, canvas, policy, steps):
        states.append(state)
        if ends is not None and ends(state):
            break
    assert shown(states, mask) == without_repeats([*case.expected["calls"], case.expected["final"]])


def llada(case: Case, new: int) -> tuple[Gumbelled, int]:
    params, tape = case.params, Tape(case.noise)
    order = {"order": TapedOrder(tape)} if params.get("remasking") == "random" else {}
    policy = Gumbelled(
        quota=Even(),
        plan=Path(blocks=Blocks(params["block_length"])),
        temperature=params.get("temperature", 0.0),
        tape=tape,
        **order,
    )
    return policy, params["steps"]


@pytest.mark.parametrize("case", cases("llada"), ids=str)
def test_golden_sampler_llada(case: Case) -> None:
    policy, steps = llada(case, case.params["gen_length"])
    if case.name == "mask_inside_prompt":
        prompt = len(case.params["prompt"][0])
        policy = Stolen(**vars(policy), block=case.params["block_length"], prompt=prompt)
    stub = Silenced(EOS, mask=case.params["mask_id"]) if case.params.get("logits_eos_inf") else None
    check(case, policy, steps, case.params["gen_length"], stub)


@pytest.mark.parametrize("case", cases("mmada_mmu"), ids=str)
def test_golden_sampler_mmada_mmu(case: Case) -> None:
    policy, steps = llada(case, case.params["max_new_tokens"])
    ends = None
    if "eot_token" in case.params:

        def ends(state: State) -> bool:
            """The released rule: a block is full and its last token is the end of text, in every row."""
            _, prompt, _ = canvas_of(case, 0)
            last = prompt + case.params["block_length"] - 1
            done = [
                c
                for c in range(last, state.canvas.shape[1], last - prompt + 1)
                if not state.canvas.masked[:, prompt : c + 1].any()
            ]
            return any((state.canvas.tokens[:, c] == case.params["eot_token"]).all() for c in done)

    check(case, policy, steps, case.params["max_new_tokens"], ends=ends)


@pytest.mark.parametrize("case", cases("fast_dllm"), ids=str)
def test_golden_sampler_fast_dllm(case: Case) -> None:
    params = case.params
    length, block = params["gen_length"], params["block_length"]
    policy = Unmask(quota=Fixed(1), plan=Path(blocks=Blocks(block)), temperature=0.0)
    if params.get("factor"):
        policy, steps = replace(policy, rule=Factor(params["factor"])), length
    elif params.get("threshold"):
        policy, steps = replace(policy, rule=Threshold(params["threshold"])), length
        if params.get("remasking") == "random":
            rule = ScoreAbove(params["threshold"])
            policy = replace(policy, rule=rule, order=TapedOrder(Tape(case.noise)))
    else:
        policy, steps = replace(policy, quota=Even()), params["steps"]
    check(case, policy, steps, length)


class Lowered(Stub):
    """One id is as good as never chosen."""

    def __init__(self, low: int, **settings) -> None:
        super().__init__(**settings)
        self.bias = self.bias.clone()
        self.bias[:, low] -= 60


def answers() -> list[Case]:
    return [case for case in cases("lumina") if case.params["task"] == "mmu"]


@pytest.mark.parametrize("case", answers(), ids=str)
def test_golden_sampler_lumina_answers(case: Case) -> None:
    params = case.params
    tokens, mask, start = torch.tensor(params["input_ids"]), params["mask_id"], params["code_start"]
    denoiser = Lowered(params["eos_id"], mask=mask)
    if scale := params.get("cfg_scale", 0.0):
        denoiser = Guided(denoiser, [Term(WithoutGiven(), scale)], mask=mask)
    canvas = text_canvas(tokens, start, mask, end=start + params["gen_length"])
    policy, steps = llada(case, params["gen_length"])
    states = list(walk(denoiser, canvas, policy, steps))
    assert shown(states, mask) == without_repeats([*case.expected["calls"], case.expected["final"]])
