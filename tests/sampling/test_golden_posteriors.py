"""GIDD's and SEDD's samplers, canvas by canvas as released: any position may change at any step.

The released posteriors are written here; what is held to them is the loop: a written token may be written
over, become a hole again, and a row takes all its steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import pytest
import torch
from replay import Case, Stub, Tape, cases, text_canvas, without_repeats
from torch import Tensor

from mmdlm.canvas import Canvas, Part, Rows
from mmdlm.sampling import Move, Policy, Proposal, State, Step, denoise
from mmdlm.sampling.state import UNSETTLED

MASK, SIZE = 13, 14
TINY = 1e-4  # GIDD's times keep this far from 0 and 1


@dataclass(frozen=True)
class Posterior(Policy):
    """Draws every position of a row anew from a law (B, L, V) that the step and the model's logits give."""

    tape: Tape
    steps: int

    def ask(self, state: State) -> Rows:
        return Rows.of(state.initial)

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        (part,) = parts
        logits = part.rows.scatter(part.logits, torch.zeros(*state.canvas.shape, SIZE, dtype=torch.float64))
        tokens = self.draw(logits, ids(state.canvas), int(state.step[0]))
        zeros = torch.zeros(tokens.shape, dtype=torch.float64)
        return Proposal(tokens, zeros, zeros, torch.ones_like(state.canvas.masked))

    def move(self, step: Step) -> Move:
        hidden = step.proposal.tokens == MASK
        return Move(~hidden, hidden, {UNSETTLED: step.state.initial})

    @abstractmethod
    def draw(self, logits: Tensor, z: Tensor, step: int) -> Tensor:
        """(B, L): what stands at each position after the step, the mask among it."""


def ids(canvas: Canvas) -> Tensor:
    return torch.where(canvas.masked, MASK, canvas.tokens)


def inverse(law: Tensor, u: Tensor) -> Tensor:
    """The first id at which the distribution function exceeds u."""
    return (law.cumsum(dim=2) > u.double().unsqueeze(2)).long().argmax(dim=2)


