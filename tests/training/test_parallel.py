"""Several processes train as one does: the same samples, losses and weights, and any number goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch

ROOT = Path(__file__).resolve().parents[2]


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def assert_same(one: Path, other: Path) -> None:
    """Weights, optimizer, average and records agree up to the order of summation."""
    assert newest(one).name == newest(other).name
    ours, others = ranks.tensors(one), ranks.tensors(other)
    for group, mine in ours.items():
        theirs = others[group]
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-12, msg=f"{group} {name}")
    mine, theirs = ranks.records(one), ranks.records(other)
    assert len(mine) == len(theirs) > 2
    for record, same in zip(mine, theirs, strict=True):
        assert record.keys() == same.keys()
        for key, value in record.items():
            if key == "samples":  # in the order of the processes
                assert sorted(value.split(", ")) == sorted(same[key].split(", "))
            else:
                assert value is same[key] is None or value == pytest.approx(same[key], rel=1e-10), key


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, ranks.train(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("both")
    return folder, ranks.launch(2, ranks.two, folder)


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_two_processes_equal_one(alone, both, name):
    (expected, samples), (folder, found) = alone, both
    assert_same(folder / name, expected)
    number = ["ddp", "sharded"].index(name)
    first, second = (answer[0][number] for answer in found)
    assert sorted(first + second) == samples
    assert {batch % 2 for batch, _ in first} == {0}
    whole = torch.load(expected / "end-0.pt")
    for rank in range(2):
        for key, value in torch.load(folder / name / f"end-{rank}.pt").items():
            torch.testing.assert_close(value, whole[key], rtol=1e-10, atol=1e-12)


def test_hooks_are_called_by_one_and_see_the_whole_averaged_module(both):
    (_, hooked, *_), (_, none, *_) = both[1]
    assert none == []
    assert len(hooked) == 4
    assert hooked[:2] == pytest.approx(hooked[2:], rel=1e-10)
    assert hooked[0] != hooked[1]


@pytest.mark.parametrize("name", ["masked-ddp", "masked-sharded"])
def test_a_transformer_is_shared_like_any_module(both, tmp_path, name):
    """T20: one row a batch, some of them without an image."""
    ranks.masked(tmp_path / "alone")
    assert_same(both[0] / name, tmp_path / "alone")


def test_what_no_process_uses_is_left_alone(both, tmp_path):
    ranks.train(tmp_path / "alone", module=ranks.Blocks(unused=True))
    assert_same(both[0] / "unused", tmp_path / "alone")


def test_one_bad_batch_is_left_out_by_all(both, tmp_path):
    ranks.train(tmp_path / "alone", spoilt=5)
    assert_same(both[0] / "spoilt", tmp_path / "alone")
    assert [record["step"] for record in ranks.records(both[0] / "spoilt") if "skipped" in record] == [2]


def test_all_say_why_they_stop(both):
    for _, _, told, _ in both[1]:
        assert len(told) == 5
        assert "accumulate=3 for 2 processes, wanted a multiple" in told[0]
        assert "threads=2" in told[1]
        assert "replicate=3 does not divide 2" in told[2]
        assert "Muon wants whole matrices" in told[3]
        assert told[4] == "the hook failed at step 2"


@pytest.mark.parametrize("name", ["behind", "copies"])
def test_saving_in_the_background_changes_nothing(alone, both, name):
    assert_same(both[0] / name, alone[0])
    assert [path.name for path in sorted((both[0] / name / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000006",
    ]


def test_every_rank_writes_what_it_holds(both):
    sizes = {path.name: path.stat().st_size for path in newest(both[0] / "sharded").glob("shard-*")}
    each = [[f"shard-0000{r}-model-0000{g}-of-00003.safetensors" for g in (1, 2, 3)] for r in (1, 2)]
    assert sorted(sizes) == each[0] + each[1]
    first, second = (sum(sizes[name] for name in names) for names in each)
    assert 0.5 < first / second < 2


def test_a_rank_that_cannot_write_is_an_error_of_all_and_leaves_nothing(both):
    folder = both[0] / "full"
    for *_, told in both[1]:
        assert len(told) == 2
        assert all("the disk of 1 is full" in each and "step-00000003 stands" in each for each in told)
    for name in ("now", "behind"):
        assert [path.name for path in (folder / name / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_run_goes_on_with_any_number_of_processes(alone, tmp_path):
    """T30. Two with shards, four, one, two; each stretch but the last ended by a signal to one process."""
    (expected, samples), folder = alone, tmp_path / "run"
    stretches = [(2, (1, 1), True), (4, (3, 11), False), (1, (0, 15), False), (2, None, True)]
    seen = []
    for world, stop, shard in stretches:
        found = ranks.launch(world, ranks.go_on, folder, stop, shard)
        assert [status for status, _ in found] == [143 if stop else 0] * world
        seen += [each for _, share in found for each in share]
    assert sorted(seen) == samples
    assert_same(folder, expected)


@pytest.mark.slow
def test_two_groups_of_two_hold_a_copy_each(tmp_path):
    shares = ranks.launch(4, ranks.hybrid, tmp_path / "run")
    assert sorted(each for share in shares for each in share) == ranks.train(tmp_path / "one", accumulate=8)
    assert_same(tmp_path / "run", tmp_path / "one")


RECIPE = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "training")!r})
from pathlib import Path
import ranks

def recipe(*, out: Path, sharded: bool = False):
    way = ranks.FullyShard() if sharded else None
    first, _ = ranks.make(out / "first", parallel=way)
    yield first
    yield ranks.make(out / "second", module=first.module)[0]
    with open(out / "end.txt", "a") as file:
        file.write(f"{{float(first.module(ranks.TABLE)[0].sum()):.9f}}\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_torchrun_carries_a_recipe_out(tmp_path, sharded):
    (tmp_path / "recipe.py").write_text(RECIPE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, command in (("two", torchrun), ("one", [sys.executable])):
        words = [str(ROOT / "train" / "run.py"), str(tmp_path / "recipe.py"), f"out={tmp_path / name}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *words, f"sharded={sharded}"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("first: done") == 1
    for stage in ("first", "second"):
        assert_same(tmp_path / "two" / stage, tmp_path / "one" / stage)
    ends = [(tmp_path / name / "end.txt").read_text().split() for name in ("two", "one")]
    assert len(ends[0]) == 1
    assert float(ends[0][0]) == pytest.approx(float(ends[1][0]), abs=1e-8)


@pytest.mark.slow
def test_torchrun_is_told_of_wrong_input_by_status_2(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    words = [str(ROOT / "train" / "run.py"), str(tmp_path / "recipe.py"), f"out={tmp_path / 'three'}"]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True)
    assert done.returncode == 1  # torchrun's own
    assert "accumulate=4 for 3 processes, wanted a multiple of them" in done.stderr
    assert "exitcode  : 2" in done.stderr
