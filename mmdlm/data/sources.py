"""Where samples come from: image folders and text files; knows no tokenizer."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from mmdlm.data.images import OnError, Stop, decode, to_array
from mmdlm.data.indexed import Indexed, Order, Shuffled
from mmdlm.data.sample import Sample
from mmdlm.io import contained

T_co = TypeVar("T_co", covariant=True)


class Source(Protocol[T_co]):
    """Items, an epoch at a time: `iter` gives the rest of the current epoch, after which the next one begins.

    The state is that after the last item handed out, so an interrupted loop goes on with the item after it.
    """

    def __iter__(self) -> Iterator[T_co]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Columns:
    """Which columns of a metadata file hold what; every column but these goes to `Sample.extra`."""

    texts: tuple[str, ...] = ("text",)  # each a text or a list of texts; all of them together, each text once
    question: str | None = None
    answer: str | None = None


class ImageFolder(Indexed[Sample]):
    """A folder of pictures with `metadata.jsonl` or `metadata.csv`, as Hugging Face's imagefolder has them.

    Each row names a picture under `file_name`, relative to the folder and inside it, and holds texts under
    the columns that `columns` says. `load` makes a picture of a path (RGB; decoding and fitting to a size, as
    one). Raises ValueError, naming file and line, for a row that is not so; pictures are only opened when
    asked for.
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
        self._load = load
        self._rows = [_row(self.path, place, row, columns) for place, row in _metadata(self.path)]
        if not self._rows:
            raise ValueError(f"{self.path}: its metadata has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """The sample of metadata row `index`. Raises ImageError when its picture cannot be had."""
        row = self._rows[self._at(index)]
        return Sample(
            name=row.name,
            image=to_array(self._load(self.path / row.name)),
            texts=row.texts,
            question=row.question,
            answer=row.answer,
            extra=row.extra,
        )

    def texts(self) -> Iterator[str]:
        """Every text of every row, in the order of the file, without opening a picture."""
        for row in self._rows:
            yield from row.texts

    def texts_of(self, index: int) -> tuple[str, ...]:
        """The texts of metadata row `index`, without opening its picture."""
        return self._rows[self._at(index)].texts


class Pieces(Protocol):
    """How a text file becomes items."""

    def __call__(self, text: str) -> Iterator[tuple[int, str]]:
        """Each piece with the offset of its first character; pieces come from the left and do not overlap."""
        ...


@dataclass(frozen=True)
class Lines:
    """Each line that is not blank, without what ends it."""

    def __call__(self, text: str) -> Iterator[tuple[int, str]]:
        offset = 0
        for line in text.split("\n"):
            if line.strip():
                yield offset, line
            offset += len(line) + 1


@dataclass(frozen=True)
class Paragraphs:
    """Runs of lines between blank lines; the line ends inside are kept."""

    def __call__(self, text: str) -> Iterator[tuple[int, str]]:
        first, held = 0, []
        for offset, line in (*_every_line(text), (len(text) + 1, "")):
            if line.strip():
                first = first if held else offset
                held.append(line)
            elif held:
                yield first, "\n".join(held)
                held = []


@dataclass(frozen=True)
class Chunks:
    """Pieces of `size` characters; the last one is what is left."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a chunk has at least 1 character, got size {self.size}")

    def __call__(self, text: str) -> Iterator[tuple[int, str]]:
        for offset in range(0, len(text), self.size):
            yield offset, text[offset : offset + self.size]


class TextFiles(Indexed[Sample]):
    """Plain text files in UTF-8, cut into pieces; a sample's name is "FILE:LINE" of its first character.

    Raises ValueError for a file that is missing or not UTF-8, and when there is no piece at all.
    """

    def __init__(
        self, paths: Path | str | Sequence[Path | str], *, pieces: Pieces = Lines(), order: Order = Shuffled()
    ) -> None:
        super().__init__(order)
        self._pieces: list[tuple[str, str]] = []
        for path in [paths] if isinstance(paths, (Path, str)) else paths:
            text, line, seen = _read_text(Path(path)), 1, 0
            for offset, piece in pieces(text):
                line, seen = line + text.count("\n", seen, offset), offset
                self._pieces.append((f"{path}:{line}", piece))
        if not self._pieces:
            raise ValueError(f"no text in {paths}")

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> Sample:
        name, text = self._pieces[self._at(index)]
        return Sample(name=name, texts=(text,))

    def texts(self) -> Iterator[str]:
        """Every piece, in the order of the files."""
        return (text for _, text in self._pieces)


@dataclass(frozen=True)
class _Row:
    name: str
    texts: tuple[str, ...]
    question: str | None
    answer: str | None
    extra: Mapping[str, Any]


def _row(folder: Path, place: str, row: Mapping[str, Any], columns: Columns) -> _Row:
    """A checked row; `place` is the file and line that errors name."""
    rest = dict(row)
    name = rest.pop("file_name", None)
    if not isinstance(name, str):
        raise ValueError(f"{place}: wanted a file name under 'file_name', got {name!r}")
    try:
        contained(folder, name)
    except ValueError as error:
        raise ValueError(f"{place}: file_name {error}") from None
    texts: dict[str, None] = {}  # an ordered set
    for column in columns.texts:
        value = _cell(rest, column, place)
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            raise ValueError(f"{place}: column {column!r} wants a text or a list of texts, got {value!r}")
        texts |= dict.fromkeys(found)
    question = (
        None
        if columns.question is None
        else _text(_cell(rest, columns.question, place), columns.question, place)
    )
    answer = (
        None if columns.answer is None else _text(_cell(rest, columns.answer, place), columns.answer, place)
    )
    used = {*columns.texts, columns.question, columns.answer}
    extra = {key: value for key, value in rest.items() if key not in used}
    return _Row(name, tuple(texts), question, answer, extra)


def _cell(row: Mapping[str, Any], column: str, place: str) -> Any:
    if column not in row:
        raise ValueError(f"{place}: no column {column!r}; there are {', '.join(row) or 'none'}")
    return row[column]


def _text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: column {column!r} wants a text, got {value!r}")
    return value


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
    with open(file, "rb") as lines:  # bytes: the JSON reader then finds out about a byte order mark itself
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}:{number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}:{number}: wanted an object, got a {type(row).__name__}")
            yield f"{file}:{number}", row


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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _every_line(text: str) -> Iterator[tuple[int, str]]:
    offset = 0
    for line in text.split("\n"):
        yield offset, line
        offset += len(line) + 1
