"""Image-text pairs whose pictures are codes already: written once, read often; knows no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mmdlm.data.indexed import Indexed, Order, Shuffled
from mmdlm.io import atomic_folder

_CODES, _ROWS = "codes.safetensors", "samples.jsonl"


@dataclass(frozen=True, eq=False)
class Encoded:
    """One pair: what a `Sample` is after its picture went through an image tokenizer."""

    name: str
    codes: np.ndarray  # (h, w) int32
    texts: tuple[str, ...]


class EncodedFolder(Indexed[Encoded]):
    """A folder that `write_encoded` wrote. Raises ValueError, naming the file, for one that is not so."""

    def __init__(self, path: Path | str, *, order: Order = Shuffled()) -> None:
        super().__init__(order)
        self.path = Path(path)
        try:
            self._codes = load_file(self.path / _CODES)["codes"]
            # by "\n" alone: texts may hold what else ends a line in Unicode
            lines = (self.path / _ROWS).read_text("utf-8").removesuffix("\n").split("\n")
            self._rows = [(str(row["name"]), tuple(row["texts"])) for row in map(json.loads, lines)]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} holds no encoded pairs ({_CODES} and {_ROWS}): {error}") from error
        if len(self._rows) != len(self._codes) or self._codes.ndim != 3:
            raise ValueError(
                f"{self.path}: {len(self._rows)} rows in {_ROWS}, but codes of shape {self._codes.shape}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes a picture."""
        return self._codes.shape[1], self._codes.shape[2]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Encoded:
        at = self._at(index)
        name, texts = self._rows[at]
        return Encoded(name, self._codes[at], texts)

    def texts(self) -> list[str]:
        """Every text of every pair."""
        return [text for _, texts in self._rows for text in texts]


def write_encoded(path: Path | str, pairs: Sequence[Encoded]) -> None:
    """Write pairs as a folder, whole or not at all.

    Raises ValueError for none, or for codes of several shapes.
    """
    shapes = {pair.codes.shape for pair in pairs}
    if len(shapes) != 1:
        found = f"{len(pairs)} pairs of shapes {sorted(shapes)}"
        raise ValueError(f"wanted pairs with codes of one shape, got {found}")
    rows = [json.dumps({"name": pair.name, "texts": list(pair.texts)}, ensure_ascii=False) for pair in pairs]
    with atomic_folder(path) as folder:
        save_file({"codes": np.stack([pair.codes for pair in pairs]).astype(np.int32)}, folder / _CODES)
        (folder / _ROWS).write_text("\n".join(rows) + "\n", "utf-8")
