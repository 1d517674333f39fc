"""The exam over seeds: what is pooled and what is averaged, what a caption costs, what does not fit."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt

import pytest
import torch

from mmdlm import Pipeline, exam
from mmdlm.data import Split
from mmdlm.evaluate import Exam, Rate, Task, take
from mmdlm.exam import EVERY_TASK, Price, Trial, Watched, averages, examine, prices, spread

FAIR = (1.0, 1.0, 1.0, 1.0)


# sums


def test_seeds_are_averaged_and_trials_are_pooled():
    marks = {3: [True, True, False, False], 4: [True], 5: [False, True, False, False]}
    score = spread("exact", [Trial(seed, "one", mark) for seed, some in marks.items() for mark in some])
    assert score["exact"] == round((0.5 + 1 + 0.25) / 3, 4)
    assert score["interval"] == [round(end, 4) for end in Rate(4, 9).interval]
    assert (score["num"], score["worst"], score["worst_seed"]) == (9, 0.25, 5)
    assert score["by_seed"] == {"3": 0.5, "4": 1.0, "5": 0.25}


def test_prices_are_averaged_with_their_errors():
    some = [Price("one", 3.0, 0.3, 1.0, 1.5), Price("two", 6.0, 0.4, 2.0, 1.5)]
    assert averages(some) == {
        "bound": 4.5,
        "generator": 1.5,
        "entropy": 1.5,
        "gap": 3.0,
        "bound_error": 0.25,
        "gap_error": 1.0,
        "num": 2,
    }
    alone = averages([Price("one", 3.0, float("inf"), 1.0, 1.5)])
    assert (alone["bound_error"], alone["gap_error"]) == (None, None)


# the exam


def test_all_that_is_asked_is_there_for_each_seed(tiny, small_law, monkeypatch):
    def only_one(task: Task) -> Task:
        return replace(task, mark=lambda questions, output: [q.kind == "one" for q in questions])

    monkeypatch.setattr(exam, "TASKS", {name: only_one(task) for name, task in exam.TASKS.items()})
    exams = [Exam(kinds=("one", "three"), num=3, seed=seed) for seed in (4, 5)]
    scores = examine(tiny, exams, mixture=FAIR, draws=3, progress=False)
    assert tuple(scores) == EVERY_TASK
    for task in exam.TASKS:
        assert (scores[task]["exact"], scores[task]["num"]) == (0.5, 12)
        kinds = scores[task]["by_kind"]
        assert {kind: (row["exact"], row["num"]) for kind, row in kinds.items()} == {
            "one": (1.0, 6),
            "three": (0.0, 6),
        }
        assert list(scores[task]["by_seed"]) == ["4", "5"]
        assert scores[task]["forwards"] > 0
    assert scores["inpaint"]["untouched"] == {"right": 12, "num": 12}
    texts = [tiny.joint(num_samples=3, seed=seed, progress=False).texts for seed in (4, 5)]
    assert scores["joint"]["distinct"] == {"4": len(set(texts[0])), "5": len(set(texts[1]))}
    assert scores["joint"]["num"] == 6
    assert set(scores["joint"]["law"]["count"]) == {"value", "interval", "chance", "chance_high"}
    assert scores["joint"]["mixture"] == [0.25] * 4
    assert scores["likelihood"]["num"] == 12
    assert scores["likelihood"]["draws"] == 3
    assert scores["likelihood"]["by_kind"]["one"]["entropy"] == round(log(3), 4)


def test_one_seed_is_the_exam_that_is_taken(kit, small_law):
    """A model that answers every question with one word, so that some answers are right."""
    layout, encode = kit.pipe.layout, kit.pipe.text_tokenizer.encode
    word = [*encode("large"), *[layout.vocab.specials["end"]] * layout.answer][: layout.answer]
    frame = layout.question_frame
    length = max(frame.length, layout.pair_frame.length)
    pipe = kit.saying(word, frame.places[2].start, length)
    one = Exam(kinds=("one", "two"), num=8, seed=3)
    wanted = take(pipe, one, progress=False)["answer"]
    assert 0 < wanted["exact"] < 1
    found = examine(pipe, [one], mixture=FAIR, tasks=("answer",), progress=False)["answer"]
    assert {name: found[name] for name in ("exact", "interval", "num")} == {
        name: wanted[name] for name in ("exact", "interval", "num")
    }


def test_scenes_that_do_not_fit_are_refused_before_anything_is_asked(kit, tiny):
    pipe, model = kit.watched()
    short = Pipeline(
        transformer=model,
        text_tokenizer=pipe.text_tokenizer,
        image_tokenizer=pipe.image_tokenizer,
        layout=replace(pipe.layout, caption=14),
        settings=pipe.settings,
    )
    exams = [Exam(kinds=("one", "three"), num=2, seed=seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"kind 'three' do not fit this model: .* tokens long.*room for 13"):
        examine(short, exams, mixture=FAIR, tasks=("caption",), progress=False)
    assert model.calls == 0
    with pytest.raises(ValueError, match=r"unknown tasks \['dance'\]; they are text_to_image, "):
        examine(tiny, exams, mixture=FAIR, tasks=("caption", "dance"), progress=False)


# codes outside the hole


def test_a_code_that_changed_outside_the_hole_is_seen(tiny):
    watched = Watched(tiny.image_tokenizer)
    codes = torch.zeros(3, 4, 4, dtype=torch.long)
    holes = torch.zeros(3, 4, 4, dtype=torch.bool)
    holes[:, 1, 1] = True
    after = codes.clone()
    after[0, 1, 1] = 5  # inside
    after[2, 1, 2] = 5  # outside
    watched.encoded, watched.decoded = [codes[:2], codes[2:]], [after]
    assert watched.untouched(holes) == [True, True, False]


def test_a_watched_tokenizer_changes_nothing(kit):
    watched = Watched(kit.pipe.image_tokenizer)
    asked = (kit.pictures, kit.masks, list(kit.prompts))
    wanted = kit.pipe.inpaint(*asked, progress=False)
    found = watched.within(kit.pipe).inpaint(*asked, progress=False)
    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in wanted.images]
    assert len(watched.encoded) == len(watched.decoded) == 1
    assert not torch.equal(watched.encoded[0], watched.decoded[0])


# prices


def test_to_a_model_that_knows_nothing_every_token_costs_the_same(kit):
    one = Exam(kinds=("one", "three"), num=3, seed=1)
    pipe = kit.even()
    found = prices(pipe, one.questions(), one, draws=4, progress=False)
    room, words = pipe.layout.caption, len(range(*pipe.layout.vocab.text.indices(pipe.layout.vocab.size)))
    for price, q in zip(found, one.questions(), strict=True):
        assert price.kind == q.kind
        assert price.bound == pytest.approx(room * log(words), rel=1e-5)
        assert price.noise == pytest.approx(0.0, abs=1e-3 * price.bound)
    assert [price.generator for price in found[:3]] == pytest.approx([log(3)] * 3)
    assert min(price.entropy for price in found[3:]) > log(3)


def test_the_bound_is_that_of_the_pipelines_score(kit):
    one = Exam(kinds=("one",), num=3, seed=1, split=Split.TRAIN)
    questions, pipe = one.questions(), kit.like(batch_size=2)
    found = prices(pipe, questions, one, draws=12, progress=False)
    pictures, captions = [q.picture for q in questions], [q.caption for q in questions]
    score = pipe.score(pictures, captions, draws=12, seed=9, progress=False)
    for price, value, error in zip(
        found, score.text_given_image, score.error["text_given_image"], strict=True
    ):
        assert abs(price.bound + value) < 5 * sqrt(price.noise**2 + error**2)
    # the noise of the batches differs: rows 0 and 2 come first in theirs
    same = [questions[0]] * 4
    bounds = [price.bound for price in prices(pipe, same, one, draws=2, progress=False)]
    assert len(set(bounds)) == 4
