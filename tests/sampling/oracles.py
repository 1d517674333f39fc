"""Small laws known exactly, and the denoiser that says what each place holds given all others that stand."""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas, Part, Rows

MASK = 19
FIRST = {TEXT: 0, IMAGE: 8}  # the id of each modality's value 0


class World(Protocol):
    """A law over `size` values at each of some places, nowhere 0."""

    size: int
    modality: tuple[int, ...]  # of each place
    grid: tuple[int, int]  # of each of its spans

    def weights(self, outcomes: Tensor) -> Tensor:
        """(N,) float64, in proportion to the probability of each outcome (N, n)."""
        ...

    def laws(self, values: Tensor, holes: Tensor) -> Tensor:
        """(B, n, size) float64: of each place, given the `values` (B, n) of all other places but `holes`."""
        ...


class Chain:
    """A Markov chain: five words of three, each most often the one before it."""

    size, modality, grid = 3, (TEXT,) * 5, (1, 5)

    def __init__(self) -> None:
        self.start = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        self.step = torch.tensor(
            [[0.90, 0.07, 0.03], [0.05, 0.80, 0.15], [0.20, 0.10, 0.70]], dtype=torch.float64
        )

    def weights(self, outcomes: Tensor) -> Tensor:
        return self.start[outcomes[:, 0]] * self.step[outcomes[:, :-1], outcomes[:, 1:]].prod(dim=1)

    def laws(self, values: Tensor, holes: Tensor) -> Tensor:
        return _normalised(messages(evidence(values, holes, 3), self.start, self.step))


class Hidden:
    """A hidden Markov chain: six letters of two, each said by one of three unseen moods."""

    size, modality, grid = 2, (TEXT,) * 6, (1, 6)

    def __init__(self) -> None:
        self.start = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
        self.step = torch.tensor(
            [[0.85, 0.10, 0.05], [0.05, 0.85, 0.10], [0.20, 0.05, 0.75]], dtype=torch.float64
        )
        self.says = torch.tensor([[0.95, 0.05], [0.08, 0.92], [0.50, 0.50]], dtype=torch.float64)

    def weights(self, outcomes: Tensor) -> Tensor:
        moods = every(3, outcomes.shape[1])
        chance = self.start[moods[:, 0]] * self.step[moods[:, :-1], moods[:, 1:]].prod(dim=1)
        return self.says[moods.unsqueeze(1), outcomes].prod(dim=2).mul(chance.unsqueeze(1)).sum(dim=0)

    def laws(self, values: Tensor, holes: Tensor) -> Tensor:
        said = torch.where(holes.unsqueeze(2), 1.0, self.says.T[values])
        return _normalised(messages(said, self.start, self.step) @ self.says)


class Ising:
    """2 x 3 spins that like to equal their neighbours, in a weak field; its columns are a chain."""

    size, modality, grid = 2, (IMAGE,) * 6, (2, 3)
    coupling, field = 0.5, 0.1

    def __init__(self) -> None:
        self.columns = every(2, 2)  # (4, 2): the two spins of each state of a column
        spin = 2.0 * self.columns.double() - 1.0
        inside = (self.coupling * spin[:, 0] * spin[:, 1] + self.field * spin.sum(dim=1)).exp()
        self.start, self.step = inside, (self.coupling * spin @ spin.T).exp() * inside

    def weights(self, outcomes: Tensor) -> Tensor:
        spin = 2.0 * outcomes.double().unflatten(1, self.grid) - 1.0
        beside = (spin[:, :, 1:] * spin[:, :, :-1]).sum(dim=(1, 2))
        above = (spin[:, 1:] * spin[:, :-1]).sum(dim=(1, 2))
        return (self.coupling * (beside + above) + self.field * spin.sum(dim=(1, 2))).exp()

    def laws(self, values: Tensor, holes: Tensor) -> Tensor:
        seen = evidence(values, holes, 2).unflatten(1, self.grid)  # (B, row, column, spin)
        each = torch.stack([seen[:, row, :, self.columns[:, row]] for row in (0, 1)], dim=1)
        said = messages(each.prod(dim=1), self.start, self.step)  # (B, column, state)
        which = F.one_hot(self.columns, 2).double()  # (state, row, spin)
        rows = [(said * each[:, 1 - row]) @ which[:, row] for row in (0, 1)]
        return _normalised(torch.stack(rows, dim=1).flatten(1, 2))


class Table:
    """Any law, as the weights of all outcomes."""

    def __init__(self, weights: Tensor, size: int, modality: tuple[int, ...], grid: tuple[int, int]) -> None:
        self.size, self.modality, self.grid = size, modality, grid
        self.outcomes, self.table = every(size, len(modality)), weights.double()

    def weights(self, outcomes: Tensor) -> Tensor:
        base = self.size ** torch.arange(outcomes.shape[1] - 1, -1, -1)
        return self.table[(outcomes * base).sum(dim=1)]

    def laws(self, values: Tensor, holes: Tensor) -> Tensor:
        differs = (values.unsqueeze(1) != self.outcomes) & ~holes.unsqueeze(1)  # (B, outcome, place)
        agrees = differs.sum(dim=2, keepdim=True) == differs.long()  # at all places but this one
        weight = agrees * self.table.unsqueeze(1)
        return _normalised(torch.einsum("bon,onv->bnv", weight, F.one_hot(self.outcomes, self.size).double()))


