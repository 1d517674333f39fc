"""The law of scenes: which scene stands at an index, and in which split. Knows no reader."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache

import numpy as np

from mmdlm.data.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    GAP,
    MOST,
    SHAPES,
    SIDE,
    SIZES,
    STEP,
    UNSEEN_PAIRS,
    Description,
    Look,
    Object,
    Relation,
    Scene,
)
from mmdlm.data.scene_language import caption
from mmdlm.data.scene_picture import draw, draw_batch
from mmdlm.data.scene_questions import EVERY_KIND, QuestionKind, ask, how_many_objects

_HELD_OUT = 8  # one signature in so many is held out: 12.5 %
_TRIES = 20  # of other paints of a scene
_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_SIZE_NAMES, _BACKGROUND_NAMES = tuple(SIZES), tuple(BACKGROUNDS)


class Split(Enum):
    """Which attribute combinations a source of scenes may show; a constant of the world, not of the seed."""

    TRAIN = "train"
    HELD_OUT = "held_out"  # signatures whose hash is 0 modulo 8: known words, known pairs, a new combination
    UNSEEN = "unseen"  # at least one of `UNSEEN_PAIRS`: zero-shot composition


def split_of(scene: Scene | Description) -> Split:
    """The one split a scene belongs to, by the BLAKE2 hash of its signature."""
    said = scene.description if isinstance(scene, Scene) else scene
    if any(look.pair in UNSEEN_PAIRS for look in said.looks):
        return Split.UNSEEN
    digest = hashlib.blake2b(said.signature().encode(), digest_size=8).digest()
    return Split.HELD_OUT if int.from_bytes(digest, "little") % _HELD_OUT == 0 else Split.TRAIN


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """An endless list of scenes; everything about entry `index` is a function of (seed, index) alone.

    `mixture` weighs scenes of one, two and three objects and groups of two to four. Within a kind, (colour,
    shape) pairs are distinct and uniform, sizes, backgrounds and counts uniform, positions on the lattice
    with at least `GAP` pixels between bounding boxes, and the relations named are uniform among those that
    hold; whatever is not of the split is then drawn again.
    """

    seed: int = 0
    split: Split = Split.TRAIN
    mixture: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25)
    step: int = STEP  # pixels of one lattice unit: bounding boxes start at its multiples

    def __post_init__(self) -> None:
        if len(self.mixture) != 4 or min(self.mixture) < 0 or sum(self.mixture) <= 0:
            raise ValueError(
                f"mixture must be four weights >= 0, not all 0 (one, two, three, groups), got {self.mixture}"
            )
        if self.step not in (2, 4, 8, 16):
            raise ValueError(f"step must be 2, 4, 8 or 16 pixels, got {self.step}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")

    def scene(self, index: int) -> Scene:
        """The scene at `index` >= 0."""
        rng = self._rng(index, 0)
        kind = int(np.searchsorted(np.cumsum(self.mixture), rng.random() * sum(self.mixture), side="right"))
        while True:
            scene = _draw_scene(kind, self.step, rng)
            if split_of(scene) is self.split:
                return scene

    def image(self, scene: Scene) -> np.ndarray:
        """The picture of a scene: (64, 64, 3) uint8."""
        return draw(scene)

    def images(self, indices: Iterable[int]) -> np.ndarray:
        """The pictures at `indices`: (N, 64, 64, 3) uint8."""
        return draw_batch([self.scene(index) for index in indices])

    def caption(self, scene: Scene, index: int) -> str:
        """One of the scene's captions; (seed, index) picks which."""
        return caption(scene.description, self._rng(index, 1))

    def question(self, scene: Scene, index: int) -> tuple[str, str]:
        """A question about the scene and its exact one-word answer; (seed, index) picks which."""
        return ask(scene, self._rng(index, 2), kinds=self._kinds())

    def repainted(self, index: int) -> tuple[tuple[Scene, Scene], tuple[Scene, Scene]]:
        """Four scenes of the split, alike but for their paint; (seed, index) picks which.

        Entry [i][j] has background i and colours j of two each, those of the scene at `index` among them;
        where no other paint of that scene is of the split it is another scene. Two objects may get the same
        colour, shape and size.
        """
        rng, scene = self._rng(index, 3), self.scene(index)
        while True:
            for _ in range(_TRIES):
                grounds = [scene.background, _BACKGROUND_NAMES[int(rng.integers(len(BACKGROUNDS)))]]
                colours = [[thing.colour for thing in scene.objects], _draw_colours(scene, rng)]
                grid = [[_paint(scene, ground, some) for some in colours] for ground in grounds]
                if all(split_of(each) is self.split for row in grid for each in row):
                    (a, b), (c, d) = grid
                    return (a, b), (c, d)
            scene = self.scene(int(rng.integers(2**62)))

    def window(self, index: int, rng: np.random.Generator, *, side: int = 32) -> np.ndarray:
        """What is around one object of the scene at `index` in its four paints: (4, side, side, 3) uint8.

        In the order of `repainted`; `rng` picks object and place, a multiple of 8 pixels.
        """
        paints = [scene for row in self.repainted(index) for scene in row]
        top, left, bottom, right = paints[0].box(int(rng.integers(len(paints[0].objects))))
        row, column = (
            8 * int(rng.integers(max(0, -(-(end - side) // 8)), min(SIDE - side, start) // 8 + 1))
            for start, end in ((top, bottom), (left, right))
        )
        return np.stack([self.image(scene)[row : row + side, column : column + side] for scene in paints])

    def _kinds(self) -> tuple[QuestionKind, ...]:
        """All kinds, but not "how many objects" where the answer never changes."""
        if any(self.mixture[1:]):
            return EVERY_KIND
        return tuple(kind for kind in EVERY_KIND if kind is not how_many_objects)

    def _rng(self, index: int, purpose: int) -> np.random.Generator:
        """A stream of its own for each (seed, index, purpose)."""
        if index < 0:
            raise ValueError(f"index must be >= 0, got {index}")
        key = np.array([self.seed, index], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], np.uint64)))


def hole(scene: Scene, rng: np.random.Generator, *, side: int = 8) -> np.ndarray:
    """What to draw anew: the boxes of some of the objects, or a rectangle that touches one, equally often.

    (64 / side, 64 / side) bool, a cell for `side` pixels; `side` divides the scene's step.
    """
    owner = _owners(scene, side)
    if rng.random() < 0.5:
        count = int(rng.integers(1, len(scene.objects) + 1))
        return np.isin(owner, rng.permutation(len(scene.objects))[:count])
    cells = len(owner)
    while True:
        height, width = rng.integers(2, cells + 1, size=2)
        row, column = rng.integers(0, cells + 1 - height), rng.integers(0, cells + 1 - width)
        if (owner[row : row + height, column : column + width] >= 0).any():
            inside = np.zeros((cells, cells), dtype=bool)
            inside[row : row + height, column : column + width] = True
            return inside


def around(
    scene: Scene, rng: np.random.Generator, *, told: Description | None = None, side: int = 8
) -> np.ndarray:
    """What to draw anew: all but the boxes of some of the objects, of none up to all but one.

    So it is to be found out where the others go, and whether there are any. The objects that stay are any, or
    with a description those that it names first. Shape as of `hole`. Raises ValueError for a description of
    another scene.
    """
    order = list(rng.permutation(len(scene.objects)))
    if told is not None and not scene.is_group:
        looks = [thing.look for thing in scene.objects]
        if sorted(told.looks) != sorted(looks):
            raise ValueError(f"{told} is not of {scene}")
        order = [looks.index(look) for look in told.looks]
    return ~np.isin(_owners(scene, side), order[: int(rng.integers(len(order)))])


def _owners(scene: Scene, side: int) -> np.ndarray:
    """(64 / side, 64 / side) long: the object whose box covers a cell, -1 where there is none."""
    owner = np.full((SIDE // side, SIDE // side), -1)
    for number in range(len(scene.objects)):
        top, left, bottom, right = (end // side for end in scene.box(number))
        owner[top:bottom, left:right] = number
    return owner


def _draw_scene(kind: int, step: int, rng: np.random.Generator) -> Scene:
    """One draw of kind 0..2 (that many objects and one) or 3 (a group), of any split."""
    copies = int(rng.integers(2, MOST + 1)) if kind == 3 else 1
    looks = _draw_looks(1 if kind == 3 else kind + 1, rng) * copies
    background = _BACKGROUND_NAMES[int(rng.integers(len(BACKGROUNDS)))]
    places = _draw_places(tuple(look.size for look in looks), step, rng)
    objects = tuple(
        Object(look.shape, look.colour, look.size, row, column)
        for look, (row, column) in zip(looks, places, strict=True)
    )
    scene = Scene(objects, background, (), step)
    if kind in (0, 3):
        return scene
    # looks are exchangeable, so the objects are told in the order in which they were drawn
    relations = tuple(_draw_relation(scene, first, rng) for first in range(kind))
    return Scene(objects, background, relations, step)


def _draw_looks(count: int, rng: np.random.Generator) -> tuple[Look, ...]:
    looks: list[Look] = []
    while len(looks) < count:
        pair, size = divmod(int(rng.integers(len(_PAIRS) * len(SIZES))), len(SIZES))
        look = Look(_SIZE_NAMES[size], *_PAIRS[pair])
        if all(look.pair != other.pair for other in looks):
            looks.append(look)
    return tuple(looks)


def _draw_colours(scene: Scene, rng: np.random.Generator) -> list[str]:
    """A colour for each object, the same for all of a group."""
    names = tuple(COLOURS)
    if scene.is_group:
        return [names[int(rng.integers(len(names)))]] * len(scene.objects)
    return [names[int(number)] for number in rng.integers(len(names), size=len(scene.objects))]


def _paint(scene: Scene, background: str, colours: list[str]) -> Scene:
    things = zip(scene.objects, colours, strict=True)
    return replace(
        scene, background=background, objects=tuple(replace(thing, colour=name) for thing, name in things)
    )


def _draw_places(sizes: tuple[str, ...], step: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """A corner for each object in turn, uniform among those still free; all over again where none is left."""
    while True:
        places: list[int] = []
        for size in sizes:
            free = np.ones(_num_starts(size, step) ** 2, dtype=bool)
            for place, other in zip(places, sizes, strict=False):
                free &= keep_apart(other, size, step)[place]
            choices = np.flatnonzero(free)
            if len(choices) == 0:
                break
            places.append(int(choices[int(rng.integers(len(choices)))]))
        if len(places) == len(sizes):
            return [divmod(place, _num_starts(size, step)) for place, size in zip(places, sizes, strict=True)]


def _draw_relation(scene: Scene, first: int, rng: np.random.Generator) -> Relation:
    """One that holds between an object and the next, told from the first."""
    candidates = [Relation(first, direction, first + 1) for direction in DIRECTIONS]
    true = [relation for relation in candidates if scene.holds(relation)]
    assert true, f"objects {first} and {first + 1} stand closer than the gap: {scene}"
    return true[int(rng.integers(len(true)))]


def _num_starts(size: str, step: int) -> int:
    """Lattice units at which a bounding box can begin, in one direction."""
    return (SIDE - SIZES[size]) // step + 1


@cache
def keep_apart(first: str, second: str, step: int) -> np.ndarray:
    """Whether two boxes keep the gap: (corners of the first, corners of the second) bool, both row-major."""
    ones, others = (np.arange(_num_starts(size, step)) * step for size in (first, second))
    room = np.maximum(
        others[None] - ones[:, None] - SIZES[first], ones[:, None] - others[None] - SIZES[second]
    )
    clear = room >= GAP  # (starts, starts) in one direction
    both = clear[:, None, :, None] | clear[None, :, None, :]
    return both.reshape(len(ones) ** 2, len(others) ** 2)
