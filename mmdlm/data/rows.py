"""What the columns of a row mean, and rows of JSON; knows neither pictures nor where rows lie."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdlm.data.sample import SampleError
from mmdlm.io import contained


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold what; every column but these goes to `Sample.extra`."""

    texts: tuple[str, ...] = ("text",)  # each a text or a list of texts; all of them together, each text once
    question: str | None = None
    answer: str | None = None
    image: str | None = None  # the picture; None: where the source has it by custom


@dataclass(frozen=True)
class Described:
    """What a row says besides its picture."""

    texts: tuple[str, ...]
    question: str | None
    answer: str | None
    extra: Mapping[str, Any]


def describe(row: Mapping[str, Any], columns: Columns, place: str) -> Described:
    """The row read as `columns` says. Raises SampleError, named `place`, for a row that is not so."""
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


def _cell(row: Mapping[str, Any], column: str, place: str) -> Any:
    if column not in row:
        raise SampleError(place, f"no column {column!r}; there are {', '.join(row) or 'none'}")
    return row[column]


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    value = _cell(row, column, place)
    if not isinstance(value, str):
        raise SampleError(place, f"column {column!r} wants a text, got {value!r}")
    return value
