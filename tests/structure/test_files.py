"""Every file says what it is, in ASCII and short lines; rooms only gather; the top level is known."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest
from house import PACKAGES, PROGRAMS, ROOT, Module, read_house, read_module

MAX_LINE = 110
TOP_LEVEL = {
    ".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "LICENSE", "Makefile", "README.md",
    "infer", "mmdlm", "pyproject.toml", "tests", "tokenizers_mm", "train",
}  # fmt: skip
MADE = {".venv", "out", "runs", "dist", "build", ".pytest_cache", ".ruff_cache", "PKG-INFO"}
FREE_INIT = {"mmdlm"}  # offers Pipeline through __getattr__


def source_files() -> list[Path]:
    return [
        path for folder in (*PACKAGES, *PROGRAMS, "tests") for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def source_faults(path: Path) -> list[str]:
    """What is wrong with the text of one source file."""
    data = path.read_bytes()
    text = data.decode("utf-8")
    faults = []
    if not data.isascii():
        lines = [number for number, line in enumerate(text.splitlines(), 1) if not line.isascii()]
        faults.append(f"{path}: not ASCII in lines {lines}; write \\u escapes")
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > MAX_LINE:
            faults.append(f"{path}:{number}: {len(line)} characters")
    first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    if not text.startswith('"""') or not first.endswith((".", "?", "!", "`")):
        faults.append(f"{path}: does not start with a docstring whose first line is a sentence")
    return faults


def gathering_faults(module: Module) -> list[str]:
    """Statements of a room's __init__.py other than its docstring, imports and `__all__`."""
    faults = []
    for node in module.tree.body[1:]:
        is_list = isinstance(node, ast.Assign) and [ast.unparse(name) for name in node.targets] == ["__all__"]
        if not (isinstance(node, ast.Import | ast.ImportFrom) or is_list):
            faults.append(f"{module.path}:{node.lineno}: {ast.unparse(node)[:60]}")
    return faults


def top_level(root: Path) -> set[str]:
    """What the repository holds at its top: tracked, or there and not ignored; all of it without git."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
        return {name.partition("/")[0] for name in listed.split("\0") if name}
    return {path.name for path in root.iterdir()} - MADE


def test_every_file_says_what_it_is_in_plain_short_lines():
    files = source_files()
    assert len(files) > 10
    assert [fault for path in files for fault in source_faults(path)] == []


def test_rooms_gather_names_and_do_nothing_else():
    rooms = [module for module in read_house().values() if module.is_package and module.name not in FREE_INIT]
    assert [fault for room in rooms for fault in gathering_faults(room)] == []


def test_the_top_level_holds_only_what_is_known():
    found = top_level(ROOT)
    assert found <= TOP_LEVEL, f"unknown at the top level: {sorted(found - TOP_LEVEL)}"
    assert {"LICENSE", "Makefile", "README.md", "pyproject.toml", "mmdlm"} <= found


def test_tests_are_no_packages_and_bear_unique_names():
    files = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert "__init__.py" not in files
    assert sorted(files) == sorted(set(files))


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n",
        "",
        '"""no sentence"""\n',
        '# a comment first\n"""A sentence."""\n',
        '"""A sentence."""\nx = "\u00e9"\n',
        '"""A sentence."""\n# ' + "x" * MAX_LINE,
    ],
)
def test_a_badly_written_file_is_seen(tmp_path, text):
    path = tmp_path / "file.py"
    path.write_text(text, encoding="utf-8")
    assert source_faults(path)


def test_a_well_written_file_is_let_pass(tmp_path):
    path = tmp_path / "file.py"
    path.write_text('"""A sentence.\n\nMore of it.\n"""\n\nx = "\\u00e9"\n')
    assert source_faults(path) == []


@pytest.mark.parametrize("text", ["x = 1", "print(3)", "if True:\n    import json", "def f(): ..."])
def test_a_room_that_does_something_is_seen(tmp_path, text):
    path = tmp_path / "__init__.py"
    path.write_text(f'"""A room."""\nimport json\n{text}\n__all__ = ["json"]\n')
    assert len(gathering_faults(read_module(path, "mmdlm.io"))) == 1
