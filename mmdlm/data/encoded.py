"""Image-text pairs whose pictures are codes, and a source that encodes on the way; knows no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmdlm.data.images import OnError, Stop
from mmdlm.data.indexed import Indexed, Order, Shuffled
from mmdlm.data.sample import Sample, SampleError


@dataclass(frozen=True, eq=False)
class Encoded:
    """One pair: what a `Sample` is after its picture went through an image tokenizer."""

    name: str
    codes: np.ndarray  # (h, w) int32
    texts: tuple[str, ...]
    question: str | None = None
    answer: str | None = None


class Encode(Protocol):
    """Pictures to codes: what an image tokenizer does, with the scaling before it."""

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """n pictures (H, W, 3) uint8, of any sizes, to (n, h, w) integers; the same for the same pictures."""
        ...


class OnlineEncoded(Indexed[Encoded]):
    """The samples of `source` with codes for their pictures, made anew each time they are asked for.

    While iterating, `batch_size` pictures are read and encoded together, always the same ones: after an
    interruption the codes come from the same batch again. Shards (`encode_shards`) cost this once and not
    every epoch. Raises ValueError for a sample without a picture.
    """

    def __init__(
        self,
        source: Indexed[Sample],
        encode: Encode,
        *,
        batch_size: int = 32,
        order: Order = Shuffled(),
        on_error: OnError = Stop(),
    ) -> None:
        super().__init__(order, on_error)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._source = source
        self._encode = encode
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Encoded:
        """The sample of that index. Raises SampleError when it cannot be had."""
        sample = self._source[self._at(index)]
        return with_codes([sample], self._encode)[0]

    def __iter__(self) -> Iterator[Encoded]:
        epoch, size = self._epoch, len(self)
        if size == 0:
            return
        order, first, group = self._order(size, epoch), -1, []
        while self._epoch == epoch:
            place = self._position % self._batch_size
            if first != self._position - place:
                first = self._position - place
                group = self._group(order[first : first + self._batch_size])
            pair = group[place]
            if isinstance(pair, SampleError):
                self._on_error(pair)
                self._advance()
                continue
            self._advance()
            yield pair

    def _group(self, indices: np.ndarray) -> list[Encoded | SampleError]:
        """The pairs of these indices, encoded together, and the error where there is none."""
        found: list[Sample | SampleError] = []
        for index in indices:
            try:
                found.append(self._source[int(index)])
            except SampleError as error:
                found.append(error)
        pairs = iter(with_codes([one for one in found if isinstance(one, Sample)], self._encode))
        return [one if isinstance(one, SampleError) else next(pairs) for one in found]


def with_codes(samples: Sequence[Sample], encode: Encode) -> list[Encoded]:
    """The samples as pairs, encoded in one call. Raises ValueError for one without a picture."""
    images = []
    for sample in samples:
        if sample.image is None:
            raise ValueError(f"{sample.name}: has no picture to encode")
        images.append(sample.image)
    if not images:
        return []
    codes = np.asarray(encode(images))
    if codes.ndim != 3 or len(codes) != len(images) or codes.dtype.kind not in "iu":
        raise ValueError(
            f"encode gave {codes.shape} {codes.dtype} for {len(images)} pictures; "
            f"wanted ({len(images)}, h, w) integers"
        )
    return [
        Encoded(sample.name, grid, sample.texts, sample.question, sample.answer)
        for sample, grid in zip(samples, codes.astype(np.int32), strict=True)
    ]
