"""Pictures and stand-ins for a model: one says what it is told, one counts how often it is asked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmdlm import Pipeline
from mmdlm.canvas import IMAGE, TEXT, Canvas, Layout, Part, Rows
from mmdlm.evaluate import KINDS, world

PROMPTS = ["a small red circle on a white background", "one large cyan star on grey", "two green squares"]


class Says(nn.Module):
    """The same logits at each place of a row, whatever it is shown: `table` is (L, V)."""

    def __init__(self, layout: Layout, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.ranges = ((TEXT, layout.vocab.text), (IMAGE, layout.vocab.image))
        self.mask = layout.vocab.mask

    def begin(self, canvas: Canvas) -> Says:
        return self

    def forward(self, canvas: Canvas, rows: Rows, *, reduce=None) -> list:
        parts = []
        for modality, ids in self.ranges:
            inside = rows.where(canvas.modality == modality)
            if len(inside.index):
                parts.append(Part(inside, ids, self.table[inside.index % canvas.shape[1], ids]))
        return parts if reduce is None else [reduce(part) for part in parts]


class Watched(nn.Module):
    """A model that counts how often it is asked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.mask = inner.mask
        self.calls = 0

    def begin(self, canvas: Canvas) -> Watched:
        return self

    def forward(self, canvas: Canvas, rows: Rows, *, reduce=None) -> list:
        self.calls += 1
        return self.inner(canvas, rows, reduce=reduce)


class Kit:
    """The tiny model, things to ask of it, and pipelines that differ from it in one part."""

    prompts = PROMPTS
    questions = ("which colour is the circle?", "how many stars are there?", "what is the background?")

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        source = world(KINDS)
        self.pictures = [Image.fromarray(source.image(source.scene(index))) for index in range(3)]
        self.masks = [self.mask(16, 16, 40, 33), self.mask(0, 0, 1, 1), self.mask(48, 8, 64, 64)]

    @staticmethod
    def mask(left: int, top: int, right: int, bottom: int, size: int = 64) -> Image.Image:
        mask = Image.new("L", (size, size), 0)
        mask.paste(255, (left, top, right, bottom))
        return mask

    def like(self, *, transformer=None, image_tokenizer=None, batch_size: int = 64) -> Pipeline:
        pipe = self.pipe
        return Pipeline(
            transformer=pipe.transformer if transformer is None else transformer,
            text_tokenizer=pipe.text_tokenizer,
            image_tokenizer=pipe.image_tokenizer if image_tokenizer is None else image_tokenizer,
            layout=pipe.layout,
            settings=pipe.settings,
            batch_size=batch_size,
        )

    def watched(self) -> tuple[Pipeline, Watched]:
        model = Watched(self.pipe.transformer)
        return self.like(transformer=model), model

    def saying(self, ids: Sequence[int], place: int, length: int) -> Pipeline:
        """A pipeline whose model knows what stands at `place` and behind; rows have `length` places."""
        table = torch.zeros(length, self.pipe.layout.vocab.size)
        for number, token in enumerate(ids, place):
            table[number, token] = 60.0
        return self.like(transformer=Says(self.pipe.layout, table))

    def even(self) -> Pipeline:
        """A pipeline to whose model everything is equally likely."""
        frame = self.pipe.layout.pair_frame
        return self.saying([], 0, frame.length)


@pytest.fixture(scope="session")
def kit(tiny: Pipeline) -> Kit:
    return Kit(tiny)
