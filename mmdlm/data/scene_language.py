"""The language of scenes: all captions of a scene, and the grammar that reads them back. Knows no pixels."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mmdlm.data.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOST,
    NUMBERS,
    SHAPES,
    SIZES,
    Description,
    Look,
    Relation,
)


def plural(shape: str) -> str:
    """The word for several of a shape."""
    return shape + ("es" if shape.endswith("s") else "s")


@dataclass(frozen=True)
class _Frame:
    """How a caption is put together: the words around the objects and the article each of them takes."""

    before: str  # "{background}" stands for its word, in one of the two
    after: str
    article: str


_FRAMES = (
    _Frame("", " on a {background} background", "a"),
    _Frame("a {background} background with ", "", "a"),
    _Frame("", " on {background}", "one"),
)


def captions(description: Description) -> tuple[str, ...]:
    """Every caption of a scene; each names count, size, colour and shape of all, background, relations.

    Three frames; in each, two objects can be told from either end, and three as a chain ("A left of B above
    C": B is above C) or from the middle one ("B right of A and above C"), either way round.

    Raises ValueError where the description is not of our world, or its relations do not join its objects in
    one path.
    """
    if not description.is_lawful:
        raise ValueError(
            f"no caption for {description}: wanted 1..3 of distinct (colour, shape) or 2..{MOST} equal"
        )
    texts = []
    for frame in _FRAMES:
        before, after = (
            part.format(background=description.background) for part in (frame.before, frame.after)
        )
        texts += [before + clause + after for clause in _clauses(description, frame.article)]
    return tuple(texts)


def caption(description: Description, rng: np.random.Generator) -> str:
    """One of the scene's captions, each equally likely."""
    texts = captions(description)
    return texts[int(rng.integers(len(texts)))]


def read_caption(text: str) -> Description | None:
    """What a caption says, or None if it is not letter for letter a caption of some scene."""
    for pattern, article in _PATTERNS:
        match = pattern.fullmatch(text)
        if match:
            return _read_clause(match["clause"], article, match["background"])
    return None


def num_captions() -> int:
    """A lower bound on the number of distinct captions that scenes can have, by counting what is said.

    Distinct because order and content can be read back. For three objects only the chain is counted, and of
    the 16 pairs of directions only the 12 that fit any sizes (not "A left of B left of C").
    """
    backgrounds, frames, sizes = len(BACKGROUNDS), len(_FRAMES), len(SIZES)
    pairs = len(COLOURS) * len(SHAPES)
    one = pairs * sizes
    two = one * (pairs - 1) * sizes * len(DIRECTIONS)
    three = one * (pairs - 1) * sizes * (pairs - 2) * sizes * 12
    groups = one * (MOST - 1)
    return (one + two + three + groups) * backgrounds * frames


def _clauses(description: Description, article: str) -> list[str]:
    looks, relations = description.looks, description.relations
    if description.is_group:
        size, colour, shape = looks[0]
        return [f"{NUMBERS[len(looks)]} {size} {colour} {plural(shape)}"]
    names = [f"{article} {' '.join(look)}" for look in looks]
    if len(relations) != len(looks) - 1:
        raise ValueError(
            f"{len(looks)} objects need {len(looks) - 1} relations to be told, got {len(relations)}"
        )
    if len(looks) == 1:
        return names
    if len(looks) == 2:
        return [
            f"{names[a]} {direction} {names[b]}" for a, direction, b in (relations[0], relations[0].inverse)
        ]
    return _clauses_of_three(names, relations)


def _clauses_of_three(names: list[str], relations: tuple[Relation, ...]) -> list[str]:
    shared = {relations[0].first, relations[0].second} & {relations[1].first, relations[1].second}
    if len(shared) != 1:
        raise ValueError(f"the relations of three objects must share exactly one of them, got {relations}")
    (middle,) = shared
    out = [
        relation if relation.first == middle else relation.inverse for relation in relations
    ]  # both from the middle
    texts = []
    for near, far in ((out[0], out[1]), (out[1], out[0])):
        back = near.inverse
        texts.append(
            f"{names[back.first]} {back.direction} {names[middle]} {far.direction} {names[far.second]}"
        )
        ends = f"{near.direction} {names[near.second]} and {far.direction} {names[far.second]}"
        texts.append(f"{names[middle]} {ends}")
    return texts


def _one_of(words: tuple[str, ...]) -> str:
    return "(" + "|".join(words) + ")"


_LOOK = f"{_one_of(tuple(SIZES))} {_one_of(tuple(COLOURS))} {_one_of(SHAPES)}"
_GROUP = re.compile(
    f"{_one_of(NUMBERS[2:])} {_one_of(tuple(SIZES))} {_one_of(tuple(COLOURS))} "
    f"{_one_of(tuple(map(plural, SHAPES)))}"
)
_SINGULAR = {plural(shape): shape for shape in SHAPES}
_GROUND = f"(?P<background>{'|'.join(BACKGROUNDS)})"


def _frame_pattern(frame: _Frame) -> re.Pattern[str]:
    before, after = (part.format(background=_GROUND) for part in (frame.before, frame.after))
    return re.compile(f"{before}(?P<clause>.+){after}")


def _clause_pattern(article: str) -> re.Pattern[str]:
    """One object; two with a direction; three with two, the second perhaps after "and"."""
    thing, direction = f"{article} {_LOOK}", _one_of(DIRECTIONS)
    return re.compile(f"{thing}(?: {direction} {thing}(?: (and )?{direction} {thing})?)?")


_PATTERNS = tuple((_frame_pattern(frame), frame.article) for frame in _FRAMES)
_CLAUSES = {article: _clause_pattern(article) for article in {frame.article for frame in _FRAMES}}


def _read_clause(clause: str, article: str, background: str) -> Description | None:
    group = _GROUP.fullmatch(clause)
    if group:
        count, size, colour, shapes = group.groups()
        return Description((Look(size, colour, _SINGULAR[shapes]),) * NUMBERS.index(count), background)
    match = _CLAUSES[article].fullmatch(clause)
    if match is None:
        return None
    words = match.groups()
    looks = [Look(*words[0:3])]
    relations = []
    if words[3]:
        relations.append(Relation(0, words[3], 1))
        looks.append(Look(*words[4:7]))
    if words[8]:
        relations.append(Relation(0 if words[7] else 1, words[8], 2))
        looks.append(Look(*words[9:12]))
    said = Description(tuple(looks), background, tuple(relations))
    # equal objects are only told as a group, so a clause of objects is one of distinct (colour, shape)
    return said if said.is_lawful and not said.is_group else None
