"""One's own image-text pairs: any imagefolder through tokenizers and transformer, with samples on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdlm import Pipeline
from mmdlm.canvas import Canvas, Layout
from mmdlm.codec import Codec
from mmdlm.data import Batches, Encoded, ImageError, ImageFolder, Listed, Sample, Shuffled, Skip, decode, fit
from mmdlm.diffusion import Absorbing, Diagonal, Edges, Linear, Masking, Mixture, Square
from mmdlm.pretrained import Settings
from mmdlm.program import find_device
from mmdlm.report import sheet
from mmdlm.sampling import Scheduled, Unmask
from mmdlm.training import (
    AdamW,
    BFloat16Autocast,
    Ema,
    Float32,
    Moment,
    Muon,
    Reconstruction,
    Run,
    WarmupCosine,
)
from tokenizers_mm import Autoencoder, AutoencoderConfig, BytePairTokenizer, Vocab

T = TypeVar("T")

LAWS = Mixture(((0.25, Square()), (0.15, Diagonal()), (0.6, Edges(text=0.4, image=0.6, hide=0.1))))

PRECISIONS = {"float32": Float32(), "bfloat16": BFloat16Autocast()}  # bfloat16 where the processor has it


def recipe(
    *,
    data: Path,
    out: Path = Path("runs/pairs"),
    rows: int | None = None,
    without: str = "",
    size: int = 64,
    tokenizer_steps: int = 2000,
    steps: int = 4000,
    batch: int = 32,
    parts: int = 2,
    lr: float = 5e-3,
    dim: int = 192,
    depth: int = 6,
    text_vocabulary: int = 2000,
    samples_every: int = 250,
    precision: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Run]:
    """Tokenizers, then transformer; the model stands in OUT/model, contact sheets beside the checkpoints.

    data: a folder of pictures with metadata.jsonl or metadata.csv (file_name, text). rows: only so many of
    them, taken evenly from the whole folder. without: leaves out the rows with these words in their text.
    size: pixels a side, a multiple of 8; pictures are scaled and cropped to it. batch: rows a step of the
    transformer, worked on in `parts`, on a CPU at once. lr: of Muon. Pictures that cannot be read are left
    out and named.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: wanted one of {', '.join(PRECISIONS)}")
    if parts < 1 or batch < 1 or batch % parts:
        raise ValueError(f"batch={batch}: wanted a multiple of parts={parts}")
    if size < 8 or size % 8:
        raise ValueError(f"size={size}: wanted a multiple of 8 pixels")
    if rows is not None and rows < 1:
        raise ValueError(f"rows={rows}: wanted at least 1")
    place = find_device(device, option="device=")
    torch.manual_seed(seed)  # the first weights
    skip = Skip()
    folder = ImageFolder(data, load=lambda path: fit(decode(path), size), on_error=skip)
    samples = read(folder, rows, skip, without)
    pictures = pixels(samples)
    said = [text for sample in samples for text in sample.texts]
    text_tokenizer = BytePairTokenizer.train(said, size=text_vocabulary)
    image_tokenizer = Autoencoder(AutoencoderConfig(levels=(8, 8, 8, 8), context=3))
    yield Run(
        module=image_tokenizer,
        objective=Reconstruction(),
        batches=Batches(
            Listed(int, len(samples), order=Shuffled(seed)), batch, collate=lambda items, rng: pictures[items]
        ),
        steps=tokenizer_steps,
        folder=out / "image_tokenizer",
        optimizer=Muon(lr=4e-3, weight_decay=0.01, rest=AdamW(lr=4e-3, weight_decay=0.01)),
        learning_rate=WarmupCosine(warmup=50, floor=0.01),
        ema=None,
        hooks=((samples_every, Rebuild(pictures[:32])),),
        checkpoint_every=500,
        progress=progress,
    )
    codes = torch.cat([image_tokenizer.encode(part) for part in pictures.split(64)]).numpy()
    pairs = [Encoded(sample.name, code, sample.texts) for sample, code in zip(samples, codes, strict=True)]
    pipe = build(pairs, text_tokenizer, image_tokenizer, dim=dim, depth=depth)
    yield Run(
        module=pipe.transformer.to(place),
        objective=Masking(Absorbing(pipe.layout.vocab.mask), LAWS),
        batches=Batches(
            Listed(pairs.__getitem__, len(pairs), order=Shuffled(seed)),
            batch // parts,
            collate=Rows(pipe),
            prefetch=2,
        ),
        accumulate=parts,
        threads=parts if place.type == "cpu" else 1,
        steps=steps,
        folder=out / "transformer",
        optimizer=Muon(lr=lr, weight_decay=0.05, rest=AdamW(lr=2e-3, weight_decay=0.05)),
        learning_rate=WarmupCosine(warmup=100, floor=0.02),
        ema=Ema(decay=0.998),
        precision=PRECISIONS[precision],
        hooks=((samples_every, Look(pipe, evenly(samples, 16))),),
        checkpoint_every=250,
        seed=seed,
        progress=progress,
    )
    told = report(pipe, samples)
    print(told)
    pipe.save_pretrained(out / "model", card=f"# {out.name}\n\n{told}\n")


