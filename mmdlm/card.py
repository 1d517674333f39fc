"""The model card of a scenes model, written from what was measured. Knows no pipeline and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["scenes_card", "stage"]

_NAMES = {
    "text_to_image": "picture of a caption, exact",
    "caption": "caption of a picture, exact",
    "answer": "answer to a question, right",
    "inpaint": "one object drawn anew, exact",
    "joint": "picture and caption from nothing, agree",
}


def stage(folder: Path, name: str, rows: int) -> dict[str, Any]:
    """What a finished run in `folder` says of itself: updates, rows an update, minutes of its own clock."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timed = [record for record in map(json.loads, lines) if "seconds" in record]
    if not timed:
        raise ValueError(f"{folder / 'metrics.jsonl'} holds no record with seconds")
    last = timed[-1]
    return {"stage": name, "updates": last["step"], "rows": rows, "minutes": round(last["seconds"] / 60, 1)}


def scenes_card(
    facts: Mapping[str, str], history: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]
) -> str:
    """Markdown. `history` as `stage` gives it, `scores` as `infer/score.py --json` prints them."""
    return "\n".join([*_head(facts), *_history(history), *_scores(scores), *_LIMITS, ""])


_LIMITS = (
    "## Limits",
    "",
    "It knows nothing but these scenes and the grammar of their captions. Held-out scenes are combinations",
    "of attributes that training never showed; their words, colours and shapes it did show, all but three",
    "(colour, shape) pairs, which are scored apart.",
)


def _head(facts: Mapping[str, str]) -> Iterator[str]:
    yield "# scenes"
    yield ""
    yield "A masked-diffusion transformer over captions and 64 x 64 pictures of simple scenes, with its"
    yield "tokenizers. Trained from nothing by `train/recipes/scenes.py` on what `mmdlm.data.Scenes` draws:"
    yield "no outside data."
    yield ""
    for name, value in facts.items():
        yield f"- {name}: {value}"
    yield ""


def _history(history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Training"
    yield ""
    yield "| stage | updates | rows an update | minutes |"
    yield "| --- | --- | --- | --- |"
    for entry in history:
        yield f"| {entry['stage']} | {entry['updates']:,} | {entry['rows']} | {entry['minutes']} |"
    yield f"| in all | | | {round(sum(entry['minutes'] for entry in history), 1)} |"
    yield ""
    for entry in history:
        if "note" in entry:
            yield f"Of the stage {entry['stage']}: {entry['note']}"
            yield ""


def _scores(scores: Mapping[str, Any]) -> Iterator[str]:
    exam = scores["exam"]
    seeds = ", ".join(map(str, exam["seeds"]))
    yield "## Scores"
    yield ""
    yield f"{exam['num']} {exam['split'].replace('_', '-')} scenes of each kind for each seed ({seeds}),"
    yield "default settings; means in per cent, with 95 % intervals over all trials (`infer/score.py`)."
    yield ""
    yield from _table(scores, exam["kinds"])
    if "untouched" in scores.get("inpaint", {}):
        kept = scores["inpaint"]["untouched"]
        yield f"Inpainting left all given codes untouched in {kept['right']} of {kept['num']} pictures."
        yield ""
    if "joint" in scores:
        yield from _law(scores["joint"], exam["num"])
    if "likelihood" in scores:
        yield from _prices(scores["likelihood"])
    if "unseen" in scores:
        yield "Scenes with a (colour, shape) pair that training never showed:"
        yield ""
        yield from _table(scores["unseen"], exam["kinds"])


def _table(scores: Mapping[str, Any], kinds: Sequence[str]) -> Iterator[str]:
    yield f"| | all | {' | '.join(kinds)} |"
    yield f"| --- | --- |{' --- |' * len(kinds)}"
    for task, name in _NAMES.items():
        if task in scores:
            score, key = scores[task], "agree" if task == "joint" else "exact"
            rows = [score, *(score["by_kind"].get(kind) for kind in kinds)]
            yield f"| {name} | {' | '.join(_share(row, key) for row in rows)} |"
    yield ""


def _share(row: Mapping[str, Any] | None, key: str) -> str:
    if row is None:
        return ""
    low, high = row["interval"]
    return f"{100 * row[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _law(score: Mapping[str, Any], num: int) -> Iterator[str]:
    distinct = ", ".join(map(str, score["distinct"].values()))
    yield f"Different captions among {num} pairs from nothing: {distinct}. Total variation of what they tell"
    yield "from the law of training (in brackets: of as many captions of that law itself, by chance):"
    yield ""
    law = score["law"].items()
    yield "; ".join(f"{name} {found['value']:.3f} ({found['chance']:.3f})" for name, found in law)
    yield ""


def _prices(score: Mapping[str, Any]) -> Iterator[str]:
    yield "Captions given their pictures, in nats a caption: the model's bound, the exact price under the"
    yield "generator, and the generator's entropy:"
    yield ""
    yield "| | bound | generator | entropy |"
    yield "| --- | --- | --- | --- |"
    for kind, row in {"all": score, **score["by_kind"]}.items():
        yield f"| {kind} | {row['bound']:.2f} | {row['generator']:.2f} | {row['entropy']:.2f} |"
    yield ""
