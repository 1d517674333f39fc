"""Policies: where the model is asked, what is drawn, what is written. Knows no model and no tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Part, Rows
from mmdlm.diffusion.schedule import Cosine, Linear, Schedule
from mmdlm.sampling.draw import CHOICE, REVEAL, TOKEN, draw, gumbel
from mmdlm.sampling.order import Drawn, Order, count, rank
from mmdlm.sampling.state import Move, Proposal, State, Step

T = TypeVar("T")

_ALL = 1 << 62  # a top_k that cuts nothing


@dataclass(frozen=True)
class ByModality(Generic[T]):
    """One setting for text and one for image, wherever a policy takes a setting."""

    text: T
    image: T

    @staticmethod
    def of(value: T | ByModality[T]) -> ByModality[T]:
        """The same setting for both, or the two that were given."""
        return value if isinstance(value, ByModality) else ByModality(value, value)


@dataclass(frozen=True)
class Path:
    """The walk through the square of noise levels: each modality's stretch of a row's time [0, 1].

    Both over (0, 1) is simultaneous; text (0, .5) and image (.5, 1) is text first.
    """

    text: tuple[float, float] = (0.0, 1.0)
    image: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name, (start, stop) in (("text", self.text), ("image", self.image)):
            if not 0.0 <= start < stop <= 1.0:
                raise ValueError(
                    f"the {name} window must satisfy 0 <= start < stop <= 1, got ({start}, {stop})"
                )

    def clocks(self, time: Tensor) -> ByModality[Tensor]:
        """Row time -> each modality's own time in [0, 1], 0 before its window and 1 after it."""
        windows = (self.text, self.image)
        return ByModality(*(((time - start) / (stop - start)).clamp(0.0, 1.0) for start, stop in windows))


class Policy(ABC):
    """One way to fill a canvas. Its methods are pure, and each works on all rows of the batch at once."""

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
) -> Proposal:
    """Draws a token at every row of `parts`, with the stream of that row; see `draw` for the settings."""
    modality = state.canvas.modality
    u = state.uniform(TOKEN)
    tokens = state.canvas.tokens
    logp = torch.zeros(state.canvas.shape, dtype=torch.float32, device=state.canvas.device)
    peak, valid = logp, torch.zeros_like(logp, dtype=torch.bool)
    for part in parts:
        image = part.rows.gather(modality) == IMAGE
        drawn = draw(
            part.logits,
            part.rows.gather(u),
            temperature=_by_row(temperature, image, 1.0),
            top_k=_by_row(top_k, image, _ALL),
            top_p=_by_row(top_p, image, 1.0),
        )
        tokens = part.rows.scatter(drawn.tokens + part.ids.start, tokens)
        logp = part.rows.scatter(drawn.logp, logp)
        peak = part.rows.scatter(drawn.peak, peak)
        valid = part.rows.scatter(part.rows.valid, valid)
    return Proposal(tokens, logp, peak, valid)


