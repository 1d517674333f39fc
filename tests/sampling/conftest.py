"""Fakes for the sampler: models that are small enough to know exactly, and the canvases they read."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mmdlm.canvas import IMAGE, TEXT, Canvas, Part, Rows
from mmdlm.model import Predictor, Transformer, TransformerConfig

TEXT_IDS, IMAGE_IDS, MASK = slice(0, 6), slice(8, 19), 19


class Fake:
    """Logits that depend on every visible token of a row, on its place and on nothing else; float64."""

    def __init__(self, ids=((TEXT, TEXT_IDS), (IMAGE, IMAGE_IDS)), size: int = MASK + 1) -> None:
        rng = torch.Generator().manual_seed(3)
        self.ids = ids
        self.embed = torch.randn(size, 16, generator=rng, dtype=torch.float64)
        self.head = torch.randn(16, size, generator=rng, dtype=torch.float64)
        self.calls: list[tuple[Canvas, Rows]] = []

    def begin(self, canvas):
        return self

    def __call__(self, canvas, rows, *, reduce=None):
        self.calls.append((canvas, rows))
        seen = torch.where(canvas.masked, MASK, canvas.tokens)
        wave = torch.cos(0.7 * canvas.position.sum(dim=2).double()) + 1.5
        features = self.embed[seen] * wave.unsqueeze(2) * (canvas.segment >= 0).unsqueeze(2)
        context = torch.stack(
            [row[segment >= 0].sum(dim=0) for row, segment in zip(features, canvas.segment, strict=True)]
        )
        hidden = torch.tanh(context.unsqueeze(1) + wave.unsqueeze(2) * self.embed[0])
        parts = []
        for modality, ids in self.ids:
            own = rows.where(canvas.modality == modality)
            if own.index.shape[0]:
                parts.append(Part(own, ids, 2.0 * own.gather(hidden) @ self.head[:, ids]))
        return parts if reduce is None else [reduce(part) for part in parts]


class Oracle:
    """The exact conditionals of a joint law over `places` positions of `size` ids, given as a table (size
    ** places,).
    """

    def __init__(self, law: torch.Tensor, places: int, size: int) -> None:
        self.law, self.size = law.double(), size
        self.outcomes = torch.tensor(list(itertools.product(range(size), repeat=places)))
        self.one_hot = torch.nn.functional.one_hot(self.outcomes, size).double()

    def begin(self, canvas):
        return self

    def __call__(self, canvas, rows, *, reduce=None):
        agrees = (canvas.tokens.unsqueeze(1) == self.outcomes) | canvas.masked.unsqueeze(1)
        weight = agrees.all(dim=2).double() * self.law
        logits = torch.einsum("bo,oiv->biv", weight, self.one_hot).log()
        return [Part(rows, slice(0, self.size), rows.gather(logits))]

    def counts(self, tokens: torch.Tensor) -> torch.Tensor:
        """How often each outcome came, in the order of the table."""
        base = self.size ** torch.arange(tokens.shape[1] - 1, -1, -1)
        return torch.bincount((tokens * base).sum(dim=1), minlength=len(self.law))


def holes(rows: int, places: int) -> Canvas:
    """Text rows that are all holes."""
    shape = (rows, places)
    everywhere = torch.ones(shape, dtype=torch.bool)
    position = torch.arange(places)[None, :, None].expand(rows, places, 2)
    zeros = torch.zeros(shape, dtype=torch.long)
    modality = torch.full(shape, TEXT, dtype=torch.uint8)
    return Canvas(zeros + MASK, modality, everywhere, everywhere, position, zeros, span=zeros)


def pair(text: int, image: int, *, given: tuple[int, ...] = (), seed: int = 0) -> Canvas:
    """One row: a structure token, a text span, a structure token, an image span; `given` positions are no
    holes.
    """
    length = text + image + 2
    rng = torch.Generator().manual_seed(seed)
    modality = torch.tensor([TEXT] * (text + 2) + [IMAGE] * image, dtype=torch.uint8)
    span = torch.tensor([-1] + [0] * text + [-1] + [1] * image)
    tokens = torch.where(
        modality == IMAGE,
        torch.randint(IMAGE_IDS.start, IMAGE_IDS.stop, (length,), generator=rng),
        torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (length,), generator=rng),
    )
    tokens[span < 0] = 7
    fillable = span >= 0
    fillable[list(given)] = False
    position = torch.arange(length)[:, None].expand(length, 2)
    columns = (
        tokens,
        modality,
        fillable,
        torch.zeros(length, dtype=torch.bool),
        position,
        torch.zeros(length).long(),
    )
    canvas = Canvas(*(column.unsqueeze(0) for column in columns), span=span.unsqueeze(0))
    return canvas.hide(canvas.fillable, MASK)


def chi_square(counts: torch.Tensor, law: torch.Tensor) -> float:
    """The statistic over its limit (one in a million under the null hypothesis); above 1 the law is
    refuted.
    """
    law = law.double() / law.sum()
    counts = counts.double()
    assert (counts[law == 0] == 0).all()
    counts, law = counts[law > 0], law[law > 0]
    expected = law * counts.sum()
    freedom = len(law) - 1
    spread = (2 / (9 * freedom)) ** 0.5
    limit = freedom * (1 - spread**2 + 4.75 * spread) ** 3  # Wilson and Hilferty 1931
    return float(((counts - expected) ** 2 / expected).sum() / limit)


def lively(*, depth: int = 2, num_heads: int = 2, seed: int = 0, **more: Any) -> Predictor:
    """A real model in float64 whose weights were moved, so that every input matters."""
    config = TransformerConfig(
        vocab_size=MASK + 1,
        dim=32,
        depth=depth,
        num_heads=num_heads,
        text=(TEXT_IDS.start, TEXT_IDS.stop),
        image=(IMAGE_IDS.start, IMAGE_IDS.stop),
        mask=MASK,
        **more,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        predictor = Predictor(Transformer(config)).double().eval()
        for weight in predictor.parameters():
            weight.add_(torch.randn(weight.shape, dtype=torch.float64) * 0.15)
    return predictor


class Kit:
    """What the tests of this folder share."""

    text_ids, image_ids, mask = TEXT_IDS, IMAGE_IDS, MASK
    Fake, Oracle = Fake, Oracle
    holes, pair, chi_square = staticmethod(holes), staticmethod(pair), staticmethod(chi_square)
    lively = staticmethod(lively)

    @staticmethod
    def last(states):
        """The finished state."""
        *_, state = states
        return state


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
