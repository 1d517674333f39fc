"""One list of things by several hands: the style is a word, and some pairs of both are never seen."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmdlm import Pipeline
from mmdlm.data import ImageFolder, InOrder, Sample, Skip, decode, fit
from mmdlm.diffusion import Diagonal, Edges, Mixture, Square
from mmdlm.pairs import Look, encoded, evenly, learn, learn_codes, percent, tensor_of, untrained
from mmdlm.program import find_device
from mmdlm.report import sheet
from mmdlm.training import Run
from tokenizers_mm import Autoencoder, AutoencoderConfig, BytePairTokenizer

LAWS = Mixture(((0.25, Square()), (0.15, Diagonal()), (0.6, Edges(text=0.3, image=0.7, hide=0.1))))


def recipe(
    *,
    data: tuple[Path, ...],
    out: Path = Path("runs/styles"),
    style: str = "style",
    without: str = "skin tone",
    size: int = 32,
    tokenizer_steps: int = 1500,
    steps: int = 3000,
    batch: int = 32,
    parts: int = 2,
    lr: float = 5e-3,
    dim: int = 160,
    depth: int = 6,
    text_vocabulary: int = 1500,
    guidance: float = 1.0,
    samples_every: int = 500,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Run]:
    """Tokenizers, transformer, an exam of unseen pairs; the model stands in OUT/model, figures in its card.

    data: imagefolders with commas between them. style: the column that says by whose hand; the text becomes
    "TEXT, STYLE style". A twelfth of the texts that are there in several styles is left out in one of them.
    without: leaves out the rows with these words. size: pixels a side, a multiple of 4; smaller pictures are
    enlarged pixel by pixel.
    """
    if parts < 1 or batch < 1 or batch % parts:
        raise ValueError(f"batch={batch}: wanted a multiple of parts={parts}")
    if size < 4 or size % 4:
        raise ValueError(f"size={size}: wanted a multiple of 4 pixels")
    place = find_device(device, option="device=")
    every = [s for path in data for s in read(path, size, style, without)]
    known, unseen = apart(every, style)
    torch.manual_seed(seed)  # the first weights
    said = [text for sample in every for text in sample.texts]  # the words are known, not their pictures
    text_tokenizer = BytePairTokenizer.train(said, size=text_vocabulary)
    image_tokenizer = Autoencoder(
        AutoencoderConfig(
            channels=(48, 96), encoder_blocks=(0, 2), decoder_blocks=(1, 2), levels=(8, 8, 8, 4), context=3
        )
    )
    yield learn_codes(
        image_tokenizer,
        known,
        folder=out / "image_tokenizer",
        steps=tokenizer_steps,
        parts=parts,
        shown=evenly(known, 32),
        every=samples_every,
        seed=seed,
        progress=progress,
    )
    pairs = encoded(image_tokenizer, known)
    height, width, _ = known[0].all_images[0].shape
    grid = image_tokenizer.grid(height, width)
    pipe = untrained(
        said, text_tokenizer, image_tokenizer, grid=grid, dim=dim, depth=depth, guidance=guidance
    )
    yield learn(
        pipe,
        pairs,
        LAWS,
        folder=out / "transformer",
        steps=steps,
        batch=batch,
        parts=parts,
        lr=lr,
        hooks=((samples_every, Look(pipe, evenly(known, 16))),),
        device=place,
        seed=seed,
        progress=progress,
    )
    told, figures, drawn = report(pipe, known, unseen, style)
    print(told)
    (out / "scores.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    drawn.save(out / "drawn.png")
    pipe.save_pretrained(out / "model", card=f"# {out.name}\n\n{told}\n")


def read(path: Path, size: int, style: str, without: str) -> list[Sample]:
    """A folder's samples, each text with its style. Raises ValueError for a row without one."""

    def load(file: Path) -> Image.Image:
        image = decode(file)
        small = max(image.size) < size
        return fit(image, size, resample=Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)

    skip, samples = Skip(), []
    for sample in ImageFolder(path, load=load, order=InOrder(), on_error=skip):
        if without and any(without in text for text in sample.texts):
            continue
        if style not in sample.extra:
            raise ValueError(f"{path}, {sample.name}: its row has no column {style!r}")
        hand = sample.extra[style]
        texts = tuple(f"{text}, {hand} style" for text in sample.texts)
        samples.append(replace(sample, texts=texts, extra={**sample.extra, "thing": sample.texts[0]}))
    if skip.count:
        print(f"left out {skip.count} pictures: {skip.failures}")
    if not samples:
        raise ValueError(f"{path}: no row is left without {without!r}")
    return samples


