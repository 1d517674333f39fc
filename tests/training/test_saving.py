"""Saving in the background: what is written is the step that asked for it, and no failure goes unheard."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file

from mmdlm.training import BatchError, SaveError, Trainer
from mmdlm.training.checkpoint import Checkpoints


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
        assert Checkpoints(run.folder / "checkpoints", keep=9).steps() == list(range(2, bad, 2))
        Trainer(run).fit()
        assert Checkpoints(run.folder / "checkpoints", keep=9).steps()[-1] == 6


def test_another_error_waits_for_the_save_that_runs_and_names_it(kit, monkeypatch):
    run = kit.run(steps=9, checkpoint_every=2, save_in_background=True, log_every=1)
    save = Checkpoints.save

    def slow(self, step, checkpoint):
        threading.Event().wait(0.3)
        return save(self, step, checkpoint)

    monkeypatch.setattr(Checkpoints, "save", slow)
    trainer = Trainer(run)
    monkeypatch.setattr(trainer, "_stream", lambda: iter([kit.table()[:4]] * 2))
    with pytest.raises((BatchError, StopIteration, RuntimeError)):
        trainer.fit()
    found = load_file(run.folder / "checkpoints/step-00000002/module.safetensors")
    live = dict(trainer.module.named_parameters())
    assert all(torch.equal(value, live[name]) for name, value in found.items())
