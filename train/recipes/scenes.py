"""The built-in model from nothing: draws its data, trains tokenizers and transformer, saves the folder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdlm import Pipeline
from mmdlm.canvas import Canvas, Layout
from mmdlm.card import scenes_card, stage
from mmdlm.codec import Codec
from mmdlm.data import Batches, Scenes, Split, hole
from mmdlm.diffusion import (
    Absorbing,
    Diagonal,
    Edges,
    Linear,
    MaskGIT,
    Masking,
    Mixture,
    Polynomial,
    Raised,
    Schedule,
    Square,
    Telling,
)
from mmdlm.evaluate import KINDS, TASKS, Exam, summary, world
from mmdlm.exam import whole_exam
from mmdlm.io import atomic_write_json
from mmdlm.pretrained import Settings
from mmdlm.program import find_device
from mmdlm.report import sheet
from mmdlm.sampling import ByModality, Confidence, Drawn, Order, Random
from mmdlm.sampling import Path as Walk
from mmdlm.training import (
    WSD,
    AdamW,
    BFloat16Autocast,
    Ema,
    Exchange,
    Float32,
    Moment,
    Muon,
    Reconstruction,
    Run,
    Validation,
    WarmupCosine,
)
from tokenizers_mm import Autoencoder, AutoencoderConfig, BytePairTokenizer, Vocab, measure

PRECISIONS = {"float32": Float32(), "bfloat16": BFloat16Autocast()}  # bfloat16 where the processor has it
LEVELS = (4, 4, 4, 8, 8)  # of a code's digits
FACTORS = (0, 1, 1, 2, 2)  # what each digit means: background, colour, form
WINDOWS = 16  # scenes an update of the tokenizer, in four paints each
DIRECTIONS = ("left", "right", "above", "below")  # one word of a caption on which most of a picture hangs
EXAM_SEED = 1000  # scenes that no setting was chosen on
GIVEN = Edges(text=0.1, image=0.9, hide=0.05)
ALONE = Edges(text=1.0, image=0.0, hide=1.0)  # a caption of nothing: how a joint sample begins
PLACED = Raised(Edges(text=0.0, image=1.0, hide=0.0), floor=0.8)  # where things go is decided first
LAWS = Mixture(((0.15, Square()), (0.05, Diagonal()), (0.32, GIVEN), (0.4, PLACED), (0.08, ALONE)))


def recipe(
    *,
    out: Path = Path("runs/scenes"),
    mixture: tuple[float, float, float, float] = (1.0, 3.0, 3.0, 1.5),
    rows: tuple[int, int, int, int] = (2, 4, 5, 5),
    start: Path | None = None,
    tokenizer_steps: int = 4500,
    decoder_steps: int = 400,
    steps: int = 9000,
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

    mixture: weights of scenes of one, two, three objects and groups, 0 leaves a kind out. rows: shares of a
    batch, see `Collate`. start: a model of this recipe to go on from, with another seed; its tokenizers and
    size stay. batch: rows a step, worked on in `parts`, on a CPU at once. lr: of Muon. note: what the card
    says of this run. exam, seeds: it tells of so many held-out scenes of each kind and seed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: wanted one of {', '.join(PRECISIONS)}")
    if parts < 1 or batch < 1 or batch % parts:
        raise ValueError(f"batch={batch}: wanted a multiple of parts={parts}")
    place = find_device(device, option="device=")
    source = Scenes(seed=seed, mixture=mixture)
    kinds = tuple(kind for kind, weight in zip(KINDS, mixture, strict=True) if weight > 0)
    torch.manual_seed(seed)  # the first weights
    painted = world(KINDS, seed=seed)
    if start is None:
        image_tokenizer = Autoencoder(AutoencoderConfig(levels=LEVELS))
        yield image_run(image_tokenizer, painted, out / "image_tokenizer", tokenizer_steps, progress)
        pipe = untrained(image_tokenizer, kinds, dim=dim, depth=depth)
        history = [stage(out / "image_tokenizer", "image tokenizer", 4 * WINDOWS)]
    else:
        pipe = Pipeline.from_pretrained(start)
        if "history" not in pipe.training:
            raise ValueError(f"start={start}: no model of this recipe, it does not say how it was trained")
        history = pipe.training["history"]
    if decoder_steps:
        tokenizer = pipe.image_tokenizer
        assert isinstance(tokenizer, Autoencoder)
        yield image_run(tokenizer, painted, out / "image_decoder", decoder_steps, progress, finish=True)
        history = [*history, stage(out / "image_decoder", "image decoder", WINDOWS)]
    where = tuple(pipe.text_tokenizer.encode(word)[0] for word in DIRECTIONS)
    telling = Telling(codes=emphasis, texts=emphasis, ids=where)
    pipe.transformer.to(place).train().requires_grad_(True)
    held_out = Collate(pipe, world(kinds, seed=seed + 1, split=Split.HELD_OUT), rows)
    yield Run(
        module=pipe.transformer,
        objective=Masking(Absorbing(pipe.layout.vocab.mask), LAWS, MaskGIT(), emphasis=telling),
        batches=Batches(int, batch // parts, collate=Collate(pipe, source, rows), prefetch=2),
        steps=steps,
        folder=out / "transformer",
        optimizer=Muon(lr=lr, weight_decay=0.05, rest=AdamW(lr=2e-3, weight_decay=0.05)),
        learning_rate=WSD(warmup=100, decay=steps * 7 // 10, floor=0.01),
        ema=Ema(decay=0.998),
        accumulate=parts,
        threads=parts if place.type == "cpu" else 1,
        weights={"text": 4.0, "image": 4.0},
        precision=PRECISIONS[precision],
        validation=Validation(every=500, batches=[held_out(list(range(256)), np.random.default_rng(seed))]),
        hooks=((1000, Examine(pipe, kinds)),),
        checkpoint_every=250,
        seed=seed,
        progress=progress,
    )
    history = [*history, stage(out / "transformer", "transformer", batch) | ({"note": note} if note else {})]
    pipe.training = {"mixture": list(source.mixture), "history": history}
    exams = [Exam(kinds=kinds, num=exam, seed=EXAM_SEED + number) for number in range(seeds)]
    scores = whole_exam(pipe, exams, mixture=source.mixture, unseen=min(exam, 200), progress=progress)
    atomic_write_json(out / "scores.json", scores)
    pipe.save_pretrained(out / "model", card=scenes_card(facts(pipe, source), history, scores))


def untrained(image: Autoencoder, kinds: tuple[str, ...], *, dim: int, depth: int) -> Pipeline:
    """A pipeline whose texts are learned from all kinds of scene, with room for those of `kinds`."""
    text = BytePairTokenizer.train(sentences(world(KINDS), 8000), size=512)
    layout = layout_of(text, image, world(kinds))
    return Pipeline.untrained(Codec(text, image, layout), dim=dim, depth=depth, settings=default_settings())


def facts(pipe: Pipeline, source: Scenes) -> dict[str, str]:
    """What the model card says before any score."""
    shares = ", ".join(f"{kind} {share:g}" for kind, share in zip(KINDS, source.mixture, strict=True))
    held_out = pixels(world(KINDS, seed=EXAM_SEED, split=Split.HELD_OUT).images(range(512)))
    rebuilt = measure(pipe.image_tokenizer, held_out)
    return {
        "scenes of training": f"{shares} (weights); lattice {source.step} pixels",
        "transformer": f"{pipe.transformer.num_parameters():,} parameters",
        "image tokenizer": f"{rebuilt.psnr:.1f} dB, SSIM {rebuilt.ssim:.3f} on {rebuilt.num_images} held-out "
        f"pictures; {rebuilt.usage:.1%} of {pipe.image_tokenizer.size:,} codes used",
    }


class Collate:
    """Numbers of scenes become rows.

    `rows` are the parts of four sorts: a question; the picture given, so that captions are learnt apart; the
    caption given and a hole in the picture, so that it is learnt what words look like; whole pairs.
    """

    def __init__(self, pipe: Pipeline, source: Scenes, rows: tuple[int, int, int, int]) -> None:
        self.pipe = pipe
        self.source = source
        self.ends = [sum(rows[: number + 1]) / sum(rows) for number in range(3)]

    def __call__(self, indices: list[int], rng: np.random.Generator) -> Canvas:
        """The canvas of these scenes."""
        encode, layout, source = self.pipe.text_tokenizer.encode, self.pipe.layout, self.source
        scenes = [source.scene(index) for index in indices]
        codes = self.pipe.image_tokenizer.encode(pixels(np.stack([source.image(scene) for scene in scenes])))
        said = [source.caption(scene, index) for scene, index in zip(scenes, indices, strict=True)]
        captions = [encode(caption) for caption in said]
        ask, tell, draw = (round(len(scenes) * end) for end in self.ends)
        asked = [source.question(s, index) for s, index in zip(scenes[:ask], indices[:ask], strict=True)]
        holes = np.stack([hole(*pair, rng) for pair in zip(scenes[tell:draw], said[tell:draw], strict=True)])
        return Canvas.concat(
            [
                layout.questions(codes[:ask], [encode(q) for q, _ in asked], [encode(a) for _, a in asked]),
                layout.captionings(codes[ask:tell], captions[ask:tell]),
                layout.inpaintings(codes[tell:draw], torch.from_numpy(holes), captions[tell:draw]),
                layout.pairs(captions[draw:], codes[draw:]),
            ]
        )


class Examine:
    """A hook: a contact sheet of held-out prompts, and the share of exact ones by kind of scene."""

    def __init__(self, pipe: Pipeline, kinds: tuple[str, ...]) -> None:
        self.pipe = pipe
        self.questions = Exam(kinds=kinds, num=64 // len(kinds), seed=1).questions()

    def __call__(self, moment: Moment) -> None:
        asked = ("text_to_image", "caption")
        made = {name: TASKS[name].ask(self.pipe, self.questions, 0, False) for name in asked}
        right = {name: TASKS[name].mark(self.questions, output) for name, output in made.items()}
        kinds = [q.kind for q in self.questions]
        scores = {task: summary("exact", marks, kinds)["by_kind"] for task, marks in right.items()}
        moment.log(
            {f"{task}.{kind}": score["exact"] for task, s in scores.items() for kind, score in s.items()}
        )
        sheet(made["text_to_image"].images).save(moment.folder / f"samples-{moment.step:06d}.png")


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


def whole(source: Scenes, indices: list[int], rng: np.random.Generator) -> Tensor:
    """(B, 3, 64, 64)."""
    return pixels(source.images(indices))


def windows(source: Scenes, indices: list[int], rng: np.random.Generator) -> Tensor:
    """(B, 2, 2, 3, 32, 32): what is around one object of each scene, by background and by colours."""
    return pixels(np.concatenate([source.window(index, rng) for index in indices])).unflatten(0, (-1, 2, 2))


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


def default_settings() -> dict[str, Settings]:
    """How the model is sampled unless the caller says otherwise."""
    drawing = Settings(steps=40, policy=Confidence(schedule=Polynomial(2.0), temperature=0.3))
    writing = Settings(steps=22, policy=Confidence(schedule=Linear(), temperature=0.0, order=Random()))
    both = Confidence(
        schedule=ByModality[Schedule](text=Linear(), image=Polynomial(2.0)),
        temperature=ByModality(text=0.7, image=0.3),
        order=ByModality[Order](text=Random(), image=Drawn()),
        path=Walk(text=(0.0, 0.5), image=(0.5, 1.0)),  # of 48 pairs 46 % agree, at once 17 %
    )
    return {
        "text_to_image": drawing,
        "inpaint": drawing,
        "caption": writing,
        "answer": writing,
        "infill": writing,
        "joint": Settings(steps=40, policy=both),
        "text": Settings(steps=22, policy=Confidence(schedule=Linear(), order=Random())),
    }


def sentences(source: Scenes, count: int) -> Iterator[str]:
    """Captions, questions and answers for the text tokenizer."""
    for index in range(count):
        scene = source.scene(index)
        yield source.caption(scene, index)
        yield from source.question(scene, index)


def pixels(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
