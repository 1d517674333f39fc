"""Several sources as one, by weights; knows nothing of what the items are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np

from mmdlm.data.indexed import forever, mix
from mmdlm.data.loader import Skippable
from mmdlm.data.sources import Source

T = TypeVar("T")

_CHOICE = 0x3147  # sets the choices apart from shuffles of the same seed
_BLOCK = 1024  # choices made at once


class Mixture(Generic[T]):
    """An endless source: item n comes from source k with a probability in proportion to `weights[k]`.

    Which one is a function of (seed, n) alone. Each source goes epoch after epoch at its own pace; from then
    on they are the mixture's own: do not iterate them elsewhere. The state is the position and those of the
    sources; weights may change when a run goes on. Raises ValueError for no sources, for weights that are not
    one positive number a source, and, in iteration, for a source that gives nothing.
    """

    def __init__(self, sources: Sequence[Source[T]], weights: Sequence[float], *, seed: int = 0) -> None:
        if not sources:
            raise ValueError("a mixture wants at least one source, got none")
        if len(weights) != len(sources):
            raise ValueError(f"wanted a weight for each of {len(sources)} sources, got {len(weights)}")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"weights must be positive and finite, got {list(weights)}")
        self._sources = list(sources)
        self._bounds = np.cumsum(np.asarray(weights, np.float64) / math.fsum(weights))[:-1]
        self._key = mix(mix(np.array([seed % 2**64], np.uint64)) ^ np.uint64(_CHOICE))
        self._position = 0
        self._streams: list[Iterator[T]] | None = None  # of the iteration under way

    def choices(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the numbers of the sources that items `start`, `start` + 1, ... come from."""
        words = mix(np.arange(start, start + count, dtype=np.uint64) + self._key)
        uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
        return np.searchsorted(self._bounds, uniform, side="right")

    def __iter__(self) -> Iterator[T]:
        self._streams = streams = self._begin()
        first, choices = -1, np.empty(0, np.int64)
        while True:
            place = self._position % _BLOCK
            if self._position - place != first:  # also after a skip
                first = self._position - place
                choices = self.choices(first, _BLOCK)
            item = next(streams[choices[place]])
            self._position += 1
            yield item

    def skip(self, count: int) -> None:
        """Pass over the next `count` items; they are loaded only in sources that cannot skip."""
        streams = self._begin() if self._streams is None else self._streams
        while count:
            taken = min(count, _BLOCK)
            counts = np.bincount(self.choices(self._position, taken), minlength=len(self._sources))
            for source, stream, number in zip(self._sources, streams, counts.tolist(), strict=True):
                if isinstance(source, Skippable):
                    source.skip(number)
                else:
                    for _ in islice(stream, number):
                        pass
            self._position += taken
            count -= taken

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, if those of the sources are."""
        return {"position": self._position, "sources": [source.state_dict() for source in self._sources]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when there were another number of sources."""
        if len(state["sources"]) != len(self._sources):
            raise ValueError(
                f"the state is of {len(state['sources'])} sources, this mixture has {len(self._sources)}"
            )
        for source, part in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(part)
        self._position = state["position"]
        self._streams = None

    def _begin(self) -> list[Iterator[T]]:
        return [forever(source, f"source {k} of the mixture") for k, source in enumerate(self._sources)]
