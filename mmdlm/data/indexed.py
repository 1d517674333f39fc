"""Items by index, in an order that resumes exactly; knows neither what the items are nor who batches them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from mmdlm.data.images import OnError, Stop
from mmdlm.data.sample import SampleError

T = TypeVar("T")

_ITEMS = 0x17E35  # sets the shuffle of items apart from that of groups


class Order(Protocol):
    """In which order the items of an epoch come."""

    def __call__(self, size: int, epoch: int) -> np.ndarray:
        """(size,) integers, a permutation of 0 .. size - 1, a function of the arguments alone."""
        ...


@dataclass(frozen=True)
class InOrder:
    """As they lie, in every epoch."""

    def __call__(self, size: int, epoch: int) -> np.ndarray:
        return np.arange(size)


@dataclass(frozen=True)
class Shuffled:
    """A uniformly random permutation for each (seed, epoch), the same on every machine and numpy."""

    seed: int = 0

    def __call__(self, size: int, epoch: int) -> np.ndarray:
        key = mix(np.array([self.seed % 2**64], np.uint64))
        key = mix(key ^ np.array([epoch], np.uint64))
        return np.argsort(mix(np.arange(size, dtype=np.uint64) + key), kind="stable")


@dataclass(frozen=True)
class Grouped:
    """Groups of neighbours (`sizes` items each) in random order, `window` of them shuffled together.

    For sources that read a whole group to give one item: one that holds `window` groups reads each once an
    epoch. As random as `Shuffled` with all groups in one window. Raises ValueError for a window below 1, and
    for a source of another size.
    """

    sizes: tuple[int, ...]
    window: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or not self.sizes or min(self.sizes) < 0:
            raise ValueError(f"wanted a window of at least 1 and sizes, got {self.window} and {self.sizes}")

    def __call__(self, size: int, epoch: int) -> np.ndarray:
        if size != sum(self.sizes):
            raise ValueError(f"the groups have {sum(self.sizes)} items together, the source has {size}")
        groups = Shuffled(self.seed)(len(self.sizes), epoch)
        place = np.empty(len(groups), np.int64)
        place[groups] = np.arange(len(groups))
        window = np.repeat(place // self.window, self.sizes)  # (size,) of each item
        drawn = Shuffled(self.seed ^ _ITEMS)(size, epoch)
        return drawn[np.argsort(window[drawn], kind="stable")]


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that scatters: SplitMix64's finaliser (doi:10.1145/2660193.2660195)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Indexed(ABC, Generic[T]):
    """A source of a known number of items, each to be had by its index: `source[i]`, `len(source)`.

    A SampleError on the way goes to `on_error`; one asked for by index is raised.
    """

    def __init__(self, order: Order, on_error: OnError = Stop()) -> None:
        self._order = order
        self._on_error = on_error
        self._epoch = 0
        self._position = 0  # of the next item in the epoch's order; always below the length

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> T: ...

    def __iter__(self) -> Iterator[T]:
        epoch, size = self._epoch, len(self)
        if size == 0:
            return
        order = self._order(size, epoch)
        while self._epoch == epoch:
            try:
                item = self[int(order[self._position])]
            except SampleError as error:
                self._on_error(error)
                self._advance()
                continue
            self._advance()
            yield item

    def skip(self, count: int) -> None:
        """Pass over the next `count` items, into the next epochs if need be.

        They are loaded only where `on_error` may leave some out, which then do not count.
        """
        if isinstance(self._on_error, Stop):
            epochs, self._position = divmod(self._position + count, max(1, len(self)))
            self._epoch += epochs
            return
        empty = 0  # two in a row (the first may be a rest of an epoch): there are none
        while count and empty < 2:
            found = sum(1 for _ in islice(self, count))
            empty = 0 if found else empty + 1
            count -= found

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"epoch": self._epoch, "position": self._position, "size": len(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when the source then had another length."""
        if state["size"] != len(self):
            raise ValueError(f"the state is of a source of {state['size']} items, this one has {len(self)}")
        self._epoch, self._position = state["epoch"], state["position"]

    def _advance(self) -> None:
        self._position += 1
        if self._position == len(self):
            self._epoch, self._position = self._epoch + 1, 0

    def _at(self, index: int) -> int:
        """An index from the end counted from the start, as lists do."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} items")
        return index % len(self)


class Listed(Indexed[T]):
    """The source of `item(0)` .. `item(size - 1)`."""

    def __init__(self, item: Callable[[int], T], size: int, *, order: Order = Shuffled()) -> None:
        super().__init__(order)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self._item = item
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> T:
        return self._item(self._at(index))


class Endless(Generic[T]):
    """The source of `item(0)`, `item(1)`, ... without end: one epoch that never ends."""

    def __init__(self, item: Callable[[int], T]) -> None:
        self._item = item
        self._position = 0

    def __iter__(self) -> Iterator[T]:
        while True:
            item = self._item(self._position)
            self._position += 1
            yield item

    def skip(self, count: int) -> None:
        """Pass over the next `count` items."""
        self._position += count

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._position = state["position"]


def forever(source: Iterable[T], what: str = "the source") -> Iterator[T]:
    """Epoch after epoch. Two empty ones in a row (the first may be a rest) are a ValueError, not a hang."""
    empty = 0
    while empty < 2:
        empty += 1
        for item in source:
            empty = 0
            yield item
    raise ValueError(f"{what} gave not one item in a whole epoch")
