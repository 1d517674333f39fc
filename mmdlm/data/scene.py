"""What a scene is: words, objects on a lattice, relations between them. Knows no pixels and no captions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

SIDE = 64  # pixels a side of every picture
SIZES = {"small": 16, "large": 24}  # pixels a side of the bounding box
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (215, 25, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 230, 40),
    "green": (25, 150, 45),
    "cyan": (40, 215, 225),
    "blue": (30, 60, 225),
    "purple": (145, 25, 175),
    "pink": (255, 135, 205),
}
# Euclidean distances, 255 a channel: no object colour is nearer than 110 to any of these, or than 98 to
# another object colour; these are 101 and more apart.
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (12, 12, 12),
    "grey": (125, 125, 125),
    "brown": (95, 65, 35),
}
NUMBERS = ("zero", "one", "two", "three", "four")  # the word of each count
MOST = len(NUMBERS) - 1  # most objects of a scene, reached by groups only; distinct objects are at most three
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
DIRECTIONS = tuple(OPPOSITES)
# These (colour, shape) pairs occur in no scene of training: they are kept for zero-shot composition.
UNSEEN_PAIRS = frozenset({("red", "star"), ("blue", "triangle"), ("yellow", "circle")})
STEP = 8  # default pixels of one lattice unit
GAP = 8  # least pixels between two bounding boxes, and the margin with which a relation must hold


class Look(NamedTuple):
    """How an object looks, wherever it stands."""

    size: str
    colour: str
    shape: str

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape): what tells apart the objects of a scene that is no group."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Object:
    """One shape; `row` and `column` are the upper left corner of its bounding box in lattice units."""

    shape: str
    colour: str
    size: str
    row: int
    column: int

    @property
    def look(self) -> Look:
        return Look(self.size, self.colour, self.shape)


class Relation(NamedTuple):
    """`first` stands `direction` `second`; both are indices into the objects of the scene or description."""

    first: int
    direction: str
    second: int

    @property
    def inverse(self) -> Relation:
        """The same fact, told from the other object."""
        return Relation(self.second, OPPOSITES[self.direction], self.first)


@dataclass(frozen=True)
class Description:
    """What a caption says: looks (a group of n is n equal looks), background and relations; no positions."""

    looks: tuple[Look, ...]
    background: str
    relations: tuple[Relation, ...] = ()

    @property
    def is_group(self) -> bool:
        """Two or more equal objects."""
        return len(self.looks) > 1 and len(set(self.looks)) == 1

    @property
    def is_lawful(self) -> bool:
        """One of ours: one to three objects of distinct (colour, shape), or two to four equal ones."""
        if self.is_group:
            return len(self.looks) <= MOST
        return 1 <= len(self.looks) <= 3 and len({look.pair for look in self.looks}) == len(self.looks)

    def facts(self) -> tuple[str, ...]:
        """The relations by look instead of by index, each told as "left of" or "above", sorted."""
        told = [
            relation if relation.direction in ("left of", "above") else relation.inverse
            for relation in self.relations
        ]
        return tuple(sorted(f"{self.looks[a]} {direction} {self.looks[b]}" for a, direction, b in told))

    def signature(self) -> str:
        """The attribute combination (looks, relations, background), whatever the order of its telling."""
        looks = ", ".join(" ".join(look) for look in sorted(self.looks))
        facts = "; ".join(self.facts())
        return f"{looks} | {facts} | {self.background}"


@dataclass(frozen=True)
class Scene:
    """Objects on a background. `relations` are those a caption names; a scene read from pixels names none."""

    objects: tuple[Object, ...]
    background: str
    relations: tuple[Relation, ...] = ()
    step: int = STEP  # pixels of one lattice unit

    @property
    def description(self) -> Description:
        """The scene without its positions."""
        return Description(tuple(thing.look for thing in self.objects), self.background, self.relations)

    @property
    def is_group(self) -> bool:
        """Two or more equal objects."""
        return self.description.is_group

    def signature(self) -> str:
        """The attribute combination that the split hashes: looks, relations, background; no positions."""
        return self.description.signature()

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Bounding box of object `index` in pixels: top, left, bottom, right (the last two exclusive)."""
        thing = self.objects[index]
        top, left = thing.row * self.step, thing.column * self.step
        side = SIZES[thing.size]
        return top, left, top + side, left + side

    def holds(self, relation: Relation) -> bool:
        """Whether the first bounding box ends at least `GAP` pixels before the second begins, that way.

        Boxes never stand closer than `GAP`, so between two objects one direction always holds, and two may
        (left of and above); a direction and its opposite never hold together.
        """
        top, left, bottom, right = self.box(relation.first)
        other_top, other_left, other_bottom, other_right = self.box(relation.second)
        room = {
            "left of": other_left - right,
            "right of": left - other_right,
            "above": other_top - bottom,
            "below": top - other_bottom,
        }
        return room[relation.direction] >= GAP


def agree(said: Description | None, seen: Scene | None) -> bool:
    """Whether what was said is the exact truth of what is seen.

    The same multiset of (size, colour, shape), the same background, and every relation that is said holds in
    the picture with its margin. None (not a caption, not a picture of ours) agrees with nothing.
    """
    if said is None or seen is None or said.background != seen.background:
        return False
    looks = [thing.look for thing in seen.objects]
    if Counter(said.looks) != Counter(looks):
        return False
    where = [looks.index(look) for look in said.looks]
    return all(seen.holds(Relation(where[a], direction, where[b])) for a, direction, b in said.relations)
