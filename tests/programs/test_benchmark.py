"""The benchmark: every row runs, and where tokens must be equal all of them are. Nothing is timed here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmdlm.contests import ROWS

COLUMNS = ["row", "ours", "s", "naive", "s", "ratio", "of", "CPU", "bar", "aim", "agreement"]
SHARES = {"sampler", "sampler-greedy"}  # they have one side
QUICK = [name for name in ROWS if name != "diffusers"]  # whose import takes seconds


@pytest.fixture
def bench(program) -> Iterator:
    """Runs the benchmark with the threads that the tests have; it sets them for the process."""
    threads = torch.get_num_threads()

    def run(*arguments: object):
        few = ("--small", "--repeats", 1, "--threads", threads)
        return program("infer/benchmark.py", *few, *arguments)

    yield run
    torch.set_num_threads(threads)


def agreements(done) -> dict[str, str]:
    """What each row of the table says of its tokens."""
    assert done.status == 0
    head, columns, *rows = done.lines
    assert head.startswith("0.1 M parameters")
    assert columns.split() == COLUMNS
    return {row.split()[0]: row.split()[-1] for row in rows}


def test_every_row_runs_and_both_sides_come_to_the_same_tokens(bench) -> None:
    told = agreements(bench("--only", ",".join(QUICK)))
    assert told == {name: "-" if name in SHARES else "1.0000" for name in QUICK}


@pytest.mark.slow
def test_diffusers_pipeline_comes_to_the_same_tokens(bench) -> None:
    assert agreements(bench("--only", "diffusers")) == {"diffusers": "1.0000"}


def test_training_steps_of_all_sides_are_the_same_step(bench) -> None:
    done = bench("--only", "training")
    assert done.status == 0, done.err
    head, told, columns, *rows = done.lines
    assert head.startswith("0.1 M parameters; 4 documents a step")
    loss, gradient = (float(word.rstrip(",")) for word in told.split() if "e" in word and word[0].isdigit())
    assert loss < 1e-5
    assert gradient < 1e-4
    assert columns.split() == ["row", "ours", "theirs", "ratio", "of", "CPU", "bar", "aim"]
    several = 4 if Path("/proc/self/status").exists() else 3
    assert len(rows) == 2 * several
    for name, (title, tokens, flops, *peak) in (("llada", rows[:several]), ("mmada", rows[several:])):
        assert title == f"as {name} trains"
        assert float(tokens.split()[1]) > 0
        assert float(flops.split()[2]) > 0
        assert all(line.startswith("peak MiB") and float(line.split()[2]) > 0 for line in peak)


def test_another_seed_is_another_model(bench) -> None:
    assert agreements(bench("--only", "greedy,dual", "--seed", 3)) == {"greedy": "1.0000", "dual": "1.0000"}


def test_unknown_rows_are_named(bench) -> None:
    done = bench("--only", "greedy,fast")
    assert done.status == 2
    assert "--only greedy,fast: wanted some of greedy, temperature" in done.err
