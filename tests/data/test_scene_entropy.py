"""The law of captions given a picture: that of a slow enumeration, and that which the generator follows."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import permutations, product
from math import log, sqrt

import numpy as np
import pytest

from mmdlm.data import scenes
from mmdlm.data.scene import DIRECTIONS, GAP, SIDE, SIZES, Description, Look, Object, Relation, Scene
from mmdlm.data.scene_entropy import caption_entropy, caption_law
from mmdlm.data.scene_language import captions, read_caption
from mmdlm.data.scenes import Scenes, Split, split_of

MIXTURES = {"one": (1, 0, 0, 0), "two": (0, 1, 0, 0), "three": (0, 0, 1, 0), "groups": (0, 0, 0, 1)}
LOOKS = (Look("large", "pink", "star"), Look("small", "cyan", "cross"), Look("large", "green", "square"))


def telling_of(order: tuple[Object, ...], scene: Scene) -> Scene:
    return Scene(order, scene.background, (), scene.step)


# the enumeration: every path of the generator, its probability multiplied out, geometry from boxes alone


def apart(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Boxes as (row, column, side) in pixels."""
    (a, b, side), (c, d, width) = one, other
    return max(c - a - side, a - c - width, d - b - side, b - d - width) >= GAP


@cache
def placements(sizes: tuple[str, ...], step: int) -> dict[tuple[tuple[int, int, int], ...], float]:
    """How probable each way is to place boxes of these sizes one after another, dead ends drawn again."""
    paths: dict[tuple[tuple[int, int, int], ...], float] = {(): 1.0}
    for size in sizes:
        side = SIZES[size]
        starts = range(0, SIDE - side + 1, step)
        longer = {}
        for path, chance in paths.items():
            free = [
                box
                for box in ((row, column, side) for row in starts for column in starts)
                if all(apart(box, other) for other in path)
            ]
            longer |= {(*path, box): chance / len(free) for box in free}
        paths = longer
    alive = sum(paths.values())
    return {path: chance / alive for path, chance in paths.items()}


def placing(order: tuple[Object, ...], step: int) -> float:
    boxes = tuple((thing.row * step, thing.column * step, SIZES[thing.size]) for thing in order)
    return placements(tuple(thing.size for thing in order), step)[boxes]


def enumerated(scene: Scene, split: Split) -> dict[str, float]:
    law: defaultdict[str, float] = defaultdict(float)
    for order in permutations(scene.objects):
        chance = placing(order, scene.step)
        told, looks = telling_of(order, scene), tuple(thing.look for thing in order)
        pairs = [(first, first + 1) for first in range(len(order) - 1)]
        true = [[Relation(a, d, b) for d in DIRECTIONS if told.holds(Relation(a, d, b))] for a, b in pairs]
        for relations in product(*true):
            said = Description(looks, scene.background, relations)
            if split_of(said) is split:
                for text in captions(said):
                    law[text] += chance / np.prod([len(some) for some in true]) / len(captions(said))
    return {text: chance / sum(law.values()) for text, chance in law.items()}


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("kind", ["two", "three"])
def test_the_law_is_that_of_every_path_of_the_generator(kind, split):
    source = Scenes(seed=5, split=split, mixture=MIXTURES[kind], step=16)
    mixed = [
        scene for scene in map(source.scene, range(40)) if len({thing.size for thing in scene.objects}) == 2
    ]
    for scene in mixed[:3]:
        wanted = enumerated(scene, split)
        assert caption_law(scene, split) == pytest.approx(wanted, rel=1e-12, abs=0)
        entropy = -sum(chance * log(chance) for chance in wanted.values())
        assert caption_entropy(caption_law(scene, split)) == pytest.approx(entropy)


# the generator itself, in a world where the same three looks come in every order


def middle_of(said: Description) -> Look:
    """The object of three that both relations speak of."""
    counts = Counter(index for relation in said.relations for index in (relation.first, relation.second))
    return said.looks[counts.most_common(1)[0][0]]


