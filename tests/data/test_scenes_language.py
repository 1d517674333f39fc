"""Captions say all there is, the grammar reads them and nothing else, and questions have one exact answer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmdlm.data.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    NUMBERS,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    Description,
    Look,
    Object,
    Relation,
    Scene,
    agree,
)
from mmdlm.data.scene_language import caption, captions, num_captions, plural, read_caption
from mmdlm.data.scene_questions import EVERY_KIND, ask, how_many_objects, is_related, is_there
from mmdlm.data.scenes import Scenes

RED, BLUE, GREEN = (
    Look("small", "red", "circle"),
    Look("large", "blue", "square"),
    Look("small", "green", "star"),
)


def test_captions_of_one_object() -> None:
    assert captions(Description((RED,), "white")) == (
        "a small red circle on a white background",
        "a white background with a small red circle",
        "one small red circle on white",
    )


def test_captions_of_two_objects_and_of_groups() -> None:
    said = Description((RED, BLUE), "white", (Relation(0, "left of", 1),))
    assert len(captions(said)) == 6
    assert "a small red circle left of a large blue square on a white background" in captions(said)
    assert "one large blue square right of one small red circle on white" in captions(said)
    assert captions(Description((GREEN,) * 3, "black")) == (
        "three small green stars on a black background",
        "a black background with three small green stars",
        "three small green stars on black",
    )


def test_captions_of_three_objects() -> None:
    said = Description((RED, BLUE, GREEN), "grey", (Relation(0, "left of", 1), Relation(1, "above", 2)))
    texts = captions(said)
    assert len(texts) == 12
    assert "one small red circle left of one large blue square above one small green star on grey" in texts
    assert (
        "one large blue square above one small green star and right of one small red circle on grey" in texts
    )


def test_every_caption_reads_back_as_what_it_says() -> None:
    for scene in map(Scenes(seed=5).scene, range(300)):
        texts = captions(scene.description)
        assert len(set(texts)) == len(texts)
        for text in texts:
            said = read_caption(text)
            assert said is not None, text
            assert said.signature() == scene.signature()
            assert agree(said, scene)
            assert text == text.lower()
            assert len(text.split()) <= (9 if len(set(said.looks)) == 1 else 32)


def test_every_caption_names_everything() -> None:
    for scene in map(Scenes(seed=6).scene, range(200)):
        for text in captions(scene.description):
            words = text.replace("crosses", "cross").split()
            for thing in scene.objects:
                assert {thing.size, thing.colour} <= set(words)
                assert thing.shape in text
            assert scene.background in words
            assert sum(text.count(direction) for direction in DIRECTIONS) == len(scene.relations)
            if scene.is_group:
                assert NUMBERS[len(scene.objects)] in words


def test_a_change_of_any_word_changes_the_meaning_or_is_refused() -> None:
    words = [*SIZES, *COLOURS, *BACKGROUNDS, *SHAPES, *map(plural, SHAPES), *NUMBERS]
    words += ["left", "right", "of", "above", "below", "a", "on", "background", "with", "and", ""]
    for scene in map(Scenes(seed=7).scene, range(12)):
        for text in captions(scene.description)[:4]:
            parts = text.split()
            for place in range(len(parts)):
                for word in words:
                    changed = " ".join(parts[:place] + [word] * (word != "") + parts[place + 1 :])
                    said = read_caption(changed)
                    if said is not None and changed != text:
                        same = said.signature() == scene.signature()
                        assert not same or changed in captions(scene.description), changed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a small red circle",
        "a small red circle on a white background ",
        "A small red circle on a white background",
        "a small red circle  on a white background",
        "a small red circle on a white background\n",
        "a small red circle on a red background",
        "a small white circle on a white background",
        "a red small circle on a white background",
        "a red circle on a white background",
        "a small red circles on a white background",
        "one small red circle on a white background",
        "a small red circle on white",
        "five small red circles on white",
        "one small red circles on white",
        "three small red circle on white",
        "two small red circles left of a small blue star on white",
        "a small red circle a small blue star on a white background",
        "a small red circle and a small blue star on a white background",
        "a small red circle left a small blue star on a white background",
        "a small red circle left of a small red circle on a white background",
        "a small red circle left of a large red circle on a white background",
        "a small red circle left of one small blue star on a white background",
        "a white background with a small red circle on a white background",
        "a small red circle above a small blue star above a small green star above a small pink star on grey",
        "a small red circle above a small blue star and a small green star on a white background",
    ],
)
def test_the_grammar_refuses_everything_else(text: str) -> None:
    assert read_caption(text) is None


def test_chain_and_fork_differ() -> None:
    chain = read_caption(
        "one small red circle left of one large blue square above one small green star on grey"
    )
    fork = read_caption(
        "one small red circle left of one large blue square and above one small green star on grey"
    )
    assert chain is not None
    assert fork is not None
    assert chain.relations == (Relation(0, "left of", 1), Relation(1, "above", 2))
    assert fork.relations == (Relation(0, "left of", 1), Relation(0, "above", 2))


def test_there_are_more_than_a_million_captions() -> None:
    looks, pairs, frames, grounds = 96, 48, 3, 4
    two = looks * (looks - 2) * 4
    three = looks * (looks - 2) * (looks - 4) * 12
    assert pairs * 2 == looks
    assert num_captions() == (looks + two + three + 3 * looks) * frames * grounds
    assert num_captions() > 10**6
    source = Scenes(mixture=(0, 0, 1, 0))
    texts = {source.caption(source.scene(index), index) for index in range(1500)}
    assert len(texts) == 1500


def test_captions_are_drawn_evenly() -> None:
    said = Description((RED, BLUE), "white", (Relation(0, "left of", 1),))
    rng = np.random.default_rng(0)
    counts = Counter(caption(said, rng) for _ in range(1200))
    assert set(counts) == set(captions(said))
    assert min(counts.values()) > 140


def test_refuses_to_tell_what_is_no_scene() -> None:
    for said in (
        Description((), "white"),
        Description((RED,) * 5, "white"),
        Description((RED, RED._replace(size="large")), "white", (Relation(0, "above", 1),)),
        Description((RED, BLUE), "white"),
        Description((RED, BLUE, GREEN), "white", (Relation(0, "above", 1), Relation(0, "left of", 1))),
    ):
        with pytest.raises(ValueError, match=r"objects|caption"):
            captions(said)


def truth(scene: Scene, question: str) -> str:
    """The answer, worked out again from the words of the question."""
    words = question.rstrip("?").split()
    things = scene.objects
    if question.startswith("how many"):
        wanted = words[2]
        return NUMBERS[sum(wanted in ("objects", plural(thing.shape)) for thing in things)]
    if question.startswith("is there"):
        return "yes" if any([thing.colour, thing.shape] == words[3:] for thing in things) else "no"
    if question.startswith("is the"):
        (a,) = [index for index, thing in enumerate(things) if [thing.colour, thing.shape] == words[2:4]]
        (b,) = [index for index, thing in enumerate(things) if [thing.colour, thing.shape] == words[-2:]]
        direction = " ".join(words[4:-3])
        told, untold = scene.holds(Relation(a, direction, b)), scene.holds(Relation(b, direction, a))
        assert told != untold  # never a question that the picture leaves open
        return "yes" if told else "no"
    if words[-1] == "background":
        return scene.background
    named = {word for word in words[4:] if word not in ("object", "objects")}
    fitting = [
        thing for thing in things if named <= {thing.size, thing.colour, thing.shape, plural(thing.shape)}
    ]
    (answer,) = {getattr(thing, words[1]) for thing in fitting}
    assert scene.is_group or len(fitting) == 1
    return answer


def test_answers_are_exact_and_one_word() -> None:
    source = Scenes(seed=8)
    rng = np.random.default_rng(1)
    for scene in map(source.scene, range(250)):
        for _ in range(6):
            question, answer = ask(scene, rng)
            assert truth(scene, question) == answer, (scene, question)
            assert answer == answer.lower()
            assert " " not in answer


def test_questions_are_balanced() -> None:
    """Each kind as often as any other where it can be asked; yes and no evenly; no answer rules a kind."""
    source = Scenes(seed=9, mixture=(1, 0, 0, 0))
    asked = [source.question(source.scene(index), index) for index in range(1800)]
    kinds = Counter(" ".join(question.split()[:2]) for question, _ in asked)
    assert not any("how many objects" in question for question, _ in asked)  # it would always be one
    assert 240 < kinds["how many"] < 360
    assert 240 < kinds["is there"] < 360
    assert 240 < kinds["which size"] < 360
    assert 480 < kinds["which colour"] < 720  # of an object, of the background
    verdicts = Counter(answer for question, answer in asked if question.startswith("is there"))
    assert 0.4 < verdicts["yes"] / verdicts.total() < 0.6
    counts = Counter(answer for question, answer in asked if question.startswith("how many"))
    assert set(counts) == {"zero", "one"}
    assert 0.4 < counts["one"] / counts.total() < 0.6


def test_questions_about_several_objects() -> None:
    source = Scenes(seed=10, mixture=(0, 1, 1, 1))
    asked = [source.question(source.scene(index), index) for index in range(1500)]
    counts = Counter(answer for question, answer in asked if question.startswith("how many objects"))
    assert set(counts) == {"two", "three", "four"}
    relations = Counter(answer for question, answer in asked if question.startswith("is the "))
    assert 0.38 < relations["yes"] / relations.total() < 0.62
    assert set(Counter(answer for question, answer in asked if "how many" in question)) == set(NUMBERS)


def test_no_is_never_learnt_of_the_unseen_pairs() -> None:
    rng = np.random.default_rng(2)
    scene = Scene((Object("circle", "red", "small", 0, 0),), "white")
    for _ in range(400):
        asked = is_there(scene, rng)
        assert asked is not None
        words = asked[0].rstrip("?").split()
        assert (words[3], words[4]) not in UNSEEN_PAIRS
        assert words[2] == ("an" if words[3] == "orange" else "a")


def test_a_scene_that_allows_none_of_the_kinds() -> None:
    scene = Scene((Object("circle", "red", "small", 0, 0),), "white")
    with pytest.raises(ValueError, match="none of 1"):
        ask(scene, np.random.default_rng(0), kinds=(is_related,))
    assert ask(scene, np.random.default_rng(0), kinds=(is_related, how_many_objects))[1] == "one"
    assert len(EVERY_KIND) == 8
