"""Where samples come from, and the image folder; knows no tokenizer."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from mmdlm.data.images import OnError, Stop, decode, to_array
from mmdlm.data.indexed import Indexed, Order, Shuffled
from mmdlm.data.rows import Columns, describe, file_under, json_object
from mmdlm.data.sample import Sample

T_co = TypeVar("T_co", covariant=True)

_FILE_NAME = "file_name"  # the column of the picture, by Hugging Face's custom


class Source(Protocol[T_co]):
    """Items, an epoch at a time: `iter` gives the rest of the current epoch, after which the next one begins.

    The state is that after the last item handed out, so an interrupted loop goes on with the item after it.
    """

    def __iter__(self) -> Iterator[T_co]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class ImageFolder(Indexed[Sample]):
    """A folder of pictures with `metadata.jsonl` or `metadata.csv`, as Hugging Face's imagefolder has them.

    Each row names a picture under `columns.image` (default: "file_name"), relative to the folder and inside
    it, and holds texts under the columns that `columns` says. `load` makes a picture of a path (RGB; decoding
    and fitting to a size, as one). Raises ValueError, naming file and line, for a row that is not so;
    pictures are only opened when asked for. Documents (`columns.pieces`) are read by `JsonLines`.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        columns: Columns = Columns(),
        load: Callable[[Path], Image.Image] = decode,
        order: Order = Shuffled(),
        on_error: OnError = Stop(),
    ) -> None:
        super().__init__(order, on_error)
        self.path = Path(path)
        if columns.pieces is not None:
            raise ValueError(
                f"{self.path}: an imagefolder has one picture a row; for documents name its metadata.jsonl"
            )
        self._load = load
        column = columns.image or _FILE_NAME
        self._rows = []
        for place, row in _metadata(self.path):
            name = file_under(row, column, self.path, place)
            rest = {key: row[key] for key in row if key != column}
            self._rows.append((name, describe(rest, columns, place)))
        if not self._rows:
            raise ValueError(f"{self.path}: its metadata has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """The sample of metadata row `index`. Raises ImageError when its picture cannot be had."""
        name, said = self._rows[self._at(index)]
        image = to_array(self._load(self.path / name))
        return Sample(name, image, said.texts, said.question, said.answer, said.extra)

    def texts(self) -> Iterator[str]:
        """Every text of every row, in the order of the file, without opening a picture."""
        for _, said in self._rows:
            yield from said.texts

    def texts_of(self, index: int) -> tuple[str, ...]:
        """The texts of metadata row `index`, without opening its picture."""
        return self._rows[self._at(index)][1].texts


def _metadata(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of the folder's one metadata file, each with "FILE:LINE"."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    readers = {"metadata.jsonl": _json_lines, "metadata.csv": _csv_rows}
    found = [name for name in readers if (folder / name).is_file()]
    if len(found) != 1:
        below = sorted(path.parent.name for name in readers for path in folder.glob(f"*/{name}"))
        hint = f"; the folders in it that have one: {', '.join(below)}" if below and not found else ""
        raise ValueError(
            f"{folder} has {' and '.join(found) or 'neither'}; wanted one of {', '.join(readers)}{hint}"
        )
    return readers[found[0]](folder / found[0])


def _json_lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file}:{number}", json_object(line, f"{file}:{number}")


def _csv_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        head: list[str] | None = None
        try:
            for cells in reader:
                place = f"{file}:{reader.line_num}"
                if not cells:
                    continue
                if head is None:
                    head = cells
                    continue
                if len(cells) != len(head):
                    raise ValueError(f"{place}: {len(cells)} cells under {len(head)} columns")
                yield place, dict(zip(head, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}:{reader.line_num + 1}: not CSV in UTF-8 ({error})") from None
