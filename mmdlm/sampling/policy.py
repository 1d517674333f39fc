"""Policies: where the model is asked, what is drawn, what is written. Knows no model and no tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Part, Rows
from mmdlm.diffusion.schedule import Linear, Schedule
from mmdlm.sampling.draw import CHOICE, REVEAL, TOKEN, draw, gumbel
from mmdlm.sampling.modality import ByModality, by_modality, spread
from mmdlm.sampling.order import Drawn, Order, rank
from mmdlm.sampling.plan import Path, Plan, Windows, check_whole
from mmdlm.sampling.quota import Quota, Rule, Scheduled
from mmdlm.sampling.remask import Remask
from mmdlm.sampling.revise import Revision
from mmdlm.sampling.scale import Ramp, Scale, scaled
from mmdlm.sampling.state import UNSETTLED, Move, Proposal, State, Step

_ALL = 1 << 62  # a top_k that cuts nothing


class Policy(ABC):
    """One way to fill a canvas. Its methods are pure, and each works on all rows of the batch at once."""

    def begin(self, state: State) -> State:
        """The state before the first step. Raises ValueError where this policy cannot work on it."""
        return state

    def ask(self, state: State) -> Rows:
        """Where proposals are wanted; by default at every hole that is still open."""
        return Rows.of(state.open)

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        """Tokens for the rows that were asked; by default drawn from the model's own law."""
        return propose(state, parts)

    @abstractmethod
    def move(self, step: Step) -> Move:
        """What to write and what to noise again; heeded only at `state.initial`, in rows not done."""


def propose(
    state: State,
    parts: list[Part],
    *,
    temperature: float | ByModality[float] = 1.0,
    top_k: int | ByModality[int | None] | None = None,
    top_p: float | ByModality[float | None] | None = None,
    needs: frozenset[str] = frozenset(),
) -> Proposal:
    """Draws a token at every row of `parts`, with the stream of that row; see `draw` for the settings."""
    modality = state.canvas.modality
    greedy = not isinstance(temperature, ByModality) and temperature == 0.0  # then chance is not asked
    u = torch.zeros_like(modality, dtype=torch.float64) if greedy else state.uniform(TOKEN)
    tokens = state.canvas.tokens
    logp = torch.zeros(state.canvas.shape, dtype=torch.float32, device=state.canvas.device)
    peak, valid = logp, torch.zeros_like(logp, dtype=torch.bool)
    columns, memory = dict.fromkeys(needs, logp), {}
    for part in parts:
        image = part.rows.gather(modality) == IMAGE
        drawn = draw(
            part.logits,
            part.rows.gather(u),
            temperature=_by_row(temperature, image, 1.0),
            top_k=_by_row(top_k, image, _ALL),
            top_p=_by_row(top_p, image, 1.0),
            needs=needs - {"kl", "current"},
        )
        told = dict(drawn.columns)
        if "current" in needs:
            stands = part.local(part.rows.gather(state.canvas.tokens)).clamp(0, part.logits.shape[1] - 1)
            told["current"] = part.logits.float().log_softmax(dim=1).gather(1, stands.unsqueeze(1)).squeeze(1)
        if "kl" in needs:
            told["kl"], memory[f"law/{part.ids.start}"] = _moved(state, part)
        tokens = part.rows.scatter(drawn.tokens + part.ids.start, tokens)
        logp = part.rows.scatter(drawn.logp, logp)
        peak = part.rows.scatter(drawn.peak, peak)
        valid = part.rows.scatter(part.rows.valid, valid)
        columns = {name: part.rows.scatter(told[name], old) for name, old in columns.items()}
    return Proposal(tokens, logp, peak, valid, columns, memory)


def _moved(state: State, part: Part) -> tuple[Tensor, Tensor]:
    """(M,) KL(law now || law at the step before), infinite where there was none, and (B, L, V) the law."""
    law = part.logits.float().log_softmax(dim=1)
    column = law.new_zeros(*state.canvas.shape, law.shape[1])
    before = part.rows.gather(state.memory.get(f"law/{part.ids.start}", column))
    mass = law.exp()
    kl = torch.where(mass > 0, mass * (law - before), 0.0).sum(dim=1)
    known = (before < 0).any(dim=1)  # a law of zeros is none
    return torch.where(known, kl, torch.inf), part.rows.scatter(law, column)


