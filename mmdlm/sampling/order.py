"""Which holes of a span come first: orders, and the ranks they give. Knows no schedule and no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from mmdlm.sampling.draw import ORDER, uniform
from mmdlm.sampling.state import Proposal, State


class Order(Protocol):
    """Scores the positions of a step: within a run, higher scores are revealed first.

    `needs`, where an order has it, names the columns of `Proposal` that it reads beside the usual ones.
    """

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
class Margin:
    """By how far the most probable token is ahead of the next (Dream's `topk_margin`; arXiv:2502.06768)."""

    needs = frozenset({"margin"})

    def score(self, state: State, proposal: Proposal | None) -> Tensor | None:
        return None if proposal is None else proposal.column("margin")


@dataclass(frozen=True)
class NegativeEntropy:
    """The less entropy, the earlier (Dream's `entropy`; EB-Sampler, arXiv:2505.24857)."""

    needs = frozenset({"entropy"})

    def score(self, state: State, proposal: Proposal | None) -> Tensor | None:
        return None if proposal is None else -proposal.column("entropy")


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


@dataclass(frozen=True)
class Halton:
    """Spread over a picture of `grid` = (rows, columns): by the Halton sequence (arXiv:2503.17076).

    A bijection on every grid, where the released code misses cells of large ones. With `rolled` every sample
    shifts the grid by an amount of its own. Grid (1, n) spreads a text of n positions.
    """

    grid: tuple[int, int]
    rolled: bool = False

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ValueError(f"a grid has at least 1 row and 1 column, got {self.grid}")

    def check(self, state: State, modality: int) -> None:
        """Raises ValueError where spans of the modality that have holes are not of this size."""
        mine = state.initial & (state.canvas.modality == modality)
        sizes = count(state.runs >= 0, state.runs)[mine].unique().tolist()
        if sizes not in ([], [math.prod(self.grid)]):
            raise ValueError(f"a grid of {self.grid} for spans of {sizes} positions")

    def score(self, state: State, proposal: Proposal | None) -> Tensor | None:
        height, width = self.grid
        place = torch.arange(state.canvas.shape[1], device=state.canvas.device).double()
        cell = rank(-place.expand(state.canvas.shape), state.runs >= 0, state.runs)
        row, column = cell // width, cell % width
        if self.rolled:
            zero = torch.zeros_like(state.sample)
            shifts = [uniform(state.seed, state.sample, zero, zero + axis, ORDER) for axis in (0, 1)]
            row = row + (shifts[0] * height).long().unsqueeze(1)
            column = column + (shifts[1] * width).long().unsqueeze(1)
        cell = row % height * width + column % width  # in the frame, where it is not read, any cell
        return -halton(height, width).to(cell.device)[cell].double()


@cache
def halton(height: int, width: int) -> Tensor:
    """(height * width,) long: in which place, 0, 1, ..., each cell, row-major, is first met by a point.

    The points are Halton's in bases 2 and 3, as many as it takes.
    """
    cells, num = height * width, 1
    while True:
        num = max(2 * num, cells)
        cell = _inverse(num, 2, height) * width + _inverse(num, 3, width)
        first = torch.full((cells,), num).scatter_reduce(0, cell, torch.arange(num), "amin")
        if bool((first < num).all()):
            return first.argsort().argsort()


def _inverse(num: int, base: int, size: int) -> Tensor:
    """(num,) long: the radical inverses of 1 .. num in a base, times `size`, rounded down; exact."""
    digits, scale = _reversed(1 << (num - 1).bit_length(), base)
    return digits[:num] * size // scale


@cache
def _reversed(num: int, base: int) -> tuple[Tensor, int]:
    """(num,) long: the digits of 1 .. num from the last to the first, read as one number below the int."""
    number, digits, scale = torch.arange(1, num + 1), torch.zeros(num, dtype=torch.long), 1
    while bool((number > 0).any()):
        digits, number, scale = digits * base + number % base, number // base, scale * base
    return digits, scale


def count(where: Tensor, runs: Tensor) -> Tensor:
    """(B, L) long: for each position, how many positions of its own span are True in `where` (B, L) bool."""
    key = runs + 1
    sums = key.new_zeros(key.shape[0], key.shape[1] + 1)
    return sums.scatter_add(1, key, where.long()).gather(1, key)


def ahead(where: Tensor) -> Tensor:
    """(B, L) long: how many positions of a row before this one are True in `where` (B, L) bool."""
    return where.long().cumsum(dim=1) - where.long()


def rank(score: Tensor, where: Tensor, runs: Tensor) -> Tensor:
    """(B, L) long: the place, from 0, of each position of `where` within its run, by descending score.

    Among equal scores the position further left comes first. Elsewhere the number means nothing.
    """
    order, first = _sorted(score, where, runs)
    place = torch.arange(score.shape[1], device=score.device) - first
    return torch.zeros_like(place).scatter(1, order, place)


def running(values: Tensor, score: Tensor, where: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) each: the sum and the largest of the `values` >= 0 of a run, from its first place to one's own.

    Places as `rank` gives them; float64. Elsewhere than at `where` the numbers mean nothing.
    """
    order, first = _sorted(score, where, runs)
    sorted_ = torch.where(where, values.double(), 0.0).gather(1, order)
    total = sorted_.cumsum(dim=1)
    total = total - (total - sorted_).gather(1, first)
    # runs lie behind one another: each is lifted above the ones before it
    step = sorted_.amax(dim=1, keepdim=True) + 1.0
    lift = first.double() * step
    largest = (sorted_ + lift).cummax(dim=1).values - lift
    return torch.zeros_like(total).scatter(1, order, total), torch.zeros_like(total).scatter(
        1, order, largest
    )


def _sorted(score: Tensor, where: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) long each: positions by run and falling score, and the place at which each one's run begins."""
    length = score.shape[1]
    key = torch.where(where, runs + 1, length + 1)
    by_score = score.argsort(dim=1, descending=True, stable=True)
    by_run = key.gather(1, by_score).argsort(dim=1, stable=True)
    order = by_score.gather(1, by_run)
    sums = key.new_zeros(key.shape[0], length + 2)
    sums = sums.scatter_add(1, key, torch.ones_like(key))
    return order, (sums.cumsum(dim=1) - sums).gather(1, key.gather(1, order))
