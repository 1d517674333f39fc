"""Carries out a recipe: `python train/run.py RECIPE [key=value ...]`; knows recipes by their file alone.

A recipe is a Python file with a function `recipe(*, ...)` that returns a `Run`, or yields one `Run` after the
other: each is trained before the recipe goes on, so that a later stage builds on the trained module of an
earlier one. The same command takes an interrupted run up again. Exit status: 0 done; 2 wrong
input, or a loss that is not finite; 143 (SIGTERM) or 130 (SIGINT) stopped after a checkpoint was saved.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmdlm.program import prepare_process

if TYPE_CHECKING:
    from mmdlm.training import Run

RECIPES = Path(__file__).resolve().parent / "recipes"
NO_PLACE = (FileExistsError, NotADirectoryError, PermissionError)  # to write the run to
USAGE = "usage: python train/run.py RECIPE [key=value ...]     RECIPE: a .py file, or one of: {names}"


def main(arguments: Sequence[str]) -> int:
    """Runs the program; the exit status."""
    words = [word for word in arguments if word not in ("-h", "--help")]
    asked = len(words) < len(arguments)
    if not words:
        usage = USAGE.format(names=shipped())
        print(f"{__doc__}\n{usage}" if asked else usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    prepare_process()
    from mmdlm.io import parse_arguments, signature

    recipe = load(find(words[0]))
    if asked:
        print(f"{(recipe.__doc__ or '').strip()}\n\n{signature(recipe)}".strip())
        return 0
    try:
        chosen = parse_arguments(recipe, words[1:])
    except ValueError as error:
        fail(str(error))
    from mmdlm.training import CheckpointError, Trainer

    for run in stages(recipe, chosen):
        print(f"{run.folder}: {run.steps} steps", file=sys.stderr)
        try:
            Trainer(run).fit()
        except (CheckpointError, FloatingPointError, *NO_PLACE) as error:
            fail(str(error))
        print(f"{run.folder}: done", file=sys.stderr)
    return 0


def shipped() -> str:
    """Names of the recipes that come along."""
    return ", ".join(sorted(path.stem for path in RECIPES.glob("*.py"))) or "(none)"


def find(name: str) -> Path:
    """The recipe's file: a path that ends in .py, or a shipped name."""
    path = Path(name) if name.endswith(".py") else RECIPES / f"{name}.py"
    if not path.is_file():
        fail(f"there is no recipe {name!r}; give a .py file or one of: {shipped()}")
    return path


def load(path: Path) -> Callable[..., Any]:
    """The function `recipe` of the file, which is executed."""
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    recipe = vars(module).get("recipe")
    if not callable(recipe):
        fail(f"{path} defines no function recipe; write one that takes keyword arguments and returns a Run")
    return recipe


def stages(recipe: Callable[..., Any], chosen: dict[str, Any]) -> Iterator[Run]:
    """The recipe's runs one by one; what follows a `yield` is executed when that run is done."""
    from mmdlm.training import Run

    try:
        made: Run | Iterable[Run] = recipe(**chosen)
        yield from [made] if isinstance(made, Run) else made
    except (ValueError, OSError) as error:  # the recipe's own: nothing of the training passes through here
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Ends the program: wrong input."""
    print(f"train/run.py: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
