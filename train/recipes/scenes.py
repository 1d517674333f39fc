"""The built-in model from nothing: draws its data, trains tokenizers and transformer, saves the folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdlm import Pipeline
from mmdlm.canvas import IMAGE, Canvas, Layout
from mmdlm.codec import Codec
from mmdlm.data import Batches, Scenes, Split, agree, read_caption
from mmdlm.diffusion import Absorbing, Diagonal, Edges, ExactCount, Linear, Masking, Mixture, Square
from mmdlm.evaluate import KINDS, Exam, read_pictures, world
from mmdlm.pretrained import Settings
from mmdlm.program import find_device
from mmdlm.report import sheet
from mmdlm.sampling import ByModality, Confidence
from mmdlm.training import (
    AdamW,
    BFloat16Autocast,
    Constant,
    Ema,
    Float32,
    Moment,
    Reconstruction,
    Run,
    Validation,
    WarmupCosine,
)
from tokenizers_mm import Autoencoder, AutoencoderConfig, BytePairTokenizer, Vocab, measure

QUESTIONS = 4  # one row in so many asks a question, the others are pairs
CARD = """# scenes

A masked-diffusion transformer over captions and 64 x 64 pictures of simple scenes, with its tokenizers.
Trained from nothing by `train/recipes/scenes.py` on what `mmdlm.data.Scenes` draws: no outside data.

- kinds of scene: {kinds}; lattice {lattice} pixels; held-out attribute combinations and three
  (colour, shape) pairs never occur in training
- transformer: {parameters:,} parameters, {first} + {steps} steps of {batch} rows
- tokenizer on held-out pictures: {tokenizer}
"""

PRECISIONS = {"float32": Float32(), "bfloat16": BFloat16Autocast()}  # bfloat16 where the processor has it

COSINE = WarmupCosine(warmup=100, floor=0.02)
LAWS = Mixture(((0.25, Square()), (0.15, Diagonal()), (0.6, Edges(text=0.35, image=0.65, hide=0.1))))


def recipe(
    *,
    out: Path = Path("runs/scenes"),
    kinds: tuple[str, ...] = ("one", "groups"),
    tokenizer_steps: int = 7500,
    first_steps: int = 2459,
    steps: int = 3700,
    batch: int = 32,
    lr: float = 2e-3,
    emphasis: float = 4.0,
    dim: int = 128,
    depth: int = 6,
    precision: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Run]:
    """Image tokenizer, then transformer; the finished model stands in OUT/model.

    The same command takes an interrupted run up again.

    kinds: which scenes, of one, two, three, groups. batch: rows a step, a quarter of them questions.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: wanted one of {', '.join(PRECISIONS)}")
    place = find_device(device, option="device=")
    source, everything = world(kinds, seed=seed), world(KINDS, seed=seed)
    torch.manual_seed(seed)  # the first weights
    image_tokenizer = Autoencoder(AutoencoderConfig(levels=(8, 8, 8, 8)))
    yield tokenizer_run(image_tokenizer, everything, out / "image_tokenizer", tokenizer_steps, progress)
    report = measure(
        image_tokenizer, pixels(world(KINDS, seed=seed + 1, split=Split.HELD_OUT).images(range(512)))
    )
    text_tokenizer = BytePairTokenizer.train(sentences(everything, 8000), size=400)
    layout = layout_of(text_tokenizer, image_tokenizer, source)
    codec = Codec(text_tokenizer, image_tokenizer, layout)
    pipe = Pipeline.untrained(codec, dim=dim, depth=depth, settings=default_settings())
    pipe.transformer.to(place)
    # one object binds colours and shapes to their words sooner; the whole world then shows every combination
    worlds = (("first", kinds[:1], first_steps, Constant(warmup=100)), ("transformer", kinds, steps, COSINE))
    for name, shown, count, rate in worlds:
        held_out = Collate(pipe, world(shown, seed=seed + 1, split=Split.HELD_OUT))
        yield Run(
            module=pipe.transformer,
            objective=Masking(Absorbing(layout.vocab.mask), LAWS, ExactCount(), emphasis=Rare(emphasis)),
            batches=Batches(int, batch, collate=Collate(pipe, world(shown, seed=seed)), prefetch=1),
            steps=count,
            folder=out / name,
            optimizer=AdamW(lr=lr, weight_decay=0.05),
            learning_rate=rate,
            ema=Ema(decay=0.998),
            weights={"text": 4.0, "image": 4.0},
            precision=PRECISIONS[precision],
            validation=Validation(every=500, batches=[held_out.rows(range(256))]),
            hooks=((500, Examine(pipe, shown)),),
            checkpoint_every=250,
            seed=seed,
            progress=progress,
        )
    card = CARD.format(
        kinds=", ".join(kinds),
        lattice=everything.step,
        parameters=pipe.transformer.num_parameters(),
        first=first_steps,
        steps=steps,
        batch=batch,
        tokenizer=report,
    )
    pipe.save_pretrained(out / "model", card=card)


