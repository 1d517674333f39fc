"""Exactness under many settings of the sampler, point by point, in one file that can be taken up again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmdlm.data import agree, read_caption
from mmdlm.diffusion import Linear
from mmdlm.evaluate import KINDS, Exam, Question, Rate, read_pictures, trained_on
from mmdlm.io import atomic_write_json
from mmdlm.law import distances
from mmdlm.output import Output
from mmdlm.pipeline import Pipeline
from mmdlm.sampling import Ancestral, LeftToRight, Policy, Random, Scheduled, Threshold, Unmask, presets
from mmdlm.sampling import Path as Walk

__all__ = [
    "FORWARDS",
    "HALTON",
    "ORDERS",
    "OWN",
    "PARALLEL",
    "POLICIES",
    "SCALES",
    "STEPS",
    "Curves",
    "Measurement",
    "Paper",
    "Point",
    "guidance_points",
    "joint_points",
    "measure",
    "policies",
    "read_curves",
    "steps_points",
    "sweep",
    "take_up",
]

STEPS = (2, 4, 8, 16, 32, 64)
SCALES = (0.0, 0.5, 1.0, 2.0, 3.0)  # of guidance
FORWARDS = (8, 16, 32, 64)  # in all, of pairs

_WHOLE = 4096  # a block that is longer than any row

# Ways to choose what is written next and how it is drawn: presets, and what they are compared with.
POLICIES: dict[str, Policy] = {
    "surest first, linear": Unmask(Scheduled(Linear()), top_p=0.9),
    "surest first, MaskGIT": presets.maskgit(),
    "surest first, P2": presets.p2(),
    "surest first, EB-Sampler": presets.entropy_bounded(),
    "surest first, Fast-dLLM": presets.fast_dllm(block=_WHOLE),
    "surest first, KLASS": presets.klass(block=_WHOLE),
    "random order, linear": Unmask(Scheduled(Linear()), Random(), top_p=0.9),
    "random order, sure at once": Unmask(Scheduled(Linear()), Random(), Threshold(0.97), top_p=0.9),
    "left to right, linear": Unmask(Scheduled(Linear()), LeftToRight(), top_p=0.9),
    "ancestral, linear": Ancestral(schedule=Linear()),
    "ancestral, ReMDM": presets.remdm(),
}
HALTON = "Halton points, cosine"  # of pictures only, on the model's own grid
OWN = "the model's own policy"
PARALLEL = "image from a quarter on"  # MMaDA-Parallel's order (arXiv:2511.09611), moving at every step
ORDERS = ("both at once", "text first", "image first", PARALLEL)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """`num` held-out scenes, as evenly of all `kinds` as the number allows, deterministic from `seed`."""

    num: int = 200
    kinds: tuple[str, ...] = KINDS
    seed: int = 0

    def questions(self) -> list[Question]:
        """The scenes, kind after kind in turn. Raises ValueError for a kind that there is not."""
        exam = Exam(kinds=self.kinds, num=math.ceil(self.num / max(1, len(self.kinds))), seed=self.seed)
        asked = exam.questions()
        turns = [q for first in range(exam.num) for q in asked[first :: exam.num]]
        return turns[: self.num]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of the sampler, and where its result stands: a figure, a task, a line, a value of x."""

    figure: str  # steps, guidance or joint
    task: str  # text_to_image, caption or joint
    line: str
    x: float
    steps: int
    guidance: float
    policy: Policy

    @property
    def cost(self) -> int:
        """Forwards a sample, at most."""
        return self.steps * (2 if self.guidance else 1)

    def named(self) -> dict[str, Any]:
        """Its fields, the policy as text: what its measurement begins with."""
        return {**vars(self), "policy": repr(self.policy)}

    def gave(self, found: Measurement) -> bool:
        """Whether the measurement was made here, with the very same settings."""
        return self.named().items() <= vars(found).items()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came out at one point: how many samples of how many were exactly right, and at what price."""

    figure: str
    task: str
    line: str
    x: float
    steps: int
    guidance: float
    policy: str
    right: int
    total: int
    forwards: int  # of all samples together
    seconds: float
    lawful: int | None = None  # captions that can be read; of pairs only, as are the next two
    distinct: int | None = None  # captions that differ
    law: dict[str, float] | None = None  # total variation of each marginal from the law of training

    @property
    def rate(self) -> Rate:
        """Right ones of all."""
        return Rate(self.right, self.total)

    @property
    def spent(self) -> float:
        """Forwards a sample."""
        return self.forwards / self.total

    @property
    def lawful_rate(self) -> Rate:
        """Captions that can be read, of all; of pairs only."""
        return Rate(self.lawful or 0, self.total)

    def place(self) -> tuple[str, str, str, float]:
        """Where it stands; of two at one place the later counts."""
        return self.figure, self.task, self.line, self.x


@dataclass(frozen=True, kw_only=True)
class Curves:
    """All that was measured of one model on one paper."""

    model: str  # the pipeline's fingerprint
    paper: Paper
    measurements: tuple[Measurement, ...] = ()

    def holds(self, point: Point) -> bool:
        """Whether this point was measured."""
        return any(point.gave(found) for found in self.measurements)

    def plus(self, new: Measurement) -> Curves:
        """With one more, in the place of an older one there."""
        others = tuple(old for old in self.measurements if old.place() != new.place())
        return replace(self, measurements=(*others, new))

    def of(self, figure: str, task: str) -> list[Measurement]:
        """The measurements of one figure and task."""
        return [found for found in self.measurements if (found.figure, found.task) == (figure, task)]


def steps_points(pipe: Pipeline, steps: Sequence[int] = STEPS) -> list[Point]:
    """The model's own and all other policies at all numbers of steps, drawing and captioning, unguided."""
    return [
        Point(figure="steps", task=task, line=line, x=float(x), steps=x, guidance=0.0, policy=policy)
        for task in ("text_to_image", "caption")
        for line, policy in policies(pipe, task).items()
        for x in steps
    ]


