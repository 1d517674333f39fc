"""What the columns of a row mean, and rows of JSON; knows neither pictures nor where rows lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdlm.data.sample import Sample, SampleError
from mmdlm.io import contained


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold what; every column but these goes to `Sample.extra`.

    With `pieces` each row is a document of texts and pictures in the order in which they stand. One column
    holds a list of {"text": ...} and {"image": ...}; or two, in this order, hold lists of equal length, of
    texts and of pictures, with null where the other has something (as in OBELICS, arXiv:2306.16527). Raises
    ValueError for `pieces` together with columns of what a document does not have.
    """

    texts: tuple[str, ...] = ("text",)  # each a text or a list of texts; all of them together, each text once
    question: str | None = None
    answer: str | None = None
    image: str | None = None  # the picture; None: where the source has it by custom
    pieces: str | tuple[str, str] | None = None

    def __post_init__(self) -> None:
        others = (self.question, self.answer, self.image, self.texts if self.texts != ("text",) else None)
        if self.pieces is not None and any(others):
            raise ValueError(f"{self}: with pieces, no texts, question, answer or image can be had")

    @staticmethod
    def named(texts: str | None, image: str | None, pieces: str | None) -> Columns | None:
        """What a command line names, commas between the names of several columns; None where it names none.

        Raises ValueError for `pieces` together with others, or of more than two columns.
        """
        if pieces is not None:
            names = pieces.split(",")
            if len(names) > 2:
                raise ValueError(f"pieces are in one column, or texts and pictures in two, got {pieces}")
            some = () if texts is None else tuple(texts.split(","))
            return Columns(some, image=image, pieces=names[0] if len(names) == 1 else (names[0], names[1]))
        if texts is None and image is None:
            return None
        return Columns(("text",) if texts is None else tuple(texts.split(",")), image=image)

    @property
    def documents(self) -> tuple[str, ...]:
        """The columns of `pieces`."""
        if self.pieces is None:
            return ()
        return (self.pieces,) if isinstance(self.pieces, str) else self.pieces


@dataclass(frozen=True)
class Unread:
    """A picture of a document as its row has it: a file name, the bytes of a file, ..."""

    value: Any


@dataclass(frozen=True)
class Described:
    """What a row says besides its picture."""

    texts: tuple[str, ...]
    question: str | None
    answer: str | None
    extra: Mapping[str, Any]
    pieces: tuple[str | Unread, ...] = ()

    @property
    def all_texts(self) -> tuple[str, ...]:
        """The texts, or those of the document in their order."""
        return self.texts or tuple(piece for piece in self.pieces if isinstance(piece, str))

    def document(self, place: str, load: Callable[[Any, str], np.ndarray]) -> Sample:
        """The sample of a document; `load(value, which)` makes an array of a picture, `which` says which."""
        pieces = tuple(
            load(piece.value, f"piece {number}") if isinstance(piece, Unread) else piece
            for number, piece in enumerate(self.pieces)
        )
        return Sample(place, extra=self.extra, pieces=pieces)


def describe(row: Mapping[str, Any], columns: Columns, place: str) -> Described:
    """The row read as `columns` says. Raises SampleError, named `place`, for a row that is not so."""
    if columns.pieces is not None:
        rest = {key: row[key] for key in row if key not in columns.documents}
        return Described((), None, None, rest, _pieces(row, columns, place))
    texts: dict[str, None] = {}  # an ordered set
    for column in columns.texts:
        value = _cell(row, column, place)
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            raise SampleError(place, f"column {column!r} wants a text or a list of texts, got {value!r}")
        texts |= dict.fromkeys(found)
    question = None if columns.question is None else _text(row, columns.question, place)
    answer = None if columns.answer is None else _text(row, columns.answer, place)
    used = {*columns.texts, columns.question, columns.answer}
    return Described(tuple(texts), question, answer, {key: row[key] for key in row if key not in used})


def file_under(row: Mapping[str, Any], column: str, folder: Path, place: str) -> str:
    """The file name in a column, relative to `folder`. Raises SampleError unless it stays inside."""
    name = row.get(column)
    if not isinstance(name, str):
        raise SampleError(place, f"wanted a file name under {column!r}, got {name!r}")
    try:
        contained(folder, name)
    except ValueError as error:
        raise SampleError(place, f"{column} {error}") from None
    return name


def json_object(line: bytes, place: str) -> dict[str, Any]:
    """One JSON object, in UTF-8. Raises SampleError, under the name `place`, for anything else."""
    try:
        row = json.loads(line)  # bytes: the reader then finds out about a byte order mark itself
    except (ValueError, RecursionError) as error:
        raise SampleError(place, f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise SampleError(place, f"wanted an object, got a {type(row).__name__}")
    return row


def read_span(path: Path | str, start: int, size: int) -> bytes:
    """`size` bytes of a file from offset `start`; from any thread or process, nothing stays open.

    Raises SampleError, naming file and offset, when they are not there.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            data = file.read(size)
    except OSError as error:
        raise SampleError(f"{path}", f"cannot be read at offset {start} ({error.strerror})") from None
    if len(data) != size:
        raise SampleError(f"{path}", f"wanted {size} bytes at offset {start}, there are {len(data)}")
    return data


def listed(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    """One path or several as a list. Raises ValueError for none."""
    found = [Path(path) for path in ([paths] if isinstance(paths, (Path, str)) else paths)]
    if not found:
        raise ValueError("wanted at least one path, got none")
    return found


def _pieces(row: Mapping[str, Any], columns: Columns, place: str) -> tuple[str | Unread, ...]:
    """The document in the columns `columns.pieces`, its pictures as they stand there."""
    what, cells = " and ".join(map(repr, columns.documents)), []
    for column in columns.documents:
        value = _cell(row, column, place)
        if not isinstance(value, list):
            raise SampleError(place, f"column {column!r} wants a list, got {value!r}")
        cells.append(value)
    if len(cells) == 1:
        for number, cell in enumerate(cells[0]):
            if not isinstance(cell, Mapping):
                raise SampleError(
                    place, f'piece {number} of {what} wants {{"text": ...}} or {{"image": ...}}, got {cell!r}'
                )
        both = [(cell.get("text"), cell.get("image")) for cell in cells[0]]
    elif len(cells[0]) != len(cells[1]):
        raise SampleError(place, f"{what} want equal lengths, got {len(cells[0])} and {len(cells[1])}")
    else:
        both = list(zip(*cells, strict=True))
    if not both:
        raise SampleError(place, f"no piece under {what}")
    pieces: list[str | Unread] = []
    for number, (text, image) in enumerate(both):
        if (text is None) == (image is None):
            got = "neither" if text is None else "both"
            raise SampleError(place, f"piece {number} of {what} wants a text or an image, got {got}")
        if text is not None and not isinstance(text, str):
            raise SampleError(place, f"piece {number} of {what} wants a text, got {text!r}")
        pieces.append(Unread(image) if text is None else text)
    return tuple(pieces)


def _cell(row: Mapping[str, Any], column: str, place: str) -> Any:
    if column not in row:
        raise SampleError(place, f"no column {column!r}; there are {', '.join(row) or 'none'}")
    return row[column]


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    value = _cell(row, column, place)
    if not isinstance(value, str):
        raise SampleError(place, f"column {column!r} wants a text, got {value!r}")
    return value
