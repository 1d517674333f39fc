"""Files and folders that are there in full or not at all; does not know what they hold."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

_SIBLING = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.(?P<ending>part|old)")  # what `_sibling` makes


def atomic_write(path: Path | str, data: bytes) -> None:
    """Write `data` to `path`: after a crash at any moment the file holds the old bytes or the new ones.

    The parent folder must exist. OSErrors are passed on; no temporary file is left behind by one.
    """
    path = Path(path)
    part = _sibling(path, "part")
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON with a final newline; NaN and infinity are a ValueError."""
    atomic_write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; when the block ends without an error it becomes `path`.

    The parent folders are made. A folder that stood at `path` is replaced as a whole, and only then; with an
    error in the block it stays as it was and the temporary one is removed. Everything is on the disk before
    the rename. Two renames replace an existing folder: a crash right between them leaves the old one whole
    beside it, as `.NAME.*.old`, and `recover` puts it back. Raises ValueError when `path` is a file.
    """
    path = Path(path)
    if path.is_symlink():  # replace what the link points to, and keep the link
        path = path.resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"cannot write a folder to {path}: a file stands there")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _sibling(path, "part")
    part.mkdir()
    try:
        yield part
        _sync_tree(part)
        _exchange(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def remove_folder(path: Path | str) -> None:
    """Delete the folder at `path` so that, after a crash at any moment, it is there in full or not at all.

    OSErrors are passed on; what is left then under a temporary name is cleared by `recover`.
    """
    path = Path(path)
    part = _sibling(path, "part")
    os.rename(path, part)
    shutil.rmtree(part)


def recover(folder: Path | str) -> list[Path]:
    """Put in order what writes that were killed left directly in `folder`; the paths that were put back.

    A folder that was being replaced, and is missing now, is put back as it was; half-written files and
    folders, and those that were being removed, are deleted. Nobody may be writing into `folder` meanwhile.
    """
    back = []
    found = [(path, match) for path in Path(folder).iterdir() if (match := _SIBLING.fullmatch(path.name))]
    for path, match in sorted(found, key=lambda pair: pair[0].stat().st_mtime, reverse=True):
        target = path.with_name(match["name"])
        if match["ending"] == "old" and not target.exists():
            os.rename(path, target)
            back.append(target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return back


def _exchange(part: Path, path: Path) -> None:
    if not path.exists():
        os.rename(part, path)
        return
    old = _sibling(path, "old")
    os.rename(path, old)
    try:
        os.rename(part, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sibling(path: Path, ending: str) -> Path:
    return path.absolute().parent / f".{path.name}.{uuid4().hex[:12]}.{ending}"


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # a folder cannot be opened for syncing elsewhere
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
