"""What holds for every test: few threads, no network, and what needs CUDA fails where there is none."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

# Read when torch and the hub client are first imported, so set here and not in a fixture.
MAX_THREADS = 2
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["OMP_NUM_THREADS"] = "1" if os.environ.get("OMP_NUM_THREADS") == "1" else str(MAX_THREADS)
os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)  # before any skipif of the test itself
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.fail("needs CUDA and finds none: run it on a machine with a GPU", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test marked `gpu` that skips itself has failed: what `make test-gpu` promises must have run."""
    report = yield
    if item.get_closest_marker("gpu") is not None and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped itself; a test marked gpu runs or fails"
    return report
