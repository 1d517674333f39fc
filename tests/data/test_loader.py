"""Batches are the same whether they are made ahead or not, and after any interruption."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mmdlm.data.images import ImageError, Skip
from mmdlm.data.indexed import Indexed, Listed, Shuffled
from mmdlm.data.loader import Batches

# A program that ends while the thread is inside torch, as every training run does.
BUSY = """
import time
import torch
from mmdlm.data.loader import Batches

def collate(items, rng):
    end = time.monotonic() + (2 if items[0] else 0)  # the first batch comes at once
    while time.monotonic() < end:
        torch.nn.functional.conv2d(torch.randn(8, 16, 64, 64), torch.randn(16, 16, 3, 3))
    return items

loader = Batches(int, 4, collate=collate, prefetch=1)
next(loader)
print("over")
"""
KINDS = ["endless", "listed", "source"]


def pick(items: list[int], rng: np.random.Generator) -> tuple[list[int], int]:
    return items, int(rng.integers(1000))


def batches(kind: str, *, prefetch: int = 0, collate=pick) -> Batches:
    if kind == "endless":
        return Batches(lambda index: index, 4, collate=collate, seed=5, prefetch=prefetch)
    if kind == "listed":
        return Batches(lambda index: index, 4, collate=collate, seed=5, size=7, prefetch=prefetch)
    source = Listed(lambda index: index, 7, order=Shuffled(9))
    return Batches(source, 4, collate=collate, seed=5, prefetch=prefetch)


def take(loader: Batches, count: int) -> list:
    return [next(loader) for _ in range(count)]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mmdlm-batches"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    if threads():
        gc.collect()
    limit = time.monotonic() + 5
    while threads() and time.monotonic() < limit:
        time.sleep(0.02)
    assert not threads()


def test_batches_are_full_and_cross_epochs():
    items = [item for batch, _ in take(batches("listed"), 7) for item in batch]
    assert all(sorted(items[7 * epoch :][:7]) == list(range(7)) for epoch in range(4))
    assert items[:7] != items[7:14]
    assert [batch for batch, _ in take(batches("endless"), 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefetch", [1, 3])
def test_making_ahead_changes_nothing(kind, prefetch):
    ahead = batches(kind, prefetch=prefetch)
    plain = batches(kind)
    for _ in range(9):
        assert next(ahead) == next(plain)
        assert ahead.state_dict() == plain.state_dict()
    ahead.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resuming_is_exact(kind, prefetch):
    whole = take(batches(kind), 9)
    for stop in range(5):
        first = batches(kind, prefetch=prefetch)
        assert take(first, stop) == whole[:stop]
        if prefetch:
            time.sleep(0.01)  # let it run ahead
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        second = batches(kind, prefetch=prefetch)
        take(second, 2)  # a loader that has been somewhere else
        second.load_state_dict(state)
        assert take(second, 9 - stop) == whole[stop:]
        second.close()


def test_a_state_once_taken_does_not_change():
    loader = batches("listed")
    next(loader)
    state = loader.state_dict()
    kept = json.dumps(state)
    take(loader, 5)
    assert json.dumps(state) == kept


def test_the_generator_depends_on_seed_and_batch_alone():
    draws = [draw for _, draw in take(batches("endless"), 50)]
    assert len(set(draws)) > 40
    assert draws == [draw for _, draw in take(batches("source", prefetch=2), 50)]
    other = Batches(lambda index: index, 4, collate=pick, seed=6)
    assert draws != [draw for _, draw in take(other, 50)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_come_at_their_batch_and_again(prefetch):
    def item(index: int) -> int:
        if index == 10:
            raise RuntimeError("item 10")
        return index

    loader = Batches(item, 4, collate=lambda items, rng: items, prefetch=prefetch)
    assert take(loader, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    state = loader.state_dict()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="item 10"):
            next(loader)
        assert loader.state_dict() == state
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_collate_come_too(prefetch):
    def collate(items, rng):
        raise KeyError("collate")

    loader = batches("endless", prefetch=prefetch, collate=collate)
    with pytest.raises(KeyError, match="collate"):
        next(loader)


class Broken(Indexed[int]):
    """Some of its items cannot be had."""

    def __init__(self, bad: set[int], size: int = 6) -> None:
        self.skip = Skip()
        super().__init__(Shuffled(0), self.skip)
        self.bad, self.size = bad, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if index in self.bad:
            raise ImageError(str(index), "is bad")
        return index


@pytest.mark.parametrize("prefetch", [0, 2])
def test_skipped_items_keep_batches_full_and_resumable(prefetch):
    def loader(ahead):
        return Batches(Broken({1, 4}), 3, collate=lambda items, rng: items, prefetch=ahead)

    whole = take(loader(0), 12)
    assert {len(batch) for batch in whole} == {3}
    assert {item for batch in whole for item in batch} == {0, 2, 3, 5}
    for stop in range(8):
        first = loader(prefetch)
        take(first, stop)
        second = loader(prefetch)
        second.load_state_dict(first.state_dict())
        assert take(second, 12 - stop) == whole[stop:]
        first.close()
        second.close()


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_source_without_a_good_item_is_an_error_not_a_hang(prefetch):
    loader = Batches(Broken({0, 1, 2}, 3), 2, collate=lambda items, rng: items, prefetch=prefetch)
    with pytest.raises(ValueError, match="not one item"):
        next(loader)


def test_making_ahead_is_bounded_and_starts_late():
    asked = []

    def item(index: int) -> int:
        asked.append(index)
        return index

    loader = Batches(item, 1, collate=lambda items, rng: items, prefetch=2)
    time.sleep(0.02)
    assert asked == []
    assert not threads()
    next(loader)
    time.sleep(0.1)
    assert 2 <= len(asked) <= 4  # one handed out, two ready, one in the hand of the thread
    loader.close()


def test_a_forgotten_loader_leaves_no_thread():
    loader = batches("endless", prefetch=2)
    next(loader)
    assert threads()
    del loader  # the fixture sees to the rest


def test_arguments_are_checked():
    for wrong in ({"batch_size": 0}, {"batch_size": 2, "prefetch": -1}, {"batch_size": 2, "seed": -1}):
        with pytest.raises(ValueError, match=r"wanted|must be"):
            Batches(lambda index: index, collate=pick, **wrong)
    with pytest.raises(ValueError, match="size = 3 is for functions"):
        Batches(Listed(str, 3), 2, collate=pick, size=3)
    with pytest.raises(ValueError, match="at least 1"):
        Batches(str, 2, collate=pick, size=0)


def test_a_program_ends_in_peace_while_batches_are_being_made():
    done = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_names_of_a_batch_are_those_of_the_batch_handed_out(prefetch):
    class Named:
        def __init__(self, index: int) -> None:
            self.name = f"row {index}.png"

    loader = Batches(Named, 2, collate=lambda items, rng: [item.name for item in items], prefetch=prefetch)
    assert loader.names() == ()
    for _ in range(4):
        batch = next(loader)
        assert list(loader.names()) == batch
    state = loader.state_dict()
    assert next(loader) == ["row 8.png", "row 9.png"]
    loader.load_state_dict(state)
    assert next(loader) == list(loader.names()) == ["row 8.png", "row 9.png"]
    numbers = batches("listed", prefetch=prefetch)  # 7 numbers an epoch, which have no names
    take(numbers, 3)
    assert numbers.names() == tuple(f"item {place} of the stream" for place in range(8, 12))
    loader.close()
    numbers.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_that_uses_its_parents_loader_is_told_and_does_not_hang():
    loader = batches("endless", prefetch=1)
    next(loader)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            take(loader, 10)
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert b"the thread that makes batches ahead is gone" in pipe.read()
    os.waitpid(child, 0)
    loader.close()
