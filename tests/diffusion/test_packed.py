"""Packed = padded = one by one: noise levels by document and modality, losses and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas, Fill, Frame, Run, pack
from mmdlm.diffusion import Absorbing, Diagonal, Edges, Masking, Mixture, Square, Strata
from mmdlm.diffusion.loss import weighted_sums
from mmdlm.model import Predictor, Reference, Sdpa, Transformer, TransformerConfig

MASK = 40
CONFIG = TransformerConfig(
    vocab_size=41,
    text=(0, 20),
    image=(20, 40),
    mask=MASK,
    dim=32,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    tied=True,
    grid=(4, 4),
)
LAWS = [Square(), Diagonal(), Edges(text=0.4, image=0.6, hide=0.3)]
MIXED = Mixture(((1.0, Square()), (1.0, Diagonal()), (2.0, Edges(hide=0.5))))


def documents(count: int, seed: int = 0) -> list[Canvas]:
    """Pairs of 1 to 9 text tokens and a picture of up to 4 x 4, all open."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        text, height, width = (int(torch.randint(1, most, (), generator=rng)) for most in (10, 5, 5))
        runs = (Run(length=text, before=(3,)), Run(grid=(height, width)))
        fills = []
        for run, first in zip(runs, (0, 20), strict=True):
            ids = first + torch.randint(20, (1, run.size), generator=rng)
            fills.append(Fill(ids, open=torch.ones_like(ids, dtype=torch.bool)))
        made.append(Frame(runs).canvas(fills, mask=MASK))
    return made


def levels(canvas: Canvas, level: Tensor, modality: int) -> list[float]:
    """The level of each document's span of this modality; it must be one."""
    found = []
    for row in range(canvas.shape[0]):
        for number in range(int(canvas.segment[row].max()) + 1):
            where = (
                (canvas.segment[row] == number) & canvas.fillable[row] & (canvas.modality[row] == modality)
            )
            (only,) = level[row][where].unique().tolist()
            found.append(only)
    return found


@pytest.mark.parametrize("times", [*LAWS, MIXED], ids=lambda law: type(law).__name__)
def test_every_document_of_a_packed_row_has_levels_of_its_own(times) -> None:
    packed = pack(documents(60), 64)
    assert int(packed.segment.max()) >= 3
    draw = times.draw(packed, torch.Generator().manual_seed(1))
    text, image = (levels(packed, draw.level, modality) for modality in (TEXT, IMAGE))
    assert not draw.level[packed.segment < 0].any()
    assert bool((draw.group[~packed.fillable] == -1).all())
    live = draw.group >= 0
    # a group lies in one document
    home = torch.arange(packed.shape[0])[:, None] * 100 + packed.segment
    pairs = torch.stack([draw.group[live], home[live]], dim=1).unique(dim=0)
    assert len(pairs) == len(draw.group[live].unique())
    inside = [one for one in text + image if 0 < one < 1]
    assert len(set(inside)) >= (60 if not isinstance(times, Edges) else 50)
    if isinstance(times, Diagonal):
        assert text == image
    elif isinstance(times, Square):
        assert all(one != other for one, other in zip(text, image, strict=True))
    elif isinstance(times, Edges):
        assert all((0 < one < 1) != (0 < other < 1) for one, other in zip(text, image, strict=True))
        assert {one for one in text + image if not 0 < one < 1} == {0.0, 1.0}


@pytest.mark.parametrize("law", LAWS[:2], ids=lambda law: type(law).__name__)
def test_levels_of_packed_documents_are_spread_evenly_over_all_parts(law) -> None:
    """T19: 12 documents in each of two parts: one level in each of 24 strata, however they are packed."""
    text, image = [], []
    for index, length in enumerate((64, 200)):
        packed = pack(documents(12, seed=index), length)
        draw = law.draw(packed, torch.Generator().manual_seed(index), Strata(index, 2, step=5))
        text += levels(packed, draw.level, TEXT)
        image += levels(packed, draw.level, IMAGE)
    for found in (text, image):
        assert sorted(int(level * 24 - 1e-6) for level in found) == list(range(24))


