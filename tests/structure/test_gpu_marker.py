"""A test marked gpu fails without CUDA, also if it would skip itself, and is left out unless asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from house import ROOT

TESTS = """
import pytest

def test_anywhere():
    pass

@pytest.mark.gpu
def test_needs_cuda():
    pass

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="no CUDA")
def test_would_skip():
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "status", "outcome"),
    [([], 0, {"passed": 1, "deselected": 2}), (["-m", "gpu"], 1, {"errors": 2, "deselected": 1})],
)
def test_missing_cuda_fails_and_never_skips(tmp_path, arguments, status, outcome):
    for name in ("pyproject.toml", "tests/conftest.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"))
    (tmp_path / "tests" / "test_small.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert {kind: counts[kind] for kind in outcome} == outcome
    assert "skipped" not in counts