def measured(text: str, scene: Scene) -> dict[str, float]:
    """What a caption tells, in numbers that the weights of the law change."""
    said = read_caption(text)
    assert said is not None
    middle = middle_of(said)
    orders = [order for order in permutations(scene.objects) if order[1].look == middle]
    places = {thing.look: index for index, thing in enumerate(scene.objects)}
    pairs = [(places[said.looks[r.first]], places[said.looks[r.second]]) for r in said.relations]
    return {
        "placing": log(sum(placing(order, scene.step) for order in orders)),
        "directions": sum(scene.holds(Relation(a, d, b)) for a, b in pairs for d in DIRECTIONS),
        "small in the middle": middle.size == "small",
        "upright": text.count(" above ") + text.count(" below "),
        "from the middle": " and " in text,
    }


@pytest.mark.parametrize(("split", "num"), [(Split.TRAIN, 2500), (Split.HELD_OUT, 800)])
def test_the_generator_follows_the_law(split, num, monkeypatch):
    def looks(count: int, rng: np.random.Generator) -> tuple[Look, ...]:
        return tuple(LOOKS[i] for i in rng.permutation(len(LOOKS)))

    @cache  # a small world: the same pictures come again and again
    def table(things: frozenset[Object], background: str) -> tuple[list[str], np.ndarray, dict]:
        seen = Scene(tuple(things), background, (), source.step)
        law = caption_law(seen, split)
        rows = [measured(text, seen) | {"nats": -log(chance)} for text, chance in law.items()]
        numbers = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
        return list(law), np.array(list(law.values())), numbers

    monkeypatch.setattr(scenes, "_draw_looks", looks)
    source = Scenes(seed=8, split=split, mixture=MIXTURES["three"], step=16)
    surprise, variance = Counter(), Counter()
    for index in range(num):
        scene = source.scene(index)
        texts, chances, numbers = table(frozenset(scene.objects), scene.background)
        said = texts.index(source.caption(scene, index))
        for name, values in numbers.items():
            mean = chances @ values
            surprise[name] += values[said] - mean
            variance[name] += chances @ (values - mean) ** 2
    for name in surprise:  # sums of martingale differences: normal, by their central limit theorem
        assert abs(surprise[name]) < 3.5 * sqrt(variance[name]), name


# what follows


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("kind", list(MIXTURES))
def test_a_law_is_one_and_holds_what_the_generator_says(kind, split):
    source = Scenes(seed=2, split=split, mixture=MIXTURES[kind])
    for index in range(15):
        scene = source.scene(index)
        law = caption_law(scene, split)
        assert sum(law.values()) == pytest.approx(1, abs=1e-12)
        assert min(law.values()) > 0
        assert source.caption(scene, index) in law
        assert {split_of(read_caption(text)) for text in law} == {split}  # pyright: ignore
        seen = Scene(scene.objects[::-1], scene.background, (), scene.step)  # as read from the picture
        assert caption_law(seen, split) == pytest.approx(law)


def test_one_object_and_groups_leave_only_the_frame_open():
    for kind in ("one", "groups"):
        scene = Scenes(mixture=MIXTURES[kind]).scene(0)
        assert caption_law(scene, Split.TRAIN) == pytest.approx(
            dict.fromkeys(captions(scene.description), 1 / 3)
        )
        assert caption_entropy(caption_law(scene, Split.TRAIN)) == pytest.approx(log(3))


def test_two_objects_one_beside_the_other_leave_the_end_and_the_frame():
    pair = Object("star", "red", "small", 0, 0), Object("cross", "cyan", "large", 0, 4)
    assert caption_entropy(caption_law(Scene(pair, "white"), Split.UNSEEN)) == pytest.approx(log(2 * 3))
    across = Object("star", "red", "small", 0, 0), Object("cross", "cyan", "large", 4, 4)
    assert caption_entropy(caption_law(Scene(across, "white"), Split.UNSEEN)) == pytest.approx(log(2 * 2 * 3))


def test_pictures_that_no_scene_of_the_split_can_show_are_refused():
    scene = Scenes(mixture=MIXTURES["one"]).scene(0)
    with pytest.raises(ValueError, match="no scene of the split 'held_out'"):
        caption_law(scene, Split.HELD_OUT)
    near = Object("star", "red", "small", 0, 0), Object("cross", "cyan", "large", 0, 2)
    with pytest.raises(ValueError, match="closer"):
        caption_law(Scene(near, "white"), Split.UNSEEN)