class Rows:
    """Encoded pairs become rows, each with one of its texts."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe

    def __call__(self, pairs: list[Encoded], rng: np.random.Generator) -> Canvas:
        texts = [pair.texts[int(rng.integers(len(pair.texts)))] for pair in pairs]
        codes = torch.from_numpy(np.stack([pair.codes for pair in pairs])).long()
        return self.pipe.layout.pairs([self.pipe.text_tokenizer.encode(text) for text in texts], codes)


class Rebuild:
    """A hook: pictures above, what their codes give below."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __call__(self, moment: Moment) -> None:
        assert isinstance(moment.module, Autoencoder)
        rebuilt = moment.module.decode(moment.module.encode(self.pictures))
        rows = zip(self.pictures.split(8), rebuilt.split(8), strict=True)
        shown = [image_of(picture) for pair in rows for picture in torch.cat(pair)]
        sheet(shown).save(moment.folder / f"rebuilt-{moment.step:06d}.png")


class Look:
    """A hook: a contact sheet of training captions drawn, and how the training pictures are captioned."""

    def __init__(self, pipe: Pipeline, samples: list[Sample]) -> None:
        self.pipe = pipe
        self.samples = samples

    def __call__(self, moment: Moment) -> None:
        pictures = [Image.fromarray(sample.image) for sample in self.samples if sample.image is not None]
        drawn = self.pipe.text_to_image([sample.texts[0] for sample in self.samples], progress=False).images
        told = self.pipe.caption(pictures, progress=False).texts
        sheet([*pictures[:8], *drawn[:8], *pictures[8:], *drawn[8:]]).save(
            moment.folder / f"samples-{moment.step:06d}.png"
        )
        lines = [f"{sample.texts[0]}\t{text}" for sample, text in zip(self.samples, told, strict=True)]
        (moment.folder / f"captions-{moment.step:06d}.txt").write_text("\n".join(lines) + "\n", "utf-8")
        named = sum(text in sample.texts for sample, text in zip(self.samples, told, strict=True))
        moment.log({"captions.equal": named / len(self.samples)})


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, or all, at even distances."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def read(folder: ImageFolder, rows: int | None, skip: Skip, without: str) -> list[Sample]:
    """Rows of the folder that are wanted and can be read. Raises ValueError when none is left."""
    samples = []
    wanted = list(range(len(folder)))
    if without:
        wanted = [index for index in wanted if all(without not in text for text in folder.texts_of(index))]
    for index in wanted if rows is None else evenly(wanted, rows):
        try:
            samples.append(folder[index])
        except ImageError as error:
            skip(error)
    if skip.count:
        print(f"left out {skip.count} pictures: {skip.failures}")
    if not samples:
        raise ValueError(f"{folder.path}: not one picture could be read")
    return samples


def report(pipe: Pipeline, samples: list[Sample]) -> str:
    """What the model makes of the very pairs that it was trained on, for its card."""
    num, pictures = len(samples), [Image.fromarray(s.image) for s in samples if s.image is not None]
    named = [
        text in sample.texts
        for sample, text in zip(samples, pipe.caption(pictures, progress=False).texts, strict=True)
    ]
    drawn = pipe.text_to_image([sample.texts[0] for sample in samples], progress=False).images
    ours, theirs = (
        torch.stack([torch.from_numpy(np.array(picture)) for picture in some]).flatten(1).float()
        for some in (drawn, pictures)
    )
    own = torch.cdist(ours, theirs).argmin(dim=1) == torch.arange(num)
    return (
        f"Trained by train/recipes/pairs.py on {num} pairs. Of these pictures it names {sum(named)} exactly "
        f"({sum(named) / num:.1%}); of the pictures that it draws for these texts {int(own.sum())} "
        f"({own.float().mean():.1%}) are nearer to their own than to any other, pixel by pixel. Both were "
        "measured on the training pairs: they tell what it has by heart, and nothing about other pictures "
        "and texts. A few hundred pairs teach no more than themselves."
    )


def build(
    pairs: list[Encoded], text: BytePairTokenizer, image: Autoencoder, *, dim: int, depth: int
) -> Pipeline:
    """An untrained pipeline whose rows hold the longest of the texts."""
    vocab = Vocab.build(num_text=text.size, num_codes=image.size)
    longest = max(len(text.encode(said)) for pair in pairs for said in pair.texts)
    height, width = pairs[0].codes.shape
    layout = Layout(vocab=vocab, grid=(height, width), caption=longest + 1, question=1, answer=1)
    drawing = Settings(steps=16, guidance={"image": 1.0})
    writing = Settings(steps=8, policy=Unmask(quota=Scheduled(Linear()), temperature=0.0))
    settings = {"text_to_image": drawing, "inpaint": drawing, "caption": writing, "joint": Settings(steps=32)}
    return Pipeline.untrained(Codec(text, image, layout), dim=dim, depth=depth, settings=settings)


def pixels(samples: list[Sample]) -> Tensor:
    """(N, 3, H, W) float32 in [-1, 1]."""
    stacked = np.stack([sample.image for sample in samples if sample.image is not None])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def image_of(picture: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a picture."""
    return Image.fromarray(((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
