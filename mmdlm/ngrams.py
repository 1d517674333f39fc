"""Texts by their n-grams: what a model of text is held against. Knows no network and no tokenizer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["NGrams"]

_BEFORE = -1  # what stands before the first token

Gram = tuple[int, ...]


class NGrams:
    """A law over sequences of ids and their ends: interpolated Kneser-Ney of any order, in plain counts.

    One discount an order, n1 / (n1 + 2 n2), as S. F. Chen and J. Goodman, An empirical study of smoothing
    techniques for language modeling (1999), section 2.7, have it; below the lowest order all ids are alike.
    """

    def __init__(self, sequences: Iterable[Sequence[int]], *, order: int, size: int) -> None:
        """Counts the `sequences` of ids below `size`. Raises ValueError for none, and for other ids."""
        if order < 1 or size < 1:
            raise ValueError(f"wanted order >= 1 and size >= 1, got {order} and {size}")
        self.order = order
        self.end = size
        counts: Counter[Gram] = Counter()
        for sequence in sequences:
            ids = self._framed(sequence)
            counts.update(ids[at - order + 1 : at + 1] for at in range(order - 1, len(ids)))
        if not counts:
            raise ValueError("n-grams need at least one sequence, got none")
        self._discounts: list[float] = []  # from order 1 on
        self._followers: list[dict[Gram, dict[int, int]]] = []  # context -> id -> count
        for _ in range(order):
            followers: dict[Gram, dict[int, int]] = {}
            for gram, count in counts.items():
                followers.setdefault(gram[:-1], {})[gram[-1]] = count
            self._discounts.insert(0, _discount(counts))
            self._followers.insert(0, followers)
            counts = _shorter(counts)
        self._sums = [{context: sum(found.values()) for context, found in t.items()} for t in self._followers]

    def nats(self, sequence: Sequence[int]) -> float:
        """-log p of the sequence and its end."""
        ids, start = self._framed(sequence), self.order - 1
        return -sum(
            math.log(self._probability(ids[at - start : at], ids[at])) for at in range(start, len(ids))
        )

    def law(self, before: Sequence[int]) -> np.ndarray:
        """(size + 1,) float64: the probability of every id, and of the end, behind the ids `before`."""
        framed = (*[_BEFORE] * (self.order - 1), *before)
        law = np.full(self.end + 1, 1 / (self.end + 1))
        for number, followers in enumerate(self._followers):
            context = framed[len(framed) - number :]
            found = followers.get(context)
            if found is None:
                break
            ids, counts = np.array(list(found)), np.array(list(found.values()), np.float64)
            discount = self._discounts[number]
            law *= discount * len(found) / counts.sum()
            law[ids] += (counts - discount) / counts.sum()
        return law

    def between(self, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
        """(size,) float64: for every id, -log p of it and of what sees it, between `before` and `after`.

        The ids before, and those after that see only one another, are the same for all, so the least is the
        likeliest id in the whole sequence.
        """
        start = self.order - 1
        framed = [*self._framed(before)[:-1], 0, *self._framed(after)[start:]]
        place, nats = start + len(before), -np.log(self.law(before)[:-1])
        for token in range(self.end):
            framed[place] = token
            for at in range(place + 1, min(place + self.order, len(framed))):
                nats[token] -= math.log(self._probability(tuple(framed[at - start : at]), framed[at]))
        return nats

    def _probability(self, context: Gram, token: int) -> float:
        probability = 1 / (self.end + 1)
        for number, followers in enumerate(self._followers):
            shorter = context[len(context) - number :]
            found = followers.get(shorter)
            if found is None:
                break
            total, discount = self._sums[number][shorter], self._discounts[number]
            kept = max(0.0, found.get(token, 0) - discount)
            probability = (kept + discount * len(found) * probability) / total
        return probability

    def _framed(self, sequence: Sequence[int]) -> Gram:
        if any(not 0 <= token < self.end for token in sequence):
            raise ValueError(f"wanted ids in 0 .. {self.end - 1}, got {list(sequence)}")
        return (*[_BEFORE] * (self.order - 1), *sequence, self.end)


def _discount(counts: Counter[Gram]) -> float:
    """What is taken off every count; a half where none is 1 or none is 2, as in a handful of texts."""
    once, twice = (sum(count == wanted for count in counts.values()) for wanted in (1, 2))
    return once / (once + 2 * twice) if once and twice else 0.5


def _shorter(counts: Counter[Gram]) -> Counter[Gram]:
    """Of n-grams without their first id: how many ids stand before each; at a text's beginning, how often."""
    shorter: Counter[Gram] = Counter()
    for gram, count in counts.items():
        if len(gram) > 1:
            shorter[gram[1:]] += count if gram[1] == _BEFORE else 1
    return shorter
