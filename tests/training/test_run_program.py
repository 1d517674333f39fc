"""The program finds recipes, reads arguments, trains stage by stage, and explains wrong input in a line."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mmdlm.io import locked

PROGRAM = Path(__file__).resolve().parents[2] / "train" / "run.py"
FAKES = Path(__file__).with_name("conftest.py")

STAGES = f"""
import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("fakes", {str(FAKES)!r})
fakes = sys.modules["fakes"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fakes)


def recipe(*, out: Path, steps: int = 3, lr: float = 1e-3):
    \"\"\"Two stages, the second on the module of the first.\"\"\"
    if lr > 1:
        raise ValueError(f"lr must be at most 1, got {{lr}}")
    first = fakes.Kit(out).run("first", steps=steps)
    yield first
    assert not first.module.training
    yield fakes.Kit(out).run("second", steps=steps, module=first.module)
"""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    spec = importlib.util.spec_from_file_location("train_run_program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "stages.py").write_text(STAGES)
    return str(tmp_path / "stages.py")


def refused(program: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_stages_run_one_after_the_other(program, recipe, tmp_path):
    assert program.main([recipe, f"out={tmp_path}", "steps=4"]) == 0
    for stage in ("first", "second"):
        assert (tmp_path / stage / "checkpoints/step-00000004").is_dir()
        assert (tmp_path / stage / "run.json").is_file()


def test_help_shows_what_the_recipe_says_and_takes(program, recipe, capsys):
    assert program.main([recipe, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "Two stages" in printed
    assert "steps: int = 3" in printed
    assert program.main(["--help"]) == 0
    assert "usage" in capsys.readouterr().out
    assert program.main([]) == 2


def test_wrong_input_is_explained(program, recipe, capsys, tmp_path):
    assert "did you mean 'steps'" in refused(program, capsys, recipe, f"out={tmp_path}", "stepz=4")
    assert "steps=many" in refused(program, capsys, recipe, f"out={tmp_path}", "steps=many")
    assert "lr must be at most 1" in refused(program, capsys, recipe, f"out={tmp_path}", "lr=2")
    assert "there is no recipe 'nowhere'" in refused(program, capsys, "nowhere")
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert "defines no function recipe" in refused(program, capsys, str(tmp_path / "empty.py"))


def test_a_folder_of_another_run_is_refused_in_a_line(program, recipe, capsys, tmp_path):
    assert program.main([recipe, f"out={tmp_path}"]) == 0
    other = Path(recipe).with_name("other.py")
    text = STAGES.replace(
        'run("first", steps=steps)', 'run("first", steps=steps, module=fakes.nn.Linear(6, 6))'
    )
    other.write_text(text)
    assert "does not fit this run" in refused(program, capsys, str(other), f"out={tmp_path}")


def test_what_ends_a_run_from_outside_is_told_in_a_line(program, recipe, capsys, tmp_path, monkeypatch):
    assert program.main([recipe, f"out={tmp_path}"]) == 0
    (tmp_path / "first").mkdir(exist_ok=True)
    with locked(tmp_path / "first"):
        told = refused(program, capsys, recipe, f"out={tmp_path}", "steps=6")
    assert f"{tmp_path / 'first'} is in use by process {os.getpid()}" in told

    def full(tensors, path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmdlm.training.checkpoint.save_file", full)
    told = refused(program, capsys, recipe, f"out={tmp_path}", "steps=6")
    assert "step-00000006 could not be written: [Errno 28] No space left on device" in told
    assert "step-00000003 stands" in told
    monkeypatch.undo()
    monkeypatch.setattr("mmdlm.training.metrics.Metrics.append", lambda *_: full(*_[:2]))
    told = refused(program, capsys, recipe, f"out={tmp_path}", "steps=6")
    assert "cannot be written to: [Errno 28] No space left on device; the checkpoint of step 3 stands" in told
    assert "Traceback" not in told


def test_every_stage_leaves_a_page_and_hands_its_records_on(program, recipe, capsys, monkeypatch, tmp_path):
    started: list[tuple[str, int]] = []

    def init(project, *, name, config, resume):
        started.append((name, config["steps"]))
        return SimpleNamespace(log=lambda values, step: logged.append(step), finish=lambda: None)

    logged: list[int] = []
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    assert program.main([recipe, f"out={tmp_path}", "--track", "trackio"]) == 0
    assert started == [(f"{tmp_path.name}-first", 3), (f"{tmp_path.name}-second", 3)]
    assert logged == [1, 2, 3] * 2
    for stage in ("first", "second"):
        assert "3 of 3" in (tmp_path / stage / "report.html").read_text("utf-8")
    assert "wanted one of tensorboard, wandb, trackio" in refused(program, capsys, recipe, "--track=paper")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install 'mmdlm[wandb]'" in refused(
        program, capsys, recipe, f"out={tmp_path / 'other'}", "--track", "wandb"
    )


def test_a_page_that_cannot_be_written_ends_nothing(program, recipe, capsys, tmp_path):
    (tmp_path / "first" / "report.html").mkdir(parents=True)
    assert program.main([recipe, f"out={tmp_path}"]) == 0
    assert "no report" in capsys.readouterr().err
    assert (tmp_path / "second" / "report.html").is_file()