@dataclass(frozen=True)
class Unmask(Policy):
    """Fills, run by run, those that come first in an order: as many as a quota wants, and what a rule allows.

    The score is that of `order` plus choice_temperature * Gumbel noise, a number w meaning w (1 - c), c the
    run's own time; every number is computed afresh from c at each step. When a run's time ends, all of it is
    filled. Without a rule, an order that looks at no proposal has the model asked only where it writes. All
    settings but the plan may differ by modality.

    MaskGIT (arXiv:2202.04200) is the drawn order with a cosine quota and noise on the choice, LLaDA
    (arXiv:2502.09992) the same with an even quota and none; `mmdlm.sampling.presets` has many more.
    """

    quota: Quota | ByModality[Quota] = Scheduled()
    order: Order | ByModality[Order] = Drawn()
    rule: Rule | ByModality[Rule | None] | None = None
    plan: Plan = Path()
    revision: Revision | None = None
    temperature: float | ByModality[float] = 1.0
    choice_temperature: float | Scale | ByModality[float | Scale] = 0.0
    top_k: int | ByModality[int | None] | None = None
    top_p: float | ByModality[float | None] | None = None

    def __post_init__(self) -> None:
        _check_draw(self.temperature, self.top_k, self.top_p)
        _check_not_negative("choice_temperature", self.choice_temperature)
        if self.revision is not None:
            self.revision.check(self.plan, ByModality.of(self.order).both, ByModality.of(self.rule).both)

    def begin(self, state: State) -> State:
        """Raises ValueError for an order that does not fit the canvas."""
        if self.revision is not None:
            state = self.revision.begin(state)
        for modality, order in zip((TEXT, IMAGE), ByModality.of(self.order).both, strict=True):
            if hasattr(order, "check"):
                order.check(state, modality)
        return state

    def ask(self, state: State) -> Rows:
        """The holes that this step writes, as far as they are known; else all that are active."""
        windows = self.windows(state)
        number, scores = self._number(state, windows), self._scores(state, None, windows)
        wanted = windows.active
        for modality, rule, score in zip(
            (TEXT, IMAGE), ByModality.of(self.rule).both, scores.both, strict=True
        ):
            if rule is None:
                mine = state.canvas.modality == modality
                due = windows.led
                if score is not None:
                    due = due & (rank(score, windows.active, windows.runs) < number)
                wanted = wanted & (~mine | due)
        if self.revision is not None:
            wanted = wanted | self.revision.looks(state, windows)
        return Rows.of(wanted)

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        return propose(
            state, parts, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, needs=self.needs
        )

    def move(self, step: Step) -> Move:
        windows = self.windows(step.state)
        candidates = windows.active & step.proposal.valid
        score, number = self.score(step, windows), self._number(step.state, windows)
        write = windows.led & (rank(score, candidates, windows.runs) < number)
        if self.rule is not None:
            write = write | by_modality(
                self.rule,
                step.state.canvas,
                lambda rule: torch.zeros_like(write) if rule is None else rule.sure(step, score, windows),
            )
        memory = {**self.plan.remember(step.state, windows), **step.proposal.memory}
        for rule in ByModality.of(self.rule).both:
            if hasattr(rule, "remember"):
                memory |= rule.remember(step)
        write, noise = candidates & write, torch.zeros_like(write)
        if self.revision is None:
            return Move(write, noise, memory)
        write, noise = self.revision.revise(step, score, windows, write, number)
        memory |= self.revision.remember(step, windows, write)
        return Move(write, noise, memory, self.revision.filler(step.state))

    def windows(self, state: State) -> Windows:
        """What a step may write to: the plan's holes, and what the revision adds to them."""
        return state.form(self, lambda: self._widened(state))

    def _widened(self, state: State) -> Windows:
        windows = self.plan.windows(state)
        return windows if self.revision is None else self.revision.widen(state, windows)

    def score(self, step: Step, windows: Windows) -> Tensor:
        """(B, L) float: higher is filled earlier."""
        scores = self._scores(step.state, step.proposal, windows)
        if scores.text is None or scores.image is None:
            raise ValueError(f"{self.order} gives no score although it was shown a proposal")
        return spread(ByModality(scores.text, scores.image), step.state.canvas)

    @property
    def needs(self) -> frozenset[str]:
        """The columns of a proposal that order, rule and revision read."""
        return _needs([*ByModality.of(self.order).both, *ByModality.of(self.rule).both, self.revision])

    def _number(self, state: State, windows: Windows) -> Tensor:
        """(B, L) long: how many holes of the position's run are due; all of them when its time ends."""
        number = by_modality(self.quota, state.canvas, lambda quota: quota.number(state, windows))
        return torch.where(windows.after >= 1.0, state.canvas.shape[1], number)

    def _scores(self, state: State, proposal: Proposal | None, windows: Windows) -> ByModality[Tensor | None]:
        """(B, L) float of each modality's order, with its noise; None where a proposal is wanted first."""

        def noisy(order: Order, heat: float | Scale) -> Tensor | None:
            score = order.score(state, proposal)
            if score is None or heat == 0.0:
                return score
            heat = Ramp(heat, 0.0) if isinstance(heat, (int, float)) else heat
            return score + scaled(heat, 1.0 - windows.after) * gumbel(state.uniform(CHOICE))

        orders, heats = ByModality.of(self.order), ByModality.of(self.choice_temperature)
        text = noisy(orders.text, heats.text)
        same = orders.text == orders.image and heats.text == heats.image
        return ByModality(text, text if same else noisy(orders.image, heats.image))


