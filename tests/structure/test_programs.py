"""Programs and recipes are short, bear safe names and use public names only."""

from __future__ import annotations

import ast
import sys

import pytest
from house import PROGRAMS, ROOT, Module, public_names, read_house

MAX_LINES = {"infer": 200, "train": 200, "recipes": 300}  # by folder
# What a program may import besides ours and the standard library: what pyproject.toml installs.
FOREIGN = {
    "PIL", "datasets", "diffusers", "einops", "gradio", "lm_eval", "numpy", "safetensors", "tensorboard",
    "tokenizers", "torch", "torchmetrics", "torchvision", "tqdm", "trackio", "transformers", "wandb",
    "webdataset",
}  # fmt: skip


def programs_of(house: dict[str, Module]) -> list[Module]:
    return [module for module in house.values() if module.name.split(".")[0] in PROGRAMS]


def name_faults(module: Module, house: dict[str, Module]) -> list[str]:
    """Names that the program takes and that nobody promised."""
    faults = []
    for found in module.imports():
        where, top = f"{module.name}:{found.line}", found.module.split(".")[0]
        package = house.get(found.module)
        if top in ("mmdlm", "tokenizers_mm"):
            if found.name is None:
                faults.append(f"{where}: import {found.module}; write from ROOM import NAME")
            elif package is None or public_names(package) is None:
                faults.append(
                    f"{where}: {found.module} promises no names in an __all__ (a file's are its room's)"
                )
            elif found.name not in (public_names(package) or []):
                faults.append(f"{where}: {found.name!r} is not in __all__ of {found.module}")
        elif top not in FOREIGN and top not in sys.stdlib_module_names:
            faults.append(f"{where}: imports {found.module or 'something unreadable'}")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            faults.append(f"{module.name}:{node.lineno}: uses the private name {node.attr}")
    return faults


def file_faults(module: Module) -> list[str]:
    """What is wrong with the program as a file."""
    faults = []
    num_lines = len(module.path.read_text("utf-8").splitlines())
    if num_lines >= MAX_LINES[module.path.parent.name]:
        faults.append(
            f"{module.name}: {num_lines} lines, wanted fewer than {MAX_LINES[module.path.parent.name]}"
        )
    if module.is_package:
        faults.append(f"{module.path.parent.name}/: has an __init__.py; programs are no package")
    if module.path.stem in sys.stdlib_module_names:
        faults.append(f"{module.name}: bears the name of a module of the standard library")
    return faults


def test_programs_use_public_names_only():
    house = read_house()
    assert [fault for program in programs_of(house) for fault in name_faults(program, house)] == []


def test_programs_are_short_files_with_safe_names():
    assert [fault for program in programs_of(read_house()) for fault in file_faults(program)] == []


def test_no_two_programs_share_a_name():
    names = [path.stem for folder in PROGRAMS for path in (ROOT / folder).glob("*.py")]
    assert sorted(names) == sorted(set(names))


ROOM = {
    "mmdlm/__init__.py": "__all__ = ['Pipeline']",
    "mmdlm/canvas/__init__.py": "from mmdlm.canvas.canvas import Canvas, hidden\n__all__ = ['Canvas']",
    "mmdlm/canvas/canvas.py": "__all__ = ['Canvas']",
    "mmdlm/output.py": "__all__ = ['Record']",
    "mmdlm/pretrained.py": "def load_parts(): ...",
}


def read_program(root, text: str, name: str = "infer/caption.py"):
    """A house of one room and one program, and the program."""
    for file, content in {**ROOM, name: text}.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    house = read_house(root)
    return next(module for module in house.values() if module.path == root / name), house


@pytest.mark.parametrize(
    "text",
    [
        "import mmdlm",
        "import mmdlm.canvas",
        "from mmdlm.canvas.canvas import Canvas",
        "from mmdlm.output import Output",
        "from mmdlm.pretrained import load_parts",
        "from mmdlm.canvas import hidden",
        "from mmdlm.canvas import canvas",
        "from mmdlm import canvas",
        "from mmdlm.nowhere import Canvas",
        "def f():\n    from mmdlm.canvas import hidden",
        "from infer import score",
        "import score",
        "import unheard_of",
        "from . import score",
        "from mmdlm import Pipeline\nPipeline.make()._network",
        "from importlib import import_module\nimport_module('mmdlm.' + name)",
    ],
)
def test_a_name_nobody_promised_is_seen(tmp_path, text):
    assert name_faults(*read_program(tmp_path, text))


def test_promised_names_are_let_pass(tmp_path):
    text = (
        "from __future__ import annotations\nimport json\nimport torch\nfrom mmdlm import Pipeline\n"
        "from mmdlm.canvas import Canvas\nfrom mmdlm.output import Record\n"
        "if __name__ == '__main__':\n    Canvas.__name__"
    )
    program, house = read_program(tmp_path, text)
    assert name_faults(program, house) == []
    assert file_faults(program) == []


@pytest.mark.parametrize(
    ("name", "num_lines"),
    [
        ("infer/json.py", 1),
        ("train/recipes/json.py", 1),
        ("infer/__init__.py", 1),
        ("infer/long.py", 200),
        ("train/recipes/long.py", 300),
    ],
)
def test_a_file_that_is_too_long_or_badly_named_is_seen(tmp_path, name, num_lines):
    program, _ = read_program(tmp_path, "x = 1\n" * num_lines, name)
    assert file_faults(program)
