"""The built-in model from nothing: draws its data, trains tokenizers and transformer, saves the folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdlm import Pipeline
from mmdlm.canvas import Layout
from mmdlm.card import scenes_card, stage
from mmdlm.codec import Codec
from mmdlm.data import Batches, Scenes, Split
from mmdlm.diffusion import (
    Absorbing,
    Edges,
    Linear,
    MaskGIT,
    Masking,
)
from mmdlm.evaluate import KINDS, Exam, world
from mmdlm.exam import Examine, whole_exam
from mmdlm.io import atomic_write_json
from mmdlm.lessons import LESSONS, Rows, course, favoured
from mmdlm.pretrained import Settings
from mmdlm.program import find_device
from mmdlm.sampling import ByModality, Drawn, LeftToRight, Order, Rule, Scale, Scheduled, Threshold, Unmask
from mmdlm.sampling import Path as Walk
from mmdlm.training import (
    WSD,
    AdamW,
    BFloat16Autocast,
    Ema,
    Exchange,
    Float32,
    Muon,
    Reconstruction,
    Run,
    Validation,
    WarmupCosine,
)
from tokenizers_mm import Autoencoder, AutoencoderConfig, BytePairTokenizer, Vocab, measure, to_tensor

PRECISIONS = {"float32": Float32(), "bfloat16": BFloat16Autocast()}  # bfloat16 where the processor has it
LEVELS = (4, 4, 4, 8, 8)  # of the quantiser's channels
FACTORS = (0, 1, 1, 2, 2)  # what each channel means: background, colour, form
GROUPS = (1, 2, 2)  # channels of each factor: colours and forms that never occur get no codes
WINDOWS = 16  # scenes an update of the tokenizer, in four paints each
EXAM_SEED = 1000  # scenes that no setting was chosen on


def recipe(
    *,
    out: Path = Path("runs/scenes"),
    kinds: tuple[str, ...] = KINDS,
    lessons: tuple[str, ...] = tuple(LESSONS),
    start: Path | None = None,
    tokenizer_steps: int = 4500,
    decoder_steps: int = 400,
    steps: int = 7000,
    batch: int = 32,
    parts: int = 2,
    lr: float = 5e-3,
    emphasis: float = 4.0,
    dim: int = 128,
    depth: int = 6,
    note: str = "",
    exam: int = 200,
    seeds: int = 1,
    precision: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Run]:
    """Image tokenizer, then transformer; the finished model stands in OUT/model. Interrupted, it goes on.

    kinds: which scenes, of one, two, three, groups. lessons: which of those in `mmdlm/lessons.py`, one after
    the other, `steps` in all. start: a model of this recipe to go on from, with another seed; its tokenizers
    and size stay. batch: rows a step, worked on in `parts`, on a CPU at once. lr: of Muon. note: what the
    card says of this run. exam, seeds: it tells of so many held-out scenes of each kind and seed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: wanted one of {', '.join(PRECISIONS)}")
    if parts < 1 or batch < 1 or batch % parts:
        raise ValueError(f"batch={batch}: wanted a multiple of parts={parts}")
    place = find_device(device, option="device=")
    plan = course(lessons, kinds)
    source = Scenes(seed=seed, mixture=list(plan.values())[-1].mixture)  # of the last lesson
    torch.manual_seed(seed)  # the first weights
    painted = world(KINDS, seed=seed)
    if start is None:
        image_tokenizer = Autoencoder(AutoencoderConfig(levels=LEVELS))
        yield image_run(image_tokenizer, painted, out / "image_tokenizer", tokenizer_steps, progress)
        image_tokenizer = image_tokenizer.compact(codes_of(image_tokenizer, painted, 8000), GROUPS)
        pipe = untrained(image_tokenizer, kinds, dim=dim, depth=depth)
        history = [stage(out / "image_tokenizer", "image tokenizer", 4 * WINDOWS)]
    else:
        pipe = Pipeline.from_pretrained(start)
        if "history" not in pipe.training:
            raise ValueError(f"start={start}: no model of this recipe, it does not say how it was trained")
        history = pipe.training["history"]
        pipe.settings |= default_settings(pipe.layout)
    if decoder_steps:
        tokenizer = pipe.image_tokenizer
        assert isinstance(tokenizer, Autoencoder)
        yield image_run(tokenizer, painted, out / "image_decoder", decoder_steps, progress, finish=True)
        history = [*history, stage(out / "image_decoder", "image decoder", WINDOWS)]
    emphasised = favoured(pipe, painted, emphasis)
    absorbing = Absorbing(pipe.layout.vocab.mask)
    plain = replace(LESSONS["all"], asked=0.0, begun=0.0)  # whole captions
    unseen = Rows(pipe, world(kinds, seed=seed + 1, split=Split.HELD_OUT), plain)
    held_out = unseen([*range(256)], np.random.default_rng(seed))  # of all lessons the same, under a bound
    pipe.transformer.to(place).train().requires_grad_(True)
    for number, (name, lesson) in enumerate(plan.items()):
        last, shown = number + 1 == len(plan), Scenes(seed=seed + number, mixture=lesson.mixture)
        count = max(1, round(steps * lesson.share / sum(each.share for each in plan.values())))
        yield Run(
            module=pipe.transformer.train(),
            objective=Masking(absorbing, lesson.laws, MaskGIT(), favoured=emphasised),
            batches=Batches(int, batch // parts, collate=Rows(pipe, shown, lesson), prefetch=2),
            steps=count,
            folder=out / name,
            optimizer=Muon(lr=lr, weight_decay=0.05, rest=AdamW(lr=2e-3, weight_decay=0.05)),
            learning_rate=WSD(warmup=100, decay=count if last else 0, floor=0.01),
            ema=Ema(decay=0.998),
            accumulate=parts,
            threads=parts if place.type == "cpu" else 1,
            weights={"text": 4.0, "image": lesson.image},
            precision=PRECISIONS[precision],
            validation=Validation(every=500, batches=[held_out], objective=Masking(absorbing, Edges())),
            hooks=((1000, Examine(pipe, kinds)),),
            checkpoint_every=250,
            seed=seed + number,
            progress=progress,
        )
        history = [*history, stage(out / name, f"transformer, {name}", batch)]
    if note:
        history[-1]["note"] = note
    pipe.training = {"mixture": list(source.mixture), "history": history}
    exams = [Exam(kinds=kinds, num=exam, seed=EXAM_SEED + number) for number in range(seeds)]
    scores = whole_exam(pipe, exams, mixture=source.mixture, unseen=min(exam, 200), progress=progress)
    atomic_write_json(out / "scores.json", scores)
    pipe.save_pretrained(out / "model", card=scenes_card(facts(pipe, source), history, scores))


def untrained(image: Autoencoder, kinds: tuple[str, ...], *, dim: int, depth: int) -> Pipeline:
    """A pipeline whose texts are learned from all kinds of scene, with room for those of `kinds`."""
    text = BytePairTokenizer.train(sentences(world(KINDS), 8000), size=512)
    layout = layout_of(text, image, world(kinds))
    codec, settings = Codec(text, image, layout), default_settings(layout)
    return Pipeline.untrained(codec, dim=dim, depth=depth, settings=settings)


def facts(pipe: Pipeline, source: Scenes) -> dict[str, str]:
    """What the model card says before any score."""
    shares = ", ".join(f"{kind} {share:g}" for kind, share in zip(KINDS, source.mixture, strict=True))
    held_out = to_tensor(world(KINDS, seed=EXAM_SEED, split=Split.HELD_OUT).images(range(512)))
    rebuilt = measure(pipe.image_tokenizer, held_out)
    return {
        "scenes of training": f"{shares} (weights); lattice {source.step} pixels",
        "transformer": f"{pipe.transformer.num_parameters():,} parameters",
        "image tokenizer": f"{rebuilt.psnr:.1f} dB, SSIM {rebuilt.ssim:.3f} on {rebuilt.num_images} held-out "
        f"pictures; {rebuilt.usage:.1%} of {pipe.image_tokenizer.size:,} codes used",
    }


def image_run(
    module: Autoencoder, source: Scenes, folder: Path, steps: int, progress: bool, *, finish: bool = False
) -> Run:
    """Windows around objects in four paints; to finish, whole pictures for the decoder alone, codes stay."""
    for name, weight in module.named_parameters():
        weight.requires_grad_(not finish or name.startswith("decoder."))
    lr = 1e-3 if finish else 4e-3
    return Run(
        module=module,
        objective=Reconstruction() if finish else Exchange(factors=FACTORS),
        batches=Batches(int, WINDOWS, collate=partial(whole if finish else windows, source), prefetch=2),
        steps=steps,
        folder=folder,
        optimizer=Muon(lr=lr, weight_decay=0.01, rest=AdamW(lr=lr, weight_decay=0.01)),
        learning_rate=WarmupCosine(warmup=50, floor=0.002),
        ema=None,
        checkpoint_every=500,
        progress=progress,
    )


def codes_of(module: Autoencoder, source: Scenes, count: int) -> Tensor:
    """The codes of so many scenes."""
    parts = torch.arange(count).split(250)
    return torch.cat([module.encode(to_tensor(source.images(part.tolist()))) for part in parts])


def whole(source: Scenes, indices: list[int], rng: np.random.Generator) -> Tensor:
    """(B, 3, 64, 64)."""
    return to_tensor(source.images(indices))


def windows(source: Scenes, indices: list[int], rng: np.random.Generator) -> Tensor:
    """(B, 2, 2, 3, 32, 32): what is around one object of each scene, by background and by colours."""
    crops = np.concatenate([source.window(index, rng) for index in indices])
    return to_tensor(crops).unflatten(0, (-1, 2, 2))


def layout_of(text: BytePairTokenizer, image: Autoencoder, source: Scenes) -> Layout:
    """Rows with room for the longest of 4000 sentences; pairs and questions of one length, none padded."""
    room = {"caption": 0, "question": 0, "answer": 0}
    for index in range(4000):
        scene = source.scene(index)
        said = source.caption(scene, index), *source.question(scene, index)
        room = {name: max(room[name], len(text.encode(s)) + 1) for name, s in zip(room, said, strict=True)}
    spare = room["caption"] - room["question"] - room["answer"] - 1
    room["question"] += max(spare, 0)
    room["caption"] += max(-spare, 0)
    vocab = Vocab.build(num_text=text.size, num_codes=image.size)
    return Layout(vocab=vocab, grid=image.grid(64, 64), **room)


def default_settings(layout: Layout) -> dict[str, Settings]:
    """How the model is sampled unless the caller says otherwise: a place a forward, and what is sure."""
    drawing = Unmask(quota=Scheduled(Linear()), temperature=0.6, choice_temperature=0.2, rule=Threshold(0.97))
    writing = Unmask(quota=Scheduled(Linear()), temperature=0.0, order=LeftToRight(), rule=Threshold(0.99))
    words, places = layout.caption, prod(layout.grid)
    turn = words / (words + places)
    both = Unmask(
        quota=Scheduled(Linear()),
        temperature=ByModality(text=0.8, image=0.6),
        order=ByModality[Order](text=LeftToRight(), image=Drawn()),
        choice_temperature=ByModality[float | Scale](text=0.0, image=0.2),
        rule=ByModality[Rule | None](text=None, image=Threshold(0.97)),
        plan=Walk(text=(0.0, turn), image=(turn, 1.0)),
    )
    return {
        "text_to_image": Settings(steps=places, policy=drawing),
        "inpaint": Settings(steps=places, policy=drawing),
        "caption": Settings(steps=words, policy=writing),
        "answer": Settings(steps=words, policy=writing),
        "infill": Settings(steps=words, policy=replace(writing, order=Drawn())),
        "joint": Settings(steps=words + places, policy=both),
        "text": Settings(steps=words, policy=replace(writing, temperature=1.0, rule=None)),
    }


def sentences(source: Scenes, count: int) -> Iterator[str]:
    """Captions, questions and answers for the text tokenizer."""
    for index in range(count):
        scene = source.scene(index)
        yield source.caption(scene, index)
        yield from source.question(scene, index)
