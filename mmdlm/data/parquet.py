"""Samples in Parquet files, pictures and all; knows no tokenizer. Wants pyarrow (the extra `parquet`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdlm.data.images import ImageError, OnError, Stop, decode, to_array
from mmdlm.data.indexed import Grouped, Indexed, Order
from mmdlm.data.rows import Columns, describe, listed
from mmdlm.data.sample import Sample, SampleError

_IMAGE = "image"  # the column of the picture, by custom


class Parquet(Indexed[Sample]):
    """Files of rows with encoded pictures and texts. A sample's name is "FILE:ROW", rows counted from 0.

    The column `columns.image` (default: "image") holds the bytes of a picture file, or, as Hugging Face
    writes them, {"bytes", "path"}; null is a row of text alone, and without an "image" column all are. `load`
    makes a picture of the bytes (RGB; decoding and fitting to a size, as one). The pictures of a document
    (`columns.pieces`) are held alike.

    A row group is read when one of its rows is asked for, and the last `window` of them are held. The default
    `order` shuffles within that: row groups in random order, `window` of them together. Any other order is
    correct, but reads a group for a row where rows jump between groups.

    Raises ImportError without pyarrow; ValueError, naming the file, for one that cannot be read, lacks a
    column or has it of another type, and for no rows at all. SampleError, naming file and row, for a row that
    is not as said or lies in a damaged group; it goes to `on_error` in iteration.
    """

    def __init__(
        self,
        paths: Path | str | Sequence[Path | str],
        *,
        columns: Columns = Columns(),
        load: Callable[[bytes], Image.Image] = decode,
        order: Order | None = None,
        window: int = 4,
        on_error: OnError = Stop(),
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 row group, got {window}")
        self._paths = listed(paths)
        self._columns = columns
        self._load = load
        self._window = window
        self._groups: list[tuple[int, int, int]] = []  # file, group in it, its first row in it
        sizes: list[int] = []
        for number, path in enumerate(self._paths):
            first = 0
            for group, size in enumerate(self._sizes_of(path)):
                self._groups.append((number, group, first))
                sizes.append(size)
                first += size
        if not sum(sizes):
            raise ValueError(f"{', '.join(map(str, self._paths))}: no rows")
        self._ends = np.cumsum(sizes)
        self._held: tuple[tuple[int, Any], ...] = ()  # the newest first; replaced as a whole, so threads may
        super().__init__(Grouped(tuple(sizes), window) if order is None else order, on_error)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each row group, over all files."""
        return tuple(int(size) for size in np.diff(self._ends, prepend=0))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """The sample of row `index`. Raises SampleError for a bad row, ImageError for a bad picture."""
        group, row, place = self._locate(index)
        table = self._table(group, place)
        try:
            values = {name: table.column(name)[row].as_py() for name in table.column_names}
        except Exception as error:  # a time out of Python's range, and the like
            raise SampleError(place, f"cannot be read ({error})") from error
        if self._columns.pieces is not None:
            said = describe(values, self._columns, place)
            return said.document(place, lambda value, which: self._picture(value, place, f"{which}: "))
        picture = values.pop(self._columns.image or _IMAGE, None)
        said = describe(values, self._columns, place)
        image = None if picture is None else self._picture(picture, place)
        return Sample(place, image, said.texts, said.question, said.answer, said.extra)

    def texts(self) -> Iterator[str]:
        """Every text of every row, in the order of the files, without reading a picture.

        Those of documents are read, and not decoded.
        """
        columns = self._columns if self._columns.pieces else Columns(self._columns.texts)
        names = [*(columns.documents or columns.texts)]
        for number, (file, _, first) in enumerate(self._groups if names else ()):
            path = self._paths[file]
            rows = self._read(number, names, f"{path}:{first}").to_pylist()
            for row, values in enumerate(rows, first):
                yield from describe(values, columns, f"{path}:{row}").all_texts

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": ()}  # to other processes without what is held

    def _locate(self, index: int) -> tuple[int, int, str]:
        """Number of the group, row in it, and the name."""
        at = self._at(index)
        number = int(np.searchsorted(self._ends, at, side="right"))
        row = at - (int(self._ends[number - 1]) if number else 0)
        file, _, first = self._groups[number]
        return number, row, f"{self._paths[file]}:{first + row}"

    def _table(self, number: int, place: str) -> Any:
        held = self._held
        found = [table for key, table in held if key == number]
        table = found[0] if found else self._read(number, None, place)
        self._held = ((number, table), *(pair for pair in held if pair[0] != number))[: self._window]
        return table

    def _read(self, number: int, columns: list[str] | None, place: str) -> Any:
        file, group, _ = self._groups[number]
        parquet = _pyarrow_parquet()
        try:
            with parquet.ParquetFile(self._paths[file], page_checksum_verification=True) as opened:
                # no threads of its own: they do not survive a fork
                table = opened.read_row_group(group, columns=columns, use_threads=False)
            table.validate(full=True)  # a damaged file may else give what is not there
        # pyarrow's errors have no class of their own: ValueErrors, OSErrors, NotImplementedErrors, ...
        except Exception as error:
            raise SampleError(place, f"row group {group} cannot be read ({error})") from error
        wanted = int(self._ends[number] - (self._ends[number - 1] if number else 0))
        if table.num_rows != wanted:
            raise SampleError(place, f"row group {group} has {table.num_rows} rows, not {wanted} as stated")
        return table

    def _picture(self, value: Any, place: str, which: str = "") -> np.ndarray:
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            reason = f"{which}its picture is a path alone ({value.get('path')!r}), wanted its bytes"
            raise SampleError(place, reason)
        try:
            return to_array(self._load(data))
        except ImageError as error:
            raise ImageError(place, which + error.reason) from error

    def _sizes_of(self, path: Path) -> list[int]:
        """Rows of each row group of a file whose columns have been checked."""
        parquet = _pyarrow_parquet()
        try:
            with parquet.ParquetFile(path, page_checksum_verification=True) as opened:
                metadata, schema = opened.metadata, opened.schema_arrow
                sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except Exception as error:
            raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error
        _check(schema, self._columns, path)
        return sizes


