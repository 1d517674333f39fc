"""The card of a scenes model holds what was measured, and nothing that was not."""

from __future__ import annotations

import json

import pytest

from mmdlm.card import scenes_card, stage

SHARE = {"exact": 0.9312, "interval": [0.91, 0.95], "num": 100, "worst": 0.9, "worst_seed": 1}
SCORES = {
    "text_to_image": {**SHARE, "by_kind": {"one": {**SHARE, "exact": 0.987}}},
    "inpaint": {**SHARE, "by_kind": {"one": SHARE}, "untouched": {"right": 99, "num": 100}},
    "joint": {
        "agree": 0.5,
        "interval": [0.4, 0.6],
        "by_kind": {},
        "distinct": {"7": 88, "8": 91},
        "law": {"count": {"value": 0.1234, "interval": [0, 1], "chance": 0.0111, "chance_high": 0.1}},
    },
    "likelihood": {"bound": 4.25, "generator": 2.5, "entropy": 2.0, "by_kind": {}},
    "unseen": {"text_to_image": {**SHARE, "exact": 0.25, "by_kind": {}}},
    "exam": {"model": "x", "kinds": ["one", "three"], "num": 100, "seeds": [7, 8], "split": "held_out"},
}
HISTORY = [
    {"stage": "image tokenizer", "updates": 4500, "rows": 64, "minutes": 17.2},
    {"stage": "transformer", "updates": 9000, "rows": 32, "minutes": 70.1},
]


def test_every_figure_is_on_the_card():
    card = scenes_card({"transformer": "5 parameters"}, HISTORY, SCORES)
    for said in (
        "- transformer: 5 parameters",
        "| transformer | 9,000 | 32 | 70.1 |",
        "| in all | | | 87.3 |",
        "100 held-out scenes of each kind for each seed (7, 8)",
        "| picture of a caption, exact | 93.1 [91.0, 95.0] | 98.7 [91.0, 95.0] |  |",
        "in 99 of 100 pictures",
        "from nothing: 88, 91.",
        "count 0.123 (0.011)",
        "| all | 4.25 | 2.50 | 2.00 |",
        "| picture of a caption, exact | 25.0 [91.0, 95.0] |  |  |",
    ):
        assert said in card, said


def test_what_was_not_asked_is_not_told():
    some = {name: SCORES[name] for name in ("text_to_image", "exam")}
    card = scenes_card({}, [], some)
    for word in ("Inpainting", "Different captions", "nats", "never showed:"):
        assert word not in card


def test_a_run_tells_its_updates_and_its_clock(tmp_path):
    records = [
        {"step": 50, "seconds": 12.0},
        {"step": 100, "seconds": 90.0},
        {"step": 100, "validation/x": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert stage(tmp_path, "transformer", 8) == {
        "stage": "transformer",
        "updates": 100,
        "rows": 8,
        "minutes": 1.5,
    }
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no record with seconds"):
        stage(tmp_path, "transformer", 8)
