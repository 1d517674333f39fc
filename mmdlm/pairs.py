"""What recipes on one's own pairs share: their runs, and sheets on the way. Knows no source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdlm.canvas import Layout
from mmdlm.codec import Codec
from mmdlm.data import Batches, Encoded, Listed, Sample, Shuffled
from mmdlm.diffusion import Absorbing, Masking, Times
from mmdlm.evaluate import Rate
from mmdlm.model import peak_flops, training_flops
from mmdlm.pipeline import Pipeline
from mmdlm.pretrained import Settings
from mmdlm.report import sheet
from mmdlm.rows import Collator
from mmdlm.sampling import Fixed, Threshold, Unmask
from mmdlm.training import (
    AdamW,
    Ema,
    Float32,
    Hook,
    Moment,
    Muon,
    Precision,
    Reconstruction,
    Run,
    WarmupCosine,
)
from tokenizers_mm import Autoencoder, BytePairTokenizer, Vocab

__all__ = [
    "Look",
    "Rebuild",
    "encoded",
    "evenly",
    "image_of",
    "learn",
    "learn_codes",
    "percent",
    "tensor_of",
    "untrained",
]

T = TypeVar("T")


class Rebuild:
    """A hook of a tokenizer's run: pictures above, what their codes give below."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures  # (N, 3, H, W) in [-1, 1]

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


def learn_codes(
    tokenizer: Autoencoder,
    samples: Sequence[Sample],
    *,
    folder: Path,
    steps: int,
    batch: int = 64,
    parts: int = 1,
    shown: Sequence[Sample],
    every: int,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    """The run that trains a tokenizer on pictures of one size; those `shown` are rebuilt on the way.

    `batch` pictures a step, in `parts` parts, which `torchrun` shares out.
    """
    return Run(
        module=tokenizer,
        objective=Reconstruction(),
        batches=Batches(
            Listed(samples.__getitem__, len(samples), order=Shuffled(seed)),
            batch // parts,
            collate=lambda items, rng: tensor_of(items),
        ),
        accumulate=parts,
        steps=steps,
        folder=folder,
        optimizer=Muon(lr=4e-3, weight_decay=0.01, rest=AdamW(lr=4e-3, weight_decay=0.01)),
        learning_rate=WarmupCosine(warmup=50, floor=0.01),
        ema=None,
        hooks=((every, Rebuild(tensor_of(shown))),),
        checkpoint_every=500,
        progress=progress,
    )


def encoded(tokenizer: Autoencoder, samples: Sequence[Sample]) -> list[Encoded]:
    """The samples with codes for pictures."""
    pairs: list[Encoded] = []
    for start in range(0, len(samples), 256):
        some = samples[start : start + 256]
        codes = tokenizer.encode(tensor_of(some)).numpy()
        pairs += [Encoded(s.name, code, s.texts) for s, code in zip(some, codes, strict=True)]
    return pairs


def learn(
    pipe: Pipeline,
    pairs: Sequence[Encoded],
    laws: Times,
    *,
    folder: Path,
    steps: int,
    batch: int,
    parts: int = 1,
    lr: float,
    hooks: tuple[Hook, ...] = (),
    precision: Precision = Float32(),
    device: torch.device,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    """The run that trains the pipeline's transformer on pairs, `batch` of them a step in `parts` parts.

    On a CPU the parts are worked on at once. `lr` is that of Muon.
    """
    return Run(
        module=pipe.transformer.to(device),
        objective=Masking(Absorbing(pipe.layout.vocab.mask), laws),
        batches=Batches(
            Listed(pairs.__getitem__, len(pairs), order=Shuffled(seed)),
            batch // parts,
            collate=Collator(pipe.codec),
            prefetch=2,
        ),
        accumulate=parts,
        threads=parts if device.type == "cpu" else 1,
        steps=steps,
        folder=folder,
        optimizer=Muon(lr=lr, weight_decay=0.05, rest=AdamW(lr=2e-3, weight_decay=0.05)),
        learning_rate=WarmupCosine(warmup=100, floor=0.02),
        ema=Ema(decay=0.998),
        precision=precision,
        flops=training_flops,
        peak_flops=peak_flops(device),
        hooks=hooks,
        checkpoint_every=250,
        seed=seed,
        progress=progress,
    )


def percent(right: int, total: int) -> str:
    """A share with its 95 % interval."""
    rate = Rate(right, total)
    low, high = rate.interval
    return f"{rate.share:.1%} [{low:.1%}, {high:.1%}]"


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, or all, at even distances."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def untrained(
    texts: Sequence[str],
    text: BytePairTokenizer,
    image: Autoencoder,
    *,
    grid: tuple[int, int],
    dim: int,
    depth: int,
    guidance: float = 1.0,
) -> Pipeline:
    """An untrained pipeline whose rows hold the longest of the texts and pictures of `grid` codes."""
    vocab = Vocab.build(num_text=text.size, num_codes=image.size)
    longest = max(len(text.encode(said)) for said in texts)
    layout = Layout(vocab=vocab, grid=grid, caption=longest + 1, question=1, answer=1)
    drawing = Settings(steps=16, guidance={"image": guidance})
    sure = Unmask(Fixed(1), rule=Threshold(0.9), temperature=0.0)  # several words at once only where certain
    writing = Settings(steps=layout.caption, policy=sure)
    settings = {"text_to_image": drawing, "inpaint": drawing, "caption": writing, "joint": Settings(steps=32)}
    return Pipeline.untrained(Codec(text, image, layout), dim=dim, depth=depth, settings=settings)


def tensor_of(samples: Sequence[Sample]) -> Tensor:
    """(N, 3, H, W) float32 in [-1, 1] of samples with pictures of one size."""
    stacked = np.stack([sample.image for sample in samples if sample.image is not None])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def image_of(picture: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a picture."""
    return Image.fromarray(((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
