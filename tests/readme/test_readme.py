"""What the pages say holds: Python runs, commands name programs, targets and options there are."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mmdlm.cli import find_programs
from mmdlm.pretrained import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "train/recipes/RESULTS.md"]
SHELLS = ("sh", "bash", "shell", "console")
# Commands of the machine, which are not ours to run here.
OTHERS = {"cd", "cp", "export", "git", "ls", "mkdir", "open", "pip", "source", "unzip", "xdg-open"}
MODULES = {"pytest", "venv", "pip", "build", "ruff"}  # python -m these


class Block(NamedTuple):
    language: str
    line: int  # of its first line, from 1
    text: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, indented ones too; a fence closes with as many ticks or more."""
    found: list[Block] = []
    inside: list[str] = []
    fence = None
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"\s*(`{3,}|~{3,})\s*([\w+-]*).*", line)
        if fence is None and match:
            fence, language, begin, inside = match[1], match[2], number + 1, []
            indent = len(line) - len(line.lstrip())
        elif fence is not None and match and match[1].startswith(fence) and not match[2]:
            found.append(Block(language, begin, "\n".join(inside) + "\n"))
            fence = None
        elif fence is not None:
            inside.append(line[min(indent, len(line) - len(line.lstrip())) :])
    assert fence is None, f"the block of line {begin} is never closed"
    return found


def commands(text: str) -> list[list[str]]:
    """The simple commands of shell text as words; comments, prompts and settings of variables are gone."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for word in ["&&", *words]:
            if word in ("&&", ";", "|"):
                found.append([])
            elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
                found[-1].append(word)
    return [command for command in found if command]


def inline_commands(text: str) -> list[list[str]]:
    """Commands between single ticks in the prose; those with dots for something left out lose the dots."""
    prose = text
    for block in blocks(text):
        prose = prose.replace(block.text, "")
    spoken = re.findall(r"(?<!`)`(?!`)([^`]+)`", prose)
    starts = re.compile(r"(make|python|mmdlm) |(infer|train)/\w+\.py")
    return [
        [word for word in words if word != "..."]
        for words in (shlex.split(one) for one in spoken if starts.match(one))
    ]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def said(path: Path, *arguments: str) -> str:
    """What a program prints when it is asked for help."""
    before = sys.argv
    sys.argv = [str(path), *arguments, "--help"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
    return out.getvalue()


def program_faults(path: Path, arguments: list[str]) -> list[str]:
    """Options and recipe arguments that the program does not know."""
    if not path.is_file():
        return [f"there is no {path.relative_to(ROOT)}"]
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    if path.name != "run.py":
        told = said(path)
        return [f"{path.name} has no {name}" for name in options if not re.search(rf"{name}\b", told)]
    recipe = arguments[:1]
    told = said(path, *recipe)
    if "takes:" not in told:
        return [f"no recipe {recipe}"]
    keys = [word.partition("=")[0] for word in arguments[1:] if "=" in word]
    faults = [f"recipe {recipe[0]} takes no {key}" for key in keys if f"\n  {key}:" not in told]
    known = said(path)
    return faults + [f"run.py has no {name}" for name in options if name != "--help" and name not in known]


def faults_of(command: list[str]) -> list[str]:
    """What is wrong with a command of ours; nothing for those of the machine."""
    name, *arguments = command
    if name == "make":
        asked = [word for word in arguments if "=" not in word]
        return [f"make has no target {word}" for word in asked if word not in targets()]
    if re.fullmatch(r"(\.venv/bin/)?python[\d.]*", name):
        if not arguments or arguments[0].startswith("-"):
            module = arguments[1] if arguments[:1] == ["-m"] else ""
            return [] if module in MODULES else [f"unknown use of python: {shlex.join(command)}"]
        return program_faults(ROOT / arguments[0], arguments[1:])
    if re.fullmatch(r"(\.venv/bin/)?mmdlm", name):
        programs = find_programs(ROOT / "mmdlm")
        if arguments[:1] in (["--help"], ["--version"]):
            return []
        if not arguments or arguments[0] not in programs:
            return [f"mmdlm has no program {arguments[:1]}"]
        return program_faults(programs[arguments[0]], arguments[1:])
    if name.endswith(".py"):
        return program_faults(ROOT / name, arguments)
    known = name.rpartition("/")[2] if name.startswith(".venv/bin/") else name
    return [] if known in OTHERS else [f"unknown command {name}"]


# what stands in the README


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    written = [block for block in blocks(README.read_text("utf-8")) if block.language == "python"]
    assert written, "README.md shows no Python"
    uses = any("from_pretrained(" in block.text for block in written)
    for name, folder in BUILT_IN.items():
        if uses and not (folder / "model_index.json").is_file():
            pytest.fail(
                f"README.md shows the built-in model {name!r}, and {folder} holds none", pytrace=False
            )
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in written:
        # as many lines ahead as in the README, so that a traceback names its line
        code = compile("\n" * (block.line - 1) + block.text, str(README), "exec")
        exec(code, namespace)
    capsys.readouterr()


def name(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_commands_name_what_exists(page):
    text = page.read_text("utf-8")
    shells = [block for block in blocks(text) if block.language in SHELLS]
    assert shells, f"{page.name} shows no command"
    found = [command for block in shells for command in commands(block.text)] + inline_commands(text)
    assert len(found) >= 4
    assert [(shlex.join(command), fault) for command in found for fault in faults_of(command)] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_links_and_folders_exist(page):
    text = page.read_text("utf-8")
    linked = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and link[0] != "#"]
    rooms = re.findall(r"`((?:tokenizers_mm|mmdlm|train|infer|tests)/[\w/.]*)`", text)
    assert rooms
    missing = [link for link in linked if not (page.parent / link.partition("#")[0]).exists()]
    assert missing + [room for room in rooms if not (ROOT / room).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_figures_are_filled_in(page):
    left = [word for word in ("FIGURES", "TODO", "FIXME", "XXX") if word in page.read_text("utf-8")]
    assert left == [], f"{page.name} holds places that are not filled in"


# what the tests above see


SAMPLE = """# A

