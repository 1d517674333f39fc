"""Exactness against forwards, guidance and order: `python infer/curves.py --num 200 --out out/curves`.

Every finished point is in OUT/curves.json at once; the same command again goes on where it was broken off.
The plots are in OUT/curves.html, a page that needs no other file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mmdlm.program import load, options, positive, run

if TYPE_CHECKING:
    from mmdlm import Pipeline
    from mmdlm.sweep import Point

T = TypeVar("T")
FIGURES = ("steps", "guidance", "joint")


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.add_argument(
        "--out", type=Path, default=Path("out/curves"), help="folder for curves.json and .html"
    )
    parser.add_argument("--num", type=positive, default=200, help="held-out scenes a point (default: 200)")
    parser.add_argument(
        "--kinds", default="one,two,three,groups", help="kinds of scene in equal parts (default: all four)"
    )
    parser.add_argument("--only", type=figures, default=FIGURES, help=f"some of {','.join(FIGURES)}")
    parser.add_argument("--steps", type=several(positive), help="numbers of steps (default: 2,4,8,16,32,64)")
    parser.add_argument("--scales", type=several(float), help="guidance scales (default: 0,0.5,1,2,3)")
    parser.add_argument("--forwards", type=several(positive), help="forwards a pair (default: 8,16,32,64)")
    given = parser.parse_args(arguments)
    pipe = load(given)
    from mmdlm.figures import show_curves
    from mmdlm.report import Page
    from mmdlm.sweep import Paper, sweep, take_up

    paper = Paper(num=given.num, kinds=tuple(given.kinds.split(",")), seed=given.seed)
    path = given.out / "curves.json"
    curves = take_up(path, pipe, paper)
    points = [point for point in plan(pipe, given) if not curves.holds(point)]
    given.out.mkdir(parents=True, exist_ok=True)
    began, whole, paid = time.perf_counter(), sum(point.cost for point in points), 0
    for number, (point, done) in enumerate(zip(points, sweep(pipe, points, curves, path), strict=True), 1):
        curves, paid = curves.plus(done), paid + point.cost
        low, high = done.rate.interval
        left = (time.perf_counter() - began) * (whole / paid - 1) / 60
        print(
            f"{number:>4}/{len(points)}  {done.figure:<8}  {done.task:<13}  {done.line:<33}  {done.x:>4g}  "
            f"{done.rate.share:.3f} [{low:.3f}, {high:.3f}]  {done.spent:5.1f} forwards  "
            f"{done.seconds:6.1f} s  {left:5.1f} min left",
            flush=True,
        )
    page = Page("mmdlm: exactness against forwards, guidance and order")
    show_curves(page, curves)
    page.save(given.out / "curves.html")
    print(path)
    print(given.out / "curves.html")


def plan(pipe: Pipeline, given: argparse.Namespace) -> list[Point]:
    """The points that the command line asks for."""
    from mmdlm.sweep import FORWARDS, SCALES, STEPS, guidance_points, joint_points, steps_points

    points = {
        "steps": lambda: steps_points(pipe, given.steps or STEPS),
        "guidance": lambda: guidance_points(pipe, given.scales or SCALES),
        "joint": lambda: joint_points(pipe, given.forwards or FORWARDS),
    }
    return [point for figure in given.only for point in points[figure]()]


def several(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Values with commas between them, for argparse."""

    def values(text: str) -> tuple[T, ...]:
        return tuple(kind(part) for part in text.split(","))

    values.__name__ = "list"
    return values


def figures(text: str) -> tuple[str, ...]:
    """Names of figures with commas between them, for argparse."""
    names = tuple(text.split(","))
    if not set(names) <= set(FIGURES):
        raise argparse.ArgumentTypeError(f"wanted some of {','.join(FIGURES)}, got {text}")
    return names


if __name__ == "__main__":
    run(main)