def noised(given: list[Canvas]) -> tuple[list[Canvas], list[Canvas]]:
    """The documents, and the same with holes; `level` holds the weight of each position."""
    rng = torch.Generator().manual_seed(7)
    clean, holes = [], []
    for each in given:
        level = torch.rand(each.shape, generator=rng) + 0.5
        where = each.fillable & (torch.rand(each.shape, generator=rng) < 0.6)
        clean.append(each.replace(level=level))
        holes.append(each.replace(level=level).hide(where, MASK))
    return clean, holes


def build(dtype: torch.dtype, **options) -> Predictor:
    predictor = Predictor(Transformer(CONFIG), **options)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in predictor.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng) * 0.2)
    return predictor.to(dtype)


def losses(predictor: Predictor, clean: list[Canvas], holes: list[Canvas]) -> tuple[Tensor, Tensor]:
    """(2,) sums of text and image over some canvases, and the gradient of both together in one vector."""
    predictor.zero_grad()
    total = torch.zeros(2, dtype=torch.float64)
    for one, other in zip(clean, holes, strict=True):
        assert other.level is not None
        weights = other.level[..., None].to(predictor.network.norm.weight.dtype)
        sums = weighted_sums(predictor, other, one.tokens, where=other.masked, weights=weights)
        both = torch.stack([sums["text"].sum(), sums["image"].sum()])
        both.sum().backward()
        total += both.detach()
    flat = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in predictor.parameters()]
    return total, torch.cat(flat)


@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("way", ["plain", "shifted", "booleans", "checkpointed"])
def test_packed_is_padded_is_one_by_one(dtype: torch.dtype, bar: float, way: str) -> None:
    """T17: loss and gradients."""
    predictor = build(dtype, shift=way == "shifted")
    predictor.network.kernel = Sdpa(packed=False) if way == "booleans" else None
    clean, holes = noised(documents(24))
    alone, expected = losses(predictor, clean, holes)
    if way == "checkpointed":
        predictor.network.checkpoint_blocks()
    for arrange in (Canvas.concat, lambda some: pack(some, 64), lambda some: pack(some, 600)):
        total, gradients = losses(predictor, [arrange(clean)], [arrange(holes)])
        assert ((total - alone).abs() <= bar * alone).all()
        assert float((gradients - expected).norm()) <= bar * float(expected.norm())


def test_a_document_does_not_see_its_neighbours() -> None:
    """What the equality above would not see if all of it were wrong alike: neighbours change nothing."""
    clean, holes = noised(documents(4))
    predictor = build(torch.float64)
    features = predictor.network.features(pack(holes, 100))
    others = [holes[0], *(each.replace(tokens=(each.tokens + 1) % 20) for each in holes[1:])]
    changed = predictor.network.features(pack(others, 100))
    size = holes[0].shape[1]
    assert torch.equal(features[0, :size], changed[0, :size])
    assert not torch.equal(features[0, size:], changed[0, size:])
    seen = predictor.network.features(holes[0])
    torch.testing.assert_close(features[:, :size], seen, atol=1e-12, rtol=0)
    predictor.network.kernel = Reference()
    torch.testing.assert_close(features, predictor.network.features(pack(holes, 100)), atol=1e-12, rtol=0)
    assert clean[0].masked.sum() == 0


def test_the_objective_counts_the_documents_of_packed_rows() -> None:
    given = documents(30)
    padded, packed = Canvas.concat(given), pack(given, 128)
    objective = Masking(Absorbing(MASK), Square())
    rng = torch.Generator()
    counts = [objective.counts(canvas, rng.manual_seed(0)) for canvas in (padded, packed)]
    assert counts[0] == counts[1]
    out = replace(objective, strata=Strata(1, 2, 3))(build(torch.float32), packed, rng.manual_seed(0))
    assert out.counts == counts[0]
