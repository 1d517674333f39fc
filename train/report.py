"""Writes the page of a training run, finished or not: `python train/report.py runs/pairs/transformer`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdlm.program import run


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", nargs="+", type=Path, help="folder of a run, with metrics.jsonl and run.json"
    )
    parser.add_argument("--model", type=Path, help="model folder that came of it (default: FOLDER/../model)")
    given = parser.parse_args(arguments)
    from mmdlm.training_report import training_report

    for folder in given.folder:
        model = given.model or folder.parent / "model"
        print(training_report(folder, model=model if (model / "model_index.json").is_file() else None))


if __name__ == "__main__":
    run(main)
