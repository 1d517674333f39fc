"""MaskGIT's kin, canvas by canvas as released: MMaDA, aMUSEd, Lumina-DiMOO."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from replay import (
    Case,
    Stub,
    Tape,
    canvas_with_image,
    cases,
    plain,
    proposal_of,
    shown,
    walk,
    without_repeats,
)
from torch import Tensor

from mmdlm.canvas import Part, Rows
from mmdlm.sampling import (
    Guided,
    Instead,
    Proposal,
    Scheduled,
    Spliced,
    State,
    Step,
    Term,
    Unmask,
)
from mmdlm.sampling.order import count

CODES = slice(24, 40)


def cosine(ratio: Tensor) -> Tensor:
    return torch.cos(ratio * math.pi * 0.5)


SCHEDULES = {
    "cosine": cosine,
    "linear": lambda ratio: 1 - ratio,
    "pow2": lambda ratio: 1 - ratio**2,
    "sigmoid": lambda ratio: sigmoid(ratio),
}


def sigmoid(ratio: Tensor, start: int = -3, end: int = 3, tau: float = 1.0) -> Tensor:
    v_start, v_end = torch.sigmoid(torch.tensor(start / tau)), torch.sigmoid(torch.tensor(end / tau))
    output = torch.sigmoid((ratio * (end - start) + start) / tau)
    return torch.clip((v_end - output) / (v_end - v_start), 1e-6, 1.0)


@dataclass(frozen=True)
class Kept(Scheduled):
    """The released counts: of all slots, known or not, in float32, and never fewer than one is kept."""

    name: str = "cosine"
    slots: int = 16

    def number(self, state: State, windows) -> Tensor:
        ratio = torch.tensor(1.0 * (int(state.step[0]) + 1) / int(state.num_steps[0]))
        keep = (self.slots * SCHEDULES[self.name](ratio)).floor().long()
        holes = count(state.open, windows.runs)
        return holes - torch.minimum(holes - 1, keep).clamp(min=1)


@dataclass(frozen=True)
class Released(Unmask):
    """The released draws and noise from the tape, the released temperature, and its one mask that stays."""

    tape: Tape | None = None
    start: int = 0
    slots: int = 16
    heat: tuple[float, ...] = ()

    def ask(self, state: State) -> Rows:
        return Rows.of(state.open)

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        (part,) = parts
        law = part.logits.softmax(dim=1)
        sample, column = part.rows.index // state.canvas.shape[1], part.rows.index % state.canvas.shape[1]
        race = self.tape.next().double()[sample * self.slots + column - self.start]
        chosen = (law / race).argmax(dim=1)
        return proposal_of(state, part, chosen, law.gather(1, chosen[:, None])[:, 0].clamp(min=1e-20).log())

    def _number(self, state: State, windows) -> Tensor:
        return self.quota.number(state, windows)

    def score(self, step: Step, windows) -> Tensor:
        u = self.tape.next().double()
        noise = torch.zeros(step.state.canvas.shape, dtype=torch.float64)
        inner = -(-(u.clamp(min=1e-20).log())).clamp(min=1e-20).log()
        noise[:, self.start : self.start + self.slots] = inner
        return step.proposal.logp + self.heat[int(step.state.step[0])] * noise


@pytest.mark.parametrize("case", cases("mmada_t2i"), ids=str)
def test_golden_sampler_mmada_t2i(case: Case) -> None:
    params = case.params
    tokens, mask, steps = torch.tensor(params["input_ids"]), params["mask_token_id"], params["timesteps"]
    start = params["text_prefix_len"] + 2
    denoiser = stub = Stub(mask=mask, image=CODES)
    if params["guidance_scale"]:
        other = torch.tensor(params["uncond_input_ids"])[:, : params["text_prefix_len"] + 1]
        denoiser = Guided(stub, [Term(Instead(other), params["guidance_scale"])], mask=mask)
    heat, heats = params["temperature"], []
    for step in range(steps):
        heat = heat * (1.0 - (step + 1) / steps)  # it compounds, where MaskGIT's falls in a straight line
        heats.append(heat)
    policy = Released(
        quota=Kept(name=params["schedule"], slots=params["num_vq_tokens"]),
        tape=Tape(case.noise),
        start=start,
        slots=params["num_vq_tokens"],
        heat=tuple(heats),
    )
    canvas = canvas_with_image(tokens, start, params["num_vq_tokens"], mask)
    states = list(walk(denoiser, canvas, policy, steps))
    assert shown(states, mask) == without_repeats([*case.expected["calls"], case.expected["final"]])


@pytest.mark.parametrize("case", cases("amused"), ids=str)
def test_golden_sampler_amused(case: Case) -> None:
    params = case.params
    mask, steps = params["stub_mask_id"], params["num_inference_steps"]
    prompt = torch.tensor(params["prompt"])
    slots = math.prod(params["grid"])
    known = params["initial"] or [[params["scheduler_mask_id"]] * slots] * len(prompt)
    codes = torch.tensor(known)
    ids = torch.where(codes == params["scheduler_mask_id"], mask, codes + params["code_offset"])
    tokens = torch.cat([prompt, ids], dim=1)
    policy = Released(
        quota=Kept(name=params["masking_schedule"], slots=slots * params["starting_mask_ratio"]),
        tape=Tape(case.noise),
        start=prompt.shape[1],
        slots=slots,
        heat=tuple(case.expected["temperatures"]),
    )
    canvas = canvas_with_image(tokens, prompt.shape[1], slots, mask)
    policy = AmusedReleased(**vars(policy))
    states = list(walk(Stub(mask=mask, image=CODES), canvas, policy, steps))
    ours = shown(states, mask)
    theirs = []
    for entry in case.expected["steps"]:
        codes = torch.tensor(entry["prev_sample"])
        theirs.append(
            torch.cat(
                [prompt, torch.where(codes == params["scheduler_mask_id"], mask, codes + 24)], dim=1
            ).tolist()
        )
    assert ours == without_repeats([tokens.tolist(), *theirs])


class AmusedReleased(Released):
    """aMUSEd fills everything at its last step, without noise on the choice."""

    def _number(self, state: State, windows) -> Tensor:
        last = int(state.step[0]) + 1 == int(state.num_steps[0])
        return (
            state.open.sum(dim=1, keepdim=True).expand(state.open.shape)
            if last
            else super()._number(state, windows)
        )

    def score(self, step: Step, windows) -> Tensor:
        last = int(step.state.step[0]) + 1 == int(step.state.num_steps[0])
        return step.proposal.logp if last else super().score(step, windows)


@dataclass(frozen=True)
class LuminaReleased(Released):
    """Gumbel noise on every draw and on the choice, the same at every step; draws and noise from the tape."""

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        (part,) = parts
        logp = part.logits.log_softmax(dim=1)
        noisy = logp
        if self.temperature:
            noisy = logp / self.temperature + lumina_gumbel(self.tape.next()[0])
        chosen = noisy.argmax(dim=1)
        return proposal_of(
            state, part, chosen, logp.gather(1, chosen[:, None])[:, 0].exp().clamp(min=1e-20).log()
        )

    def score(self, step: Step, windows) -> Tensor:
        noise = torch.zeros(step.state.canvas.shape, dtype=torch.float64)
        noise[step.state.open] = lumina_gumbel(self.tape.next()[0])
        return step.proposal.logp + self.temperature * noise


@dataclass(frozen=True)
class LuminaKept(Scheduled):
    """The released counts in float32, and all at the last step."""

    def number(self, state: State, windows) -> Tensor:
        holes, first = count(state.open, windows.runs), count(state.initial, windows.runs)
        step, steps = int(state.step[0]) + 1, int(state.num_steps[0])
        if step == steps:
            return holes
        keep = (first * cosine(torch.tensor(step / steps))).floor().long().clamp(min=1)
        return holes - torch.minimum(keep, holes - 1)


def lumina_gumbel(u: Tensor) -> Tensor:
    return -((-((u.double() + 1e-20).log()) + 1e-20).log())


def pictures() -> list[Case]:
    return [case for case in cases("lumina") if case.params["task"] != "mmu"]


@pytest.mark.parametrize("case", pictures(), ids=str)
def test_golden_sampler_lumina(case: Case) -> None:
    params = case.params
    tokens, mask, start = torch.tensor(params["input_ids"]), params["mask_token_id"], params["code_start"]
    stub = Stub(mask=mask, image=CODES)
    terms = []
    if params["task"] == "t2i":
        prefixes = [("uncond_prefix", "cfg_scale")]
    else:
        prefixes = [("uncond_text_prefix", "cfg_scale"), ("uncond_image_prefix", "cfg_img")]
    for name, scale in prefixes:
        prefix = plain(torch.tensor(params[name]))
        terms.append(Term(Spliced(prefix, start - 2), params[scale]))
    policy = LuminaReleased(quota=LuminaKept(), temperature=params["temperature"], tape=Tape(case.noise))
    canvas = canvas_with_image(tokens, start, tokens.shape[1] - 2 - start, mask, skip=params["newline_id"])
    states = list(walk(Guided(stub, terms, mask=mask), canvas, policy, params["timesteps"]))
    calls = case.expected["calls"]
    if case.name == "i2i_t1_imgcfg_only":  # the released sampler forwards a branch of scale 0 too
        calls = [call for number, call in enumerate(calls) if number % 3 != 1]
    assert stub.calls == calls
    assert shown([states[-1]], mask) == [case.expected["final"]]