def policies(pipe: Pipeline, task: str) -> dict[str, Policy]:
    """The model's own policy for a task and all others, by name."""
    own, more = pipe.settings[task].policy, {}
    if task == "text_to_image":
        more = {HALTON: presets.halton(pipe.layout.grid)}
    return {OWN: own, **POLICIES, **more}


def guidance_points(pipe: Pipeline, scales: Sequence[float] = SCALES) -> list[Point]:
    """Every scale of guidance at the model's own steps and policy, drawing."""
    own = pipe.settings["text_to_image"]
    shared = {"figure": "guidance", "task": "text_to_image", "line": OWN}
    return [Point(**shared, x=x, steps=own.steps, guidance=x, policy=own.policy) for x in scales]


def joint_points(pipe: Pipeline, totals: Sequence[int] = FORWARDS) -> list[Point]:
    """Pairs from nothing, both at once or one after the other, at equal numbers of forwards in all.

    The model's own policy for pairs, without guidance and rule and with a linear schedule, which spends
    every forward (one that fills many places early ends early), on four walks. In turn each modality gets
    half of the forwards, but never more than it has places, for each forward fills one at least. Raises
    ValueError where that policy is not `Unmask` or a total cannot be spent.
    """
    policy, layout = pipe.settings["joint"].policy, pipe.layout
    if not isinstance(policy, Unmask):
        raise ValueError(f"orders are compared on a policy of class Unmask, and the model's is {policy}")
    rooms = layout.caption, math.prod(layout.grid)
    return [
        Point(
            figure="joint",
            task="joint",
            line=line,
            x=float(total),
            steps=total,
            guidance=0.0,
            policy=replace(policy, plan=walk, quota=Scheduled(Linear()), rule=None, revision=None),
        )
        for total in totals
        for line, walk in zip(ORDERS, _walks(total, *rooms), strict=True)
    ]


def measure(pipe: Pipeline, point: Point, questions: Sequence[Question], *, seed: int) -> Measurement:
    """Sample at one point and have it judged exactly; of pairs as many are made as there are questions.

    Raises ValueError for pairs that took another number of forwards than their point says.
    """
    began = time.perf_counter()
    made, right, more = _TASKS[point.task](pipe, point, questions, seed)
    if point.figure == "joint" and made.forwards != point.steps * len(questions):
        wanted = f"wanted {point.steps} for each of {len(questions)}"
        raise ValueError(f"{point.line}: {made.forwards} forwards, {wanted}; its schedule ends early")
    counts = {"right": sum(right), "total": len(right), "forwards": made.forwards, **more}
    return Measurement(**point.named(), **counts, seconds=round(time.perf_counter() - began, 2))


