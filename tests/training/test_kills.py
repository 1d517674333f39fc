"""A run may be killed at any moment: what it ends with is what it would have ended with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("killed.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="every run is a forked child")
@pytest.mark.parametrize("background", ["0", "1"])
@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_equals_one_that_is_not(tmp_path, kills, background):
    """By sha256 of weights, optimizer, average and best weights, and by every record of the metrics."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(tmp_path), str(kills), "0", background]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(counts)
    assert counts["kills"] == kills
    assert counts["differing runs"] == 0, done.stderr
    assert counts["completed runs"] >= 1
    assert counts["inside a checkpoint write"] >= 0.3 * kills
