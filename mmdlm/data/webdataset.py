"""Samples in tar shards (WebDataset), read where they lie; nothing is ever extracted. Knows no tokenizer."""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from mmdlm.data.images import ImageError, OnError, Stop, decode, to_array
from mmdlm.data.indexed import Indexed, Order, Shuffled
from mmdlm.data.rows import Columns, describe, json_object, listed, read_span
from mmdlm.data.sample import Sample, SampleError

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
_CAPTIONS = ("txt", "text", "caption")
_TEXTS = (*_CAPTIONS, "cls")
_BLOCK = 512  # bytes; a tar file is made of these


class WebDataset(Indexed[Sample]):
    """Tar shards with members KEY.EXTENSION; those of a shard with one key are the sample "SHARD:KEY".

    The extension is what follows the first point of the file name, in lower case. The picture is the member
    with one of the usual extensions, or `columns.image` where there are several; `load` makes a picture of
    its bytes (RGB; decoding and fitting to a size, as one). The row that `columns` are of holds each member
    of text under its extension (txt, text, caption, cls) and what the object in a json member holds. Without
    `columns` the texts are those under txt, text and caption; at least one is wanted. Members of other kinds
    are left unread; files whose name begins with a point or has no extension are passed over. The pictures
    of a document (`columns.pieces`, in the json member) are named there by the extensions of their members.

    The shards are read through once for the places of their members; each is then read from its offset when
    asked for, from any thread. Raises ValueError, naming shard and offset, for a shard that is compressed,
    damaged, cut short or followed by another one, for members that are links or devices or come twice, and
    for no sample at all. SampleError for a sample that is not as said; it goes to `on_error` in iteration.
    """

    def __init__(
        self,
        paths: Path | str | Sequence[Path | str],
        *,
        columns: Columns | None = None,
        load: Callable[[bytes], Image.Image] = decode,
        order: Order = Shuffled(),
        on_error: OnError = Stop(),
    ) -> None:
        super().__init__(order, on_error)
        self._paths = listed(paths)
        self._columns = columns
        self._load = load
        self._keys: list[str] = []
        self._kinds: dict[str, int] = {}  # extension -> number
        self._shards = array("q")  # of each sample
        self._firsts = array("q", [0])  # of each sample the first member, and at the end how many members
        self._kind, self._offset, self._size = array("q"), array("q"), array("q")  # of each member
        for number, path in enumerate(self._paths):
            self._index(number, path)
        if not self._keys:
            raise ValueError(f"{', '.join(map(str, self._paths))}: no samples (members named KEY.EXTENSION)")
        self._extensions = list(self._kinds)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, in the order of the shards. Raises SampleError when it cannot be had."""
        path, place, members = self._locate(index)
        row, columns = self._row(path, place, members)
        if columns.pieces is not None:
            said = describe(row, columns, place)
            return said.document(place, lambda name, which: self._picture(path, place, members, name, which))
        picture = self._pick(place, members)
        image = None if picture is None else self._picture(path, place, members, picture)
        said = describe(row, columns, place)
        return Sample(place, image, said.texts, said.question, said.answer, said.extra)

    def texts(self) -> Iterator[str]:
        """Every text of every sample, in the order of the shards, without reading a picture."""
        for index in range(len(self)):
            path, place, members = self._locate(index)
            yield from describe(*self._row(path, place, members), place).all_texts

    def _locate(self, index: int) -> tuple[Path, str, dict[str, tuple[int, int]]]:
        """The shard, the name, and offset and size of each member by its extension."""
        at = self._at(index)
        path = self._paths[self._shards[at]]
        members = {
            self._extensions[self._kind[member]]: (self._offset[member], self._size[member])
            for member in range(self._firsts[at], self._firsts[at + 1])
        }
        return path, f"{path}:{self._keys[at]}", members

    def _row(
        self, path: Path, place: str, members: dict[str, tuple[int, int]]
    ) -> tuple[dict[str, Any], Columns]:
        """What the members of text hold, and the columns to read it by."""
        row: dict[str, Any] = {}
        for kind in _TEXTS:
            if kind in members:
                data = read_span(path, *members[kind])
                try:
                    row[kind] = data.decode("utf-8-sig").strip()
                except UnicodeDecodeError as error:
                    offset = members[kind][0] + error.start
                    raise SampleError(place, f"member .{kind} is not UTF-8 at offset {offset}") from None
        if "json" in members:
            found = json_object(read_span(path, *members["json"]), place)
            twice = sorted(row.keys() & found.keys())
            if twice:
                raise SampleError(place, f"has {', '.join(twice)} both as a member and in its json")
            row |= found
        if self._columns is not None:
            return row, self._columns
        texts = tuple(name for name in _CAPTIONS if name in row)
        if not texts:
            there = ", ".join([*members, *(key for key in row if key not in members)])
            raise SampleError(place, f"no text under {', '.join(_CAPTIONS)}; there are {there}")
        return row, replace(Columns(), texts=texts)

    def _picture(
        self, path: Path, place: str, members: dict[str, tuple[int, int]], kind: Any, which: str = "image"
    ) -> np.ndarray:
        if not isinstance(kind, str) or kind not in members:
            raise SampleError(place, f"{which} is in no member .{kind}; there are {', '.join(members)}")
        offset, size = members[kind]
        try:
            return to_array(self._load(read_span(path, offset, size)))
        except ImageError as error:
            raise ImageError(place, f"member .{kind} at offset {offset}: {error.reason}") from error

    def _pick(self, place: str, members: dict[str, tuple[int, int]]) -> str | None:
        """The extension of the picture; None for a sample of text alone."""
        wanted = None if self._columns is None else self._columns.image
        there = ", ".join(members)
        if wanted is not None:
            if wanted not in members:
                raise SampleError(place, f"no member .{wanted}; there are {there}")
            return wanted
        found = [kind for kind in members if kind in _PICTURES]
        if len(found) > 1:
            raise SampleError(place, f"several pictures ({', '.join(found)}); say which: Columns(image=...)")
        strange = [kind for kind in members if kind not in (*_TEXTS, "json")]
        if not found and strange:
            raise SampleError(place, f"no picture among {there}; name one by Columns(image=...)")
        return found[0] if found else None

    def _index(self, number: int, path: Path) -> None:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for name, offset, size in _members(path):
            folder, slash, base = name.rpartition("/")
            stem, point, extension = base.partition(".")
            if not stem or not point:
                continue
            members = samples.setdefault(folder + slash + stem, {})
            if extension.lower() in members:
                raise ValueError(f"{path}: member {name!r} at offset {offset} comes twice")
            members[extension.lower()] = (offset, size)
        for key, members in samples.items():
            self._keys.append(key)
            self._shards.append(number)
            for extension, (offset, size) in members.items():
                self._kind.append(self._kinds.setdefault(extension, len(self._kinds)))
                self._offset.append(offset)
                self._size.append(size)
            self._firsts.append(len(self._kind))


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file in a tar file, which is checked to its end.

    `tarfile` takes a bad header for the end, and a file cut between members for whole: hence the checks here.
    """
    end = 0  # of the members so far
    try:
        with open(path, "rb") as file:
            whole = file.seek(0, 2)
            file.seek(0)
            # mode "r:" sees no compression; names in any bytes stay printable
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
                while (member := tar.next()) is not None:
                    if member.offset < end or member.size < 0:  # else a loop without end
                        raise ValueError(f"{path}: damaged header at offset {end}")
                    _check_kind(path, member)
                    end = member.offset_data
                    if member.isfile():
                        if end + member.size > whole:
                            raise ValueError(f"{path}: cut short in {member.name!r} at offset {end}")
                        yield member.name, end, member.size
                        end += -(-member.size // _BLOCK) * _BLOCK
            _check_end(path, file, end)
    except UnicodeError as error:
        raise ValueError(f"{path}: damaged header at offset {end} ({error})") from error
    except (tarfile.TarError, EOFError, OverflowError, OSError, RecursionError) as error:
        hint = "; compressed shards are not read, unpack them" if _compressed(path) else ""
        raise ValueError(f"{path}: no tar file at offset {end} ({error}){hint}") from error


def _check_kind(path: Path, member: tarfile.TarInfo) -> None:
    """Raise ValueError for what is neither a file nor a folder."""
    if member.isdir() or (member.isfile() and not member.issparse()):
        return
    what = "a link" if member.islnk() or member.issym() else "a device or a sparse file"
    raise ValueError(f"{path}: member {member.name!r} at offset {member.offset} is {what}, wanted a file")


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """Raise ValueError unless a tar file's mark stands at `end`, with nothing behind it."""
    file.seek(end)
    mark = file.read(_BLOCK)
    if len(mark) < _BLOCK:
        raise ValueError(f"{path}: cut short at offset {end}: it lacks the mark that ends a tar file")
    if mark.strip(b"\0"):
        raise ValueError(f"{path}: damaged header at offset {end}")
    while block := file.read(2**20):
        if block.strip(b"\0"):
            raise ValueError(f"{path}: more data behind the end of the tar file at offset {end}")


def _compressed(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))
    except OSError:
        return False
