"""Folders of shards, texts and pictures as codes, read in place; knows no tokenizer, nor how they are made.

A folder holds `shard-00000.safetensors`, ... and `index.json`, which says how many items each has and what
its SHA-256 is. A shard of n items with p pictures holds these tensors: `codes` (p, h, w) uint16, or int32 for
more than 65,536 codes; `rows`, n JSON objects in ASCII, end to end; `ends` (n,) int64, the byte where each of
them ends; and, unless each item has one picture, `pictures` (n,) int64, how many the items up to and with
this one have. The object of a document has `pieces`, its texts, and null for each of its pictures. Besides,
`shard-00000.json` is the shard's own record, for whoever goes on with an interrupted encoding; reading needs
only the index.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdlm.data.encoded import Encoded
from mmdlm.data.indexed import Indexed, Order, Shuffled
from mmdlm.io import atomic_write_json

INDEX = "index.json"
FORMAT = 2  # 1 had one picture an item, and no count of pictures in the records
_OPEN = 512  # shards mapped at a time, each with a file descriptor; many systems allow 1,024
_READ = json.JSONDecoder().raw_decode  # a quarter of the time of json.loads, which looks for more
_DTYPES = {"uint16": "U16", "int32": "I32"}  # ours, and safetensors' name


@dataclass(frozen=True)
class Shard:
    """One file: the items `start` to `stop` of the source, less those that could not be had."""

    file: str
    start: int
    stop: int
    samples: int
    pictures: int
    bytes: int
    sha256: str
    grid: tuple[int, int]  # (0, 0) without pictures
    skipped: Mapping[str, str]  # name -> reason

    def fault(self, folder: Path, *, whole: bool) -> str | None:
        """What is wrong with the file: missing, of another size or, if read `whole`, of other bytes."""
        path = folder / self.file
        try:
            size = os.stat(path).st_size
            if size != self.bytes:
                return f"{size} bytes, wanted {self.bytes}"
            if whole and sha256_of(path) != self.sha256:
                return "its bytes are not those that were written (another SHA-256)"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None


class Shards(Indexed[Encoded]):
    """A folder that `encode_shards` wrote. The files are mapped into memory, not read: opening is quick.

    Raises ValueError naming the file when the index cannot be read, or a shard is missing or of another size;
    `verify` reads every byte.
    """

    def __init__(self, path: Path | str, *, order: Order = Shuffled()) -> None:
        super().__init__(order)
        self.path = Path(path)
        index = read_sealed(self.path / INDEX)
        try:
            if index["format"] not in (1, FORMAT):
                raise ValueError(f"its format is {index['format']!r}, this version reads 1 and {FORMAT}")
            self.plan: Mapping[str, Any] = index["plan"]
            self.grid: tuple[int, int] = (index["grid"][0], index["grid"][1])  # rows, columns of codes
            self.num_codes: int = index["plan"]["num_codes"]
            self.tokenizer: str = index["plan"]["tokenizer"]  # fingerprint of what made the codes
            self._dtype: str = index["dtype"]
            self.shards = tuple(shard_of(record) for record in index["shards"])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{self.path / INDEX}: is no index of shards ({error!r})") from error
        self._first = [0]  # number of the first item of each shard, and of all items
        for shard in self.shards:
            self._first.append(self._first[-1] + shard.samples)
        self._keys = [
            (
                str(self.path / shard.file),
                shard.sha256,
                shard.samples,
                (shard.pictures, *self.grid),
                self._dtype,
            )
            for shard in self.shards
        ]
        self._refuse(self.faults(whole=False))

    @property
    def skipped(self) -> dict[str, str]:
        """Samples that were left out, for they could not be had, each with the reason."""
        return {name: reason for shard in self.shards for name, reason in shard.skipped.items()}

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Encoded:
        at = self._at(index)
        number = bisect_right(self._first, at) - 1
        codes, row = self._item(number, at - self._first[number])
        if "pieces" in row:
            grids = iter(codes.astype(np.int32))
            return Encoded(
                row["name"], pieces=tuple(next(grids) if one is None else one for one in row["pieces"])
            )
        image = codes[0].astype(np.int32) if len(codes) else None
        return Encoded(row["name"], image, tuple(row["texts"]), row.get("question"), row.get("answer"))

    def take(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The codes of several pairs, (n, h, w) int32.

        Raises IndexError for one that is not there, ValueError for an item that has not just one picture.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"indices from {wanted.min()} to {wanted.max()} of {len(self)} items")
        wanted = wanted % max(len(self), 1)
        numbers = np.searchsorted(self._first, wanted, side="right") - 1
        taken = np.empty((len(wanted), *self.grid), np.int32)
        for number in np.unique(numbers):
            here = numbers == number
            mapped = _map(*self._keys[number])
            rows = wanted[here] - self._first[number]
            firsts, counts = mapped.pictures[rows], mapped.pictures[rows + 1] - mapped.pictures[rows]
            if (counts != 1).any():
                at = int(np.flatnonzero(counts != 1)[0])
                name = self[self._first[number] + int(rows[at])].name
                raise ValueError(f"{name}: has {counts[at]} pictures, wanted one")
            taken[here] = mapped.codes[firsts]
        return taken

    def texts_of(self, index: int) -> tuple[str, ...]:
        """The texts of one item."""
        return self[index].all_texts

    def texts(self) -> Iterator[str]:
        """Every text of every item, as they lie."""
        for index in range(len(self)):
            yield from self[index].all_texts

    def faults(self, *, whole: bool = True) -> Iterator[tuple[str, str]]:
        """Each shard that is not as it was written, with what is wrong; `whole` reads every byte."""
        for shard in self.shards:
            fault = shard.fault(self.path, whole=whole)
            if fault is not None:
                yield str(self.path / shard.file), fault

    def verify(self) -> None:
        """Read every byte. Raises ValueError naming each shard that is not as it was written."""
        self._refuse(self.faults())

    def _refuse(self, faults: Iterator[tuple[str, str]]) -> None:
        found = [f"{file}: {fault}" for file, fault in faults]
        if found:
            more = f"; and {len(found) - 10} more" if len(found) > 10 else ""
            raise ValueError(
                f"{len(found)} of {len(self.shards)} shards are damaged "
                f"(encoding again into the folder mends them): {'; '.join(found[:10])}{more}"
            )

    def _item(self, number: int, row: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The codes (p, h, w) of an item of a shard, and what else is known of it."""
        codes, pictures, ends, rows = _map(*self._keys[number])
        try:
            text = str(rows[ends[row - 1] if row else 0 : ends[row]], "ascii")
            return codes[pictures[row] : pictures[row + 1]], _READ(text)[0]
        except ValueError as error:
            raise ValueError(f"{self._keys[number][0]}: item {row} is damaged ({error})") from None


