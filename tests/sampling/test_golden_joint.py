"""Text and image at once, canvas by canvas as released: MMaDA-Parallel in both versions, UniDisc."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from replay import Case, Stub, Tape, canvas_with_image, cases, proposal_of, shown, walk, without_repeats
from test_golden_ancestral import OneDraw, grid
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas, Part, Rows
from mmdlm.diffusion import Linear, LogLinear
from mmdlm.sampling import (
    Guided,
    Instead,
    Move,
    Path,
    Policy,
    Proposal,
    State,
    Step,
    Term,
    Unmask,
    WithoutGiven,
    denoise,
)
from mmdlm.sampling.order import count, rank

CODES = slice(24, 40)


@dataclass(frozen=True)
class Parallel(Policy):
    """Text goes on at every step, the image at some; the released counts, draws and noise.

    `ratio` is the text's clock, the image's counts follow it too, and one image position is never filled.
    """

    tape: Tape
    steps: int  # of the text
    image_steps: frozenset[int]
    slots: int
    text_start: int
    image_start: int
    text_temperature: float
    image_temperature: float
    normal: bool  # version A draws normal noise for the choice, M Gumbel's

    def clock(self, state: State) -> int:
        return int(state.step[0])

    def images(self, state: State) -> bool:
        return self.clock(state) in self.image_steps

    def texts(self, state: State) -> bool:
        return True

    def ask(self, state: State) -> Rows:
        wanted = (state.canvas.modality == TEXT) & self.texts(state)
        return Rows.of(state.open & (wanted | ((state.canvas.modality == IMAGE) & self.images(state))))

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        proposals = [self.draw(state, part) for part in parts]
        if not proposals:
            return super().propose(state, parts)
        first, *rest = proposals
        for other in rest:
            columns = (
                torch.where(other.valid, theirs, ours)
                for ours, theirs in (
                    (first.tokens, other.tokens),
                    (first.logp, other.logp),
                    (first.peak, other.peak),
                    (first.valid, other.valid),
                )
            )
            first = Proposal(*columns)
        return first

    def draw(self, state: State, part: Part) -> Proposal:
        logp = part.logits.log_softmax(dim=1)
        column = part.rows.index % state.canvas.shape[1]
        if part.ids == CODES:
            if self.normal and self.image_temperature == 0.0:
                chosen = logp.argmax(dim=1)
            else:
                order = self.order_of(state, column)
                chosen = (logp.exp() / self.tape.next().double()[order]).argmax(dim=1)
        elif self.text_temperature:
            u = self.tape.next().double()[0, column - self.text_start]
            if self.normal:
                chosen = (part.logits - self.text_temperature * (-u.log()).log()).argmax(dim=1)
            else:
                chosen = (part.logits.exp() / (-u.log()) ** self.text_temperature).argmax(dim=1)
        else:
            chosen = logp.argmax(dim=1)
        return proposal_of(state, part, chosen, logp.gather(1, chosen[:, None])[:, 0])

    def order_of(self, state: State, column: Tensor) -> Tensor:
        """The numbers of image positions among those of the image."""
        place = (state.canvas.modality[0] == IMAGE).long().cumsum(dim=0) - 1
        return place[column]

    def move(self, step: Step) -> Move:
        state = step.state
        text = state.open & (state.canvas.modality == TEXT) & self.texts(state)
        write = text & (rank(step.proposal.logp, text, state.runs) < self.text_number(state))
        if self.images(state):
            image = state.open & (state.canvas.modality == IMAGE)
            score = self.image_score(state, step.proposal)
            write = write | (image & (rank(score, image, state.runs) < self.image_number(state)))
        return Move(write, torch.zeros_like(write))

    def text_number(self, state: State) -> Tensor:
        planned, step = count(state.initial, state.runs), self.clock(state)
        return planned // self.steps + (step < planned % self.steps)

    def image_number(self, state: State) -> Tensor:
        holes = count(state.open, state.runs)
        ratio = torch.tensor((self.clock(state) + 1) / self.steps)
        keep = (self.slots * torch.cos(ratio * math.pi / 2)).floor().long()
        return holes - torch.minimum(keep, holes - 1).clamp(min=1)

    def image_score(self, state: State, proposal: Proposal) -> Tensor:
        ratio = (self.clock(state) + 1) / self.steps
        noise = torch.zeros(state.canvas.shape, dtype=torch.float64)
        drawn = self.tape.next().double()
        if not self.normal:
            drawn = -(-(drawn.clamp(min=1e-20).log())).clamp(min=1e-20).log()
        noise[state.canvas.modality == IMAGE] = drawn[0]
        sure = (proposal.logp.exp() + 1e-10).log() if self.normal else proposal.logp
        return sure + self.image_temperature * (1 - ratio) * noise


@pytest.mark.parametrize("case", cases("mmada_parallel_m"), ids=str)
def test_golden_sampler_mmada_parallel_m(case: Case) -> None:
    params = case.params
    mask, slots, length = params["mask_token_id"], params["num_vq_tokens"], params["max_seq_length"]
    given, other = params["input_ids"], params["uncond_input_ids"]
    start = len(given) + 1
    row = [*given, params["soi"], *[mask] * slots, params["eoi"], params["bos_id"], *[mask] * (length - 1)]
    text = start + slots + 2
    canvas = canvas_with_image(torch.tensor([row]), start, slots, mask, holes=slice(text, len(row)))
    stub = Stub(mask=mask, image=CODES)
    steps = params["text_steps"]
    branch = Instead(torch.tensor([other]))
    # the text is pushed towards the branch, as released
    terms = [Term(branch, -params["text_cfg"], TEXT), Term(branch, params["image_cfg"], IMAGE)]
    at = torch.linspace(steps // 4, steps - 1, params["image_steps"]).round().long().tolist()
    policy = Parallel(
        tape=Tape(case.noise),
        steps=steps,
        image_steps=frozenset(at),
        slots=slots,
        text_start=text - 1,
        image_start=start,
        text_temperature=params["text_temperature"],
        image_temperature=params["image_temperature"],
        normal=False,
    )
    states = list(walk(Guided(stub, terms, mask=mask), canvas, policy, steps))
    assert shown(states[:-1], mask) == without_repeats(case.expected["calls"])
    last = states[-1].canvas
    assert last.tokens[0, text - 1 :].tolist() == case.expected["text_ids"][0]
    codes = last.tokens[0, start : start + slots] - CODES.start
    left = last.masked[0, start : start + slots]
    assert left.sum() == 1
    assert codes[~left].tolist() == torch.tensor(case.expected["image_codes"][0])[~left].tolist()


@dataclass(frozen=True)
class Halves(Parallel):
    """Version A commits the text before it asks its branches: two steps of ours for one of theirs."""

    stale: Stale | None = None

    def ask(self, state: State) -> Rows:
        if self.texts(state):
            self.stale.see(state.canvas)
        return super().ask(state)

    def clock(self, state: State) -> int:
        return int(state.step[0]) // 2

    def texts(self, state: State) -> bool:
        return int(state.step[0]) % 2 == 0

    def images(self, state: State) -> bool:
        return not self.texts(state) and self.clock(state) in self.image_steps

    def text_number(self, state: State) -> Tensor:
        planned = count(state.initial, state.runs)
        keep = (planned.double() * (1 - (self.clock(state) + 1) / self.steps)).long()
        return count(state.open, state.runs) - keep


class Stale:
    """... and takes the image's own logits, unlike its branches', from before the text was committed."""

    def __init__(self, stub: Stub, canvas: Canvas) -> None:
        self.stub, self.prefix, self.before = stub, canvas.tokens[:, :5], canvas

    def begin(self, canvas: Canvas) -> Stale:
        return self

    def see(self, canvas: Canvas) -> None:
        """The one forward of a released step."""
        self.before = canvas
        self.stub.calls.append(self.stub.shown(canvas).tolist())

    def __call__(self, canvas: Canvas, rows: Rows, *, reduce=None) -> list[Part]:
        if not torch.equal(canvas.tokens[:, :5], self.prefix):
            return self.stub(canvas, rows)
        parts = self.stub(self.before, rows)
        self.stub.calls.pop()
        return parts


@pytest.mark.parametrize("case", cases("mmada_parallel"), ids=str)
def test_golden_sampler_mmada_parallel(case: Case) -> None:
    params = case.params
    tokens, mask, start = torch.tensor(params["input_ids"]), params["mask_token_id"], params["image_start"]
    columns = slice(params["text_start"], params["text_end"])
    width = tokens.shape[1] - 1 - start
    canvas = canvas_with_image(tokens, start, width, mask, holes=columns, skip=params["newline_id"])
    stub = Stub(mask=mask, image=CODES)
    terms = [
        Term(Instead(torch.tensor(params["uncon_text"])), params["cfg_scale"], IMAGE),
        Term(Instead(torch.tensor(params["uncon_image"])), params["cfg_img"], IMAGE),
    ]
    steps = params["text_steps"]
    at = torch.linspace(steps // 4, steps - 1, params["timesteps"]).round().long().tolist()
    policy = Halves(
        tape=Tape(case.noise[:-1]),
        steps=steps,
        image_steps=frozenset(at),
        slots=params["seq_len"],
        text_start=columns.start,
        image_start=start,
        text_temperature=params["text_temperature"],
        image_temperature=params["temperature"],
        normal=True,
        stale=(stale := Stale(stub, canvas)),
    )
    states = list(walk(Guided(stale, terms, mask=mask), canvas, policy, 2 * steps))
    calls, other = case.expected["calls"], params["uncon_text"][0]
    if params["cfg_scale"] == 0.0:  # the released sampler forwards a branch of scale 0 too
        calls = [call for call in calls if call[0][: len(other)] != other]
    assert without_repeats(stub.calls) == without_repeats(calls)
    last = states[-1].canvas
    assert last.tokens[0, columns].tolist() == case.expected["text_tokens"]
    image = last.modality[0] == IMAGE
    left = last.masked[0, image]
    assert left.sum() == 1  # ... which the released sampler then fills with any code
    codes = (last.tokens[0, image] - CODES.start).masked_fill(left, int(case.noise[-1][0] * 16))
    assert codes.tolist() == case.expected["image_codes"]


@dataclass(frozen=True)
class Timed:
    """A scale that follows the walk's time, not the share of holes."""

    scale: float
    times: Tensor
    now: list[int]

    def __call__(self, level: Tensor) -> Tensor:
        return torch.full_like(level, self.scale * (1 - float(self.times[self.now[0]])))


