"""Nothing that happens to the files of a checkpoint goes unseen, and a full disk takes nothing away."""

from __future__ import annotations

import os
import random
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdlm.training import SaveError, Trainer
from mmdlm.training.checkpoint import Checkpoints


def flip(folder: Path, file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(folder: Path, file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def empty(folder: Path, file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def delete(folder: Path, file: Path, rng: random.Random) -> None:
    file.unlink()


def append(folder: Path, file: Path, rng: random.Random) -> None:
    more = rng.choice([b"\n", b" ", b"\0", rng.randbytes(rng.randrange(1, 100))])
    file.write_bytes(file.read_bytes() + more)


def swap(folder: Path, file: Path, rng: random.Random) -> None:
    other = rng.choice([each for each in sorted(folder.iterdir()) if each != file])
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


def stray(folder: Path, file: Path, rng: random.Random) -> None:
    shutil.copy(file, folder / f"other-{file.name}")


def older(folder: Path, file: Path, rng: random.Random) -> None:
    """The file of the checkpoint before."""
    shutil.copy(folder.with_name("step-00000002") / file.name, file)


DAMAGES = [flip, truncate, empty, delete, append, swap, stray, older]


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_corruption_is_detected_and_the_checkpoint_before_is_used(kit, tmp_path, count):
    run = kit.run(steps=4, checkpoint_every=2)
    Trainer(run).fit()
    found = Checkpoints(run.folder / "checkpoints", keep=2)
    before, newest = (run.folder / f"checkpoints/step-0000000{step}" for step in (2, 4))
    expected, whole = load_file(before / "module.safetensors"), tmp_path / "whole"
    shutil.copytree(newest, whole)
    names = sorted(file.name for file in whole.iterdir())
    assert "manifest.json" in names
    rng, detected, seen = random.Random(0), 0, set()
    for _ in range(count):
        damage, name = rng.choice(DAMAGES), rng.choice(names)
        damage(newest, newest / name, rng)
        seen.add((damage.__name__, name))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            checkpoint = found.newest()
        assert checkpoint is not None
        case = f"{damage.__name__} of {name}"
        assert checkpoint.state["step"] == 2, case
        assert all(torch.equal(checkpoint.tensors["module"][key], value) for key, value in expected.items())
        assert [str(newest) in str(each.message) for each in told] == [True], case
        detected += 1
        shutil.rmtree(newest)
        shutil.copytree(whole, newest)
    assert detected == count
    assert len(seen) > min(count, len(DAMAGES) * len(names)) / 3
    checkpoint = found.newest()  # undamaged it is taken
    assert checkpoint is not None
    assert checkpoint.state["step"] == 4


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process can be longer than `size` bytes: a disk that is full, for every writer."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_full_disk_at_fifty_offsets_takes_nothing_away(kit):
    """Whatever file the disk ends in: metrics, configuration or any of the checkpoint."""
    Trainer(kit.run("straight", steps=8, checkpoint_every=4)).fit()
    run = kit.run("full", steps=4, checkpoint_every=4)
    Trainer(run).fit()
    saved = contents(run.folder / "checkpoints")
    sizes = [file.stat().st_size for file in (run.folder / "checkpoints/step-00000004").iterdir()]
    reasons = set()
    for number in range(50):
        size = number * max(sizes) // 50
        with files_end_at(size), pytest.raises(SaveError) as caught:
            Trainer(kit.run("full", steps=8, checkpoint_every=4)).fit()
        reasons.add(str(caught.value).split(": ")[0].replace(str(run.folder), ""))
        assert contents(run.folder / "checkpoints") == saved, size
        assert any(told in str(caught.value) for told in ("step-00000004 stands", "step 4 stands")), (
            caught.value
        )
    assert len(reasons) >= 2, reasons
    Trainer(kit.run("full", steps=8, checkpoint_every=4)).fit()  # there is room again
    for name in ("module", "optimizer", "average"):
        one, two = (
            load_file(kit.folder / where / f"checkpoints/step-00000008/{name}.safetensors")
            for where in ("straight", "full")
        )
        assert all(torch.equal(one[key], two[key]) for key in one), name


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_an_error_of_any_call_while_saving_takes_nothing_away(kit, monkeypatch, call):
    """From the first, the second, ... such call on there is no space left, until a save needs no more."""
    run = kit.run(steps=4, checkpoint_every=4)
    trainer = Trainer(run)
    trainer.fit()
    folder, real = run.folder / "checkpoints", getattr(os, call)
    saved, failed = contents(folder), 0
    trainer.step = 6
    while True:
        left = [failed]

        def full(*arguments, left=left, **named):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return real(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                trainer.save()
                break
            except SaveError as error:
                told = str(error)
        assert "No space left on device" in told
        now = contents(folder)
        assert {name: now[name] for name in saved} == saved, failed
        if now != saved:  # the last call of all, when the new checkpoint stood
            assert "step-00000006 stands" in told
            trainer.checkpoints.load(6)
            shutil.rmtree(folder / "step-00000006")
        else:
            assert "step-00000004 stands" in told
        failed += 1
    assert failed >= 1
    assert trainer.checkpoints.newest().state["step"] == 6


def test_metrics_that_could_not_be_written_leave_no_half_line(kit):
    run = kit.run(steps=2)
    Trainer(run).fit()
    metrics = Trainer(run).metrics
    written = metrics.path.read_bytes()
    for size in range(len(written), len(written) + 10):
        with files_end_at(size), pytest.raises(OSError, match="File too large"):
            metrics.append(3, {"loss": 1.0})
        assert metrics.path.read_bytes() == written
    metrics.append(3, {"loss": 1.0})
    assert [record["step"] for record in metrics.read()] == [1, 2, 3]


def test_a_checkpoint_that_was_being_replaced_when_the_run_was_killed_is_put_back(kit):
    run = kit.run(steps=4, checkpoint_every=4)
    Trainer(run).fit()
    path = run.folder / "checkpoints/step-00000004"
    path.rename(path.with_name(".step-00000004.0123456789ab.old"))  # between the two renames
    (path.parent / ".step-00000004.ba9876543210.part").mkdir()
    trainer = Trainer(kit.run(steps=4))
    trainer.fit()
    assert trainer.step == 4
    assert [each.name for each in path.parent.iterdir()] == ["step-00000004"]


def test_a_save_that_was_killed_before_it_removed_the_oldest_is_finished(kit):
    settings = {"checkpoint_every": 2, "steps": 6}
    Trainer(kit.run(keep_checkpoints=3, **settings)).fit()
    Trainer(kit.run(keep_checkpoints=2, **settings)).fit()  # has no step to do
    assert Checkpoints(kit.folder / "run/checkpoints", keep=2).steps() == [4, 6]


def test_a_half_deleted_old_checkpoint_is_never_seen(kit, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(path, *arguments, **named):
        next(Path(path).iterdir()).unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(Killed):
        Trainer(kit.run(steps=6, checkpoint_every=2, keep_checkpoints=1)).fit()
    monkeypatch.undo()
    assert Checkpoints(kit.folder / "run/checkpoints", keep=1).steps() == [4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(kit.run(steps=6, checkpoint_every=2, keep_checkpoints=1)).fit()
    assert [path.name for path in (kit.folder / "run/checkpoints").iterdir()] == ["step-00000006"]
