"""Loaders that share a stream make each batch once and load nothing for the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mmdlm.data import Batches, ImageError, Indexed, Listed, Shuffled, Skip

BATCHES = 11  # of 4 items from 10: over four epochs


def collate(items: list[int], rng: np.random.Generator) -> tuple[list[int], float]:
    return items, float(rng.random())


def listed(loaded: list[int]) -> Listed[int]:
    def item(index: int) -> int:
        loaded.append(index)
        return index

    return Listed(item, 10, order=Shuffled(3))


class Plain:
    """A source that cannot skip."""

    def __init__(self) -> None:
        self.inner = Listed(int, 10, order=Shuffled(3))

    def __iter__(self) -> Iterator[int]:
        return iter(self.inner)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


class Broken(Indexed[int]):
    """Every third item cannot be had."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index % 3 == 0:
            raise ImageError(f"item {index}", "broken")
        return index


def take(batches: Batches, number: int) -> list:
    return [next(batches) for _ in range(number)]


def sources(name: str) -> Any:
    return {"listed": lambda: listed([]), "plain": Plain, "broken": lambda: Broken(Shuffled(3), Skip())}[
        name
    ]()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("name", ["listed", "plain", "broken"])
def test_shares_interlock_and_their_states_are_those_of_the_stream(name, prefetch):
    alone = Batches(sources(name), 4, collate=collate, seed=1)
    begun, rest = take(alone, 1), take(alone, BATCHES)
    for count in (1, 2, 4):
        merged: list = [None] * BATCHES
        for index in range(count):
            mine = Batches(sources(name), 4, collate=collate, seed=1, prefetch=prefetch)
            assert take(mine, 1) == begun
            mine.assign(index, count)
            share = take(mine, BATCHES)
            assert [place % count == index for place in range(BATCHES)] == [
                each is not None for each in share
            ]
            merged = [new if old is None else old for old, new in zip(merged, share, strict=True)]
            assert mine.state_dict() == alone.state_dict()
            mine.close()
        assert merged == rest


def test_what_others_work_on_is_not_loaded():
    loaded: list[int] = []
    mine = Batches(listed(loaded), 4, collate=collate)
    mine.assign(1, 2)
    share = [batch for batch in take(mine, BATCHES) if batch is not None]
    assert loaded == [index for items, _ in share for index in items]


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_share_that_is_none_is_refused(index, count):
    with pytest.raises(ValueError, match="the index must be in 0"):
        Batches(listed([]), 4, collate=collate).assign(index, count)
