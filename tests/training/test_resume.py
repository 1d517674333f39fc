"""A run that was stopped, killed or damaged goes on as if nothing had been, bit by bit, or says why not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmdlm.training import CheckpointError, Reconstruction, Stopped, Trainer
from mmdlm.training.checkpoint import module_tensors

ROOT = Path(__file__).resolve().parents[2]


def records(folder: Path) -> list[dict]:
    """All that was written but clock times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def assert_equal_runs(one: Path, other: Path) -> None:
    assert newest(one).name == newest(other).name
    for group in ("module", "optimizer", "average"):
        mine, theirs = (load_file(newest(folder) / f"{group}.safetensors") for folder in (one, other))
        assert mine.keys() == theirs.keys()
        assert mine
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), group
    states = [json.loads((newest(folder) / "state.json").read_text()) for folder in (one, other)]
    assert states[0]["batches"] == states[1]["batches"]
    assert records(one) == records(other)


def stop_at(step: int):
    """A hook that sends this process a signal at `step`, once."""
    done = []

    def hook(moment) -> None:
        if moment.step == step and not done:
            done.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    return hook


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_five_steps_and_five_more_are_ten(kit, log_every, accumulate):
    settings = {"log_every": log_every, "accumulate": accumulate}
    Trainer(kit.run("straight", **settings)).fit()
    with pytest.raises(Stopped) as caught:
        Trainer(kit.run("halves", hooks=((1, stop_at(5)),), **settings)).fit()
    assert caught.value.code == 128 + signal.SIGTERM
    assert newest(kit.folder / "halves").name == "step-00000005"
    resumed = Trainer(kit.run("halves", **settings))
    resumed.fit()
    assert resumed.step == 10
    assert_equal_runs(kit.folder / "straight", kit.folder / "halves")


def test_signal_handlers_are_put_back_and_a_second_signal_kills(kit):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    during = []

    def hook(moment) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        during.extend(signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT))

    with pytest.raises(Stopped) as caught:
        Trainer(kit.run(hooks=((2, hook),))).fit()
    assert caught.value.code == 130
    assert during == [signal.SIG_DFL, signal.SIG_DFL]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_hooks_that_a_signal_forestalled_are_made_up_for(kit):
    class Stopping(kit.Columns):
        def __call__(self, module, batch, rng):
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(module, batch, rng)

    calls: list[int] = []
    seen: list[int] = []
    hooks = ((2, lambda moment: seen.append(moment.step)),)
    with pytest.raises(Stopped):
        Trainer(kit.run(objective=Stopping(), hooks=hooks)).fit()
    assert seen == [2]
    Trainer(kit.run(hooks=hooks)).fit()
    assert seen == [2, 4, 6, 8, 10]


def test_records_after_the_checkpoint_are_not_written_twice(kit):
    class Dying(kit.Columns):
        def __call__(self, module, batch, rng):
            calls.append(1)
            if len(calls) == 8:
                raise KeyboardInterrupt  # nothing is saved: the machine dies at step 8
            return super().__call__(module, batch, rng)

    calls: list[int] = []
    Trainer(kit.run("straight")).fit()
    with pytest.raises(KeyboardInterrupt):
        Trainer(kit.run("dead", objective=Dying(), checkpoint_every=5)).fit()
    assert [record["step"] for record in records(kit.folder / "dead")] == list(range(1, 8))
    Trainer(kit.run("dead")).fit()
    assert_equal_runs(kit.folder / "straight", kit.folder / "dead")


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(kit):
    (kit.folder / "run").mkdir()
    (kit.folder / "run/metrics.jsonl").write_text('{"step": 1, "loss": 0}\n')
    Trainer(kit.run(steps=2)).fit()
    assert [record["step"] for record in records(kit.folder / "run")] == [1, 2]