def sweep(pipe: Pipeline, points: Sequence[Point], curves: Curves, path: Path) -> Iterator[Measurement]:
    """Measure the points and add them to `curves`; each is in the file at `path` before it is yielded."""
    questions = curves.paper.questions()
    for point in points:
        curves = curves.plus(measure(pipe, point, questions, seed=curves.paper.seed))
        atomic_write_json(path, asdict(curves))
        yield curves.measurements[-1]


def take_up(path: Path, pipe: Pipeline, paper: Paper) -> Curves:
    """The curves in the file at `path`, or none where there is no file.

    What was measured with settings that are no longer those of the policies or of the model is left out.
    Raises ValueError where the curves are of another model or paper; nothing in the file is lost.
    """
    empty = Curves(model=pipe.fingerprint, paper=paper)
    if not path.exists():
        return empty
    found = read_curves(path)
    if (found.model, found.paper) != (empty.model, paper):
        raise ValueError(
            f"{path} holds model {found.model} on {found.paper}, and asked for is {empty.model} on {paper}; "
            "choose another folder, or remove the file"
        )
    kept = [one for one in found.measurements if any(point.gave(one) for point in _again(pipe, one))]
    return replace(empty, measurements=tuple(kept))


def _again(pipe: Pipeline, found: Measurement) -> list[Point]:
    """The points of a measurement's figure at its x, as they would be asked for today."""
    today = {
        "steps": lambda: steps_points(pipe, (int(found.x),)),
        "guidance": lambda: guidance_points(pipe, (found.x,)),
        "joint": lambda: joint_points(pipe, (int(found.x),)),
    }
    return today[found.figure]() if found.figure in today else []


def read_curves(path: Path) -> Curves:
    """The file that `sweep` wrote. Raises ValueError for one that is none."""
    try:
        value = json.loads(path.read_bytes())
        paper = Paper(**{**value["paper"], "kinds": tuple(value["paper"]["kinds"])})
        measurements = tuple(Measurement(**entry) for entry in value["measurements"])
        return Curves(model=value["model"], paper=paper, measurements=measurements)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold curves of this version ({error!r})") from error


def _walks(total: int, text: int, image: int) -> tuple[Walk, Walk, Walk, Walk]:
    """Through the square of noise levels, one for each of `ORDERS`, for spans of so many places."""
    if not 2 <= total <= max(text, image):
        raise ValueError(
            f"pairs in {total} forwards cannot be compared: wanted from 2 to {max(text, image)}, "
            "the places of the longer span, for each forward fills one at least"
        )
    turn = [max(min(total // 2, own), total - other) / total for own, other in ((text, image), (image, text))]
    return (
        Walk(),
        Walk(text=(0.0, turn[0]), image=(turn[0], 1.0)),
        Walk(image=(0.0, turn[1]), text=(turn[1], 1.0)),
        Walk(image=(0.25, 1.0)),
    )


_Judged = tuple[Output, list[bool], dict[str, Any]]


def _draw(pipe: Pipeline, point: Point, questions: Sequence[Question], seed: int) -> _Judged:
    made = pipe.text_to_image([q.caption for q in questions], **_sampler(point, seed))
    said = [read_caption(q.caption) for q in questions]
    return made, list(map(agree, said, read_pictures(made.images))), {}


def _tell(pipe: Pipeline, point: Point, questions: Sequence[Question], seed: int) -> _Judged:
    made = pipe.caption([q.picture for q in questions], **_sampler(point, seed))
    said = [read_caption(text) for text in made.texts]
    return made, list(map(agree, said, [q.scene for q in questions])), {}


def _dream(pipe: Pipeline, point: Point, questions: Sequence[Question], seed: int) -> _Judged:
    made = pipe.joint(num_samples=len(questions), **_sampler(point, seed))
    said = [read_caption(text) for text in made.texts]
    more = {
        "lawful": sum(one is not None for one in said),
        "distinct": len(set(made.texts)),
        "law": {name: each.value for name, each in distances(said, trained_on(pipe, KINDS)).items()},
    }
    return made, list(map(agree, said, read_pictures(made.images))), more


def _sampler(point: Point, seed: int) -> dict[str, Any]:
    settings = {"steps": point.steps, "guidance": point.guidance, "policy": point.policy}
    return {**settings, "seed": seed, "progress": False}


_TASKS: dict[str, Callable[[Pipeline, Point, Sequence[Question], int], _Judged]] = {
    "text_to_image": _draw,
    "caption": _tell,
    "joint": _dream,
}
