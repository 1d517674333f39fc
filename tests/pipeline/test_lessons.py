"""Lessons: which rows they make, and which of them are taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmdlm import Pipeline
from mmdlm.canvas import IMAGE, TEXT
from mmdlm.data import Scenes, Split
from mmdlm.evaluate import KINDS
from mmdlm.lessons import LESSONS, Lesson, Rows, course, favoured
from tokenizers_mm import to_tensor


@pytest.fixture(scope="module")
def scenes_pipe() -> Pipeline:
    return Pipeline.from_pretrained("scenes")


@pytest.fixture
def source() -> Scenes:
    return Scenes(seed=3, split=Split.TRAIN)


def test_a_lesson_makes_its_sorts_of_rows(scenes_pipe, source) -> None:
    lesson = Lesson(share=1.0, rows=(1, 2, 3, 2), around=0.0)
    canvas = Rows(scenes_pipe, source, lesson)(list(range(8)), np.random.default_rng(0))
    text = (canvas.fillable & (canvas.modality == TEXT)).sum(dim=1)
    image = (canvas.fillable & (canvas.modality == IMAGE)).sum(dim=1)
    assert canvas.shape[0] == 8
    assert not canvas.masked.any()
    assert (image[1:3] == 0).all()
    assert (text[1:3] > 0).all()  # captions of given pictures
    assert (text[3:6] == 0).all()
    assert ((image[3:6] > 0) & (image[3:6] <= 64)).all()  # holes
    assert (image[6:] == 64).all()
    assert (text[6:] > 0).all()  # whole pairs


def test_around_leaves_what_is_named_first(scenes_pipe, source) -> None:
    two = replace(source, mixture=(0, 1, 0, 0))
    lesson = Lesson(share=1.0, rows=(0, 0, 1, 0), around=1.0, told=True)
    canvas = Rows(scenes_pipe, two, lesson)(list(range(16)), np.random.default_rng(0))
    image = (canvas.fillable & (canvas.modality == IMAGE)).sum(dim=1)
    assert set(image.tolist()) <= {64, 64 - 4, 64 - 9}  # none stays, or a small object, or a large one
    assert len(set(image.tolist())) > 1
    again = Rows(scenes_pipe, two, lesson)(list(range(16)), np.random.default_rng(0))
    assert torch.equal(again.fillable, canvas.fillable)


def test_directions_and_the_codes_of_objects_are_favoured(scenes_pipe, source) -> None:
    factors = favoured(scenes_pipe, source, 4.0, count=100)
    vocab = scenes_pipe.layout.vocab
    words = [scenes_pipe.text_tokenizer.decode([token]) for token in (factors[vocab.text] == 4).nonzero()]
    assert sorted(words) == ["above", "below", "left", "right"]
    blank = replace(source.scene(0), objects=())
    codes = scenes_pipe.image_tokenizer.encode(to_tensor([source.image(blank)])) + vocab.image.start
    assert (factors[codes] == 1).all()
    assert (factors[vocab.image] == 4).sum() >= vocab.num_codes - 8 * 8


def test_captions_that_are_asked_have_no_holes_but_their_directions(scenes_pipe, source) -> None:
    two = replace(source, mixture=(0, 1, 0, 0))
    lesson = Lesson(share=1.0, rows=(0, 1, 0, 0), asked=1.0)
    canvas = Rows(scenes_pipe, two, lesson)(list(range(16)), np.random.default_rng(0))
    asked = [scenes_pipe.text_tokenizer.decode([token]) for token in canvas.tokens[canvas.fillable].tolist()]
    assert len(asked) == 16
    assert set(asked) == {"left", "right", "above", "below"}
    ones = Rows(scenes_pipe, replace(source, mixture=(1, 0, 0, 0)), lesson)  # these have no directions
    assert (ones(list(range(4)), np.random.default_rng(0)).fillable.sum(dim=1) == 22).all()


def test_a_caption_that_is_begun_is_open_behind_its_beginning(scenes_pipe, source) -> None:
    lesson = Lesson(share=1.0, rows=(0, 1, 0, 1), begun=1.0)
    canvas = Rows(scenes_pipe, source, lesson)(list(range(32)), np.random.default_rng(0))
    opened = (canvas.fillable & (canvas.span == 0))[:, 1:23].long()
    assert (opened.diff(dim=1) >= 0).all()  # closed, then open to the end
    begun = 22 - opened.sum(dim=1)
    assert len(set(begun[:16].tolist())) > 5
    assert len(set(begun[16:].tolist())) > 5
    ends = (canvas.tokens[:, 1:23] == scenes_pipe.layout.vocab.specials["end"]).sum(dim=1)
    assert (begun <= 22 - ends).all()  # at least what closes the caption is open


def test_a_course_leaves_out_lessons_without_a_scene() -> None:
    assert list(course(tuple(LESSONS), KINDS)) == list(LESSONS)
    plan = course(tuple(LESSONS), ("one", "groups"))
    assert list(plan) == ["words", "captions", "subjects", "sentences", "all"]
    assert plan["words"].mixture == (1.0, 0.0, 0.0, 3.0)
    with pytest.raises(ValueError, match="no lessons spelling: there are words, relations"):
        course(("words", "spelling"), KINDS)
