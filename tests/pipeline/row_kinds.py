"""Samples of every kind, and a codec of bytes and brightness, for tests of rows; knows no test."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mmdlm.canvas import Layout
from mmdlm.codec import Codec
from mmdlm.data import Encoded, Sample
from mmdlm.rows import Collator
from tokenizers_mm import Vocab


class Bytes:
    """A text tokenizer of bytes; no lone surrogates, as ours."""

    size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())  # a UnicodeEncodeError is a ValueError

    def decode(self, ids) -> str:
        return bytes(ids).decode()


class Brightness:
    """An image tokenizer: of each 4 x 4 patch the brightness in 16 steps."""

    size, downsample, digits = 16, 4, None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 4, width // 4

    def encode(self, images: Tensor) -> Tensor:
        patches = images.mean(dim=1).unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(3, 4))
        return ((patches + 1) * 7.5).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        pixels = (codes / 7.5 - 1).repeat_interleave(4, 1).repeat_interleave(4, 2)
        return pixels[:, None].expand(-1, 3, -1, -1)


VOCAB = Vocab.build(num_text=256, num_codes=16)
LAYOUT = Layout(vocab=VOCAB, grid=(2, 2), caption=12, question=8, answer=4)
CODEC = Codec(Bytes(), Brightness(), LAYOUT)
BEGIN, PICTURE, END_PICTURE = (VOCAB.specials[name] for name in ("begin_text", "begin_image", "end_image"))
END = VOCAB.specials["end"]
COLLATE = Collator(CODEC)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def grid(first: int = 0) -> np.ndarray:
    return np.arange(first, first + 4, dtype=np.int32).reshape(2, 2)


def picture(code: int) -> np.ndarray:
    """8 x 8 pixels of one code."""
    return np.full((8, 8, 3), round(code * 17), np.uint8)


KINDS = [
    Encoded("pair", grid(), ("a cat",)),
    Encoded("text", None, ("two words",)),
    Encoded("picture", grid(4)),
    Encoded("document", pieces=("one", grid(1), "", grid(2), grid(3))),
    Encoded("question", grid(5), (), "who?", "I"),
    Encoded("asked", None, (), "why?", "no"),
    Sample("raw pair", picture(7), ("grey",)),
    Sample("raw document", pieces=("dark", picture(1), "light", picture(14))),
]