@dataclass(frozen=True)
class Confidence(Policy):
    """Reveals, span by span, the surest proposals and as many as a schedule wants.

    MaskGIT (arXiv:2202.04200, section 3.2) with a cosine schedule and noise on the choice, LLaDA
    (arXiv:2502.09992, low-confidence remasking) with a linear one and none. At its modality's clock c a span
    that had n holes keeps floor(n * (1 - alpha(1 - c))) of them; while the clock runs at least one goes a
    step, when it ends all do. The score is that of `order` plus choice_temperature * (1 - c) * Gumbel noise.
    Every number is computed afresh from c each step. With a `threshold`, a hole whose most probable token has
    at least that probability (before temperature) is filled as well, whatever was drawn (Fast-dLLM,
    arXiv:2505.22618): a row is then done in fewer steps. Without one, an order that looks at no proposal has
    the model asked only where it writes. `order` may differ by modality, and so may every setting but the
    path.
    """

    schedule: Schedule | ByModality[Schedule] = Cosine()
    path: Path = Path()
    temperature: float | ByModality[float] = 1.0
    choice_temperature: float | ByModality[float] = 0.0
    top_k: int | ByModality[int | None] | None = None
    top_p: float | ByModality[float | None] | None = None
    order: Order | ByModality[Order] = Drawn()
    threshold: float | ByModality[float | None] | None = None

    def __post_init__(self) -> None:
        _check_draw(self.temperature, self.top_k, self.top_p)
        _check_not_negative("choice_temperature", self.choice_temperature)
        for value in (ByModality.of(self.threshold).text, ByModality.of(self.threshold).image):
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"threshold must be in (0, 1], or None for none, got {value}")

    def ask(self, state: State) -> Rows:
        """The holes that this step writes, as far as they are known; else all in a span that it writes to."""
        quota = self.quota(state)
        wanted = state.open & (quota > 0)
        thresholds, scores = ByModality.of(self.threshold), self._scores(state, None)
        for modality, threshold, score in (
            (TEXT, thresholds.text, scores.text),
            (IMAGE, thresholds.image, scores.image),
        ):
            if threshold is None and score is not None:
                mine = wanted & (state.canvas.modality == modality)
                wanted = wanted & (~mine | (rank(score, mine, state.runs) < quota))
        return Rows.of(wanted)

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        return propose(state, parts, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def move(self, step: Step) -> Move:
        state, proposal = step.state, step.proposal
        candidates = state.open & proposal.valid
        write = rank(self.score(step), candidates, state.runs) < self.quota(state)
        thresholds = ByModality.of(self.threshold)
        for modality, threshold in ((TEXT, thresholds.text), (IMAGE, thresholds.image)):
            if threshold is not None:
                sure = proposal.peak.double().exp() >= threshold
                write = write | (sure & (state.canvas.modality == modality))
        return Move(candidates & write, torch.zeros_like(candidates))

    def quota(self, state: State) -> Tensor:
        """(B, L) long: how many holes of the position's span are filled at this step."""
        holes, planned = count(state.open, state.runs), count(state.initial, state.runs)
        clock = _spread(self.path.clocks(state.after), state)
        level = _levels(self.schedule, self.path.clocks(state.after), state)
        keep = (planned * level + 1e-9).floor().long()  # the small number: 0.3 * 10 is 3
        keep = torch.minimum(keep, holes - 1)
        keep = torch.where(clock >= 1.0, 0, keep)
        return torch.where(clock > 0.0, holes - keep.clamp(min=0), 0)

    def score(self, step: Step) -> Tensor:
        """(B, L) float: higher is revealed earlier."""
        scores = self._scores(step.state, step.proposal)
        if scores.text is None or scores.image is None:
            raise ValueError(f"{self.order} gives no score although it was shown a proposal")
        return torch.where(step.state.canvas.modality == IMAGE, scores.image, scores.text)

    def _scores(self, state: State, proposal: Proposal | None) -> ByModality[Tensor | None]:
        """(B, L) float of each modality's order, with its noise; None where a proposal is wanted first."""
        orders, heat = ByModality.of(self.order), ByModality.of(self.choice_temperature)
        clocks = self.path.clocks(state.after)

        def noisy(score: Tensor | None, heat: float, clock: Tensor) -> Tensor | None:
            if score is None or heat == 0.0:
                return score
            return score + (heat * (1.0 - clock)).unsqueeze(1) * gumbel(state.uniform(CHOICE))

        text = noisy(orders.text.score(state, proposal), heat.text, clocks.text)
        return ByModality(text, noisy(orders.image.score(state, proposal), heat.image, clocks.image))


@dataclass(frozen=True)
class Ancestral(Policy):
    """The exact reverse process of masked diffusion on a grid of times (MDLM, arXiv:2406.07524, eq. 6).

    In two stages (arXiv:2409.02908): first each hole is revealed with probability (alpha_s - alpha_t) / (1 -
    alpha_t), then tokens are drawn only there, so the mask never competes in a categorical draw, the model is
    asked only at the positions that are written, and a step that reveals nothing costs no forward on the CPU.
    """

    schedule: Schedule | ByModality[Schedule] = Linear()
    path: Path = Path()
    temperature: float | ByModality[float] = 1.0
    top_k: int | ByModality[int | None] | None = None
    top_p: float | ByModality[float | None] | None = None

    def __post_init__(self) -> None:
        _check_draw(self.temperature, self.top_k, self.top_p)

    def ask(self, state: State) -> Rows:
        """The holes that this step reveals."""
        return Rows.of(state.open & self._reveal(state))

    def propose(self, state: State, parts: list[Part]) -> Proposal:
        return propose(state, parts, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def move(self, step: Step) -> Move:
        write = step.state.open & step.proposal.valid
        return Move(write, torch.zeros_like(write))

    def _reveal(self, state: State) -> Tensor:
        before, after = self.path.clocks(state.before), self.path.clocks(state.after)
        masked_t, masked_s = (_levels(self.schedule, clocks, state) for clocks in (before, after))
        chance = 1.0 - masked_s / masked_t.clamp(min=torch.finfo(torch.float64).tiny)
        ended = _spread(after, state) >= 1.0  # whatever rounding and the schedule's end leave
        return (state.uniform(REVEAL) < chance) | ended


def _levels(schedule: Schedule | ByModality[Schedule], clocks: ByModality[Tensor], state: State) -> Tensor:
    """(B, L) float64: the fraction that is masked at each position's own clock, 1 - alpha(1 - clock)."""
    schedules = ByModality.of(schedule)
    levels = ByModality(
        1.0 - schedules.text.alpha(1.0 - clocks.text).double(),
        1.0 - schedules.image.alpha(1.0 - clocks.image).double(),
    )
    return _spread(levels, state)


def _spread(values: ByModality[Tensor], state: State) -> Tensor:
    """(B,) for each modality -> (B, L)."""
    image = state.canvas.modality == IMAGE
    return torch.where(image, values.image.unsqueeze(1), values.text.unsqueeze(1))


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


def _check_not_negative(name: str, value: float | ByModality[float]) -> None:
    both = ByModality.of(value)
    if both.text < 0.0 or both.image < 0.0:
        raise ValueError(f"{name} must not be negative, got {value}")
