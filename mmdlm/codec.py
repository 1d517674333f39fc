"""Words and pictures become ids, and ids words and pictures. Knows no model and no task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdlm.canvas import Frame, Layout, Run
from mmdlm.data import fit, to_rgb
from tokenizers_mm import ImageTokenizer, TextTokenizer, Vocab

__all__ = ["Codec", "TextLayout"]

_AT_ONCE = 64  # pictures that go through the image tokenizer together
_HOLE = 128  # grey of what is not drawn yet


class TextLayout(Layout):
    """Rows of a model of text alone: a picture of no codes, and no token that tells of one."""

    @staticmethod
    def build(*, num_text: int, room: int) -> TextLayout:
        """The layout for a tokenizer of `num_text` ids and texts of up to `room` positions, `end` included.

        Raises ValueError for a room without a place for a token and the end.
        """
        if room < 2:
            raise ValueError(f"a text needs room for a token and its end, 2 positions, got {room}")
        vocab = Vocab.build(num_text=num_text, num_codes=0)
        return TextLayout(vocab=vocab, grid=(0, 0), caption=room, question=1, answer=1)

    @cached_property
    def pair_frame(self) -> Frame:
        """[begin_caption] text (span 0), and span 1, which has no position."""
        begin = self.vocab.specials["begin_caption"]
        return Frame((Run(length=self.caption, before=(begin,)), Run(grid=(0, 0))))


@dataclass(frozen=True)
class Codec:
    """The two tokenizers of a model and the layout of its rows.

    A model of text alone has no image tokenizer; nor need one that is only trained, on pictures that are
    codes already.
    """

    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer | None
    layout: Layout

    @property
    def images(self) -> ImageTokenizer:
        """The image tokenizer. Raises ValueError where there is none."""
        if self.image_tokenizer is None:
            if self.layout.vocab.num_codes:
                raise ValueError("pictures want an image tokenizer, got None with a layout of image codes")
            raise ValueError("this model is one of text alone: it has no image tokenizer and no pictures")
        return self.image_tokenizer

    @property
    def image_size(self) -> int:
        """Pixels a side of the pictures that the model reads and draws."""
        return self.layout.grid[0] * self.images.downsample

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures scaled and cropped to the model's size, (B, 3, H, W) float32 in [-1, 1]."""
        stacked = np.stack([np.asarray(fit(to_rgb(image), self.image_size)) for image in images])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def covered(self, masks: Sequence[Image.Image]) -> Tensor:
        """Which pixels of the model's size any pixel of a mask that is not 0 reaches, (B, H, W) bool."""
        whole = [Image.fromarray(np.asarray(mask.convert("L")) > 0).convert("RGB") for mask in masks]
        scaled = [fit(mask, self.image_size, resample=Image.Resampling.BOX) for mask in whole]
        return torch.from_numpy(np.stack([np.asarray(mask)[..., 0] > 0 for mask in scaled]))

    def touched(self, covered: Tensor) -> Tensor:
        """Which patches hold a covered pixel: (B, H, W) bool -> (B, h, w) bool."""
        height, width = self.layout.grid
        return covered.unflatten(1, (height, -1)).unflatten(3, (width, -1)).any(4).any(2)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> image codes (B, h, w) long."""
        return torch.cat([self.images.encode(part) for part in pixels.split(_AT_ONCE)])

    def decode(self, codes: Tensor, holes: Tensor | None = None) -> list[Image.Image]:
        """Pictures of image codes (B, h, w) long; patches of `holes` (B, h, w) bool are grey."""
        known = codes if holes is None else codes.masked_fill(holes, 0)
        images = torch.cat([self.images.decode(part) for part in known.split(_AT_ONCE)])
        pixels = ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        if holes is not None:
            factor = self.images.downsample
            grey = holes.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            pixels = pixels.masked_fill(grey[..., None].to(pixels.device), _HOLE)
        return [Image.fromarray(image) for image in pixels.cpu().numpy()]

    def ids(self, texts: Sequence[str], room: int) -> list[list[int]]:
        """Token ids of each text; whatever it spells, they are ordinary text.

        Raises ValueError for a text that does not fit a run of `room` positions, one of them for its end.
        """
        every = [self.text_tokenizer.encode(text) for text in texts]
        for text, ids in zip(texts, every, strict=True):
            if len(ids) >= room:
                raise ValueError(
                    f"{text!r} is {len(ids)} tokens long, and this model has room for {room - 1}"
                )
        return every

    def ids_with_holes(self, text: str, hole: str) -> list[int | None]:
        """Ids with None for each `hole` of the text.

        A token brings its own leading space, so that before a hole is dropped, and that behind it, which
        the tokenizer writes itself.
        """
        first, *others = text.split(hole)
        ids: list[int | None] = [*self.text_tokenizer.encode(first.rstrip(" ") if others else first)]
        for number, piece in enumerate(others, 1):
            inner = piece.removeprefix(" ")
            ids += [None, *self.text_tokenizer.encode(inner if number == len(others) else inner.rstrip(" "))]
        return ids

    def read(self, ids: list[int], holes: list[bool]) -> str:
        """The text of a run up to its first `end`; each hole before that is `_`, spaces around it."""
        end = self.layout.vocab.specials["end"]
        pieces: list[str] = []
        known: list[int] = []
        for number, hole in zip(ids, holes, strict=True):
            if not hole and number == end:
                break
            if hole:
                pieces += [self.text_tokenizer.decode(known), "_"] if known else ["_"]
                known = []
            else:
                known.append(number)
        pieces += [self.text_tokenizer.decode(known)] if known else []
        return " ".join(pieces)