def one_hot(z: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(z, SIZE).double()


@dataclass(frozen=True)
class Hybrid(Posterior):
    """GIDD: masks and uniform noise together (arXiv:2503.04482)."""

    p_uniform: float
    min_p: float

    def marginal(self, t: float) -> tuple[float, Tensor]:
        """alpha, and (V,) the noise beta pi."""
        share = max(math.exp(-20), self.p_uniform)
        c = 2 * share / (1 - share) * math.sqrt(t * (1 - t))
        pi = torch.full((SIZE,), c / (SIZE - 1), dtype=torch.float64)
        pi[MASK] = t
        return (1 - t) / (1 + c), pi / (1 + c)

    def draw(self, logits: Tensor, z: Tensor, step: int) -> Tensor:
        at = [(1 - 2 * TINY) * k / self.steps + TINY for k in range(self.steps + 1)]
        i = self.steps - 1 - step
        (alpha_t, beta_t), (alpha_s, beta_s) = self.marginal(at[i]), self.marginal(at[max(0, i - 1)])
        p0 = logits.softmax(dim=2)
        q_s, q_t = alpha_s * p0 + beta_s, alpha_t * p0 + beta_t
        alpha = alpha_t / alpha_s
        beta = (beta_t - alpha * beta_s)[z].unsqueeze(2)
        law = q_s * (alpha * one_hot(z) + beta) / q_t.gather(2, z.unsqueeze(2))
        if self.min_p > 0:
            law = law.masked_fill(law < self.min_p, 0.0)
            law = law / law.sum(dim=2, keepdim=True)
        return inverse(law, self.tape.next())


@dataclass(frozen=True)
class Inverse(Posterior):
    """The masked sampler in GIDD's code."""

    def draw(self, logits: Tensor, z: Tensor, step: int) -> Tensor:
        def masked(t: float) -> float:
            return (1 - TINY) * min(max(t, TINY), 1.0)

        at = torch.linspace(TINY, 1 - TINY, self.steps + 1, dtype=torch.float64).tolist()
        i = self.steps - 1 - step
        p0 = logits.softmax(dim=2)
        if i == 0:
            return torch.where(z == MASK, p0.argmax(dim=2), z)
        t, s = masked(at[i]), masked(at[i - 1])
        law = p0 * (t - s)
        law[..., MASK] = s
        return torch.where(z == MASK, inverse(law / t, self.tape.next()), z)


def replayed(case: Case, policy: Posterior, stub: Stub, canvas: Canvas, steps: int) -> None:
    states = list(denoise(stub, canvas, policy=policy, steps=steps, mask=-1))
    seen = [stub.shown(state.canvas).tolist() for state in states]
    assert without_repeats(seen) == without_repeats([*case.expected["calls"], case.expected["final"]])


class Unmasked(Stub):
    """The mask has no logit."""

    def logits(self, tokens: Tensor) -> Tensor:
        return super().logits(tokens).index_fill(2, torch.tensor([MASK]), -torch.inf)


@pytest.mark.parametrize("case", cases("ancestral_gidd"), ids=str)
def test_golden_sampler_ancestral_gidd(case: Case) -> None:
    params, tape = case.params, Tape(case.noise)
    steps = params["num_steps"]
    if "p_uniform" in params:
        policy = Hybrid(tape, steps, params["p_uniform"], params["min_p"])
    else:
        policy = Inverse(tape, steps)
    tokens = torch.full((params["batch"], params["length"]), MASK)
    replayed(case, policy, Unmasked("stub_ancestral", mask=MASK), text_canvas(tokens, 0, MASK), steps)


@dataclass(frozen=True)
class Scored(Posterior):
    """SEDD (arXiv:2310.16834): the model's logits are log scores, half of the stub's."""

    params: dict

    @property
    def uniform(self) -> bool:
        return self.params["graph"] == "uniform"

    def noise(self, t: float) -> tuple[float, float]:
        """sigma and its derivative."""
        if self.params["noise"] == "loglinear":
            return -math.log1p(-(1 - 1e-3) * t), (1 - 1e-3) / (1 - (1 - 1e-3) * t)
        low, high = self.params["geometric_sigma"]
        sigma = low ** (1 - t) * high**t
        return sigma, sigma * math.log(high / low)

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        (part,) = parts
        logits = part.rows.scatter(part.logits, torch.zeros(*state.canvas.shape, SIZE, dtype=torch.float64))
        z = state.canvas.tokens if self.uniform else ids(state.canvas)
        tokens = self.draw(logits, z, int(state.step[0]))
        zeros = torch.zeros(tokens.shape, dtype=torch.float64)
        return Proposal(tokens, zeros, zeros, torch.ones_like(state.canvas.masked))

    def move(self, step: Step) -> Move:
        if not self.uniform:
            return super().move(step)
        return Move(step.proposal.valid, ~step.proposal.valid, {UNSETTLED: step.state.initial})

    def draw(self, logits: Tensor, z: Tensor, step: int) -> Tensor:
        eps = self.params["eps"]
        dt, t = (1 - eps) / self.steps, 1 - (1 - eps) * step / self.steps
        sigma, slope = self.noise(t)
        logs = 0.5 * logits - (0.0 if self.uniform else math.log(math.expm1(sigma)) + math.log(SIZE - 1))
        score = logs.scatter(2, z.unsqueeze(2), 0.0).exp()
        if step == self.steps:
            law = self.staggered(score, sigma) * self.transition(z, sigma)
            law = law if self.uniform else law[..., :MASK]
        elif self.params["predictor"] == "euler":
            hidden = (z == MASK).unsqueeze(2).double()
            rate = (score * (1 / SIZE if self.uniform else hidden)).scatter(2, z.unsqueeze(2), 0.0)
            rate = rate.scatter(2, z.unsqueeze(2), -rate.sum(dim=2, keepdim=True))
            law = one_hot(z) + dt * slope * rate
        else:
            gap = sigma - self.noise(t - dt)[0]
            law = self.staggered(score, gap) * self.transition(z, gap)
        return (law / (1e-10 - (self.tape.next().double() + 1e-10).log())).argmax(dim=2)

    def staggered(self, score: Tensor, gap: float) -> Tensor:
        total = score.sum(dim=2)
        if self.uniform:
            return math.expm1(-gap) / (SIZE * math.exp(-gap)) * total.unsqueeze(2) + score / math.exp(-gap)
        score = score * math.exp(gap)
        score[..., MASK] += (1 - math.exp(gap)) * total
        return score

    def transition(self, z: Tensor, gap: float) -> Tensor:
        stays = math.exp(-gap) * one_hot(z)
        if self.uniform:
            return stays + (1 - math.exp(-gap)) / SIZE
        return stays + (1 - math.exp(-gap)) * (z == MASK).unsqueeze(2)


class Anything(Stub):
    """No id is a mask: the network is shown what stands in the holes too."""

    def shown(self, canvas: Canvas) -> Tensor:
        return canvas.tokens


@pytest.mark.parametrize("case", cases("ancestral_sedd"), ids=str)
def test_golden_sampler_ancestral_sedd(case: Case) -> None:
    params, tape = case.params, Tape(case.noise)
    steps, shape = params["num_steps"], (params["batch"], params["length"])
    if params["graph"] == "uniform":
        tokens, stub = (tape.next().double() * SIZE).floor().long(), Anything("stub_ancestral", mask=MASK)
    else:
        tokens, stub = torch.full(shape, MASK), Stub("stub_ancestral", mask=MASK)
    canvas = text_canvas(tokens, 0, MASK)
    canvas = canvas.replace(masked=torch.ones_like(canvas.masked))
    replayed(case, Scored(tape, steps, params), stub, canvas, steps + 1)
