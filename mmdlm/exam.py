"""The whole exam: several seeds, the law of the pairs, the price of captions. Knows no command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite, log
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmdlm.codec import Codec
from mmdlm.data import Split, agree, caption_entropy, caption_law, read_caption
from mmdlm.evaluate import TASKS, Exam, Question, Rate, kind_of, object_mask, read_pictures, summary
from mmdlm.law import Mixture, distances
from mmdlm.likelihood import text_given_image
from mmdlm.pipeline import Pipeline
from mmdlm.report import sheet
from mmdlm.training import Moment
from tokenizers_mm import ImageTokenizer

__all__ = [
    "EVERY_TASK",
    "UNSEEN_TASKS",
    "Examine",
    "Price",
    "Trial",
    "Watched",
    "averages",
    "examine",
    "prices",
    "spread",
    "whole_exam",
]

EVERY_TASK = (*TASKS, "joint", "likelihood")
UNSEEN_TASKS = ("text_to_image", "caption", "answer")  # of scenes with a (colour, shape) never shown


class Examine:
    """A hook of training: a contact sheet of 64 held-out prompts, and the share of exact ones by kind."""

    def __init__(self, pipe: Pipeline, kinds: tuple[str, ...]) -> None:
        self.pipe = pipe
        self.questions = Exam(kinds=kinds, num=64 // len(kinds), seed=1).questions()

    def __call__(self, moment: Moment) -> None:
        asked = ("text_to_image", "caption")
        made = {name: TASKS[name].ask(self.pipe, self.questions, 0, False) for name in asked}
        right = {name: TASKS[name].mark(self.questions, output) for name, output in made.items()}
        kinds = [question.kind for question in self.questions]
        scores = {task: summary("exact", marks, kinds)["by_kind"] for task, marks in right.items()}
        moment.log(
            {f"{task}.{kind}": score["exact"] for task, s in scores.items() for kind, score in s.items()}
        )
        sheet(made["text_to_image"].images).save(moment.folder / f"samples-{moment.step:06d}.png")


class Trial(NamedTuple):
    """One thing that was right or wrong."""

    seed: int
    kind: str
    right: bool


class Price(NamedTuple):
    """What one caption costs, given its picture, in nats."""

    kind: str
    bound: float  # with the model at most this (NELBO); every `end` behind the caption is counted
    noise: float  # standard error of the bound, over its noise draws
    generator: float  # -log p(caption | picture) of the generator, exactly
    entropy: float  # of the generator's captions of this picture


Item = TypeVar("Item", Trial, Price)
Key = TypeVar("Key", int, str)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One task of one exam."""

    task: str
    seed: int
    trials: Sequence[Trial] = ()
    texts: Sequence[str] = ()  # captions of the pairs
    untouched: Sequence[bool] = ()  # inpainted pictures
    prices: Sequence[Price] = ()
    forwards: int = 0
    seconds: float = 0.0


