"""One process at a time in a folder; a lock ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmdlm.io import InUseError, locked

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from mmdlm.io import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path):
    process = holder(tmp_path)
    try:
        with (
            pytest.raises(InUseError, match=rf"{tmp_path} is in use by process {process.pid} on "),
            locked(tmp_path),
        ):
            pass
    finally:
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.communicate()
    with locked(tmp_path):  # what the killed one left blocks nobody
        pass


def test_a_second_attempt_in_the_same_process_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(InUseError, match="this one"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_an_error_inside_lets_go(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_keep_the_lock_of_its_parent(tmp_path):
    ready, release = os.pipe(), os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:  # outlives the block
            os.write(ready[1], b"x")
            os.read(release[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.write(release[1], b"x")
        os.waitpid(child, 0)


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_a_file_system_without_locks_warns(tmp_path, monkeypatch):
    import fcntl

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"), locked(tmp_path):
        pass


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), locked(tmp_path / "nowhere"):
        pass