class Picture(nn.Module):
    """Convolutions whose weights lie in memory as (out, height, width, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))
        for value in self.parameters():
            if value.ndim == 4:
                value.data = value.data.contiguous(memory_format=torch.channels_last)

    def forward(self, images):
        return SimpleNamespace(images=self.layers(images))


def test_channels_last_weights_resume_exactly(kit):
    def run(name: str, **changes):
        torch.manual_seed(0)
        images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
        return kit.run(
            name, module=Picture(), objective=Reconstruction(), batches=kit.Rows(images, 4), **changes
        )

    Trainer(run("straight", steps=6)).fit()
    with pytest.raises(Stopped):
        Trainer(run("halves", steps=6, hooks=((1, stop_at(3)),))).fit()
    Trainer(run("halves", steps=6)).fit()
    assert_equal_runs(kit.folder / "straight", kit.folder / "halves")


def test_only_the_newest_checkpoints_stay(kit):
    Trainer(kit.run(checkpoint_every=2, keep_checkpoints=3)).fit()
    found = sorted(path.name for path in (kit.folder / "run/checkpoints").iterdir())
    assert found == ["step-00000006", "step-00000008", "step-00000010"]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def damage_byte(path: Path) -> None:
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)


DAMAGES = [
    damage_byte,
    lambda path: (path / "average.safetensors").unlink(),
    lambda path: (path / "manifest.json").unlink(),
    lambda path: (path / "manifest.json").write_text("{}"),
    lambda path: (path / "manifest.json").write_text("[]"),
    lambda path: (path / "state.json").write_text("{}"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_left_alone(kit, damage):
    Trainer(kit.run("straight")).fit()
    Trainer(kit.run("hurt", checkpoint_every=6)).fit()
    damaged = newest(kit.folder / "hurt")
    damage(damaged)
    before = contents(damaged)
    with (
        pytest.warns(UserWarning, match="step-00000010 cannot be read.* left as it is and passed over"),
        pytest.raises(Stopped),
    ):
        Trainer(kit.run("hurt", hooks=((1, stop_at(8)),), keep_checkpoints=1)).fit()
    assert contents(damaged) == before
    assert sorted(path.name for path in damaged.parent.iterdir()) == ["step-00000008", damaged.name]
    with pytest.warns(UserWarning, match="step-00000010 cannot be read"):  # its step comes again
        Trainer(kit.run("hurt")).fit()
    assert contents(damaged.with_name("broken-step-00000010")) == before
    assert_equal_runs(kit.folder / "straight", kit.folder / "hurt")


def test_an_old_damaged_checkpoint_is_neither_deleted_nor_counted(kit):
    run = kit.run(steps=6, checkpoint_every=2, keep_checkpoints=3)
    Trainer(run).fit()
    oldest = run.folder / "checkpoints/step-00000002"
    damage_byte(oldest)
    before = contents(oldest)
    with pytest.warns(UserWarning, match="step-00000002 cannot be read"):
        Trainer(kit.run(steps=10, checkpoint_every=2, keep_checkpoints=2)).fit()
    left = sorted(path.name for path in oldest.parent.iterdir())
    assert left == ["step-00000002", "step-00000008", "step-00000010"]
    assert contents(oldest) == before


def test_when_every_checkpoint_is_damaged_the_run_does_not_silently_begin_anew(kit):
    Trainer(kit.run(checkpoint_every=6)).fit()
    for path in (kit.folder / "run/checkpoints").iterdir():
        damage_byte(path)
    for _ in range(2):  # nor when it is tried once more
        with pytest.warns(match="passed over"), pytest.raises(CheckpointError, match="2 are damaged"):
            Trainer(kit.run()).fit()
    found = {path.name for path in (kit.folder / "run/checkpoints").iterdir()}
    assert found == {"step-00000006", "step-00000010"}


def test_another_module_or_average_is_refused(kit):
    Trainer(kit.run(steps=2)).fit()
    with pytest.raises(CheckpointError, match="does not fit this run"):
        Trainer(kit.run(steps=2, module=nn.Linear(6, 6))).fit()
    with pytest.raises(CheckpointError, match="averaged"):
        Trainer(kit.run(steps=2, ema=None)).fit()


def test_a_tied_weight_is_saved_once(kit):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, batch):
            return self.second(self.first(batch))

    assert set(module_tensors(Tied())) == {"first.weight", "first.bias", "second.bias"}
    Trainer(kit.run(steps=4, module=Tied())).fit()
    again = Tied()
    Trainer(kit.run(steps=4, module=again)).fit()
    assert again.second.weight is again.first.weight
    shadow = load_file(newest(kit.folder / "run") / "average.safetensors")
    assert torch.equal(again.first.weight, shadow["first.weight"])


RECIPE = '''
import importlib.util, sys, time
from pathlib import Path

def recipe(*, out: Path, steps: int = 10):
    """Learns nothing much, slowly."""
    spec = importlib.util.spec_from_file_location("fakes", {fakes!r})
    fakes = sys.modules["fakes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fakes)
    wait = (1, lambda moment: time.sleep(0.05))
    return fakes.Kit(out).run(steps=steps, hooks=(wait,))
'''


def test_a_process_that_is_told_to_end_leaves_a_whole_checkpoint(kit, tmp_path):
    recipe = tmp_path / "slow.py"
    recipe.write_text(RECIPE.format(fakes=str(Path(__file__).with_name("conftest.py"))))
    command = [sys.executable, str(ROOT / "train/run.py"), str(recipe), f"out={tmp_path}", "steps=100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
    step = int(newest(tmp_path / "run").name.removeprefix("step-"))
    assert step >= 2
    again = Trainer(kit.run(steps=step + 1))  # a whole one: nothing warns
    again.fit()
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, step + 2))
