"""Samples whose pictures are codes, and a source that encodes on the way; knows no tokenizer."""

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
    """What a `Sample` is after its pictures went through an image tokenizer."""

    name: str
    codes: np.ndarray | None = None  # (h, w) int32
    texts: tuple[str, ...] = ()
    question: str | None = None
    answer: str | None = None
    pieces: tuple[str | np.ndarray, ...] = ()  # of a document, texts and codes; it has none of the others

    def __post_init__(self) -> None:
        others = self.codes, self.texts or None, self.question, self.answer
        if self.pieces and any(other is not None for other in others):
            raise ValueError(f"{self.name}: a document has pieces and no codes, texts, question or answer")

    @property
    def all_codes(self) -> tuple[np.ndarray, ...]:
        """The codes of the picture, or of those of the document in their order."""
        if self.codes is not None:
            return (self.codes,)
        return tuple(piece for piece in self.pieces if isinstance(piece, np.ndarray))

    @property
    def all_texts(self) -> tuple[str, ...]:
        """The texts, or those of the document in their order."""
        return self.texts or tuple(piece for piece in self.pieces if isinstance(piece, str))


class Encode(Protocol):
    """Pictures to codes: what an image tokenizer does, with the scaling before it."""

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """n pictures (H, W, 3) uint8, of any sizes, to (n, h, w) integers; the same for the same pictures."""
        ...


class OnlineEncoded(Indexed[Encoded]):
    """The samples of `source` with codes for their pictures, made anew each time they are asked for.

    While iterating, `batch_size` samples are read together and their pictures encoded, so many at a time and
    always the same ones: after an interruption the codes come from the same batch again. Shards
    (`encode_shards`) cost this once and not every epoch. What has no picture stays as it is.
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
        return with_codes([sample], self._encode, self._batch_size)[0]

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
        samples = [one for one in found if isinstance(one, Sample)]
        pairs = iter(with_codes(samples, self._encode, self._batch_size))
        return [one if isinstance(one, SampleError) else next(pairs) for one in found]


def with_codes(samples: Sequence[Sample], encode: Encode, batch_size: int) -> list[Encoded]:
    """The samples with codes for their pictures, of which `batch_size` at a time are encoded together."""
    images = [image for sample in samples for image in sample.all_images]
    codes: list[np.ndarray] = []
    for start in range(0, len(images), batch_size):
        codes += _codes(encode, images[start : start + batch_size])
    made, after = iter(codes), []
    for sample in samples:
        image = None if sample.image is None else next(made)
        pieces = tuple(piece if isinstance(piece, str) else next(made) for piece in sample.pieces)
        after.append(Encoded(sample.name, image, sample.texts, sample.question, sample.answer, pieces))
    return after


def _codes(encode: Encode, images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    codes = np.asarray(encode(images))
    if codes.ndim != 3 or len(codes) != len(images) or codes.dtype.kind not in "iu":
        raise ValueError(
            f"encode gave {codes.shape} {codes.dtype} for {len(images)} pictures; "
            f"wanted ({len(images)}, h, w) integers"
        )
    yield from codes.astype(np.int32)
