"""The `mmdlm` command finds the programs of a clone and of an installed package, and runs them."""

from __future__ import annotations

import sys

import pytest

from mmdlm import __version__, cli

PROGRAM = """\
'''Prints what it was given.'''
import sys

print(sys.argv[1:])
sys.exit(7 if "--fail" in sys.argv else 0)
"""


def lay_out(home, *names: str) -> None:
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(PROGRAM)


@pytest.fixture
def clone(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A clone of three programs and a recipe, which the command takes for its own."""
    lay_out(tmp_path, "infer/caption.py", "infer/score.py", "train/run.py", "train/recipes/scenes.py")
    (tmp_path / "mmdlm").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mmdlm"\n')
    monkeypatch.setattr(cli, "_HERE", tmp_path / "mmdlm")
    monkeypatch.setattr(sys, "argv", ["mmdlm"])
    return tmp_path


def test_a_clone_offers_its_own_folders(clone):
    programs = cli.find_programs(clone / "mmdlm")
    assert list(programs) == ["caption", "score", "run"]  # recipes are no programs
    assert programs["run"] == clone / "train" / "run.py"


def test_an_installed_package_offers_what_it_carries(clone):
    lay_out(clone / "mmdlm" / "programs", "infer/joint.py")
    assert list(cli.find_programs(clone / "mmdlm")) == ["joint"]


@pytest.mark.parametrize("text", [None, "[tool.ruff]\n", '[project]\nname = "another"\n'])
def test_the_folders_beside_a_stranger_are_left_alone(clone, text):
    (clone / "pyproject.toml").unlink()
    if text is not None:
        (clone / "pyproject.toml").write_text(text)
    assert cli.find_programs(clone / "mmdlm") == {}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_program_with_its_first_line(clone, capsys, arguments):
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: mmdlm NAME")
    assert [line.split(maxsplit=1) for line in lines[2:]] == [
        [name, "Prints what it was given."] for name in ("caption", "score", "run")
    ]


def test_the_version_is_printed(clone, capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmdlm {__version__}\n"


def test_a_program_runs_with_its_own_arguments(clone, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "scenes", "--help", "lr=2e-4"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "['scenes', '--help', 'lr=2e-4']\n"


def test_the_exit_status_is_the_programs(clone):
    with pytest.raises(SystemExit) as ended:
        cli.main(["caption", "--fail"])
    assert ended.value.code == 7


def test_a_wrong_name_is_one_line_with_the_nearest(clone, capsys):
    assert cli.main(["captoin", "a.png"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "'captoin'" in printed.err
    assert "nearest: caption (see" in printed.err


def test_the_real_programs_all_say_what_they_are():
    for line in cli.describe(cli.find_programs(cli._HERE)).splitlines()[2:]:
        assert len(line.split(maxsplit=1)) == 2, line
