"""Saving in the background: what is written is the step that asked for it, and no failure goes unheard."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from mmdlm.io.lock import locked
from mmdlm.training import CheckpointError, SaveError, Stopped, Trainer, load_tensors
from mmdlm.training.checkpoint import Checkpoint, Checkpoints


def files(run, step: int) -> dict[str, bytes]:
    folder = run.folder / f"checkpoints/step-{step:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_what_is_written_is_the_step_that_asked_for_it(kit, monkeypatch):
    """The writer starts only when two more updates are done."""
    kinds = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 3}
    Trainer(kit.run("now", **kinds)).fit()
    run = kit.run("behind", save_in_background=True, **kinds)
    trainer, later, save = Trainer(run), threading.Event(), Checkpoints.save

    def slow(self, step, checkpoint):
        assert threading.current_thread() is not threading.main_thread()
        if step == 3:
            assert later.wait(20)
        return save(self, step, checkpoint)

    monkeypatch.setattr(Checkpoints, "save", slow)
    update = trainer._update

    def updated(*batches):
        update(*batches)
        if trainer.step == 5:
            assert not files(run, 3)
            later.set()

    monkeypatch.setattr(trainer, "_update", updated)
    trainer.fit()
    for step in (3, 6):
        assert files(run, step) == files(kit.run("now", **kinds), step) != {}
    assert files(run, 3) != files(run, 6)


def test_a_save_that_fails_behind_is_told_by_the_next_or_at_the_end(kit, monkeypatch):
    save = Checkpoints.save

    def full(bad: int):
        def saved(self, step, checkpoint):
            if step == bad:
                raise SaveError(f"the disk is full at {step}")
            return save(self, step, checkpoint)

        return saved

    for bad, reached in ((4, 6), (6, 6)):
        run = kit.run(f"run {bad}", steps=6, checkpoint_every=2, save_in_background=True, keep_checkpoints=9)
        monkeypatch.setattr(Checkpoints, "save", full(bad))
        trainer = Trainer(run)
        with pytest.raises(SaveError, match=f"the disk is full at {bad}"):
            trainer.fit()
        assert trainer.step == reached
        monkeypatch.setattr(Checkpoints, "save", save)
        stand = [step for step in (2, 4, 6) if step != bad]  # the one that heard of it was written, too
        assert Checkpoints(run.folder / "checkpoints", keep=9).steps() == stand
        Trainer(run).fit()
        assert Checkpoints(run.folder / "checkpoints", keep=9).steps()[-1] == 6


def test_another_error_waits_for_the_save_that_runs_whatever_comes_meanwhile(kit, monkeypatch):
    """Nobody may take the folder before; afterwards the same trainer goes on."""
    run = kit.run(steps=5, checkpoint_every=2, save_in_background=True)
    save = Checkpoints.save

    def slow(self, step, checkpoint):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return save(self, step, checkpoint)

    trainer = Trainer(run)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", slow)
        patch.setattr(trainer, "_stream", lambda: iter([kit.table()[:8]] * 2))
        with pytest.raises((RuntimeError, StopIteration)):
            trainer.fit()
    assert files(run, 2)
    assert not list(run.folder.rglob("*.part"))
    with locked(run.folder):
        pass
    found = load_tensors(run.folder / "checkpoints/step-00000002")
    live = dict(trainer.module.named_parameters())
    assert all(torch.equal(value, live[name]) for name, value in found.items())
    trainer.fit()
    assert files(run, 5)


def test_a_signal_during_the_last_save_stops_what_comes_after(kit, monkeypatch):
    save = Checkpoints.save

    def signalled(self, step, checkpoint):
        time.sleep(0.1)  # the loop waits by now
        os.kill(os.getpid(), signal.SIGTERM)
        return save(self, step, checkpoint)

    run = kit.run(steps=3, save_in_background=True)
    monkeypatch.setattr(Checkpoints, "save", signalled)
    with pytest.raises(Stopped) as caught:
        Trainer(run).fit()
    assert caught.value.code == 128 + signal.SIGTERM
    assert files(run, 3)


def test_a_file_that_another_rank_wrote_elsewhere_is_an_error_and_leaves_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, Checkpoint({"module": {"a": torch.ones(2)}}, {"step": 1}))
    told = r"shard-00002.* are not in .*all ranks need one folder.*step-00000001 stands"
    with pytest.raises(SaveError, match=told), checkpoints.writing(2, {"step": 2}) as begun:
        begun.digests["shard-00002-model-00001-of-00001.safetensors"] = "0" * 64
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("name", "group", "message"),
    [
        ("step-00000001", "average", "holds no average, but module"),
        ("best", "module", "best is no checkpoint"),
        ("step-00000002", "module", "cannot be read"),
    ],
)
def test_tensors_of_a_checkpoint_that_are_not_there_are_named(tmp_path, name, group, message):
    Checkpoints(tmp_path, keep=1).save(1, Checkpoint({"module": {"a": torch.ones(2)}}, {"step": 1}))
    with pytest.raises(CheckpointError, match=message):
        load_tensors(tmp_path / name, group)
