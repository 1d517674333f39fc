"""What recipes on text alone share: texts apart, in pieces, in documents for packing. Knows no source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmdlm.canvas import PAD, Canvas, Layout
from mmdlm.data import Sample
from mmdlm.diffusion import Absorbing, nelbo
from mmdlm.pipeline import Pipeline
from mmdlm.training import Moment
from tokenizers_mm import TextTokenizer

__all__ = ["Excerpt", "TextDocuments", "WriteTexts", "apart", "bound", "cut", "whole_rows"]

_AT_ONCE = 64  # rows


@dataclass(frozen=True)
class Excerpt:
    """A text, or a part of one that is too long for its room: what one document holds."""

    name: str
    ids: tuple[int, ...]


def apart(samples: Sequence[Sample], held_out: float) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Samples to train on, to choose by, and for an exam: shares 1 - held_out, and half of the rest each.

    A hash of all its texts says where a sample belongs, so its texts stay together, wherever its file lies,
    and equal samples too. Raises ValueError when a part is empty, and for no share.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: wanted a share above 0 and below 1")
    parts: tuple[list[Sample], list[Sample], list[Sample]] = ([], [], [])
    for sample in samples:
        digest = hashlib.sha256("\n".join(sample.texts).encode()).hexdigest()
        place = int(digest[:8], 16) / 16**8
        parts[0 if place >= held_out else 1 if place >= held_out / 2 else 2].append(sample)
    sizes = [len(part) for part in parts]
    if not all(sizes):
        found = "training {}, validation {}, exam {}".format(*sizes)
        raise ValueError(f"held_out={held_out} of {len(samples)} rows leaves a part empty: {found}")
    return parts


def cut(texts: Sequence[str], tokenizer: TextTokenizer, room: int) -> list[Excerpt]:
    """The texts as ids, in pieces of at most `room` - 1, so that an end fits; an empty text is one too."""
    return [
        Excerpt(text[:40], tuple(ids[start : start + room - 1]))
        for text in texts
        for ids in [tokenizer.encode(text)]
        for start in range(0, max(1, len(ids)), room - 1)
    ]


class TextDocuments:
    """Pieces become rows, each one document: a share `whole` of them with all their room, the rest not.

    A text is generated with all the room of the layout, which it fills with `end`s, so a model must have seen
    that. But those `end`s teach little: most documents have just one, and what is cut off is padding on the
    right, which `Packed` leaves out.
    """

    def __init__(self, layout: Layout, whole: float) -> None:
        if not 0 <= whole <= 1:
            raise ValueError(f"whole={whole}: wanted a share from 0 to 1")
        self.layout = layout
        self.whole = whole

    def __call__(self, pieces: list[Excerpt], rng: np.random.Generator) -> Canvas:
        canvas = _rows(self.layout, pieces)
        assert canvas.span is not None
        sizes = torch.tensor([len(piece.ids) for piece in pieces])
        short = torch.from_numpy(rng.random(len(pieces)) >= self.whole)
        place = torch.arange(canvas.shape[1]) - self.layout.pair_frame.places[0].start
        off = short[:, None] & (place > sizes[:, None])
        return canvas.replace(
            tokens=canvas.tokens.masked_fill(off, 0),
            modality=canvas.modality.masked_fill(off, PAD),
            fillable=canvas.fillable & ~off,
            position=canvas.position.masked_fill(off[..., None], 0),
            segment=canvas.segment.masked_fill(off, -1),
            span=canvas.span.masked_fill(off, -1),
        )


def whole_rows(layout: Layout, pieces: Sequence[Excerpt]) -> list[Canvas]:
    """Batches of rows with all their room, all of it open, as texts are generated: the law that is judged."""
    return [_rows(layout, pieces[at : at + _AT_ONCE]) for at in range(0, len(pieces), _AT_ONCE)]


def bound(pipe: Pipeline, texts: Sequence[str], *, draws: int, seed: int) -> tuple[float, float]:
    """What -log p of all the texts together is at most, in nats, and the standard error its draws leave.

    Of each text its tokens and all the `end`s behind them, which tell its length, as `pipe.text` makes them.
    One that is too long for the layout is the product of its pieces. `draws` noise levels a piece.
    """
    process, rng = Absorbing(pipe.layout.vocab.mask), torch.Generator().manual_seed(seed)
    nats, variance = 0.0, 0.0
    for canvas in whole_rows(pipe.layout, cut(texts, pipe.text_tokenizer, pipe.layout.caption)):
        found = nelbo(pipe.transformer, canvas.to(pipe.device), process, num_draws=draws, rng=rng)
        nats += float(found.nats.sum())
        variance += float(found.error.square().sum())
    return nats, math.sqrt(variance)


class WriteTexts:
    """A hook: texts as they are generated now, a line each, in texts-STEP.txt."""

    def __init__(self, pipe: Pipeline, num: int = 32) -> None:
        self.pipe = pipe
        self.num = num

    def __call__(self, moment: Moment) -> None:
        texts = self.pipe.text(num_samples=self.num, progress=False).texts
        lines = "".join(f"{' '.join(text.split())}\n" for text in texts)
        (moment.folder / f"texts-{moment.step:06d}.txt").write_text(lines, "utf-8")
        moment.log({"texts.distinct": len(set(texts)) / len(texts)})


def _rows(layout: Layout, pieces: Sequence[Excerpt]) -> Canvas:
    return layout.pairs([piece.ids for piece in pieces], torch.zeros(len(pieces), 0, 0, dtype=torch.long))
