"""What a data set holds: counts, sizes, what is there twice, what is wrong; knows no source and no file."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from mmdlm.data.encoded import Encoded
from mmdlm.data.sample import Sample

_BYTES = 12  # of a digest: among 10^9 the chance that two are alike is 10^-11


class Census:
    """Counts the items it is shown; `bad` maps the name of what could not be had to the reason."""

    def __init__(self) -> None:
        self.bad: dict[str, str] = {}
        self.wordless: list[str] = []  # names of items without a text, or with a blank one
        self._counts = {"rows": 0, "texts": 0, "pictures": 0}
        self._seen: dict[str, set[bytes]] = {name: set() for name in self._counts}
        self._lengths: list[int] = []  # characters of each text
        self._sizes: list[tuple[int, int]] = []  # width and height of each picture in pixels

    def add(self, item: Sample | Encoded) -> None:
        """Count an item."""
        pictures, texts = item.all_codes if isinstance(item, Encoded) else item.all_images, item.all_texts
        if isinstance(item, Sample):
            self._sizes += [(image.shape[1], image.shape[0]) for image in pictures]
        parts = [self._piece(piece) for piece in item.pieces or (*pictures, *texts)]
        parts += [f"{said}".encode("utf-8", "surrogatepass") for said in (item.question, item.answer)]
        self._count("rows", b"\n".join(parts))
        self._lengths += [len(text) for text in texts]
        if not texts or not all(text.strip() for text in texts):
            self.wordless.append(item.name)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows, texts and pictures."""
        return dict(self._counts)

    @property
    def repeated(self) -> dict[str, int]:
        """How many of them were seen before: the same text, the same pixels or codes, the same of all."""
        return {name: count - len(self._seen[name]) for name, count in self._counts.items()}

    def lines(self) -> Iterator[str]:
        """The report, bad items at its end."""
        for name, count in self._counts.items():
            again = self.repeated[name]
            yield f"{name:<9}{count:>10}" + (f"   {again} of them seen before" if again else "")
        if self._lengths:
            yield f"characters a text: {_spread(self._lengths)}"
        if self._sizes:
            widths, heights = zip(*self._sizes, strict=True)
            yield f"pixels: width {_spread(widths)}; height {_spread(heights)}"
        if self.wordless:
            yield f"without text: {len(self.wordless)} rows, the first is {self.wordless[0]}"
        yield f"bad rows: {len(self.bad) or 'none'}"
        for name, reason in self.bad.items():
            yield f"  {name}: {reason}"

    def _piece(self, piece: str | np.ndarray) -> bytes:
        if isinstance(piece, str):
            return self._count("texts", piece.encode("utf-8", "surrogatepass"))
        return self._count("pictures", f"{piece.shape}".encode() + np.ascontiguousarray(piece).tobytes())

    def _count(self, kind: str, data: bytes) -> bytes:
        digest = hashlib.blake2b(data, digest_size=_BYTES).digest()
        self._counts[kind] += 1
        self._seen[kind].add(digest)
        return digest


def _spread(values: Sequence[int]) -> str:
    return f"{min(values)} to {max(values)}, median {statistics.median(values):g}"