```python
x = 1
if x:
    x = 2
```

1. a list

   ```sh
   $ make demo  # all of it
   OMP_NUM_THREADS=1 python infer/caption.py a.png \\
       --seed 3 && cd "a folder"
   ```

~~~text
```python
raise SystemExit
```
~~~
`python train/run.py scenes`, `make fly ...`, `infer/caption.py --model x`, `code`
"""


def test_blocks_and_commands_are_found():
    found = blocks(SAMPLE)
    assert [(block.language, block.line) for block in found] == [("python", 4), ("sh", 12), ("text", 18)]
    assert found[0].text == "x = 1\nif x:\n    x = 2\n"
    assert commands(found[1].text) == [
        ["make", "demo"],
        ["python", "infer/caption.py", "a.png", "--seed", "3"],
        ["cd", "a folder"],
    ]
    assert inline_commands(SAMPLE) == [
        ["python", "train/run.py", "scenes"],
        ["make", "fly"],
        ["infer/caption.py", "--model", "x"],
    ]
    with pytest.raises(AssertionError, match="line 2 is never closed"):
        blocks("```sh\nmake\n")


@pytest.mark.parametrize(
    "command",
    [
        "make demo ARGS='--num 3'",
        ".venv/bin/python infer/joint.py 'a small' --num=3",
        "python train/run.py pairs data=x steps=3 --track wandb",
        "python train/run.py train/recipes/pairs.py --help",
        "python3 -m venv .venv",
        "mmdlm score --json",
        "mmdlm --help",
        ".venv/bin/pip install torch",
    ],
)
def test_commands_that_exist_are_let_pass(command):
    assert faults_of(shlex.split(command)) == []


@pytest.mark.parametrize(
    "command",
    [
        "make fly",
        "python infer/fly.py",
        "python infer/joint.py --nums 3",
        "python train/run.py pairs stepz=3",
        "python train/run.py pairs --trace wandb",
        "python train/run.py fly",
        "python -m http.server",
        "mmdlm fly",
        "mmdlm score --jsonn",
        "fly",
    ],
)
def test_commands_that_do_not_exist_are_seen(command):
    assert len(faults_of(shlex.split(command))) == 1
