"""Endless batches of a source, resumable exactly; knows no picture and no tokenizer."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from mmdlm.data.indexed import Endless, Listed, Shuffled, forever
from mmdlm.data.sources import Source

T = TypeVar("T")
B = TypeVar("B")

_SECONDS = 0.1  # how often a waiting thread looks whether it is still wanted
_BATCH = 0xBA7C  # sets the streams of collating apart from others of the same seed

Made = tuple[B | None, tuple[str, ...], dict[str, Any]]  # a batch, the names of its items, the state after it


@runtime_checkable
class _Called(Protocol):
    """An item that its source gave a name."""

    name: str


@runtime_checkable
class Skippable(Protocol):
    """A source that need not load what nobody wants."""

    def skip(self, count: int) -> None:
        """Pass over the next `count` items, into the next epochs if need be."""
        ...


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
        self._share = (0, 1)  # made are the batches whose number is the first modulo the second
        self._names: tuple[str, ...] = ()
        self._made: Iterator[Made[B]] | None = None
        self._ahead: _Ahead[Made[B]] | None = None

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        if self._made is None:
            made = _make(
                self._source, self._batch_size, self._collate, self._seed, self._state["batch"], self._share
            )
            if self._prefetch:
                self._ahead = _Ahead(made, self._prefetch * self._share[1])
                made = iter(self._ahead)
            self._made = made
        try:
            batch, self._names, self._state = next(self._made)
        except BaseException:
            self.load_state_dict(self._state)
            raise
        return cast(B, batch)  # None only in the places of other shares

    def assign(self, index: int, count: int) -> None:
        """From here on make only every `count`-th batch, the first after `index` others; these come as None.

        So processes share a stream: each makes its own batches, and its state is that of the whole stream.
        What belongs to other batches is not even loaded where the source is `Skippable`. Raises ValueError
        unless `index` is in 0 .. count - 1.
        """
        if not 0 <= index < count:
            raise ValueError(f"share {index} of {count}: the index must be in 0 .. count - 1")
        self.load_state_dict(self._state)
        self._share = ((self._state["batch"] + index) % count, count)

    def names(self) -> tuple[str, ...]:
        """Of each item of the batch handed out last: its `name` if it has one, else "item N of the stream".

        N counts from 0 across epochs: for a function of an index without a size it is the index.
        """
        return self._names

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
    share: tuple[int, int],
) -> Iterator[Made[B]]:
    """Batches from `number` on; None for those outside the share."""
    stream = forever(source)
    while True:
        items = None
        if number % share[1] == share[0]:
            items = list(islice(stream, batch_size))
        elif isinstance(source, Skippable):
            source.skip(batch_size)
        else:
            for _ in islice(stream, batch_size):
                pass
        state = source.state_dict()
        rng = np.random.Generator(
            np.random.Philox(key=np.array([seed, _BATCH], np.uint64), counter=number << 64)
        )
        first = number * batch_size
        names = tuple(_name(item, place) for place, item in enumerate(items or (), start=first))
        number += 1
        yield None if items is None else collate(items, rng), names, {"batch": number, "source": state}


def _name(item: object, place: int) -> str:
    return item.name if isinstance(item, _Called) else f"item {place} of the stream"


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
            item, error = self._next()
            if error is not None:
                raise error
            assert item is not None
            yield item

    def _next(self) -> tuple[T | None, BaseException | None]:
        while True:
            alive = self._thread.is_alive()  # before the last look: what it made while alive is there then
            try:
                return self._ready.get(timeout=_SECONDS)
            except queue.Empty:
                if not alive:
                    raise RuntimeError(
                        "the thread that makes batches ahead is gone (does a forked process use the loader "
                        "of its parent? make one of its own there)"
                    ) from None

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
