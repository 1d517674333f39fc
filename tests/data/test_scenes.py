"""The law of scenes: deterministic, on the lattice, apart, split by hash; and their pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mmdlm.data.scene import (
    BACKGROUNDS,
    COLOURS,
    GAP,
    SHAPES,
    SIDE,
    SIZES,
    UNSEEN_PAIRS,
    Description,
    Look,
    Object,
    Relation,
    Scene,
)
from mmdlm.data.scene_language import read_caption
from mmdlm.data.scene_picture import draw, draw_batch, sprite_mask
from mmdlm.data.scenes import Scenes, Split, around, hole, split_of

NUM = 400


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    source = Scenes(seed=3)
    forwards = [source.scene(index) for index in range(50)]
    backwards = [Scenes(seed=3).scene(index) for index in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert [source.caption(scene, 7) for scene in forwards] == [
        source.caption(scene, 7) for scene in forwards
    ]
    assert [source.question(scene, 7) for scene in forwards] == [
        source.question(scene, 7) for scene in forwards
    ]
    assert forwards != [Scenes(seed=4).scene(index) for index in range(50)]
    assert len({scene.signature() for scene in forwards}) > 40


def test_the_first_scenes_stay_what_they_are() -> None:
    """Data sets are named by their seed, so the law may not drift."""
    source = Scenes(seed=0)
    scene = source.scene(0)
    assert scene.signature() == "small cyan diamond |  | white"
    assert source.caption(scene, 0) == "one small cyan diamond on white"


@pytest.mark.parametrize("step", [4, 8, 16])
def test_boxes_lie_on_the_lattice_and_apart(step: int) -> None:
    source = Scenes(seed=1, step=step)
    for scene in map(source.scene, range(NUM)):
        boxes = [scene.box(index) for index in range(len(scene.objects))]
        for top, left, bottom, right in boxes:
            assert top % step == left % step == 0
            assert min(top, left) >= 0
            assert max(bottom, right) <= SIDE
        for (a, b, c, d), (e, f, g, h) in combinations(boxes, 2):
            assert max(e - c, a - g, f - d, b - h) >= GAP


def test_the_mixture_decides_the_kind() -> None:
    for kind in range(4):
        mixture = (float(kind == 0), float(kind == 1), float(kind == 2), float(kind == 3))
        for scene in map(Scenes(mixture=mixture).scene, range(60)):
            assert scene.is_group == (kind == 3)
            assert kind == 3 or len(scene.objects) == kind + 1
            assert len(scene.relations) == (0 if kind == 3 else kind)
    counts = Counter(len(scene.objects) for scene in map(Scenes(mixture=(0, 0, 0, 1)).scene, range(600)))
    assert set(counts) == {2, 3, 4}
    assert min(counts.values()) > 150


def test_scenes_are_lawful_and_their_relations_hold() -> None:
    for scene in map(Scenes(seed=2).scene, range(NUM)):
        assert scene.description.is_lawful
        assert all(scene.holds(relation) for relation in scene.relations)
        assert not any(scene.holds(Relation(b, direction, a)) for a, direction, b in scene.relations)


def test_attributes_are_uniform() -> None:
    things = [Scenes(mixture=(1, 0, 0, 0)).scene(index) for index in range(3000)]
    for words, chosen in (
        (SIZES, [scene.objects[0].size for scene in things]),
        (BACKGROUNDS, [scene.background for scene in things]),
        (COLOURS, [scene.objects[0].colour for scene in things]),
        (SHAPES, [scene.objects[0].shape for scene in things]),
    ):
        counts = Counter(chosen)
        assert set(counts) == set(words)
        # the split takes an eighth away unevenly, and three words have a pair less
        assert max(counts.values()) / min(counts.values()) < 1.6
    rows = Counter(scene.objects[0].row for scene in things if scene.objects[0].size == "small")
    assert set(rows) == set(range(7))


def test_splits_share_no_signature() -> None:
    """One of three, by the signature alone; an eighth is held out; the unseen pairs are in UNSEEN only."""
    for kind in ((1, 0, 0, 0), (0, 1, 1, 1)):
        seen = {}
        for split in Split:
            scenes = [Scenes(split=split, mixture=kind).scene(index) for index in range(250)]
            assert {split_of(scene) for scene in scenes} == {split}
            seen[split] = {scene.signature() for scene in scenes}
            special = [any(thing.look.pair in UNSEEN_PAIRS for thing in scene.objects) for scene in scenes]
            assert all(special) if split is Split.UNSEEN else not any(special)
        assert not (seen[Split.TRAIN] & seen[Split.HELD_OUT])
    every = [
        Description((Look(size, colour, shape),), background)
        for size in SIZES
        for colour in COLOURS
        for shape in SHAPES
        for background in BACKGROUNDS
    ]
    counts = Counter(map(split_of, every))
    assert sum(counts.values()) == 384
    assert counts[Split.UNSEEN] == 3 * 2 * 4
    assert 0.09 < counts[Split.HELD_OUT] / 360 < 0.16
    held = [description.looks[0] for description in every if split_of(description) is Split.HELD_OUT]
    assert {look.shape for look in held} == set(SHAPES)
    assert {look.colour for look in held} == set(COLOURS)


def test_a_signature_is_about_meaning() -> None:
    """Neither positions nor the order or the end from which a scene is told matter; everything else does."""
    first, second = Object("circle", "red", "small", 0, 0), Object("star", "blue", "large", 4, 4)
    scene = Scene((first, second), "white", (Relation(0, "above", 1),))
    told = {
        scene.signature(),
        Scene((second, first), "white", (Relation(1, "above", 0),)).signature(),
        Scene((second, first), "white", (Relation(0, "below", 1),)).signature(),
        Scene((Object("circle", "red", "small", 1, 5), second), "white", scene.relations).signature(),
    }
    assert len(told) == 1
    others = {
        Scene((second, first), "white", (Relation(0, "above", 1),)).signature(),
        Scene((first, second), "white", (Relation(0, "left of", 1),)).signature(),
        Scene((first, second), "black", (Relation(0, "above", 1),)).signature(),
        Scene((Object("circle", "red", "large", 0, 0), second), "white", scene.relations).signature(),
    }
    assert len(others - told) == 4


def test_pictures_show_their_objects() -> None:
    scene = Scene((Object("square", "red", "small", 1, 2),), "black")
    picture = draw(scene)
    assert picture.shape == (SIDE, SIDE, 3)
    assert picture.dtype == np.uint8
    inner = np.zeros((SIDE, SIDE), bool)
    inner[9:23, 17:31] = True
    assert (picture[inner] == COLOURS["red"]).all()
    assert (picture[~inner] == BACKGROUNDS["black"]).all()
    picture[:] = 0  # a picture is its caller's own
    assert (draw(scene)[inner] == COLOURS["red"]).all()
    source = Scenes()
    assert (source.images([4, 2])[1] == source.image(source.scene(2))).all()
    assert draw_batch([]).shape == (0, SIDE, SIDE, 3)


def test_sprites_are_anti_aliased_and_distinct() -> None:
    for size, side in SIZES.items():
        masks = {shape: sprite_mask(shape, size) for shape in SHAPES}
        for shape, mask in masks.items():
            assert mask.shape == (side, side)
            assert mask.min() == 0
            assert mask.max() == 1
            assert not mask[0].any()
            assert not mask[-1].any()
            assert np.allclose(mask, mask[:, ::-1], atol=0.02)  # every shape is its own mirror image
            partial = ((mask > 0.1) & (mask < 0.9)).sum()
            assert partial > 4 or shape in ("square", "cross")
        for (_, one), (_, other) in combinations(masks.items(), 2):
            assert np.abs(one - other).sum() > 0.1 * max(one.sum(), other.sum())


def test_colours_are_far_apart() -> None:
    colours = np.array(list(COLOURS.values()), float)
    grounds = np.array(list(BACKGROUNDS.values()), float)
    both = np.linalg.norm(colours[:, None] - colours, axis=2) + 1000 * np.eye(len(colours))
    assert both.min() > 98
    assert np.linalg.norm(colours[:, None] - grounds, axis=2).min() > 110
    assert (np.linalg.norm(grounds[:, None] - grounds, axis=2) + 1000 * np.eye(len(grounds))).min() > 101


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ({"mixture": (0, 0, 0, 0)}, "mixture"),
        ({"mixture": (1, -1, 0, 0)}, "mixture"),
        ({"step": 3}, "step"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refuses_what_is_no_law(law: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenes(**law)
    with pytest.raises(ValueError, match="index"):
        Scenes().scene(-1)


def test_a_window_shows_one_object_whole_in_every_paint() -> None:
    source, rng = Scenes(seed=4), np.random.default_rng(0)
    for index in range(40):
        paints = [scene for row in source.repainted(index) for scene in row]
        found = source.window(index, rng)
        assert found.shape == (4, 32, 32, 3)
        places = [
            (row, column)
            for row in range(0, 33, 8)
            for column in range(0, 33, 8)
            if all(
                (source.image(scene)[row : row + 32, column : column + 32] == window).all()
                for scene, window in zip(paints, found, strict=True)
            )
        ]
        boxes = [paints[0].box(number) for number in range(len(paints[0].objects))]
        assert any(
            row <= box[0] and column <= box[1] and box[2] <= row + 32 and box[3] <= column + 32
            for row, column in places
            for box in boxes
        )


def test_repainted_scenes_differ_in_paint_alone() -> None:
    source = Scenes(seed=4)
    for index in range(60):
        grid = source.repainted(index)
        assert grid == source.repainted(index)
        for i, row in enumerate(grid):
            for j, scene in enumerate(row):
                assert split_of(scene) is Split.TRAIN
                assert scene.background == grid[i][0].background
                assert [t.colour for t in scene.objects] == [t.colour for t in grid[0][j].objects]
                for mine, other in zip(scene.objects, grid[0][0].objects, strict=True):
                    assert replace(mine, colour="") == replace(other, colour="")
    grounds = {scene.background for index in range(60) for row in source.repainted(index) for scene in row}
    assert grounds == set(BACKGROUNDS)


def covered(scene, inside) -> tuple[np.ndarray, list[bool], list[bool]]:
    """Cells of objects, and for each object whether it is wholly inside and whether wholly outside."""
    objects, within, without = np.zeros((8, 8), dtype=bool), [], []
    for number in range(len(scene.objects)):
        top, left, bottom, right = (end // 8 for end in scene.box(number))
        objects[top:bottom, left:right] = True
        within.append(bool(inside[top:bottom, left:right].all()))
        without.append(not inside[top:bottom, left:right].any())
    return objects, within, without


def test_holes_are_boxes_of_objects_or_rectangles_that_touch_one() -> None:
    source, rng = Scenes(seed=5), np.random.default_rng(0)
    boxes = 0
    for index in range(300):
        scene = source.scene(index)
        inside = hole(scene, rng)
        assert inside.shape == (8, 8)
        objects, within, _ = covered(scene, inside)
        assert (inside & objects).any()
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        rectangle = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        only_objects = not (inside & ~objects).any() and any(within)
        assert rectangle or only_objects
        boxes += only_objects
    assert 130 < boxes < 200


def test_around_some_objects_is_all_but_their_boxes_those_told_first() -> None:
    source, rng = Scenes(seed=6), np.random.default_rng(0)
    kept = Counter()
    for index in range(300):
        scene = source.scene(index)
        told = read_caption(source.caption(scene, index))
        for description in (None, told):
            inside = around(scene, rng, told=description)
            objects, within, without = covered(scene, inside)
            assert inside[~objects].all()
            assert all(a or b for a, b in zip(within, without, strict=True))
            assert any(within)
            kept[len(scene.objects), sum(without)] += 1
            if description is not None and not scene.is_group:
                looks = {scene.objects[number].look for number in np.flatnonzero(without)}
                assert looks == set(told.looks[: sum(without)])
    assert {stay for count, stay in kept if count == 3} == {0, 1, 2}
    one, other = [scene for scene in map(source.scene, range(99)) if len(scene.objects) == 2][:2]
    with pytest.raises(ValueError, match="is not of"):
        around(one, rng, told=other.description)
