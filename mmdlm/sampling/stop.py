"""Policies around policies: what ends a row before its time. Knows no model and no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdlm.canvas import TEXT, Canvas, Part, Rows
from mmdlm.sampling.order import ahead
from mmdlm.sampling.plan import first_of
from mmdlm.sampling.policy import Policy
from mmdlm.sampling.state import UNSETTLED, Move, Proposal, State, Step, apply


@dataclass(frozen=True)
class Around(Policy):
    """Another policy, asked first."""

    policy: Policy

    def begin(self, state: State) -> State:
        return self.policy.begin(state)

    def ask(self, state: State) -> Rows:
        return self.policy.ask(state)

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        return self.policy.propose(state, parts)


@dataclass(frozen=True)
class Ended(Around):
    """Another policy, and nothing behind the end of a text.

    Once `end` stands with no hole before it in its span, the rest of the span is `end` from the same step on,
    whatever the policy wrote there. A row whose text ends early is done early.
    """

    end: int

    def move(self, step: Step) -> Move:
        move = self.policy.move(step)
        after = apply(step.state, step.proposal, move, -1)
        noise = torch.zeros_like(move.noise) if move.filler is None else move.noise  # no word, and no hole
        behind = self._behind(step.state, after.replace(masked=after.masked | noise))
        filler = torch.full_like(step.state.canvas.tokens, -1) if move.filler is None else move.filler
        filler = torch.where(behind, self.end, filler)
        return replace(move, write=move.write & ~behind, noise=move.noise | behind, filler=filler)

    def _behind(self, state: State, canvas: Canvas) -> Tensor:
        """(B, L) bool: the positions of texts that have ended before them."""
        text = (canvas.modality == TEXT) & (state.runs >= 0)
        first = first_of(torch.where(text, state.runs, -1)).clamp(min=0)
        left = ahead(canvas.masked & text)
        ends = text & ~canvas.masked & (canvas.tokens == self.end) & (left == left.gather(1, first))
        number = ahead(ends)
        return text & (number > number.gather(1, first))


@dataclass(frozen=True)
class Settled(Around):
    """Another policy, until the model says the same again: then its most probable tokens are the rest.

    A row is settled when every position of it that is not settled yet was asked, the most probable token of
    each is the one it was at the last `steps` steps, and the mean entropy of their laws is below `nats`.
    DiffusionGemma's adaptive stop; the laws are the model's own, before temperature.
    """

    nats: float = 0.005
    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.nats <= 0.0:
            raise ValueError(f"wanted steps >= 1 and nats > 0, got {self.steps} and {self.nats}")

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        proposal = self.policy.propose(state, parts)
        doubt, first = torch.zeros_like(proposal.logp), torch.full_like(proposal.tokens, -1)
        for part in parts:
            law = part.logits.float().log_softmax(dim=1)
            entropy = -torch.where(law.isneginf(), 0.0, law.exp() * law).sum(dim=1)
            doubt = part.rows.scatter(entropy, doubt)
            first = part.rows.scatter(law.argmax(dim=1) + part.ids.start, first)
        before = state.memory.get("mode", torch.zeros_like(first)) - 1
        calm = state.memory.get("calm", torch.zeros_like(first))
        calm = torch.where(proposal.valid & (first == before), calm + 1, 0)
        # what was not asked has mode 0, as where there was no step before: never the same as an id, plus 1
        memory = {**proposal.memory, "mode": first + 1, "calm": calm, "doubt": doubt}
        return replace(proposal, memory=memory)

    def move(self, step: Step) -> Move:
        move, told = self.policy.move(step), step.proposal.memory
        asked = step.proposal.valid & step.state.initial
        wanted = step.state.open | step.state.memory.get(UNSETTLED, torch.zeros_like(asked))
        calm = (~asked | (told["calm"] >= self.steps)) & (asked | ~wanted)
        doubt = (told["doubt"] * asked).sum(dim=1) / asked.sum(dim=1).clamp(min=1)
        ends = (asked.any(dim=1) & calm.all(dim=1) & (doubt < self.nats)).unsqueeze(1)
        memory = {**move.memory, **{name: told[name] for name in ("mode", "calm", "doubt")}}
        if UNSETTLED in memory:
            memory[UNSETTLED] = memory[UNSETTLED] & ~ends
        filler = torch.full_like(step.proposal.tokens, -1) if move.filler is None else move.filler
        filler = torch.where(ends, told["mode"] - 1, filler)
        noise = torch.where(ends, asked, move.noise)
        return replace(move, write=move.write & ~ends, noise=noise, memory=memory, filler=filler)
