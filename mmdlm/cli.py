"""The `mmdlm` command: runs a program of `infer/` or `train/` by name. Knows none and loads no library."""

from __future__ import annotations

import ast
import runpy
import sys
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from mmdlm import __version__

_HERE = Path(__file__).resolve().parent


def find_programs(package: Path) -> dict[str, Path]:
    """The programs by name: those inside an installed `package`, or in the clone that `package` lies in."""
    home = package / "programs"
    if not home.is_dir():
        home = package.parent
        stated = home / "pyproject.toml"
        project = tomllib.loads(stated.read_text("utf-8")).get("project", {}) if stated.is_file() else {}
        if project.get("name") != "mmdlm":
            return {}
    return {path.stem: path for folder in ("infer", "train") for path in sorted((home / folder).glob("*.py"))}


def describe(programs: dict[str, Path]) -> str:
    """What `mmdlm --help` prints: the first line of each program's docstring, read without running it."""
    lines = ["usage: mmdlm NAME [ARGUMENT ...]     mmdlm NAME --help     mmdlm --version", ""]
    for name, path in programs.items():
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        lines.append(f"  {name:<16}  {text.partition(chr(10))[0]}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program that the arguments name (default: the command line's); 2 for a wrong name, else 0."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    programs = find_programs(_HERE)
    if name in ("-h", "--help"):
        print(describe(programs))
    elif name == "--version":
        print(f"mmdlm {__version__}")
    elif name in programs:
        sys.argv = [str(programs[name]), *rest]
        runpy.run_path(str(programs[name]), run_name="__main__")
    else:
        nearest = ", ".join(get_close_matches(name, programs, n=3, cutoff=0.4) or programs) or "none"
        print(f"mmdlm: no program {name!r}; nearest: {nearest} (see mmdlm --help)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
