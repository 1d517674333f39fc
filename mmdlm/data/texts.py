"""Text files cut into pieces, read when asked for; knows no tokenizer."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from mmdlm.data.images import OnError, Stop
from mmdlm.data.indexed import Indexed, Order, Shuffled
from mmdlm.data.rows import listed, read_span
from mmdlm.data.sample import Sample, SampleError

_MARK = b"\xef\xbb\xbf"  # the byte order mark, which is no text


class Line(NamedTuple):
    """A line of a file; places are counted in bytes."""

    number: int  # from 1
    start: int
    end: int  # of the text, before what ends the line
    after: int  # where the next line starts: `end`, if nothing ends this one
    text: str  # without what ends it


class Piece(NamedTuple):
    """Where a piece of a file lies: the line of its first character, and its bytes."""

    line: int
    start: int
    end: int


class Pieces(Protocol):
    """How a text file becomes items."""

    def __call__(self, lines: Iterable[Line]) -> Iterator[Piece]:
        """The pieces of a file with these lines, from the top; they do not overlap."""
        ...


@dataclass(frozen=True)
class Lines:
    """Each line that is not blank, without what ends it."""

    def __call__(self, lines: Iterable[Line]) -> Iterator[Piece]:
        for line in lines:
            if line.text.strip():
                yield Piece(line.number, line.start, line.end)


@dataclass(frozen=True)
class Paragraphs:
    """Runs of lines between blank lines; the line ends inside are kept."""

    def __call__(self, lines: Iterable[Line]) -> Iterator[Piece]:
        held: Piece | None = None
        for line in lines:
            if line.text.strip():
                number, start = (line.number, line.start) if held is None else (held.line, held.start)
                held = Piece(number, start, line.end)
            elif held is not None:
                yield held
                held = None
        if held is not None:
            yield held


@dataclass(frozen=True)
class Documents:
    """What lies between lines that are `separator` (as "<|endoftext|>"), blank lines around it left out.

    None: a file is one document.
    """

    separator: str | None = None

    def __call__(self, lines: Iterable[Line]) -> Iterator[Piece]:
        held: Piece | None = None
        for line in lines:
            if self.separator is not None and line.text.strip() == self.separator:
                if held is not None:
                    yield held
                held = None
            elif line.text.strip():
                number, start = (line.number, line.start) if held is None else (held.line, held.start)
                held = Piece(number, start, line.end)
        if held is not None:
            yield held


@dataclass(frozen=True)
class Chunks:
    """Pieces of `size` characters; the last one is what is left. What ends a line is one character."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a chunk has at least 1 character, got size {self.size}")

    def __call__(self, lines: Iterable[Line]) -> Iterator[Piece]:
        number = start = place = held = 0
        for line in lines:
            characters = line.text + "\n" * (line.after > line.end)
            at, place = 0, line.start
            while at < len(characters):
                if not held:
                    number, start = line.number, place
                taken = characters[at : at + self.size - held]
                at, held = at + len(taken), held + len(taken)
                place = line.after if at == len(characters) else place + len(taken.encode())
                if held == self.size:
                    yield Piece(number, start, place)
                    held = 0
        if held:
            yield Piece(number, start, place)


class TextFiles(Indexed[Sample]):
    """Plain text files in UTF-8, cut into pieces; a sample's name is "FILE:LINE" of its first character.

    Only the places of the pieces are kept (32 bytes each); their text is read when asked for, and its lines
    then end in a newline. Raises ValueError for a file that is missing or not UTF-8, and when there is no
    piece at all; SampleError for a file that has become shorter or another since.
    """

    def __init__(
        self,
        paths: Path | str | Sequence[Path | str],
        *,
        pieces: Pieces = Lines(),
        order: Order = Shuffled(),
        on_error: OnError = Stop(),
    ) -> None:
        super().__init__(order, on_error)
        self._paths = listed(paths)
        self._files, self._lines = array("q"), array("q")
        self._starts, self._ends = array("q"), array("q")
        for number, path in enumerate(self._paths):
            for piece in pieces(_lines_of(path)):
                self._files.append(number)
                self._lines.append(piece.line)
                self._starts.append(piece.start)
                self._ends.append(piece.end)
        if not self._files:
            raise ValueError(f"no text in {paths}")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        """Piece `index`, in the order of the files. Raises SampleError when it cannot be had."""
        at = self._at(index)
        path, start = self._paths[self._files[at]], self._starts[at]
        data = read_span(path, start, self._ends[at] - start)
        text = _decoded(data, path, start).replace("\r\n", "\n").replace("\r", "\n")
        return Sample(name=f"{path}:{self._lines[at]}", texts=(text,))

    def texts(self) -> Iterator[str]:
        """Every piece, in the order of the files."""
        return (self[index].texts[0] for index in range(len(self)))


def _lines_of(path: Path) -> Iterator[Line]:
    """The lines of a file, ended by any of CR LF, LF and CR."""
    number, start = 0, 0
    try:
        with open(path, "rb") as file:
            if file.read(len(_MARK)) == _MARK:
                start = len(_MARK)
            file.seek(start)
            for block in file:
                for line in block.splitlines(keepends=True):
                    number += 1
                    text = line.rstrip(b"\r\n")
                    after = start + len(line)
                    yield Line(number, start, start + len(text), after, _decoded(text, path, start))
                    start = after
    except OSError as error:
        raise SampleError(f"{path}", f"cannot be read ({error.strerror})") from None


def _decoded(data: bytes, path: Path, start: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"{path}", f"not UTF-8 at byte {start + error.start}") from None