def apart(samples: list[Sample], style: str) -> tuple[list[Sample], list[Sample]]:
    """Those to learn from, and those whose thing is only to be seen in the other styles."""
    hands = Counter((sample.extra["thing"], sample.extra[style]) for sample in samples)
    things: dict[str, list[str]] = {}
    for thing, hand in hands:
        things.setdefault(thing, []).append(hand)
    out = set()
    for thing, found in things.items():
        number = int(hashlib.sha256(thing.encode()).hexdigest(), 16)
        if len(found) > 1 and number % 12 == 0:
            out.add((thing, sorted(found)[number // 12 % len(found)]))
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        parts[(sample.extra["thing"], sample.extra[style]) in out].append(sample)
    if not parts[1]:
        raise ValueError(
            "no text is there in two styles and held out in one; wanted folders that share texts"
        )
    return parts


def report(
    pipe: Pipeline, known: list[Sample], unseen: list[Sample], style: str
) -> tuple[str, dict[str, float], Image.Image]:
    """What the model makes of pairs of thing and style that it never saw: words, figures, a sheet."""
    drawn = pipe.text_to_image([sample.texts[0] for sample in unseen], progress=False).images
    told = pipe.caption([shown(sample) for sample in unseen], progress=False).texts
    made = torch.stack([F.adaptive_avg_pool2d(pixels, 16) for pixels in pipe.codec.pixels(drawn)]).flatten(1)
    real = {hand: coarse([s for s in known if s.extra[style] == hand]) for hand in hands(known, style)}
    own, ranks, right = coarse(unseen), [], []
    for number, sample in enumerate(unseen):
        hand = sample.extra[style]
        others = torch.cat([own[number : number + 1], real[hand]])
        far = (others - made[number]).norm(dim=1)
        ranks.append(float((far < far[0]).float().sum() / (len(far) - 1)))
        nearest = {name: float((rows - made[number]).norm(dim=1).min()) for name, rows in real.items()}
        right.append(min(nearest, key=lambda name: nearest[name]) == hand)
    things = [text.rpartition(", ") for text in told]
    num = len(unseen)
    named = sum(thing == s.extra["thing"] for (thing, _, _), s in zip(things, unseen, strict=True))
    styled = sum(
        end == f"{sample.extra[style]} style" for (_, _, end), sample in zip(things, unseen, strict=True)
    )
    median = float(torch.tensor(ranks).median())
    figures = {
        "unseen": num,
        "drawn in the style asked for": sum(right) / num,
        "median share of the style's pictures nearer than the true one": median,
        "among the nearest 5 %": sum(rank <= 0.05 for rank in ranks) / num,
        "captions with the thing": named / num,
        "captions with the style": styled / num,
    }
    words = (
        f"Trained by train/recipes/styles.py on {len(known):,} pictures in {len(real)} styles; {num} pairs "
        "of thing and style were left out, the things being there in other styles. Drawn from their texts, "
        f"{percent(sum(right), num)} are nearest to a picture of the style that was asked for (16 x 16 "
        f"pixels). In the median {median:.1%} of that style's pictures are nearer to the drawing than the "
        f"true one (chance 50 %), and {percent(sum(rank <= 0.05 for rank in ranks), num)} are among the "
        f"nearest 5 %. Shown the true ones it names the thing of {percent(named, num)} and the style of "
        f"{percent(styled, num)}."
    )
    some = evenly(list(zip(unseen, drawn, strict=True)), 40)
    rows = [image for n in range(0, len(some), 10) for image in columns(some[n : n + 10])]
    return words, figures, sheet(rows, columns=10)


def columns(some: list[tuple[Sample, Image.Image]]) -> list[Image.Image]:
    """Ten true pictures, then what was drawn for their texts."""
    blank = [Image.new("RGB", some[0][1].size, "white")] * (10 - len(some))
    return [*(shown(sample) for sample, _ in some), *blank, *(image for _, image in some), *blank]


def hands(samples: list[Sample], style: str) -> list[str]:
    return sorted({sample.extra[style] for sample in samples})


def shown(sample: Sample) -> Image.Image:
    assert sample.image is not None
    return Image.fromarray(sample.image)


def coarse(samples: list[Sample]) -> Tensor:
    """(N, 3 * 16 * 16): what pictures are compared by."""
    return F.adaptive_avg_pool2d(tensor_of(samples), 16).flatten(1)
