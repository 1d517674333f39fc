"""Score a scenes model exactly on held-out scenes: `python infer/score.py --num 1000 --seeds 3 --json`.

Every task is sat once a seed: --seed, --seed + 1, ... A seed chooses other scenes, captions and questions and
other noise of the sampler. Printed are the mean over the seeds, Wilson's 95 % interval over all trials, and
the worst seed, for all scenes and for each kind:

  text_to_image  the picture of a held-out caption is exactly what it says, as the exact reader sees it
  caption        the caption of a held-out picture parses and is exactly true
  answer         the answer to a question is the right word
  inpaint        the picture whose first object was cut out and drawn anew is exactly what its caption says;
                 codes outside the hole come back untouched
  joint          caption and picture dreamt together agree; different captions a seed; the total variation of
                 each marginal from the law of training, its bootstrap interval, and what chance alone gives
  likelihood     what a caption costs given its picture, in nats: the model's bound (NELBO, every `end` behind
                 the caption counted), and the exact price and entropy of the generator

Beside it --unseen scenes of each kind that hold a (colour, shape) never shown in training are scored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmdlm.program import load, options, positive, run

if TYPE_CHECKING:
    from mmdlm import Pipeline
    from mmdlm.law import Mixture

TASKS = "text_to_image,caption,answer,inpaint,joint,likelihood"


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    add = parser.add_argument
    add("--num", type=positive, default=1000, help="scenes of each kind, and pairs (default: 1000)")
    add("--kinds", default="one,two,groups,three", help="of one, two, three, groups (default: all)")
    add("--seeds", type=positive, default=3, help="how many seeds, from --seed on (default: 3)")
    add("--tasks", default=TASKS, help=f"of {TASKS.replace(',', ', ')} (default: all)")
    add("--split", default="held_out", help="held_out, train, or unseen: never-seen colour and shape")
    add("--law", help="weights of one,two,three,groups that pairs are held against (default: as trained)")
    add("--draws", type=positive, default=16, help="noise draws of the bound of a caption (default: 16)")
    add("--unseen", type=int, default=200, help="scenes of each kind with a never-seen pair (default: 200)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    given = parser.parse_args(arguments)
    pipe = load(given)
    from mmdlm.data import Split
    from mmdlm.evaluate import Exam
    from mmdlm.exam import whole_exam

    splits = {split.value: split for split in Split}
    if given.split not in splits:
        raise ValueError(f"--split {given.split}: wanted one of {', '.join(splits)}")
    if given.unseen < 0:
        raise ValueError(f"--unseen {given.unseen}: wanted 0 or more")
    kinds, tasks = tuple(given.kinds.split(",")), given.tasks.split(",")
    first = Exam(kinds=kinds, num=given.num, seed=given.seed, split=splits[given.split])
    exams = [replace(first, seed=given.seed + number) for number in range(given.seeds)]
    scores = whole_exam(
        pipe,
        exams,
        unseen=given.unseen,
        mixture=law_of(pipe, kinds, given.law),
        tasks=tasks,
        draws=given.draws,
        progress=not given.json,
    )
    print(json.dumps(scores) if given.json else "\n".join(lines(scores, given.unseen)))


def law_of(pipe: Pipeline, kinds: Sequence[str], law: str | None) -> Mixture:
    """What --law says, or else the model's own word on its training, or else equal shares of the kinds."""
    from mmdlm.evaluate import trained_on
    from mmdlm.law import as_mixture

    if law is None:
        return trained_on(pipe, kinds)
    try:
        return as_mixture(law.split(","))
    except ValueError as error:
        raise ValueError(f"--law {law}: {error}") from error


def lines(scores: dict[str, Any], unseen: int) -> Iterator[str]:
    """The table."""
    exam = scores["exam"]
    seeds = ", ".join(map(str, exam["seeds"]))
    yield f"{exam['num']} {exam['split']} scenes of each kind, seeds {seeds}; model {exam['model']}"
    yield from shares(scores)
    if "untouched" in scores.get("inpaint", {}):
        kept = scores["inpaint"]["untouched"]
        yield f"inpaint: all codes outside the hole untouched in {kept['right']} of {kept['num']} pictures"
    if "joint" in scores:
        yield from pairs(scores["joint"], exam["num"])
    if "likelihood" in scores:
        yield from prices(scores["likelihood"])
    if "unseen" in scores:
        yield f"\nnever-seen (colour, shape) pairs, {unseen} scenes of each kind"
        yield from shares(scores["unseen"])
    parts = [(task, score) for task, score in scores.items() if "forwards" in score]
    yield "\nseconds: " + ", ".join(f"{task} {score['seconds']}" for task, score in parts)


def shares(scores: dict[str, Any]) -> Iterator[str]:
    """What was right, task by task and kind by kind."""
    yield f"{'':<22}{'mean':>6}  {'95 % interval':<16}{'of':>7}  worst seed"
    for task, score in scores.items():
        name = "agree" if task == "joint" else "exact"
        if name not in score:
            continue
        rows = {f"{task} {name}": score, **{f"  {kind}": some for kind, some in score["by_kind"].items()}}
        for title, row in rows.items():
            low, high = row["interval"]
            worst = f"{row['worst']:.3f} (seed {row['worst_seed']})"
            yield f"{title:<22}{row[name]:>6.3f}  [{low:.3f}, {high:.3f}]  {row['num']:>7}  {worst}"


def pairs(score: dict[str, Any], num: int) -> Iterator[str]:
    """How various the pairs are, and how like the law of training."""
    yield f"joint: distinct captions {', '.join(map(str, score['distinct'].values()))} of {num} a seed"
    weights = ", ".join(f"{weight:g}" for weight in score["mixture"])
    yield f"\ntotal variation from the law (one, two, three, groups: {weights}), 95 % interval; by chance"
    for name, found in score["law"].items():
        low, high = found["interval"]
        chance = f"{found['chance']:.3f}, in 1 of 20 over {found['chance_high']:.3f}"
        yield f"  {name:<20}{found['value']:>6.3f}  [{low:.3f}, {high:.3f}]  {chance}"


def prices(score: dict[str, Any]) -> Iterator[str]:
    """What captions cost."""
    yield f"\nnats a caption given its picture; bound with {score['draws']} noise draws, +- standard error"
    yield f"{'':<12}{'bound':>7}{'':<10}{'generator':>10}{'entropy':>9}   bound - generator"
    for title, row in {"all": score, **score["by_kind"]}.items():
        noise, gap = (f"+- {row[name]}" if row[name] else "" for name in ("bound_error", "gap_error"))
        yield (
            f"  {title:<10}{row['bound']:>7.3f} {noise:<9}{row['generator']:>10.3f}{row['entropy']:>9.3f}"
            f"   {row['gap']:.3f} {gap}"
        )


if __name__ == "__main__":
    run(main)
