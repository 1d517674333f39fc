"""Carries out a recipe: `python train/run.py RECIPE [key=value ...] [--track NAME]`; knows it by its file.

A recipe is a Python file with a function `recipe(*, ...)` that returns a `Run`, or yields one `Run` after the
other: each is trained before the recipe goes on, so that a later stage builds on the trained module of an
earlier one. The same command takes an interrupted run up again. Each stage leaves report.html in its folder;
--track, which may be repeated, hands its records on to tensorboard, wandb or trackio as well.

`torchrun --nproc-per-node N train/run.py RECIPE ...` shares every step out among N processes, with the same
result; a stage's `accumulate` must then be a multiple of N. Rank 0 goes through a recipe first, the others
only as far as its last stage: what a recipe writes after that is written once.

Exit status: 0 done; 2 wrong input or data, a loss that is not finite, a full disk, a folder in use; 143
(SIGTERM) or 130 (SIGINT) stopped after a checkpoint was saved.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmdlm.program import prepare_process

if TYPE_CHECKING:
    from mmdlm.training import Listener, Ranks, Run

RECIPES = Path(__file__).resolve().parent / "recipes"
NO_PLACE = (FileExistsError, NotADirectoryError, PermissionError)  # to write the run to
TRACKERS = ("tensorboard", "wandb", "trackio")
USAGE = "usage: python train/run.py RECIPE [key=value ...] [--track NAME]   RECIPE: .py file, or of: {names}"


def main(arguments: Sequence[str]) -> int:
    """Runs the program; the exit status."""
    words = [word for word in arguments if word not in ("-h", "--help")]
    asked = len(words) < len(arguments)
    words, tracked = options(words)
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
    from mmdlm.io import InUseError
    from mmdlm.training import BatchError, CheckpointError, SaveError, Trainer, join

    clear = (BatchError, CheckpointError, FloatingPointError, InUseError, SaveError, *NO_PLACE)
    ranks = join()
    folders: list[Path] = []
    for stage in stages(recipe, chosen, ranks):
        run = replace(
            stage, listeners=(*stage.listeners, *(listener(name, stage.folder) for name in tracked))
        )
        try:
            trainer = Trainer(run)
        except ValueError as error:
            fail(f"{run.folder}: {error}")
        if ranks.leads:
            print(f"{run.folder}: {run.steps} steps", file=sys.stderr)
        try:
            trainer.fit()
        except clear as error:
            fail(str(error))
        if not ranks.leads:
            continue
        folders.append(run.folder)
        report(run.folder)
        print(f"{run.folder}: done", file=sys.stderr)
    for folder in folders:  # once more: now the pages tell how to use the finished model
        report(folder)
    return 0


def options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without --track NAME, and the names."""
    rest, names, ahead = [], [], iter(words)
    for word in ahead:
        if word.partition("=")[0] != "--track":
            rest.append(word)
            continue
        name = word.partition("=")[2] or next(ahead, "")
        if name not in TRACKERS:
            fail(f"--track {name}: wanted one of {', '.join(TRACKERS)}")
        names.append(name)
    return rest, names


def listener(name: str, folder: Path) -> Listener:
    """The tracker of that name for the run in `folder`."""
    from mmdlm.training import TensorBoard, Trackio, WandB

    try:
        if name == "tensorboard":
            return TensorBoard(folder / name)
        return {"wandb": WandB, "trackio": Trackio}[name]("mmdlm", folder, name="-".join(folder.parts[-2:]))
    except ImportError as error:
        fail(str(error))


def report(folder: Path) -> None:
    """Writes the run's page; what goes wrong with it is said, and ends nothing."""
    from mmdlm.training_report import training_report

    model = folder.parent / "model"
    try:
        training_report(folder, model=model if (model / "model_index.json").is_file() else None)
    except (OSError, ValueError) as error:
        print(f"{folder}: no report: {error}", file=sys.stderr)


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


def stages(recipe: Callable[..., Any], chosen: dict[str, Any], ranks: Ranks) -> Iterator[Run]:
    """The recipe's runs one by one; what follows a `yield` is executed when that run is done."""
    from mmdlm.training import Run

    try:
        made: Run | Iterable[Run] | None = ranks.follow(lambda: recipe(**chosen))
        runs = iter([made] if isinstance(made, Run) else made or ())
        while (run := ranks.follow(lambda: next(runs, None))) is not None:
            yield run
    except (ValueError, OSError) as error:  # the recipe's own: nothing of the training passes through here
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Ends the program: wrong input."""
    print(f"train/run.py: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