def pairs() -> Table:
    """Two words and two codes of three values each, in a lopsided law without a pattern."""
    rng = torch.Generator().manual_seed(1)
    weights = torch.randn(81, generator=rng, dtype=torch.float64).mul(1.5).exp()
    return Table(weights, 3, (TEXT, TEXT, IMAGE, IMAGE), (1, 2))


class Exact:
    """A denoiser that knows a world."""

    def __init__(self, world: World) -> None:
        self.world = world

    def begin(self, canvas: Canvas) -> Exact:
        return self

    def __call__(self, canvas: Canvas, rows: Rows, *, reduce=None) -> list:
        asked, values = rows.samples(canvas.shape[1]), values_of(self.world, canvas)
        laws = torch.ones(*canvas.shape, self.world.size, dtype=torch.float64)
        laws[asked] = self.world.laws(values[asked], canvas.masked[asked])
        logits, parts = laws.log(), []
        for modality, first in FIRST.items():
            own = rows.where(canvas.modality == modality)
            if own.index.shape[0]:
                parts.append(Part(own, slice(first, first + self.world.size), own.gather(logits)))
        return parts if reduce is None else [reduce(part) for part in parts]


def all_holes(world: World, rows: int) -> Canvas:
    """Rows that are all holes, a span for each modality, text first."""
    modality = torch.tensor(world.modality, dtype=torch.uint8).expand(rows, -1)
    place = torch.arange(len(world.modality)).expand(rows, -1)
    everywhere, zeros = torch.ones_like(place, dtype=torch.bool), torch.zeros_like(place)
    span = (modality - modality[:, :1]).long()
    position = torch.stack([place, place], dim=2)
    return Canvas(zeros + MASK, modality, everywhere, everywhere, position, zeros, span=span)


def written(world: World, values: Tensor, holes: Tensor) -> Canvas:
    """A canvas of the `values` (B, n) with `holes` (B, n) bool left in it, all of it fillable."""
    canvas = all_holes(world, values.shape[0])
    tokens = values + _first(canvas)
    return canvas.replace(tokens=torch.where(holes, MASK, tokens), masked=holes)


def values_of(world: World, canvas: Canvas) -> Tensor:
    """(B, n) long: what stands at each place; under a hole, anything."""
    return (canvas.tokens - _first(canvas)).clamp(0, world.size - 1)


def law_of(world: World) -> Tensor:
    """(size ** n,) float64: the probability of every outcome, in the order of `every`."""
    weights = world.weights(every(world.size, len(world.modality)))
    return weights / weights.sum()


def counts_of(world: World, canvas: Canvas) -> Tensor:
    """How often each outcome came, in the order of `every`."""
    base = world.size ** torch.arange(canvas.shape[1] - 1, -1, -1)
    numbers = (values_of(world, canvas) * base).sum(dim=1)
    return torch.bincount(numbers, minlength=world.size ** canvas.shape[1])


def every(size: int, places: int) -> Tensor:
    """(size ** places, places) long: all outcomes, the last place running fastest."""
    return torch.tensor(list(itertools.product(range(size), repeat=places)))


def evidence(values: Tensor, holes: Tensor, size: int) -> Tensor:
    """(B, n, size) float64: 1 for what a place may hold."""
    return torch.where(holes.unsqueeze(2), 1.0, F.one_hot(values, size).double())


def messages(said: Tensor, start: Tensor, step: Tensor) -> Tensor:
    """(B, n, S): what all other places of a chain say of each one, by one pass forward and one backward.

    `said` (B, n, S) is what each place says of itself, `start` (S,) and `step` (S, S) the chain's weights.
    """
    forward, backward = [start.expand_as(said[:, 0])], [torch.ones_like(said[:, 0])]
    for place in range(1, said.shape[1]):
        forward.append(_normalised((forward[-1] * said[:, place - 1]) @ step))
        backward.append(_normalised((backward[-1] * said[:, -place]) @ step.T))
    return torch.stack(forward, dim=1) * torch.stack(backward[::-1], dim=1)


def p_value(counts: Tensor, law: Tensor) -> float:
    """Of Pearson's chi-square; cells of which fewer than 5 are expected are one cell."""
    expected = law.double() / law.double().sum() * counts.sum()
    cell = torch.where(expected < 5, 0, 1 + torch.arange(len(law)))
    sums = [torch.zeros(len(law) + 1).double().index_add(0, cell, x.double()) for x in (counts, expected)]
    found, wanted = (x[sums[1] > 0] for x in sums)
    assert len(found) > 2, "the cells are too small to tell anything"
    statistic = ((found - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(found) - 1) / 2).double(), statistic / 2))


def _first(canvas: Canvas) -> Tensor:
    return torch.where(canvas.modality == IMAGE, FIRST[IMAGE], FIRST[TEXT])


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


WORLDS: dict[str, World] = {"chain": Chain(), "hidden chain": Hidden(), "ising": Ising(), "pairs": pairs()}
