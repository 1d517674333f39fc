"""Score a scenes model exactly on held-out scenes: `python infer/score.py --num 1000 --json`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mmdlm.program import load, options, positive, run

TASKS = (
    ("text_to_image", "exact"),
    ("caption", "exact"),
    ("answer", "exact"),
    ("inpaint", "exact"),
    ("joint", "agree"),
)


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.add_argument(
        "--num", type=positive, default=1000, help="held-out scenes of each kind (default: 1000)"
    )
    parser.add_argument(
        "--kinds", default="one", help="of one, two, three, groups; with commas (default: one)"
    )
    parser.add_argument(
        "--split", default="held_out", help="held_out, train, or unseen: never-seen colour and shape"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = parser.parse_args(arguments)
    pipe = load(given)
    from mmdlm.data import Split
    from mmdlm.evaluate import Exam, take

    splits = {split.value: split for split in Split}
    if given.split not in splits:
        raise ValueError(f"--split {given.split}: wanted one of {', '.join(splits)}")
    exam = Exam(
        kinds=tuple(given.kinds.split(",")), num=given.num, seed=given.seed, split=splits[given.split]
    )
    scores = take(pipe, exam, progress=not given.json)
    if given.json:
        print(json.dumps(scores))
        return
    for task, name in TASKS:
        score = scores[task]
        low, high = score["interval"]
        print(f"{task:<14} {name} {score[name]:.3f}  [{low:.3f}, {high:.3f}]  of {score['num']}")
    print(f"joint          distinct {scores['joint']['distinct']}, law {scores['joint']['law']}")
    print(f"{scores['seconds']} s, forwards {scores['forwards']}")


if __name__ == "__main__":
    run(main)
