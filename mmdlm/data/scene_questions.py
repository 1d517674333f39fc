"""Questions about scenes with one exact one-word answer. Knows no pixels and no law of scenes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import TypeVar

import numpy as np

from mmdlm.data.scene import COLOURS, DIRECTIONS, NUMBERS, SHAPES, UNSEEN_PAIRS, Look, Relation, Scene
from mmdlm.data.scene_language import plural

T = TypeVar("T")
# (scene, rng) -> (question, answer), or None where the scene allows no such question with a unique answer
QuestionKind = Callable[[Scene, np.random.Generator], tuple[str, str] | None]


def how_many_objects(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The number of all objects, a group counted object by object."""
    return "how many objects are there?", NUMBERS[len(scene.objects)]


def how_many_of_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The number of a shape; of an absent one with probability 1 / (objects + 1): "zero" must not prevail."""
    present = sorted({thing.shape for thing in scene.objects})
    absent = [shape for shape in SHAPES if shape not in present]
    shape = _pick(absent if rng.random() * (len(scene.objects) + 1) < 1 else present, rng)
    return f"how many {plural(shape)} are there?", NUMBERS[
        sum(thing.shape == shape for thing in scene.objects)
    ]


def which_colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The colour of the only object of that size and shape, or of a group."""
    if scene.is_group:
        return f"which colour are the {plural(scene.objects[0].shape)}?", scene.objects[0].colour
    look = _pick_unique(scene, lambda look: (look.size, look.shape), rng)
    return look and (f"which colour is the {look.size} {look.shape}?", look.colour)


def which_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The shape of the only object of that colour, or of a group."""
    if scene.is_group:
        return f"which shape are the {scene.objects[0].colour} objects?", scene.objects[0].shape
    look = _pick_unique(scene, lambda look: look.colour, rng)
    return look and (f"which shape is the {look.colour} object?", look.shape)


def which_size(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The size of one object, named by colour and shape, or of a group."""
    if scene.is_group:
        return f"which size are the {plural(scene.objects[0].shape)}?", scene.objects[0].size
    look = _pick_unique(scene, lambda look: look.pair, rng)
    return look and (f"which size is the {look.colour} {look.shape}?", look.size)


def which_background(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The colour of the background."""
    return "which colour is the background?", scene.background


def is_there(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Yes and no equally often; three no's in four share their colour or their shape with an object.

    A "no" never names one of `UNSEEN_PAIRS`: a model must not learn that those words go with "no".
    """
    pairs = {thing.look.pair for thing in scene.objects}
    if rng.random() < 0.5:
        colour, shape = _pick(sorted(pairs), rng)
        return f"is there {_article(colour)} {colour} {shape}?", "yes"
    near = _pick(sorted(pairs), rng)
    every = [pair for pair in product(COLOURS, SHAPES) if pair not in pairs and pair not in UNSEEN_PAIRS]
    alike = [pair for pair in every if (pair[0] == near[0]) != (pair[1] == near[1])]
    colour, shape = _pick(alike if rng.random() < 0.75 else every, rng)
    return f"is there {_article(colour)} {colour} {shape}?", "no"


def is_related(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Whether one object is left of, right of, above or below another; yes and no equally often.

    A "no" is the opposite of a relation that holds with its margin, never one that holds by less than that.
    """
    if scene.is_group or len(scene.objects) == 1:
        return None
    count = len(scene.objects)
    told = [Relation(a, name, b) for a in range(count) for name in DIRECTIONS for b in range(count) if a != b]
    relation = _pick([relation for relation in told if scene.holds(relation)], rng)
    yes = rng.random() < 0.5
    first, direction, second = (
        relation if yes else Relation(relation.second, relation.direction, relation.first)
    )
    names = [f"{thing.colour} {thing.shape}" for thing in scene.objects]
    return f"is the {names[first]} {direction} the {names[second]}?", "yes" if yes else "no"


EVERY_KIND: tuple[QuestionKind, ...] = (
    how_many_objects,
    how_many_of_shape,
    which_colour,
    which_shape,
    which_size,
    which_background,
    is_there,
    is_related,
)


def ask(
    scene: Scene, rng: np.random.Generator, *, kinds: Sequence[QuestionKind] = EVERY_KIND
) -> tuple[str, str]:
    """A question and its exact answer; the kinds that the scene allows are equally likely."""
    order = rng.permutation(len(kinds))
    for number in order:
        asked = kinds[int(number)](scene, rng)
        if asked:
            return asked
    raise ValueError(f"none of {len(kinds)} kinds of question fits {scene}")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]


def _pick_unique(scene: Scene, key: Callable[[Look], object], rng: np.random.Generator) -> Look | None:
    """One of the looks that no other object of the scene shares `key` with."""
    looks = [thing.look for thing in scene.objects]
    counts = Counter(map(key, looks))
    unique = [look for look in looks if counts[key(look)] == 1]
    return _pick(unique, rng) if unique else None
