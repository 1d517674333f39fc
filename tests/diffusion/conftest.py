"""What the tests of the diffusion room share: a whole canvas, and a denoiser that is a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from mmdlm.canvas import IMAGE, TEXT, Canvas, Part, Rows

T = TypeVar("T")
SIZE = 3  # ids: text 0 .. SIZE - 1, image SIZE .. 2 SIZE - 1, mask, structure
MASK, STRUCTURE = 2 * SIZE, 2 * SIZE + 1


class Table(nn.Module):
    """A denoiser over L slots of SIZE values whose logits at a slot are looked up by what is visible.

    `logits` is (patterns, L, V): a pattern is a number in base V + 1, slot 0 first, the digit V for a masked
    slot. The slots are the positions with a span, in every row alike. Rows are handed to `reduce` in pieces.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    @staticmethod
    def of(joint: Tensor) -> Table:
        """The exact conditionals of a joint law over L values, uniform given what is impossible."""
        num_slots, num_values = joint.ndim, joint.shape[0]
        logits = torch.zeros((num_values + 1) ** num_slots, num_slots, num_values, dtype=torch.float64)
        for pattern in itertools.product(range(num_values + 1), repeat=num_slots):
            index = tuple(
                slice(None) if digit == num_values else slice(digit, digit + 1) for digit in pattern
            )
            seen = joint[index]
            for slot in range(num_slots):
                others = [axis for axis in range(num_slots) if axis != slot]
                law = seen.sum(dim=others) if others else seen
                if pattern[slot] == num_values:
                    number = sum(digit * (num_values + 1) ** place for place, digit in enumerate(pattern))
                    logits[number, slot] = (law / law.sum()).log().nan_to_num(nan=0.0, neginf=-1e30)
        return Table(logits)

    @staticmethod
    def noise(num_slots: int, num_values: int, seed: int) -> Table:
        """Conditionals at random, which belong to no joint law."""
        rng = torch.Generator().manual_seed(seed)
        shape = ((num_values + 1) ** num_slots, num_slots, num_values)
        return Table(torch.randn(shape, generator=rng, dtype=torch.float64))

    def forward(self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T]) -> list[T]:
        assert canvas.span is not None
        num_values = self.logits.shape[2]
        slots = (canvas.span[0] >= 0).nonzero().squeeze(1)
        digits = canvas.tokens - SIZE * (canvas.modality == IMAGE)
        digits = torch.where(canvas.masked, num_values, digits)[:, slots]
        pattern = (digits * (num_values + 1) ** torch.arange(len(slots))).sum(dim=1)
        column = torch.full((canvas.shape[1],), 0).scatter(0, slots, torch.arange(len(slots)))
        answers = []
        for modality, start in ((TEXT, 0), (IMAGE, SIZE)):
            for some in rows.where(canvas.modality == modality).chunks(1 + len(rows.index) // 3):
                if len(some.index) == 0:
                    continue
                row, place = some.index // canvas.shape[1], some.index % canvas.shape[1]
                logits = self.logits[pattern[row], column[place]]
                answers.append(reduce(Part(some, slice(start, start + num_values), logits)))
        return answers


def make_pairs(num_rows: int, num_text: int, num_image: int, num_values: int = SIZE) -> Canvas:
    """Rows of text (span 0), a structure token, an image (span 1) and one position of padding; all of it
    clean.
    """
    length = num_text + num_image + 2
    modality = torch.full((num_rows, length), TEXT, dtype=torch.uint8)
    modality[:, num_text + 1 : -1] = IMAGE
    modality[:, -1] = 0
    span = torch.full((num_rows, length), -1)
    span[:, :num_text] = 0
    span[:, num_text + 1 : -1] = 1
    segment = torch.zeros(num_rows, length, dtype=torch.long)
    segment[:, -1] = -1
    rng = torch.Generator().manual_seed(num_rows)
    tokens = torch.randint(num_values, (num_rows, length), generator=rng) + SIZE * (modality == IMAGE)
    tokens = torch.where(span >= 0, tokens, STRUCTURE).masked_fill(modality == 0, 0)
    return Canvas(
        tokens=tokens,
        modality=modality,
        fillable=span >= 0,
        masked=torch.zeros(num_rows, length, dtype=torch.bool),
        position=torch.zeros(num_rows, length, 2, dtype=torch.long),
        segment=segment,
        span=span,
    )


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pairs() -> Callable[..., Canvas]:
    return make_pairs


@pytest.fixture
def every() -> Callable[..., Canvas]:
    """A canvas that holds each value of its slots once: row number in base `num_values`, slot 0 first."""

    def build(num_text: int, num_image: int, num_values: int) -> Canvas:
        num_slots = num_text + num_image
        canvas = make_pairs(num_values**num_slots, num_text, num_image)
        row = torch.arange(num_values**num_slots)[:, None]
        digits = row // num_values ** torch.arange(num_slots) % num_values
        tokens = canvas.tokens.masked_scatter(canvas.fillable, digits)
        return canvas.replace(tokens=tokens + SIZE * ((canvas.modality == IMAGE) & canvas.fillable))

    return build


@pytest.fixture
def table() -> type[Table]:
    return Table


@pytest.fixture
def mask_id() -> int:
    return MASK
