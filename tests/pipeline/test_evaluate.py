"""The exam: its scenes are held out, its marks are right, its intervals and laws are the known ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmdlm.data import Scene, Split, agree, captions, read_caption, read_images, split_of
from mmdlm.evaluate import (
    KINDS,
    Exam,
    Rate,
    judge_pairs,
    object_mask,
    read_pictures,
    summary,
    take,
    trained_on,
    world,
)
from mmdlm.output import Output

# Another colour for each, so that no description stays the same.
TWINS = (("red", "blue"), ("green", "pink"), ("yellow", "purple"), ("orange", "cyan"))
SWAP = {one: other for pair in TWINS for one, other in (pair, pair[::-1])}
TASKS = ("text_to_image", "caption", "answer", "inpaint")


def swapped(scene: Scene) -> Scene:
    return replace(scene, objects=tuple(replace(o, colour=SWAP[o.colour]) for o in scene.objects))


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(world(KINDS).image(scene))


class Knowing:
    """Answers an exam with the truth, or with the truth about the scene in other colours."""

    def __init__(self, exam: Exam, *, lies: bool) -> None:
        self.questions = exam.questions()
        self.source = world(exam.kinds, seed=11)
        self.lies = lies
        self.training: dict = {}

    def told(self, scene: Scene) -> Scene:
        return swapped(scene) if self.lies else scene

    def text_to_image(self, prompts, *, seed, progress) -> Output:
        assert prompts == [q.caption for q in self.questions]
        return Output(images=tuple(picture(self.told(q.scene)) for q in self.questions), forwards=1)

    def caption(self, images, *, seed, progress) -> Output:
        assert [i.tobytes() for i in images] == [q.picture.tobytes() for q in self.questions]
        return Output(texts=tuple(captions(self.told(q.scene).description)[0] for q in self.questions))

    def answer(self, images, questions, *, seed, progress) -> Output:
        return Output(texts=tuple("" if self.lies else q.answer for q in self.questions))

    def inpaint(self, images, masks, prompts, *, seed, progress) -> Output:
        for image, mask, question in zip(images, masks, self.questions, strict=True):
            box = question.scene.box(0)
            assert mask.size == image.size
            assert mask.getbbox() == (box[1], box[0], box[3], box[2])
        return self.text_to_image(prompts, seed=seed, progress=progress)

    def joint(self, *, num_samples, seed, progress) -> Output:
        scenes = [self.source.scene(index) for index in range(num_samples)]
        texts = tuple(self.source.caption(scene, index) for index, scene in enumerate(scenes))
        return Output(texts=texts, images=tuple(picture(self.told(scene)) for scene in scenes), forwards=2)


# rates


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # the first four: R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
        (0, 0, 0.0, 1.0),
    ],
)
def test_intervals_are_wilsons(right, total, low, high):
    assert Rate(right, total).interval == pytest.approx((low, high), abs=5e-5)


def test_a_summary_counts_all_and_by_kind():
    marks = [True, True, False, True, False, False]
    score = summary("exact", marks, ["one", "one", "one", "two", "two", "two"])
    assert (score["exact"], score["num"]) == (0.5, 6)
    kinds = {kind: (rate["exact"], rate["num"]) for kind, rate in score["by_kind"].items()}
    assert kinds == {"one": (0.6667, 3), "two": (0.3333, 3)}
    assert score["interval"] == [round(end, 4) for end in Rate(3, 6).interval]


# the exam


def test_an_exam_is_the_same_each_time_and_held_out():
    exam = Exam(kinds=("one", "groups", "three"), num=12, seed=4)
    questions = exam.questions()
    again = Exam(kinds=("one", "groups", "three"), num=12, seed=4).questions()
    assert [(q.scene, q.caption, q.question, q.answer, q.picture.tobytes()) for q in questions] == [
        (q.scene, q.caption, q.question, q.answer, q.picture.tobytes()) for q in again
    ]
    assert [q.kind for q in questions] == ["one"] * 12 + ["groups"] * 12 + ["three"] * 12
    assert {split_of(q.scene) for q in questions} == {Split.HELD_OUT}
    assert [len(q.scene.objects) for q in questions[:12]] == [1] * 12
    assert all(q.scene.is_group for q in questions[12:24])
    assert questions[0].scene != Exam(num=1, seed=5).questions()[0].scene
    for q in questions:
        assert agree(read_caption(q.caption), q.scene)


@pytest.mark.parametrize("split", list(Split))
def test_an_exam_of_another_split_stays_in_it(split):
    assert {split_of(q.scene) for q in Exam(num=3, split=split).questions()} == {split}


@pytest.mark.parametrize(("changes", "message"), [
    ({"kinds": ("one", "five")}, r"unknown kinds of scene \['five'\]; they are one, two, three, groups"),
    ({"kinds": ()}, "unknown kinds"),
    ({"num": 0}, "at least one scene a kind, got num = 0"),
])  # fmt: skip
def test_an_exam_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Exam(**changes)


def test_the_truth_has_full_marks_and_other_colours_none(small_law):
    exam = Exam(kinds=("one", "two"), num=5, seed=2)
    for lies, share in ((False, 1.0), (True, 0.0)):
        scores = take(Knowing(exam, lies=lies), exam, progress=False)
        for task in TASKS:
            assert scores[task]["exact"] == share, task
            assert scores[task]["num"] == 10
            assert {kind: rate["exact"] for kind, rate in scores[task]["by_kind"].items()} == {
                "one": share,
                "two": share,
            }
        assert scores["joint"]["agree"] == share
        assert scores["joint"]["num"] == 5
    assert scores["exam"] == {"kinds": ["one", "two"], "num": 5, "seed": 2, "split": "held_out"}
    assert scores["forwards"] == {"text_to_image": 1, "caption": 0, "answer": 0, "joint": 2, "inpaint": 1}


def test_the_mask_of_an_object_is_its_box():
    scene = world(("two",)).scene(3)
    top, left, bottom, right = scene.box(0)
    mask = np.asarray(object_mask(scene))
    assert (mask[top:bottom, left:right] == 255).all()
    assert (mask > 0).sum() == (bottom - top) * (right - left)


def test_pictures_are_read_as_the_reader_does():
    scenes = [world(KINDS).scene(index) for index in range(3)]
    seen = read_pictures([picture(scene) for scene in scenes])
    assert seen == read_images(np.stack([np.asarray(picture(scene)) for scene in scenes]))
    assert [agree(scene.description, found) for scene, found in zip(scenes, seen, strict=True)] == [True] * 3


# pairs


def pairs(kinds: tuple[str, ...], num: int, seed: int = 21) -> Output:
    source = world(kinds, seed=seed)
    texts = [source.caption(source.scene(index), index) for index in range(num)]
    return Output(texts=tuple(texts), images=(Image.new("RGB", (64, 64)),) * num)


def test_captions_drawn_from_the_law_follow_it(small_law):
    score = judge_pairs(pairs(("one", "two"), 300), (1.0, 1.0, 0.0, 0.0))
    assert set(score["law"]) == {"count", "shape", "colour", "size", "relation", "background"}
    assert max(score["law"].values()) < 0.15  # two samples, of 300 and 1500, of a law of at most eight values
    assert score["agree"] == 0.0
    assert score["distinct"] == len(set(pairs(("one", "two"), 300).texts)) > 100


def test_captions_of_another_law_do_not_follow_it(small_law):
    law = judge_pairs(pairs(("two",), 200), (1.0, 0.0, 0.0, 0.0))["law"]
    assert law["count"] == 1.0
    assert law["relation"] == 1.0
    assert law["background"] < 0.15


def test_captions_that_say_nothing_count_as_such(small_law):
    nonsense = Output(texts=("a red", "x"), images=(Image.new("RGB", (64, 64)),) * 2)
    score = judge_pairs(nonsense, (1.0, 0.0, 0.0, 0.0))
    assert set(score["law"].values()) == {1.0}
    assert (score["agree"], score["distinct"]) == (0.0, 2)


def test_pairs_are_held_against_the_law_of_training(small_law, tiny):
    mixture = (1.0, 0.0, 0.0, 3.0)
    law = judge_pairs(pairs(("two",), 50), mixture)["law"]
    assert law["relation"] == 1.0
    exam = Exam(kinds=("one", "two"), num=2)
    model = Knowing(exam, lies=False)
    fair = take(model, exam, progress=False)["joint"]["law"]["relation"]
    model.training = {"mixture": list(mixture)}
    assert take(model, exam, progress=False)["joint"]["law"]["relation"] != fair
    assert trained_on(model, exam.kinds) == mixture
    assert trained_on(tiny, exam.kinds) == world(exam.kinds).mixture


@pytest.mark.parametrize(
    "mixture", [3, "much", [0.5, 0.5], [1, 0, 0, -1], [0, 0, 0, 0], [1, 0, 0, float("nan")]]
)
def test_a_law_of_training_that_is_none_is_refused(mixture):
    model = Knowing(Exam(num=1), lies=False)
    model.training = {"mixture": mixture}
    with pytest.raises(ValueError, match="says it was trained on"):
        trained_on(model, KINDS)
