"""What ends a run from outside: SIGTERM and Ctrl-C, noted and not obeyed at once. Knows no run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(SystemExit):
    """A signal ended the run, a checkpoint stands; exit status 128 + number of the signal (TERM: 143)."""


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The caught SIGTERM or SIGINT, in the main thread only; after the first one the next kills at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    watched = (signal.SIGTERM, signal.SIGINT)

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)
        for each in watched:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, note) for each in watched}
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