def _check(schema: Any, columns: Columns, path: Path) -> None:
    """Raise ValueError unless the columns are there and of types that can be read."""
    import pyarrow.types as types

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind)

    def is_texts(kind: Any) -> bool:
        several = types.is_list(kind) or types.is_large_list(kind)
        return is_text(kind) or (several and is_text(kind.value_type))

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def is_picture(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)
        return is_bytes(kind)

    def is_text_or_none(kind: Any) -> bool:
        return types.is_null(kind) or is_text(kind)

    def is_list(inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda kind: (types.is_list(kind) or types.is_large_list(kind)) and inner(kind.value_type)

    def is_piece(kind: Any) -> bool:
        if not types.is_struct(kind) or min(map(kind.get_field_index, ("text", "image"))) < 0:
            return False
        return is_text_or_none(kind.field("text").type) and is_picture(kind.field("image").type)

    pictures = 'the bytes of pictures, or {"bytes", "path"}'
    if columns.pieces is not None:
        names, whole = columns.documents, f'a list of {{"text", "image"}}, the image {pictures}'
        wanted = [(names[0], is_list(is_piece), whole)]
        if len(names) == 2:
            wanted = [(names[0], is_list(is_text_or_none), "a list of texts")]
            wanted.append((names[1], is_list(is_picture), f"a list of {pictures}"))
        _check_types(schema, wanted, path)
        return
    wanted = [(name, is_texts, "a text or a list of texts") for name in columns.texts]
    wanted += [(name, is_text, "a text") for name in (columns.question, columns.answer) if name is not None]
    if columns.image is not None or _IMAGE in schema.names:
        wanted.append((columns.image or _IMAGE, is_picture, pictures))
    _check_types(schema, wanted, path)


def _check_types(schema: Any, wanted: Sequence[tuple[str, Callable[[Any], bool], str]], path: Path) -> None:
    for name, fits, what in wanted:
        if name not in schema.names:
            raise ValueError(f"{path}: no column {name!r}; there are {', '.join(schema.names) or 'none'}")
        kind = schema.field(name).type
        if not fits(kind):
            raise ValueError(f"{path}: column {name!r} wants {what}, it holds {kind}")


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "Parquet files want pyarrow: pip install pyarrow, or mmdlm's extra [parquet]"
        ) from None
    return pyarrow.parquet
