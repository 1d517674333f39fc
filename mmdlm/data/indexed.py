"""Items by index, in an order that resumes exactly; knows neither what the items are nor who batches them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from mmdlm.data.images import ImageError, OnError, Stop

T = TypeVar("T")


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
        key = _mix(np.array([self.seed % 2**64], np.uint64))
        key = _mix(key ^ np.array([epoch], np.uint64))
        return np.argsort(_mix(np.arange(size, dtype=np.uint64) + key), kind="stable")


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that scatters: SplitMix64's finaliser (doi:10.1145/2660193.2660195)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Indexed(ABC, Generic[T]):
    """A source of a known number of items, each to be had by its index: `source[i]`, `len(source)`.

    An ImageError on the way goes to `on_error`; one asked for by index is raised.
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
        for index in self._order(size, epoch)[self._position :]:
            try:
                item = self[int(index)]
            except ImageError as error:
                self._on_error(error)
                self._advance()
                continue
            self._advance()
            yield item

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

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._position = state["position"]
