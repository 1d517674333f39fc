"""One's own image-text pairs: any imagefolder through tokenizers and transformer, with samples on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmdlm import Pipeline
from mmdlm.data import Sample, Skip, fit, open_source, to_array
from mmdlm.diffusion import Diagonal, Edges, Mixture, Square
from mmdlm.pairs import Look, encoded, evenly, learn, learn_codes, untrained
from mmdlm.program import find_device
from mmdlm.training import (
    BFloat16Autocast,
    Float32,
    Run,
)
from mmdlm.training_report import write_statistics
from tokenizers_mm import Autoencoder, AutoencoderConfig, BytePairTokenizer

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

    data: a folder of pictures with metadata.jsonl or metadata.csv (file_name, text), or files of .jsonl,
    .parquet or .tar, or a folder of them. rows: only so many of them, taken evenly from all. without: leaves
    out the rows with these words in their text.
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
    samples = read(data, size, rows, without)
    said = [text for sample in samples for text in sample.texts]
    text_tokenizer = BytePairTokenizer.train(said, size=text_vocabulary)
    image_tokenizer = Autoencoder(AutoencoderConfig(levels=(8, 8, 8, 8), context=3))
    yield learn_codes(
        image_tokenizer,
        samples,
        folder=out / "image_tokenizer",
        steps=tokenizer_steps,
        batch=batch,
        parts=parts,
        shown=samples[:32],
        every=samples_every,
        seed=seed,
        progress=progress,
    )
    pairs = encoded(image_tokenizer, samples)
    grid = (size // image_tokenizer.downsample, size // image_tokenizer.downsample)
    pipe = untrained(said, text_tokenizer, image_tokenizer, grid=grid, dim=dim, depth=depth)
    write_statistics(out / "transformer", pairs, lambda text: len(text_tokenizer.encode(text)))
    yield learn(
        pipe,
        pairs,
        LAWS,
        folder=out / "transformer",
        steps=steps,
        batch=batch,
        parts=parts,
        lr=lr,
        hooks=((samples_every, Look(pipe, evenly(samples, 16))),),
        precision=PRECISIONS[precision],
        device=place,
        seed=seed,
        progress=progress,
    )
    told = report(pipe, samples)
    print(told)
    pipe.save_pretrained(out / "model", card=f"# {out.name}\n\n{told}\n")


def read(data: Path, size: int, rows: int | None, without: str) -> list[Sample]:
    """The pairs that are wanted and can be read, fitted to `size`. Raises ValueError when none is left."""
    skip, samples = Skip(), []
    for sample in open_source(data, on_error=skip):
        if sample.image is not None and not (without and any(without in text for text in sample.texts)):
            image = to_array(fit(Image.fromarray(sample.image), size))
            samples.append(replace(sample, image=image))
    if skip.count:
        print(f"left out {skip.count} pictures: {skip.failures}")
    if not samples:
        raise ValueError(f"{data}: not one picture could be read")
    return samples if rows is None else evenly(samples, rows)


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