class Rare:
    """How much more a code counts that is not its picture's commonest: the background drowns the objects."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, canvas: Canvas) -> Tensor:
        image = canvas.modality == IMAGE
        apart = -1 - torch.arange(canvas.shape[1])  # other positions: ids of their own
        commonest = torch.where(image, canvas.tokens, apart).mode(dim=1, keepdim=True).values
        return torch.where(image & (canvas.tokens != commonest), self.factor, 1.0)


class Collate:
    """Numbers of scenes become rows: three quarters pairs, one quarter questions."""

    def __init__(self, pipe: Pipeline, source: Scenes) -> None:
        self.pipe = pipe
        self.source = source

    def __call__(self, indices: list[int], rng: np.random.Generator) -> Canvas:
        return self.rows(indices)

    def rows(self, indices: list[int] | range) -> Canvas:
        """The canvas of these scenes."""
        encode, layout, source = self.pipe.text_tokenizer.encode, self.pipe.layout, self.source
        scenes = [(index, source.scene(index)) for index in indices]
        codes = self.pipe.image_tokenizer.encode(
            pixels(np.stack([source.image(scene) for _, scene in scenes]))
        )
        asked = len(scenes) // QUESTIONS
        captions = [encode(source.caption(scene, index)) for index, scene in scenes[asked:]]
        told = [source.question(scene, index) for index, scene in scenes[:asked]]
        questions = layout.questions(
            codes[:asked], [encode(q) for q, _ in told], [encode(a) for _, a in told]
        )
        return Canvas.concat([layout.pairs(captions, codes[asked:]), questions])


class Examine:
    """A hook: a contact sheet of held-out prompts, and how many of 64 the exact reader finds right."""

    def __init__(self, pipe: Pipeline, kinds: tuple[str, ...]) -> None:
        self.pipe = pipe
        self.questions = Exam(kinds=kinds, num=-(-64 // len(kinds)), seed=1).questions()

    def __call__(self, moment: Moment) -> None:
        captions = [q.caption for q in self.questions]
        drawn = self.pipe.text_to_image(captions, progress=False).images
        told = self.pipe.caption([q.picture for q in self.questions], progress=False).texts
        exact = [
            agree(read_caption(said), seen) for said, seen in zip(captions, read_pictures(drawn), strict=True)
        ]
        right = [agree(read_caption(text), q.scene) for text, q in zip(told, self.questions, strict=True)]
        moment.log({"text_to_image.exact": sum(exact) / len(exact), "caption.exact": sum(right) / len(right)})
        sheet(drawn[:64]).save(moment.folder / f"samples-{moment.step:06d}.png")


def tokenizer_run(module: Autoencoder, source: Scenes, folder: Path, steps: int, progress: bool) -> Run:
    """The first stage: windows around objects of every kind of scene, rebuilt from their codes."""
    return Run(
        module=module,
        objective=Reconstruction(),
        batches=Batches(int, 64, collate=lambda indices, rng: windows(source, indices, rng), prefetch=1),
        steps=steps,
        folder=folder,
        optimizer=AdamW(lr=4e-3, weight_decay=0.01),
        learning_rate=WarmupCosine(warmup=50, floor=0.002),
        ema=None,
        checkpoint_every=500,
        progress=progress,
    )


def windows(source: Scenes, indices: list[int], rng: np.random.Generator) -> Tensor:
    """For each scene 32 x 32 pixels that hold one of its objects: most of a whole picture is background."""
    crops = []
    for index in indices:
        scene = source.scene(index)
        top, left, bottom, right = scene.box(int(rng.integers(len(scene.objects))))
        row, column = (
            8 * int(rng.integers(max(0, -(-(end - 32) // 8)), min(32, start) // 8 + 1))
            for start, end in ((top, bottom), (left, right))
        )
        crops.append(source.image(scene)[row : row + 32, column : column + 32])
    return pixels(np.stack(crops))


def layout_of(text: BytePairTokenizer, image: Autoencoder, source: Scenes) -> Layout:
    """Rows with room for the longest of 4000 sentences; pairs and questions of one length, none padded."""
    count, room = 4000, {"caption": 0, "question": 0, "answer": 0}
    for index in range(count):
        scene = source.scene(index)
        question, answer = source.question(scene, index)
        for name, said in (
            ("caption", source.caption(scene, index)),
            ("question", question),
            ("answer", answer),
        ):
            room[name] = max(room[name], len(text.encode(said)) + 1)
    spare = room["caption"] - room["question"] - room["answer"] - 1
    room["question"] += max(spare, 0)
    room["caption"] += max(-spare, 0)
    vocab = Vocab.build(num_text=text.size, num_codes=image.size)
    return Layout(vocab=vocab, grid=image.grid(64, 64), **room)


def default_settings() -> dict[str, Settings]:
    """How the model is sampled unless the caller says otherwise."""
    # on 48 held-out prompts: 23 % exact at temperature 1, guidance 1.5, 32 steps; 52 % at 0.3, none, 48
    drawing = Settings(steps=40, policy=Confidence(temperature=0.3))
    writing = Settings(steps=14, policy=Confidence(schedule=Linear(), temperature=0.0))
    return {
        "text_to_image": drawing,
        "inpaint": drawing,
        "caption": writing,
        "answer": writing,
        "infill": writing,
        "joint": Settings(steps=40, policy=Confidence(temperature=ByModality(text=1.0, image=0.3))),
        "text": Settings(steps=16, policy=Confidence(schedule=Linear())),
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