@dataclass(frozen=True)
class Ancestral(Policy):
    """The exact reverse process of masked diffusion on a grid of times (MDLM, arXiv:2406.07524, eq. 6).

    In two stages (arXiv:2409.02908): first each hole is revealed with probability (alpha_s - alpha_t) / (1 -
    alpha_t), then tokens are drawn only there, so the mask never competes in a categorical draw, the model is
    asked only at the positions that are written, and a step that reveals nothing costs no forward on the CPU.
    Times fall evenly from 1 to `eps`; what is left then is drawn at once.

    With `remask` it is ReMDM (arXiv:2503.00307, eq. 8): what is written becomes a hole again with the chance
    sigma that it gives, and holes are revealed with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), which
    keeps the marginals. A row then takes all its steps.
    """

    schedule: Schedule | ByModality[Schedule] = Linear()
    plan: Plan = Path()
    remask: Remask | None = None
    eps: float = 0.0
    temperature: float | ByModality[float] = 1.0
    top_k: int | ByModality[int | None] | None = None
    top_p: float | ByModality[float | None] | None = None

    def __post_init__(self) -> None:
        _check_draw(self.temperature, self.top_k, self.top_p)
        if not 0.0 <= self.eps < 1.0:
            raise ValueError(f"the walk ends at a time in [0, 1), got eps {self.eps}")
        if self.remask is not None:
            check_whole(self.plan, self.remask)

    def ask(self, state: State) -> Rows:
        """The holes that this step reveals."""
        reveal, _ = self.chances(state)
        return Rows.of(state.open & (state.uniform(REVEAL) < reveal))

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        return propose(state, parts, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def move(self, step: Step) -> Move:
        state = step.state
        write = state.open & step.proposal.valid
        noise, memory = torch.zeros_like(write), self.plan.remember(state, self.plan.windows(state))
        if self.remask is not None:
            _, again = self.chances(state)
            noise = state.written & (state.uniform(REVEAL) < again)
            memory |= {UNSETTLED: state.initial, **self.remask.remember(step, write)}
        return Move(write, noise, memory)

    def chances(self, state: State) -> tuple[Tensor, Tensor]:
        """(B, L) float64 each: that a hole is revealed at this step, and that a written token is noised."""
        windows = self.plan.windows(state)
        t, s = (1.0 - (1.0 - self.eps) * clock for clock in (windows.before, windows.after))
        reveal, again = self.transition(state, t, s)
        ended = windows.after >= 1.0  # whatever rounding and the schedule's end leave
        moved = windows.after > windows.before
        return torch.where(ended, 1.0, reveal * moved), torch.where(ended, 0.0, again * moved)

    def transition(self, state: State, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The chances of `chances` for a step from noise times t to s, (B, L) float64 each."""
        clean_t, clean_s = (self._clean(state, time) for time in (t, s))
        again = torch.zeros_like(clean_t)
        if self.remask is not None:
            clean_t, clean_s, again = self.remask.chances(state, t, s, clean_t, clean_s)
        gap = (1.0 - clean_t).clamp(min=torch.finfo(torch.float64).tiny)
        return ((clean_s - (1.0 - again) * clean_t) / gap).clamp(0.0, 1.0), again

    def _clean(self, state: State, time: Tensor) -> Tensor:
        """(B, L) float64: the fraction that is clean at each position's own noise time."""
        return by_modality(self.schedule, state.canvas, lambda schedule: schedule.alpha(time))


def _needs(parts: Iterable[Any]) -> frozenset[str]:
    return frozenset[str]().union(*(getattr(part, "needs", ()) for part in parts))


def _by_row(value, image: Tensor, nothing):
    """A setting for the rows of a part: one number where both modalities share it, else (M,) of them."""
    both = ByModality.of(value)
    if both.text == both.image:
        return both.text
    text, other = (nothing if value is None else value for value in (both.text, both.image))
    return torch.where(image, other, text)


def _check_draw(temperature, top_k, top_p) -> None:
    _check_not_negative("temperature", temperature)
    for value in (ByModality.of(top_k).text, ByModality.of(top_k).image):
        if value is not None and value < 1:
            raise ValueError(f"top_k must be at least 1, or None for no cut, got {value}")
    for value in (ByModality.of(top_p).text, ByModality.of(top_p).image):
        if value is not None and not 0.0 < value <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], or None for no cut, got {value}")


def _check_not_negative(name: str, value: float | Scale | ByModality[float | Scale]) -> None:
    for each in ByModality.of(value).both:
        if isinstance(each, (int, float)) and each < 0.0:
            raise ValueError(f"{name} must not be negative, got {value}")
