"""Samples that are lines of JSON, with pictures in files beside them; knows no tokenizer."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdlm.data.images import ImageError, OnError, Stop, decode, to_array
from mmdlm.data.indexed import Indexed, Order, Shuffled
from mmdlm.data.rows import Columns, describe, file_under, json_object, listed, read_span
from mmdlm.data.sample import Sample

_IMAGE = "image"  # the column of the picture, by custom


class JsonLines(Indexed[Sample]):
    """Files of one JSON object a line; blank lines do not count. A sample's name is "FILE:LINE".

    The picture is a file named under `columns.image` (default: "image"), relative to the folder `root`
    (default: that of the JSON file) and inside it; `load` makes a picture of its path (RGB; decoding and
    fitting to a size, as one). A row without that column, or with null in it, is text alone. Only the places
    of the lines are kept (32 bytes each); rows are read, and checked, when asked for. The pictures of a
    document (`columns.pieces`) are files alike.

    Raises ValueError for a file that cannot be read, for no row at all, and for an image column that was
    asked for by name and that no row of a file has. A row that is not as said is a SampleError, which goes to
    `on_error` in iteration.
    """

    def __init__(
        self,
        paths: Path | str | Sequence[Path | str],
        *,
        columns: Columns = Columns(),
        load: Callable[[Path], Image.Image] = decode,
        order: Order = Shuffled(),
        on_error: OnError = Stop(),
        root: Path | str | None = None,
    ) -> None:
        super().__init__(order, on_error)
        self._paths = listed(paths)
        self._columns = columns
        self._load = load
        self._root = None if root is None else Path(root)
        self._files, self._lines = array("q"), array("q")
        self._starts, self._sizes = array("q"), array("q")
        for number, path in enumerate(self._paths):
            self._index(number, path)
        if not self._files:
            raise ValueError(f"{', '.join(map(str, self._paths))}: no rows")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        """The sample of row `index`. Raises SampleError for a bad row, ImageError for a bad picture."""
        place, row = self._row(index)
        said = describe(row, self._columns, place)
        if said.pieces:
            return said.document(place, lambda name, which: self._picture({which: name}, which, place, index))
        column = self._columns.image or _IMAGE
        image = None if row.get(column) is None else self._picture(row, column, place, index)
        return Sample(place, image, said.texts, said.question, said.answer, said.extra)

    def texts(self) -> Iterator[str]:
        """Every text of every row, in the order of the files, without opening a picture."""
        for index in range(len(self)):
            yield from self.texts_of(index)

    def texts_of(self, index: int) -> tuple[str, ...]:
        """The texts of row `index`, without opening its picture."""
        place, row = self._row(index)
        return describe(row, self._columns, place).all_texts

    def _row(self, index: int) -> tuple[str, dict[str, Any]]:
        at = self._at(index)
        path = self._paths[self._files[at]]
        place = f"{path}:{self._lines[at]}"
        return place, json_object(read_span(path, self._starts[at], self._sizes[at]), place)

    def _picture(self, row: dict[str, Any], column: str, place: str, index: int) -> np.ndarray:
        folder = self._root or self._paths[self._files[self._at(index)]].parent
        name = file_under(row, column, folder, place)
        try:
            return to_array(self._load(folder / name))
        except ImageError as error:
            raise ImageError(place, f"picture {name!r}: {error.reason}") from error

    def _index(self, number: int, path: Path) -> None:
        column = self._columns.image
        wanted = None if column is None else json.dumps(column).encode()
        start = 0
        try:
            with open(path, "rb") as file:
                for at, line in enumerate(file, 1):
                    if wanted is not None and wanted in line:
                        wanted = None
                    if line.strip():
                        self._files.append(number)
                        self._lines.append(at)
                        self._starts.append(start)
                        self._sizes.append(len(line))
                    start += len(line)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        if wanted is not None:
            raise ValueError(f"{path}: no row has the image column {column!r}")