def read_sealed(path: Path) -> dict[str, Any]:
    """The JSON object that `write_sealed` wrote. Raises ValueError for one that was changed since."""
    try:
        value = json.loads(path.read_bytes())
        seal = value.pop("sha256")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or no index of shards ({error!r})") from error
    if seal != _seal(value):
        raise ValueError(f"{path}: damaged; it is not what was written (another SHA-256)")
    return value


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of what it says."""
    atomic_write_json(path, {**value, "sha256": _seal(value)})


def shard_of(record: Mapping[str, Any]) -> Shard:
    """A shard's record as JSON has it. Raises ValueError for a file that is not directly in the folder."""
    height, width = record["grid"]
    if Path(record["file"]).name != record["file"]:
        raise ValueError(f"{record['file']!r} is no file of this folder")
    known = {"pictures": record["samples"], **record}  # format 1 has one an item
    return Shard(**{**known, "grid": (height, width), "skipped": dict(record["skipped"])})


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dtype_for(num_codes: int) -> str:
    """The smaller of the two types that holds every code."""
    return "uint16" if num_codes <= 2**16 else "int32"


class _Mapped(NamedTuple):
    codes: np.ndarray  # (p, h, w)
    pictures: np.ndarray  # (n + 1,) of each item the first one, and how many in all
    ends: np.ndarray  # (n,)
    rows: memoryview


@lru_cache(maxsize=_OPEN)  # of the process: a Shards holds no file itself, so it can be sent to others
def _map(path: str, sha256: str, samples: int, shape: tuple[int, int, int], dtype: str) -> _Mapped:
    """The file's tensors. `sha256` only tells apart what was written to one path, one after the other."""
    try:
        raw = np.asarray(np.memmap(path, np.uint8, "r"))
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())
        parts = {}
        kinds = {"codes": _DTYPES[dtype], "ends": "I64", "rows": "U8"}
        for name, kind in (kinds | ({"pictures": "I64"} if "pictures" in header else {})).items():
            first, last = header[name]["data_offsets"]
            if header[name]["dtype"] != kind:
                raise ValueError(f"{name} are {header[name]['dtype']}, wanted {kind}")
            parts[name] = raw[start + first : start + last]
        codes = parts["codes"].view(np.dtype(dtype).newbyteorder("<")).reshape(shape)
        ends = parts["ends"].view("<i8")
        last = parts["pictures"].view("<i8") if "pictures" in parts else np.arange(1, len(ends) + 1)
        if not len(last) == len(ends) == samples or last[-1] != shape[0] or ends[-1] != len(parts["rows"]):
            raise ValueError(f"{len(ends)} rows of {last[-1]} pictures, wanted {samples} rows of {shape[0]}")
        pictures = np.concatenate([np.zeros(1, np.int64), last])
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or no shard of codes ({error})") from error
    return _Mapped(codes, pictures, ends, memoryview(parts["rows"]))


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
