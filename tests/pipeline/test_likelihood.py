"""Scores of pairs: bounds on their log-likelihood."""

from __future__ import annotations

import math

import pytest


def test_scores_are_those_of_an_even_model(kit):
    vocab, layout = kit.pipe.layout.vocab, kit.pipe.layout
    score = kit.even().score(kit.pictures[:2], kit.prompts[:2], draws=5, progress=False)
    text = -layout.caption * math.log(vocab.num_text + 1)
    image = -16 * math.log(vocab.num_codes)
    for name, nats in {
        "joint": text + image,
        "text_given_image": text,
        "image_given_text": image,
        "text": text,
        "image": image,
    }.items():
        # the joint bound is even only on average: a draw masks as many texts as codes only roughly
        wanted = pytest.approx([nats] * 2, abs=5 * max(score.error[name]) + 1e-3)
        assert list(getattr(score, name)) == wanted, name
    assert score.error["text"] == pytest.approx((0.0, 0.0), abs=1e-3)
    assert score.pmi == pytest.approx((0.0, 0.0), abs=5 * max(score.error["joint"]) + 1e-3)


def test_scores_follow_the_seed_and_the_pairs(kit):
    pipe = kit.pipe
    pictures, prompts = kit.pictures[:2], kit.prompts[:2]
    first, again = (pipe.score(pictures, prompts, draws=4, seed=1, progress=False) for _ in range(2))
    assert first == again
    assert first.joint != pipe.score(pictures, prompts, draws=4, seed=2, progress=False).joint
    sides = zip(first.joint, first.text, first.image, strict=True)
    assert first.pmi == pytest.approx([joint - text - image for joint, text, image in sides])
    assert set(first.error) == {"joint", "text_given_image", "image_given_text", "text", "image"}
    for name, errors in first.error.items():
        values = getattr(first, name)
        assert len(values) == len(errors) == 2
        assert all(value < 0 and math.isfinite(value) for value in values)


def test_scores_of_many_pairs_are_taken_in_batches(kit, capsys):
    one = kit.like(batch_size=1)
    pictures, prompts = kit.pictures[:2], kit.prompts[:2]
    alone = [one.score(p, t, draws=4, progress=False) for p, t in zip(pictures, prompts, strict=True)]
    both = one.score(pictures, prompts, draws=4, progress=False)
    assert both.joint == (*alone[0].joint, *alone[1].joint)
    assert both.error["image"] == (*alone[0].error["image"], *alone[1].error["image"])
    assert capsys.readouterr() == ("", "")


def test_a_model_that_knows_the_caption_gives_it_probability_one(kit):
    layout, encode = kit.pipe.layout, kit.pipe.text_tokenizer.encode
    end = layout.vocab.specials["end"]
    ids = encode(kit.prompts[0])
    whole = [*ids, *([end] * (layout.caption - len(ids)))]
    pipe = kit.saying(whole, layout.pair_frame.places[0].start, layout.pair_frame.length)
    right, wrong = (pipe.score(kit.pictures[0], text, draws=2, progress=False) for text in kit.prompts[:2])
    assert right.text_given_image == pytest.approx((0.0,), abs=1e-3)
    assert right.text == pytest.approx((0.0,), abs=1e-3)
    assert wrong.text[0] < -100
