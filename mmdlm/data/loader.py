"""Endless batches of a source, resumable exactly; knows no picture and no tokenizer."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from mmdlm.data.indexed import Endless, Listed, Shuffled
from mmdlm.data.sources import Source

T = TypeVar("T")
B = TypeVar("B")

_SECONDS = 0.1  # how often a waiting thread looks whether it is still wanted
_BATCH = 0xBA7C  # sets the streams of collating apart from others of the same seed


class Batches(Generic[T, B]):
    """An endless iterator over collated batches of exactly `batch_size` items, across the ends of epochs.

    `source` is a Source (from then on the loader's own: do not iterate it elsewhere) or a function of an
    index, asked for 0, 1, 2, ... or, with `size`, for 0 .. size - 1 in an order shuffled anew each epoch by
    `seed`. `collate(items, rng)` makes a batch; `rng` depends on (seed, number of the batch) alone, so
    choices made with it resume exactly too. It must take nothing else from outside that changes.

    `prefetch` batches are made ahead in one thread (0: none, no thread); what comes out does not depend on
    it. The state is that after the last batch handed out. An error of the source or of `collate` is raised at
    the batch it belongs to, and again by the next call.
    """

    def __init__(
        self,
        source: Source[T] | Callable[[int], T],
        batch_size: int,
        *,
        collate: Callable[[list[T], np.random.Generator], B],
        seed: int = 0,
        size: int | None = None,
        prefetch: int = 0,
    ) -> None:
        if batch_size < 1 or prefetch < 0:
            raise ValueError(f"wanted batch_size >= 1 and prefetch >= 0, got {batch_size} and {prefetch}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if callable(source):
            source = Endless(source) if size is None else Listed(source, size, order=Shuffled(seed))
        elif size is not None:
            raise ValueError(f"size = {size} is for functions of an index; a source knows its own")
        self._source: Source[T] = source
        self._batch_size = batch_size
        self._collate = collate
        self._seed = seed
        self._prefetch = prefetch
        self._state: dict[str, Any] = {"batch": 0, "source": source.state_dict()}
        self._made: Iterator[tuple[B, dict[str, Any]]] | None = None
        self._ahead: _Ahead[tuple[B, dict[str, Any]]] | None = None

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        if self._made is None:
            made = _make(self._source, self._batch_size, self._collate, self._seed, self._state["batch"])
            if self._prefetch:
                self._ahead = _Ahead(made, self._prefetch)
                made = iter(self._ahead)
            self._made = made
        try:
            batch, self._state = next(self._made)
        except BaseException:
            self.load_state_dict(self._state)
            raise
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, in the JSON values of the source."""
        return {"batch": self._state["batch"], "source": dict(self._state["source"])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the batch after the one at which `state` was taken; what was made ahead is dropped."""
        self._halt()
        self._source.load_state_dict(state["source"])
        self._state = {"batch": state["batch"], "source": dict(state["source"])}

    def close(self) -> None:
        """End the thread. A later `next` goes on where the last one was, with a new thread."""
        self.load_state_dict(self._state)

    def _halt(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead.join()
        self._made = self._ahead = None


def _make(
    source: Source[T],
    batch_size: int,
    collate: Callable[[list[T], np.random.Generator], B],
    seed: int,
    number: int,
) -> Iterator[tuple[B, dict[str, Any]]]:
    """Batches from `number` on, each with the state after it."""
    items: list[T] = []
    for item in _forever(source):
        items.append(item)
        if len(items) == batch_size:
            state = source.state_dict()
            rng = np.random.Generator(
                np.random.Philox(key=np.array([seed, _BATCH], np.uint64), counter=number << 64)
            )
            number += 1
            yield collate(items, rng), {"batch": number, "source": state}
            items = []


def _forever(source: Source[T]) -> Iterator[T]:
    """Epoch after epoch. Two empty ones in a row (the first may be a rest) are an error, not a hang."""
    empty = 0
    while empty < 2:
        empty += 1
        for item in source:
            empty = 0
            yield item
    raise ValueError("the source gave not one item in a whole epoch")


class _Ahead(Generic[T]):
    """What an iterator gives, errors included, computed ahead in a thread; iterated by one other thread."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        # the thread holds neither this object nor the loader, so that both can be forgotten
        arguments = (items, self._ready, self._stopped)
        # no daemon: one that is inside torch while the interpreter goes down aborts the process
        self._thread = threading.Thread(target=_run_ahead, args=arguments, name="mmdlm-batches")
        weakref.finalize(self, self._stopped.set)  # a loader that is forgotten leaves no thread behind
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error = self._ready.get()
            if error is not None:
                raise error
            assert item is not None
            yield item

    def stop(self) -> None:
        self._stopped.set()

    def join(self) -> None:
        self._thread.join()


def _run_ahead(items: Iterator[T], ready: queue.Queue, stopped: threading.Event) -> None:
    try:
        for item in items:
            if not _hand_over((item, None), ready, stopped):
                return
    except BaseException as error:
        _hand_over((None, error), ready, stopped)


def _hand_over(
    result: tuple[Any, BaseException | None], ready: queue.Queue, stopped: threading.Event
) -> bool:
    while not stopped.is_set() and threading.main_thread().is_alive():  # else the program is ending
        try:
            ready.put(result, timeout=_SECONDS)
            return True
        except queue.Full:
            continue
    return False
