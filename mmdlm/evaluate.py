"""The exam on scenes: what a pipeline makes, judged exactly. Knows a pipeline by its methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmdlm.data import Description, Scene, Scenes, Split, agree, read_caption, read_images
from mmdlm.law import Mixture, as_mixture, distances
from mmdlm.output import Output
from mmdlm.pipeline import Pipeline

__all__ = [
    "KINDS",
    "TASKS",
    "Exam",
    "Question",
    "Rate",
    "Task",
    "judge_pairs",
    "kind_of",
    "object_mask",
    "read_pictures",
    "summary",
    "take",
    "trained_on",
    "world",
]

KINDS = ("one", "two", "three", "groups")  # kinds of scene, in the order of `Scenes.mixture`


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
    outputs = {name: task.ask(pipe, questions, exam.seed, progress) for name, task in TASKS.items()}
    marks = {name: task.mark(questions, outputs[name]) for name, task in TASKS.items()}
    outputs["joint"] = pipe.joint(num_samples=exam.num, seed=exam.seed, progress=progress)
    kinds = [q.kind for q in questions]
    return {
        **{name: summary("exact", right, kinds) for name, right in marks.items()},
        "joint": judge_pairs(outputs["joint"], trained_on(pipe, exam.kinds)),
        "exam": {"kinds": list(exam.kinds), "num": exam.num, "seed": exam.seed, "split": exam.split.value},
        "forwards": {name: output.forwards for name, output in outputs.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }


@dataclass(frozen=True)
class Task:
    """One thing that is asked about every scene: of (pipeline, questions, seed, progress), and its marks."""

    ask: Callable[[Pipeline, Sequence[Question], int, bool], Output]
    mark: Callable[[Sequence[Question], Output], list[bool]]


def _draw(pipe: Pipeline, questions: Sequence[Question], seed: int, progress: bool) -> Output:
    return pipe.text_to_image([q.caption for q in questions], seed=seed, progress=progress)


def _caption(pipe: Pipeline, questions: Sequence[Question], seed: int, progress: bool) -> Output:
    return pipe.caption([q.picture for q in questions], seed=seed, progress=progress)


def _answer(pipe: Pipeline, questions: Sequence[Question], seed: int, progress: bool) -> Output:
    pictures, asked = [q.picture for q in questions], [q.question for q in questions]
    return pipe.answer(pictures, asked, seed=seed, progress=progress)


def _inpaint(pipe: Pipeline, questions: Sequence[Question], seed: int, progress: bool) -> Output:
    pictures, holes = [q.picture for q in questions], [object_mask(q.scene) for q in questions]
    return pipe.inpaint(pictures, holes, [q.caption for q in questions], seed=seed, progress=progress)


def _pictures_right(questions: Sequence[Question], output: Output) -> list[bool]:
    seen = read_pictures(output.images)
    return [agree(read_caption(q.caption), scene) for q, scene in zip(questions, seen, strict=True)]


def _captions_right(questions: Sequence[Question], output: Output) -> list[bool]:
    return [agree(read_caption(text), q.scene) for text, q in zip(output.texts, questions, strict=True)]


def _answers_right(questions: Sequence[Question], output: Output) -> list[bool]:
    return [text == q.answer for text, q in zip(output.texts, questions, strict=True)]


TASKS: Mapping[str, Task] = {
    "text_to_image": Task(_draw, _pictures_right),
    "caption": Task(_caption, _captions_right),
    "answer": Task(_answer, _answers_right),
    "inpaint": Task(_inpaint, _pictures_right),
}


def summary(name: str, marks: Sequence[bool], kinds: Sequence[str]) -> dict[str, Any]:
    """Share of right ones under `name`, with its interval, over all and by kind."""
    by_kind = {
        kind: [mark for mark, k in zip(marks, kinds, strict=True) if k == kind]
        for kind in dict.fromkeys(kinds)
    }
    return {**_rate(name, marks), "by_kind": {kind: _rate(name, some) for kind, some in by_kind.items()}}


def judge_pairs(output: Output, mixture: Mixture) -> dict[str, Any]:
    """Do picture and caption agree, how many captions are distinct, and is their law the data's?

    `law` is the total variation between the samples and the generator (training split, kinds weighed by
    `mixture`) for each marginal; a caption that does not parse counts as a value of its own.
    """
    said = [read_caption(text) for text in output.texts]
    marks = list(map(agree, said, read_pictures(output.images)))
    return {
        **summary("agree", marks, list(map(kind_of, said))),
        "distinct": len(set(output.texts)),
        "law": {name: distance.value for name, distance in distances(said, mixture).items()},
    }


def trained_on(pipe: Pipeline, kinds: Iterable[str]) -> Mixture:
    """The mixture of kinds that the model says it was trained on; where it says none, `kinds` equally.

    Raises ValueError for one that is none.
    """
    told = pipe.training.get("mixture")
    if told is None:
        return world(kinds).mixture
    try:
        return as_mixture(told)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model says it was trained on a mixture {told!r}: {error}") from error


def read_pictures(images: Sequence[Image.Image]) -> list[Scene | None]:
    """What the exact reader sees in each picture."""
    return read_images(np.stack([np.asarray(image) for image in images]))


def object_mask(scene: Scene) -> Image.Image:
    """The bounding box of the scene's first object, white on black: what the exam has drawn anew."""
    top, left, bottom, right = scene.box(0)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def kind_of(said: Description | None) -> str:
    """What kind of scene a caption tells of."""
    if said is None:
        return "unreadable"
    return "groups" if said.is_group else KINDS[len(said.looks) - 1]


def _rate(name: str, marks: Sequence[bool]) -> dict[str, Any]:
    rate = Rate(sum(marks), len(marks))
    low, high = rate.interval
    return {name: round(rate.share, 4), "interval": [round(low, 4), round(high, 4)], "num": rate.total}