@dataclass(frozen=True)
class Given:
    """Numbers of holes that are filled, step by step and row by row."""

    numbers: Tensor  # (B, S)

    def number(self, state: State, windows) -> Tensor:
        return self.numbers[:, state.step[0]].unsqueeze(1).expand(state.canvas.shape)


@dataclass(frozen=True, kw_only=True)
class Globally(Unmask):
    """UniDisc's choice among all holes of a row, with draws and Gumbel noise from the tape."""

    tape: Tape
    times: Tensor
    heat: float
    now: list[int]

    def ask(self, state: State) -> Rows:
        self.now[0] = int(state.step[0])
        return Rows.of(state.open)

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        race = self.tape.next().double().unflatten(0, state.canvas.shape)
        tokens, logp = state.canvas.tokens, torch.zeros(state.canvas.shape, dtype=torch.float64)
        for part in parts:
            law = part.logits.softmax(dim=1)
            chosen = (law / part.rows.gather(race)[:, part.ids]).argmax(dim=1)
            tokens = part.rows.scatter(chosen + part.ids.start, tokens)
            logp = part.rows.scatter(law.gather(1, chosen[:, None])[:, 0].log(), logp)
        return Proposal(tokens, logp, logp, state.canvas.masked)

    def score(self, step: Step, windows) -> Tensor:
        u = self.tape.next().double()
        noise = -(-(u + 1e-10).log() + 1e-10).log()
        return step.proposal.logp + self.heat * float(self.times[int(step.state.step[0])]) * noise

    def _number(self, state: State, windows) -> Tensor:
        return self.quota.number(state, windows)


