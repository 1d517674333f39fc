"""The exact law of captions given a picture of scenes, and its entropy. Knows no model and no pixels.

`Scenes` draws, for a kind of scene: looks, a background, a corner for each object in turn, for each object
but the last a relation to the next, all of it again until the split fits, and one of the captions. A picture
shows the objects and the background; the order of drawing and the relations are hidden. Call a *telling* an
order o of the objects with relations r between neighbours of the order. By Bayes' rule, with T(S) the
tellings whose signature is of split S,

    P(caption | picture) = sum over (o, r) in T(S) of  P(caption | o, r) w(o, r)  /  sum over T(S) of w(o, r)

where w(o, r) is what of the chance of drawing this telling differs between the tellings of one picture:

- looks: a given set of distinct looks comes in each order equally often (they are drawn again until (colour,
  shape) are distinct, and the sizes are independent), as do backgrounds: no factor;
- places: an attempt draws object i uniformly among the n_i(o) corners still free and starts again where
  there are none, so P(places | o) = 1 / (n_1 n_2 ... Z), with Z(sizes in this order) the chance that an
  attempt does not end dead. Both depend on the order, n_i even between objects of one size;
- relations: uniform among the m_i(o) directions that hold from object i to the next: 1 / (m_1 m_2 ...);
- the split: whole scenes of one kind are drawn again, so it only restricts the sum to T(S). A signature
  holds relations, so one picture can be drawn in both splits, told differently; `Split.UNSEEN` depends on
  looks alone and keeps every telling;
- captions: uniform among `captions(description)`.

One object and groups have a single telling. The entropy of this law, averaged over pictures, is
H(caption | picture): no captioner has a lower expected -log p.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import permutations, product
from math import isqrt, log, prod

import numpy as np

from mmdlm.data.scene import DIRECTIONS, Description, Object, Relation, Scene
from mmdlm.data.scene_language import captions
from mmdlm.data.scenes import Split, keep_apart, split_of


def caption_law(scene: Scene, split: Split) -> dict[str, float]:
    """Every caption that `Scenes` of a split can give to the picture of `scene`, and how probable it is.

    What the scene's own telling is (the order of its objects, its relations) does not matter: a picture does
    not show it. Raises ValueError for a picture that `Scenes` of this split cannot draw.
    """
    weights: defaultdict[str, float] = defaultdict(float)
    for told, weight in _tellings(scene):
        if split_of(told) is split:
            texts = captions(told)
            for text in texts:
                weights[text] += weight / len(texts)
    total = sum(weights.values())
    if total == 0:
        raise ValueError(f"no scene of the split {split.value!r} looks like {scene}")
    return {text: weight / total for text, weight in weights.items()}


def caption_entropy(law: Mapping[str, float]) -> float:
    """The entropy of a `caption_law` in nats: what the best captioner pays for this picture on average."""
    return -sum(chance * log(chance) for chance in law.values())


def _tellings(scene: Scene) -> Iterator[tuple[Description, float]]:
    """What the picture may have been drawn from, with weights in proportion to the chance of being drawn."""
    if scene.is_group or len(scene.objects) == 1:
        yield Description(scene.description.looks, scene.background), 1.0
        return
    for order in permutations(scene.objects):
        told = Scene(order, scene.background, (), scene.step)
        placing = _placing(order, scene.step)
        choices = [_relations(told, first) for first in range(len(order) - 1)]
        weight = placing / prod(map(len, choices))
        for relations in product(*choices):
            yield Description(told.description.looks, scene.background, relations), weight


def _relations(scene: Scene, first: int) -> list[Relation]:
    """All that hold between an object and the next, told from the first."""
    every = [Relation(first, direction, first + 1) for direction in DIRECTIONS]
    return [relation for relation in every if scene.holds(relation)]


def _placing(order: tuple[Object, ...], step: int) -> float:
    """The chance that objects of these sizes, placed in this order, come to stand where they do."""
    places: list[int] = []
    num_free = []
    for number, thing in enumerate(order):
        others = [keep_apart(other.size, thing.size, step) for other in order[:number]]
        alone = keep_apart(thing.size, thing.size, step)
        free = np.ones(len(alone), dtype=bool)
        for apart, place in zip(others, places, strict=True):
            free &= apart[place]
        place = thing.row * isqrt(len(alone)) + thing.column
        if not free[place]:
            raise ValueError(f"objects of {order} stand closer than scenes of {step} pixels a step allow")
        places.append(place)
        num_free.append(int(free.sum()))
    return 1 / prod(num_free) / _success(tuple(thing.size for thing in order), step)


@cache
def _success(sizes: tuple[str, ...], step: int) -> float:
    """The chance that an attempt to place two or three objects of these sizes in turn meets no dead end."""
    first, second, *third = sizes
    free = keep_apart(first, second, step)  # (corners of the first, corners of the second)
    fits = free
    for size in third:
        rooms = keep_apart(first, size, step).astype(float) @ keep_apart(second, size, step).T.astype(float)
        fits = free & (rooms > 0)
    return float((fits.sum(axis=1) / np.maximum(free.sum(axis=1), 1)).mean())
