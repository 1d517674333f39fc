"""Which holes of a span come first: orders, and the ranks they give. Knows no schedule and no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdlm.sampling.draw import ORDER
from mmdlm.sampling.state import Proposal, State


class Order(Protocol):
    """Scores the positions of a step: within a span, higher scores are revealed first."""

    def score(self, state: State, proposal: Proposal | None) -> Tensor | None:
        """(B, L) float; read only where a proposal was made.

        Before the model is asked there is no proposal; an order that needs one then gives None, and is asked
        again. From any other the policy knows beforehand what it will write, and asks for nothing else: its
        score must be the same without and with a proposal.
        """
        ...


@dataclass(frozen=True)
class Drawn:
    """By the probability of the token that was drawn (MaskGIT, arXiv:2202.04200; LLaDA, arXiv:2502.09992).

    Strong in few steps, but the order looks at the draw: even one position at a time, with an exact model,
    the law of the samples is sharper than the model's own, for rare tokens are drawn again and again. `Peak`
    is free of that.
    """

    def score(self, state: State, proposal: Proposal | None) -> Tensor | None:
        return None if proposal is None else proposal.logp


@dataclass(frozen=True)
class Peak:
    """By the probability of the most probable token: the model's certainty, whatever was drawn.

    One position at a time this samples exactly from the model's conditionals.
    """

    def score(self, state: State, proposal: Proposal | None) -> Tensor | None:
        return None if proposal is None else proposal.peak


@dataclass(frozen=True)
class Random:
    """In a random order."""

    def score(self, state: State, proposal: Proposal | None) -> Tensor | None:
        return state.uniform(ORDER)


@dataclass(frozen=True)
class LeftToRight:
    """From left to right; an image in raster order."""

    def score(self, state: State, proposal: Proposal | None) -> Tensor | None:
        canvas = state.canvas
        return -torch.arange(canvas.shape[1], device=canvas.device).double().expand(canvas.shape)


def count(where: Tensor, runs: Tensor) -> Tensor:
    """(B, L) long: for each position, how many positions of its own span are True in `where` (B, L) bool."""
    key = runs + 1
    sums = key.new_zeros(key.shape[0], key.shape[1] + 1)
    return sums.scatter_add(1, key, where.long()).gather(1, key)


def rank(score: Tensor, where: Tensor, runs: Tensor) -> Tensor:
    """(B, L) long: the place, from 0, of each position of `where` within its span, by descending score.

    Among equal scores the position further left comes first. Elsewhere the number means nothing.
    """
    length = score.shape[1]
    key = torch.where(where, runs + 1, length + 1)
    by_score = score.argsort(dim=1, descending=True, stable=True)
    by_run = key.gather(1, by_score).argsort(dim=1, stable=True)
    order = by_score.gather(1, by_run)
    sums = key.new_zeros(key.shape[0], length + 2)
    sums = sums.scatter_add(1, key, torch.ones_like(key))
    first = (sums.cumsum(dim=1) - sums).gather(1, key.gather(1, order))
    place = torch.arange(length, device=score.device) - first
    return torch.zeros_like(place).scatter(1, order, place)
