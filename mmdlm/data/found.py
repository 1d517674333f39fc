"""Which source reads what lies at a path, by the names of the files; knows no tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mmdlm.data.images import OnError, Stop
from mmdlm.data.indexed import Indexed, InOrder
from mmdlm.data.jsonlines import JsonLines
from mmdlm.data.parquet import Parquet
from mmdlm.data.rows import Columns
from mmdlm.data.sample import Sample
from mmdlm.data.sources import ImageFolder
from mmdlm.data.texts import TextFiles
from mmdlm.data.webdataset import WebDataset

_KINDS = (".jsonl", ".parquet", ".tar", ".txt")
_METADATA = ("metadata.jsonl", "metadata.csv")
_MEGABYTES = 64


def open_source(
    path: Path | str, *, columns: Columns | None = None, on_error: OnError = Stop()
) -> Indexed[Sample]:
    """The samples at a path, in order: an imagefolder, or files of one kind, or a folder of them.

    The kinds are .jsonl, .parquet, .tar (WebDataset) and .txt (a sample a line). Raises ValueError, saying
    what lies there, for anything else and for several kinds at once.
    """
    path, order, read = Path(path), InOrder(), columns or Columns()
    if path.is_dir() and any((path / name).is_file() for name in _METADATA):
        return ImageFolder(path, columns=read, order=order, on_error=on_error)
    kind, files = _files(path)
    match kind:
        case ".jsonl":
            return JsonLines(files, columns=read, order=order, on_error=on_error)
        case ".parquet":
            return Parquet(files, columns=read, order=order, on_error=on_error)
        case ".tar":
            return WebDataset(files, columns=columns, order=order, on_error=on_error)
        case _:
            return TextFiles(files, order=order)


def data_digest(path: Path | str) -> str:
    """16 hexadecimal digits that change when the data does, without reading pictures.

    Of the names and sizes of the files directly in the folder, and what small tables (JSON lines, CSV) say.
    """
    path = Path(path)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}\n{size}\n".encode("utf-8", "surrogateescape"))
        if file.suffix in (".jsonl", ".csv") and size <= _MEGABYTES * 2**20:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _files(path: Path) -> tuple[str, list[Path]]:
    """The one kind of files that is there, by their ending, and the files."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    found = {kind: [file for file in files if file.suffix == kind] for kind in _KINDS}
    found = {kind: some for kind, some in found.items() if some}
    if len(found) != 1:
        there = " and ".join(found) or ", ".join(sorted({file.suffix or file.name for file in files}))
        raise ValueError(
            f"{path}: wanted a folder with {' or '.join(_METADATA)}, or files of one kind of "
            f"{', '.join(_KINDS)}; found {there or 'nothing'}"
        )
    return next(iter(found.items()))