def examine(
    pipe: Pipeline,
    exams: Sequence[Exam],
    *,
    mixture: Mixture,
    tasks: Iterable[str] = EVERY_TASK,
    draws: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """All scores of a pipeline over exams that differ in their seeds, as plain JSON values.

    The seed of an exam chooses its scenes, the captions and questions asked of them, and the noise of the
    sampler and of the bound. `mixture` is the law that pairs are held against; `draws` noise draws stand
    behind the bound of each caption. Raises ValueError for an unknown task, and for scenes whose captions or
    questions do not fit the model.
    """
    asked = list(dict.fromkeys(tasks))
    unknown = sorted(set(asked) - set(EVERY_TASK))
    if unknown or not asked:
        raise ValueError(f"unknown tasks {unknown}; they are {', '.join(EVERY_TASK)}")
    for exam in exams:  # all of them now, not after an hour
        _check_room(pipe.codec, exam.questions())
    parts = []
    for exam in exams:
        questions = exam.questions()
        for task in asked:
            began = time.perf_counter()
            if task in TASKS:
                part = _ask(pipe, questions, task, exam.seed, progress)
            elif task == "joint":
                part = _dream(pipe, exam, progress)
            else:
                paid = prices(pipe, questions, exam, draws=draws, progress=progress)
                part = _Part(task=task, seed=exam.seed, prices=paid, forwards=draws * len(paid))
            parts.append(replace(part, seconds=time.perf_counter() - began))
    scores = {task: _score([part for part in parts if part.task == task], mixture) for task in asked}
    if "likelihood" in scores:
        scores["likelihood"]["draws"] = draws
    return scores


def whole_exam(
    pipe: Pipeline,
    exams: Sequence[Exam],
    *,
    unseen: int = 200,
    mixture: Mixture,
    tasks: Sequence[str] = EVERY_TASK,
    draws: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """`examine`, what was asked under `exam`, and under `unseen` tasks on so many unseen scenes a kind."""
    scores = examine(pipe, exams, mixture=mixture, tasks=tasks, draws=draws, progress=progress)
    first = exams[0]
    scores["exam"] = {
        "model": pipe.fingerprint,
        "kinds": list(first.kinds),
        "num": first.num,
        "seeds": [exam.seed for exam in exams],
        "split": first.split.value,
    }
    asked = [task for task in UNSEEN_TASKS if task in tasks]
    if unseen > 0 and asked:
        others = [replace(exam, num=unseen, split=Split.UNSEEN) for exam in exams]
        scores["unseen"] = examine(pipe, others, mixture=mixture, tasks=asked, progress=progress)
    return scores


def prices(
    pipe: Pipeline, questions: Sequence[Question], exam: Exam, *, draws: int, progress: bool = True
) -> list[Price]:
    """What each caption costs the model and the generator itself, given its picture.

    The model sees the picture as codes; where two pictures share their codes it cannot reach the exact price.
    """
    ids = pipe.codec.ids([q.caption for q in questions], pipe.layout.caption)
    pairs = pipe.layout.pairs(ids, pipe.encode_images([q.picture for q in questions]))
    bounds, errors = text_given_image(
        pipe.transformer, pairs, draws=draws, seed=exam.seed, batch_size=pipe.batch_size, progress=progress
    )
    laws = [caption_law(q.scene, exam.split) for q in questions]
    return [
        Price(q.kind, bound, error, -log(law[q.caption]), caption_entropy(law))
        for q, law, bound, error in zip(questions, laws, bounds, errors, strict=True)
    ]


def spread(name: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """The mean share of right ones over the seeds under `name`, their pooled interval, the worst seed."""
    grouped = _grouped(trials, lambda trial: trial.seed)
    by_seed = {seed: Rate(sum(t.right for t in some), len(some)) for seed, some in grouped.items()}
    worst = min(by_seed, key=lambda seed: by_seed[seed].share)
    pooled = Rate(sum(rate.right for rate in by_seed.values()), len(trials))
    return {
        name: round(float(np.mean([rate.share for rate in by_seed.values()])), 4),
        "interval": [round(end, 4) for end in pooled.interval],
        "num": pooled.total,
        "worst": round(by_seed[worst].share, 4),
        "worst_seed": worst,
        "by_seed": {str(seed): round(rate.share, 4) for seed, rate in by_seed.items()},
    }


def averages(some: Sequence[Price]) -> dict[str, Any]:
    """Mean prices in nats a caption, with standard errors; None for one that a single value does not give.

    `bound_error` is that over the noise draws alone. `gap` is how much more the bound is than the generator's
    price: on average the Kullback-Leibler divergence of the two laws and what the bound gives away.
    `gap_error` is that over captions, noise included.
    """
    _, bound, noise, generator, entropy = map(np.array, zip(*some, strict=True))
    gap = bound - generator
    errors = {
        "bound_error": float(np.sqrt((noise**2).sum()) / len(some)),
        "gap_error": float(gap.std(ddof=1) / len(some) ** 0.5) if len(some) > 1 else float("inf"),
    }
    means = {"bound": bound, "generator": generator, "entropy": entropy, "gap": gap}
    return {
        **{name: round(float(values.mean()), 4) for name, values in means.items()},
        **{name: round(value, 4) if isfinite(value) else None for name, value in errors.items()},
        "num": len(some),
    }


class Watched:
    """An image tokenizer that remembers the codes that went through it, in either direction."""

    def __init__(self, inner: ImageTokenizer) -> None:
        self.inner = inner
        self.encoded: list[Tensor] = []
        self.decoded: list[Tensor] = []

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def downsample(self) -> int:
        return self.inner.downsample

    @property
    def digits(self) -> tuple[int, ...] | None:
        return self.inner.digits

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.inner.grid(height, width)

    def encode(self, images: Tensor) -> Tensor:
        self.encoded.append(self.inner.encode(images))
        return self.encoded[-1]

    def decode(self, codes: Tensor) -> Tensor:
        self.decoded.append(codes)
        return self.inner.decode(codes)

    def within(self, pipe: Pipeline) -> Pipeline:
        """The same pipeline with this tokenizer."""
        return Pipeline(
            transformer=pipe.transformer,
            text_tokenizer=pipe.text_tokenizer,
            image_tokenizer=self,
            layout=pipe.layout,
            settings=pipe.settings,
            batch_size=pipe.batch_size,
        )

    def untouched(self, holes: Tensor) -> list[bool]:
        """Whether all codes of each picture outside its `holes` (B, h, w) bool came back as they went in."""
        before, after = (torch.cat(codes).cpu() for codes in (self.encoded, self.decoded))
        return ((before == after) | holes).flatten(1).all(1).tolist()


def _ask(pipe: Pipeline, questions: Sequence[Question], task: str, seed: int, progress: bool) -> _Part:
    watched = Watched(pipe.image_tokenizer)
    output = TASKS[task].ask(watched.within(pipe), questions, seed, progress)
    marks = TASKS[task].mark(questions, output)
    untouched: list[bool] = []
    if task == "inpaint":
        covered = pipe.codec.covered([object_mask(q.scene) for q in questions])
        untouched = watched.untouched(pipe.codec.touched(covered))
    return _Part(
        task=task,
        seed=seed,
        trials=[Trial(seed, q.kind, right) for q, right in zip(questions, marks, strict=True)],
        untouched=untouched,
        forwards=output.forwards,
    )


def _dream(pipe: Pipeline, exam: Exam, progress: bool) -> _Part:
    output = pipe.joint(num_samples=exam.num, seed=exam.seed, progress=progress)
    said = [read_caption(text) for text in output.texts]
    marks = map(agree, said, read_pictures(output.images))
    trials = [Trial(exam.seed, kind_of(one), right) for one, right in zip(said, marks, strict=True)]
    return _Part(task="joint", seed=exam.seed, trials=trials, texts=output.texts, forwards=output.forwards)


def _score(parts: Sequence[_Part], mixture: Mixture) -> dict[str, Any]:
    """What all parts of one task come to."""
    task = parts[0].task
    score: dict[str, Any] = {}
    trials = [trial for part in parts for trial in part.trials]
    if trials:
        name = "agree" if task == "joint" else "exact"
        score |= _in_all_and_by_kind(trials, lambda some: spread(name, some))
    kept = [mark for part in parts for mark in part.untouched]
    if kept:
        score["untouched"] = {"right": sum(kept), "num": len(kept)}
    if any(part.texts for part in parts):
        score |= _law_of(parts, mixture)
    paid = [price for part in parts for price in part.prices]
    if paid:
        score |= _in_all_and_by_kind(paid, averages)
    score["forwards"] = sum(part.forwards for part in parts)
    score["seconds"] = round(sum(part.seconds for part in parts), 1)
    return score


def _law_of(parts: Sequence[_Part], mixture: Mixture) -> dict[str, Any]:
    """How many different captions each seed gave, and how far those of all seeds are from the law."""
    said = [read_caption(text) for part in parts for text in part.texts]
    return {
        "distinct": {str(part.seed): len(set(part.texts)) for part in parts},
        "law": {name: asdict(distance) for name, distance in distances(said, mixture).items()},
        "mixture": [round(weight / sum(mixture), 4) for weight in mixture],
    }


def _in_all_and_by_kind(
    items: Sequence[Item], summed: Callable[[Sequence[Item]], dict[str, Any]]
) -> dict[str, Any]:
    by_kind = _grouped(items, lambda item: item.kind)
    return {**summed(items), "by_kind": {kind: summed(some) for kind, some in by_kind.items()}}


def _grouped(items: Sequence[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    keys = dict.fromkeys(map(key, items))
    return {one: [item for item in items if key(item) == one] for one in keys}


def _check_room(codec: Codec, questions: Sequence[Question]) -> None:
    for q in questions:
        try:
            codec.ids([q.caption], codec.layout.caption)
            codec.ids([q.question], codec.layout.question)
        except ValueError as error:
            raise ValueError(f"scenes of the kind {q.kind!r} do not fit this model: {error}") from error
