"""The exam on scenes: all that a pipeline makes, judged exactly. Knows a pipeline by its methods."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from mmdlm.data import Description, Scene, Scenes, Split, agree, read_caption, read_images
from mmdlm.output import Output
from mmdlm.pipeline import Pipeline

__all__ = [
    "KINDS",
    "Exam",
    "Question",
    "Rate",
    "judge_pairs",
    "object_mask",
    "read_pictures",
    "summary",
    "take",
    "total_variation",
    "world",
]

KINDS = ("one", "two", "three", "groups")  # kinds of scene, in the order of `Scenes.mixture`
_LAW_SCENES = 20_000  # scenes of the generator that stand for its law


@dataclass(frozen=True)
class Rate:
    """How many of a number of trials were right."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / max(self.total, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval for a proportion."""
        if self.total == 0:
            return 0.0, 1.0
        z, n, p = 1.959964, self.total, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Question:
    """One scene of an exam, with everything that is asked of it."""

    kind: str
    scene: Scene
    picture: Image.Image
    caption: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Exam:
    """`num` scenes of each kind in `kinds`, held out from training, deterministic from `seed`."""

    kinds: tuple[str, ...] = KINDS
    num: int = 1000
    seed: int = 0
    split: Split = Split.HELD_OUT

    def __post_init__(self) -> None:
        world(self.kinds)
        if self.num < 1:
            raise ValueError(f"an exam needs at least one scene a kind, got num = {self.num}")

    def questions(self) -> list[Question]:
        """All scenes of the exam, kind by kind."""
        questions = []
        for kind in self.kinds:
            source = world((kind,), seed=self.seed, split=self.split)
            for index in range(self.num):
                scene = source.scene(index)
                asked, answer = source.question(scene, index)
                picture = Image.fromarray(source.image(scene))
                questions.append(Question(kind, scene, picture, source.caption(scene, index), asked, answer))
        return questions


def world(kinds: Iterable[str], *, seed: int = 0, split: Split = Split.TRAIN) -> Scenes:
    """The scenes of some kinds, all equally likely. Raises ValueError for a kind that there is not."""
    wanted = set(kinds)
    unknown = sorted(wanted - set(KINDS))
    if unknown or not wanted:
        raise ValueError(f"unknown kinds of scene {unknown}; they are {', '.join(KINDS)}")
    one, two, three, groups = (float(kind in wanted) for kind in KINDS)
    return Scenes(seed=seed, split=split, mixture=(one, two, three, groups))


def take(pipe: Pipeline, exam: Exam, *, progress: bool = True) -> dict[str, Any]:
    """All scores of a pipeline as plain JSON values; each with its 95 % interval and by kind of scene."""
    began, questions = time.perf_counter(), exam.questions()
    outputs = {
        "text_to_image": pipe.text_to_image(
            [q.caption for q in questions], seed=exam.seed, progress=progress
        ),
        "caption": pipe.caption([q.picture for q in questions], seed=exam.seed, progress=progress),
        "answer": pipe.answer(
            [q.picture for q in questions], [q.question for q in questions], seed=exam.seed, progress=progress
        ),
        "joint": pipe.joint(num_samples=exam.num, seed=exam.seed, progress=progress),
    }
    holes = [object_mask(q.scene) for q in questions]
    outputs["inpaint"] = pipe.inpaint(
        [q.picture for q in questions],
        holes,
        [q.caption for q in questions],
        seed=exam.seed,
        progress=progress,
    )
    said = [read_caption(q.caption) for q in questions]
    right = {
        "text_to_image": list(map(agree, said, read_pictures(outputs["text_to_image"].images))),
        "caption": [
            agree(read_caption(t), q.scene) for t, q in zip(outputs["caption"].texts, questions, strict=True)
        ],
        "answer": [t == q.answer for t, q in zip(outputs["answer"].texts, questions, strict=True)],
        "inpaint": list(map(agree, said, read_pictures(outputs["inpaint"].images))),
    }
    kinds = [q.kind for q in questions]
    return {
        **{task: summary("exact", marks, kinds) for task, marks in right.items()},
        "joint": judge_pairs(outputs["joint"], exam.kinds),
        "exam": {"kinds": list(exam.kinds), "num": exam.num, "seed": exam.seed, "split": exam.split.value},
        "forwards": {task: output.forwards for task, output in outputs.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }


def summary(name: str, marks: Sequence[bool], kinds: Sequence[str]) -> dict[str, Any]:
    """Share of right ones under `name`, with its interval, over all and by kind."""
    by_kind = {
        kind: [mark for mark, k in zip(marks, kinds, strict=True) if k == kind]
        for kind in dict.fromkeys(kinds)
    }
    return {**_rate(name, marks), "by_objects": {kind: _rate(name, some) for kind, some in by_kind.items()}}


def judge_pairs(output: Output, kinds: Iterable[str]) -> dict[str, Any]:
    """Do picture and caption agree, how many captions are distinct, and is their law the data's?

    `law` is the total variation between the samples and the generator (training split) for each marginal; a
    caption that does not parse counts as a value of its own.
    """
    said = [read_caption(text) for text in output.texts]
    marks = list(map(agree, said, read_pictures(output.images)))
    expected = _law(tuple(kinds))
    law = {
        name: total_variation(_counts(feature, said), expected[name]) for name, feature in _FEATURES.items()
    }
    return {**summary("agree", marks, list(map(_kind, said))), "distinct": len(set(output.texts)), "law": law}


def read_pictures(images: Sequence[Image.Image]) -> list[Scene | None]:
    """What the exact reader sees in each picture."""
    return read_images(np.stack([np.asarray(image) for image in images]))


def object_mask(scene: Scene) -> Image.Image:
    """The bounding box of the scene's first object, white on black: what the exam has drawn anew."""
    top, left, bottom, right = scene.box(0)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def total_variation(counts: Mapping[Any, float], expected: Mapping[Any, float]) -> float:
    """Half the sum of |p - q| over everything that occurs; both are counts and are normalised."""
    p, q = (sum(law.values()) or 1 for law in (counts, expected))
    keys = set(counts) | set(expected)
    return round(0.5 * sum(abs(counts.get(key, 0) / p - expected.get(key, 0) / q) for key in keys), 4)


def _kind(said: Description | None) -> str:
    """What kind of scene a caption tells of."""
    if said is None:
        return "unreadable"
    return "groups" if said.is_group else KINDS[len(said.looks) - 1]


def _rate(name: str, marks: Sequence[bool]) -> dict[str, Any]:
    rate = Rate(sum(marks), len(marks))
    low, high = rate.interval
    return {name: round(rate.share, 4), "interval": [round(low, 4), round(high, 4)], "num": rate.total}


# What a description holds, each as a list of values: the marginals of the law.
_FEATURES: dict[str, Callable[[Description], list[Any]]] = {
    "count": lambda said: [len(said.looks)],
    "shape": lambda said: [look.shape for look in said.looks],
    "colour": lambda said: [look.colour for look in said.looks],
    "size": lambda said: [look.size for look in said.looks],
    "relation": lambda said: [relation.direction for relation in said.relations] or ["none"],
    "background": lambda said: [said.background],
}


def _counts(feature: Callable[[Description], list[Any]], said: Sequence[Description | None]) -> Counter:
    return Counter(value for one in said for value in (["unreadable"] if one is None else feature(one)))


@cache
def _law(kinds: tuple[str, ...]) -> dict[str, Counter]:
    source = world(kinds)
    said: list[Description | None] = [source.scene(index).description for index in range(_LAW_SCENES)]
    return {name: _counts(feature, said) for name, feature in _FEATURES.items()}
