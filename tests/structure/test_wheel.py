"""The wheel holds two packages, the programs as data, the built-in model, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from house import PACKAGES, PROGRAMS, ROOT

SUFFIXES = {".py", ".typed", ".json", ".safetensors", ".md", ".png"}  # source, types, a model's files
MODEL = "mmdlm/models/"
MAX_MODEL_BYTES = 24 * 2**20
IN_PROCESS = "import sys; from hatchling import build; print(build.{0}(sys.argv[1]))"


def build(hook: str, folder: Path) -> zipfile.ZipFile:
    """What hatchling builds through the named hook; no network, no isolation."""
    command = [sys.executable, "-c", IN_PROCESS.format(hook), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory):
    with build("build_wheel", tmp_path_factory.mktemp("wheel")) as archive:
        yield archive


def wanted(root: Path) -> set[str]:
    """The files that a wheel of the tree at `root` ought to hold."""
    files = set()
    for folder in (*PACKAGES, *PROGRAMS):
        home = f"mmdlm/programs/{folder}" if folder in PROGRAMS else folder
        suffixes = {".py"} if folder in PROGRAMS else SUFFIXES  # a page beside the recipes stays behind
        for path in (root / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix in suffixes:
                files.add(f"{home}/{path.relative_to(root / folder).as_posix()}")
    return files


def test_the_wheel_holds_the_packages_the_programs_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == wanted(ROOT)
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_programs_travel_as_data_and_are_no_package(wheel):
    programs = {name for name in wheel.namelist() if name.startswith("mmdlm/programs/")}
    assert {name.removeprefix("mmdlm/programs/") for name in programs} == {
        path.relative_to(ROOT).as_posix() for folder in PROGRAMS for path in (ROOT / folder).rglob("*.py")
    }
    assert not any(name.endswith("__init__.py") for name in programs)


def test_the_built_in_models_travel_whole_and_stay_small(wheel):
    entries = [entry for entry in wheel.infolist() if entry.filename.startswith(MODEL)]
    shipped = {entry.filename: entry.file_size for entry in entries}
    files = [path for path in (ROOT / MODEL).rglob("*") if path.is_file()]
    assert shipped == {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in files}
    assert {Path(name).suffix for name in shipped} <= SUFFIXES - {".py"}
    assert sum(shipped.values()) <= MAX_MODEL_BYTES


def test_the_metadata_name_licence_command_and_version(wheel):
    import mmdlm

    home = f"mmdlm-{mmdlm.__version__}.dist-info"
    metadata = wheel.read(f"{home}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "mmdlm = mmdlm.cli:main" in wheel.read(f"{home}/entry_points.txt").decode()
    assert wheel.read(f"{home}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_command_of_an_unpacked_wheel_runs_its_own_programs(wheel, tmp_path):
    wheel.extractall(tmp_path)
    program = tmp_path / "mmdlm" / "programs" / "infer" / "echo_arguments.py"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text('"""Prints its arguments."""\nimport sys\n\nprint(__file__, sys.argv, __name__)\n')
    done = subprocess.run(
        [sys.executable, "-m", "mmdlm.cli", "echo_arguments", "--seed", "3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{program} {[str(program), '--seed', '3']} __main__"


def test_an_editable_wheel_is_a_path_to_the_clone(tmp_path):
    with build("build_editable", tmp_path) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [Path(name).suffix for name in names] == [".pth"]
        assert Path(archive.read(names[0]).decode().strip()) == ROOT
