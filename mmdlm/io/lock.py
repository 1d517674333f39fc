"""One process at a time in a folder, by a lock that ends with its process; knows not what is done there."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import FileIO
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_FILE = ".lock"
_BYTE = 1 << 20  # Windows locks bytes against reading too: one far behind what the file says
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_held: list[FileIO] = []  # closed in forked children, so that no child keeps a dead parent's lock


class InUseError(OSError):
    """A folder that another process is writing to."""


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold the lock of an existing `folder` inside the block; InUseError, naming the holder, if it is taken.

    The lock is the operating system's, on the file `.lock`, which stays: a process that was killed holds it
    no more, forked children do not inherit it, and a second attempt in the same process is refused too. Where
    the file system has no locks a warning says so and the block runs without one.
    """
    path = Path(folder) / LOCK_FILE
    with open(path, "a+b", buffering=0) as file:
        try:
            _take(file)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise InUseError(f"{folder} is in use by {_holder(path)}: wait for it, or stop it") from error
            message = f"{folder} cannot be locked ({error.strerror}): let no second process write to it"
            warnings.warn(message, stacklevel=3)
        with suppress(OSError):  # a full disk: it is only what a refused process will be told
            file.truncate(0)
            file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
        _forget_when_forked()
        _held.append(file)
        try:
            yield
        finally:
            _held.remove(file)


def _take(file: FileIO) -> None:
    if sys.platform == "win32":
        file.seek(_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(path: Path) -> str:
    try:
        said = json.loads(path.read_bytes())
        number, host = int(said["process"]), str(said["host"])
    except (OSError, ValueError, KeyError, TypeError):  # read in the moment it was being written
        return "another process"
    here = ", this one" if number == os.getpid() and host == socket.gethostname() else ""
    return f"process {number} on {host}{here}"


@cache  # once a process
def _forget_when_forked() -> None:
    if sys.platform != "win32":
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    for file in _held:
        file.close()