@pytest.mark.parametrize("case", cases("unidisc"), ids=str)
def test_golden_sampler_unidisc(case: Case) -> None:
    params = case.params
    mask, steps = params["mask_index"], params["num_steps"]
    tokens, keep = torch.tensor(params["x0"]), torch.tensor(params["keep"]).bool()
    image = torch.tensor(params["modality"]).bool()
    length = tokens.shape[1]
    canvas = Canvas(
        tokens=tokens.masked_fill(~keep, mask),
        modality=torch.where(image, IMAGE, TEXT).to(torch.uint8),
        fillable=~keep,
        masked=~keep,
        position=torch.arange(length)[None, :, None].expand(len(tokens), length, 2),
        segment=torch.zeros_like(tokens),
        span=image.long(),
    )
    ids = {"text": slice(0, 24), "image": CODES} if params["restrict_vocab_by_modality"] else {}
    stub, tape = Stub(mask=mask, **ids), Tape(case.noise)
    times = torch.linspace(1, params["eps"], steps + 1, dtype=torch.float64)
    if params["sampler"] == "maskgit":
        now = [0]
        policy = Globally(
            quota=Given(torch.tensor(case.expected["schedule"])),
            plan=Path(together=True),
            tape=tape,
            times=times,
            heat=params["maskgit_r_temp"],
            now=now,
        )
    else:
        schedule = Linear() if params["sampler"] == "cache" else LogLinear()
        policy = OneDraw(
            schedule=schedule, tape=tape, times=grid(steps, params["eps"]), mask_id=mask, size=40
        )
        now = policy.now
    terms = [Term(WithoutGiven(), Timed(params["cfg"], times, now))] if params["cfg"] else []
    last = 0 if params["sampler"] == "maskgit" else 1  # ancestral samplers end with a greedy step
    denoiser = Guided(stub, terms, mask=mask)
    states = list(denoise(denoiser, canvas, policy=policy, steps=steps + last, mask=mask))
    assert shown(states, mask) == without_repeats([*case.expected["canvases"], case.expected["final"]])
