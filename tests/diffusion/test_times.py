"""Laws over noise levels: who is live, given, hidden; levels uniform and spread; nobody else touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas
from mmdlm.diffusion import Diagonal, Draw, Edges, Mixture, Raised, Square, Strata, Times
from mmdlm.diffusion.times import shuffle

ALL = Mixture(((0.25, Square()), (0.25, Diagonal()), (0.5, Edges(hide=0.25))))
LAWS = [Square(), Diagonal(), Edges(), Edges(text=0.0, hide=0.5), ALL, Mixture(((1.0, ALL), (2.0, Square())))]


def by_span(draw: Draw, canvas: Canvas) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Level of text, level of image, is text live, is image live; (B,) each, from the first column of
    each.
    """
    text, image = 0, int((canvas.modality[0] == IMAGE).nonzero()[0])
    live = draw.group >= 0
    return draw.level[:, text], draw.level[:, image], live[:, text], live[:, image]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_draw_keeps_its_contract(law: Times, pairs, rng: torch.Generator) -> None:
    canvas = pairs(40, 3, 5)
    draw = law.draw(canvas, rng)
    assert draw.level.dtype == torch.float32
    assert draw.group.dtype == torch.long
    assert (draw.group < draw.num_groups).all()
    live = draw.group >= 0
    assert live.any(dim=1).all(), "every row with something fillable is in the loss"
    assert not (live & ~canvas.fillable).any()
    assert (draw.level[~canvas.fillable] == 0).all()
    assert ((draw.level > 0) & (draw.level <= 1))[live].all()
    resting = draw.level[canvas.fillable & ~live]
    assert ((resting == 0) | (resting == 1)).all()
    for number in draw.group[live].unique():
        member = draw.group == number
        assert len(draw.level[member].unique()) == 1
        assert len(member.nonzero()[:, 0].unique()) == 1, "a group stays in its row"


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_generator_decides_everything(law: Times, pairs) -> None:
    canvas = pairs(8, 3, 5)
    draws = [law.draw(canvas, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0].level, draws[1].level)
    assert torch.equal(draws[0].group, draws[1].group)
    assert not torch.equal(draws[0].level, draws[2].level)


def test_square_gives_each_span_its_own_level(pairs, rng: torch.Generator) -> None:
    canvas = pairs(512, 3, 5)
    text, image, text_live, image_live = by_span(Square().draw(canvas, rng), canvas)
    assert text_live.all()
    assert image_live.all()
    correlation = torch.corrcoef(torch.stack([text, image]))[0, 1].abs()
    assert correlation < 5 / 512**0.5
    # all of the square: stratified margins, each quarter of it about a quarter of the rows
    quarter = torch.stack([(text > 0.5) & (image > 0.5), (text > 0.5) & (image <= 0.5)]).float().mean(dim=1)
    assert ((quarter - 0.25).abs() < 0.08).all()


def test_diagonal_gives_one_level_and_one_group(pairs, rng: torch.Generator) -> None:
    canvas = pairs(16, 3, 5)
    draw = Diagonal().draw(canvas, rng)
    text, image, _, _ = by_span(draw, canvas)
    assert torch.equal(text, image)
    assert len(draw.group[draw.group >= 0].unique()) == 16
    assert sorted((text * 16).ceil().int().tolist()) == list(range(1, 17)), "one level per stratum"


def test_edges_are_drawn_in_their_proportions_and_spread(pairs, rng: torch.Generator) -> None:
    canvas = pairs(160, 3, 5)
    text, image, text_live, image_live = by_span(Edges(text=1, image=3, hide=0.25).draw(canvas, rng), canvas)
    assert (text_live ^ image_live).all()
    assert image_live.sum() == 120
    assert ((text == 0) | (text == 1))[image_live].all()
    assert (text[image_live] == 1).sum() == 30, "a quarter is hidden"
    assert (image[text_live] == 1).sum() == 10
    for chosen in (
        image[image_live & (text == 1)],
        image[image_live & (text == 0)],
        text[text_live & (image == 0)],
    ):
        assert sorted((chosen.double() * len(chosen)).ceil().int().tolist()) == list(
            range(1, len(chosen) + 1)
        )


def test_edges_at_the_ends_of_their_dials(pairs, rng: torch.Generator) -> None:
    canvas = pairs(32, 3, 5)
    text, image, text_live, image_live = by_span(Edges(text=0, hide=0).draw(canvas, rng), canvas)
    assert image_live.all()
    assert not text_live.any()
    assert (text == 0).all()
    text, image, text_live, _ = by_span(Edges(image=0, hide=1).draw(canvas, rng), canvas)
    assert text_live.all()
    assert (image == 1).all()


@pytest.mark.parametrize("law", [Square(), Diagonal(), Edges(text=0.0), Edges(hide=1.0), ALL], ids=str)
def test_every_law_reduces_to_the_one_fillable_span(law: Times, pairs, rng: torch.Generator) -> None:
    canvas = pairs(16, 3, 5)
    canvas = canvas.replace(
        fillable=canvas.fillable & (canvas.modality == TEXT)
    )  # image and structure are given
    draw = law.draw(canvas, rng)
    assert torch.equal(draw.group >= 0, canvas.fillable)
    assert (draw.level[~canvas.fillable] == 0).all()
    text = draw.level[:, 0]
    if law is not ALL:  # there the parts are spread each for itself
        assert sorted((text * 16).ceil().int().tolist()) == list(range(1, 17))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_what_comes_masked_stays_unknown_and_out_of_the_loss(law: Times, pairs, rng: torch.Generator) -> None:
    canvas = pairs(32, 3, 5)
    where = torch.zeros(canvas.shape, dtype=torch.bool)
    where[:16, 1] = True
    draw = law.draw(canvas.hide(where, 6), rng)
    assert (draw.group[where] == -1).all()
    assert (draw.level[where] == 1).all()


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_nothing_fillable_is_no_group(law: Times, pairs, rng: torch.Generator) -> None:
    canvas = pairs(4, 3, 5)
    draw = law.draw(canvas.replace(fillable=torch.zeros_like(canvas.fillable)), rng)
    assert (draw.group == -1).all()
    assert (draw.level == 0).all()


def test_documents_of_a_packed_row_have_levels_of_their_own(pairs, rng: torch.Generator) -> None:
    canvas = pairs(16, 3, 5)
    canvas = canvas.replace(segment=torch.where(canvas.span == 1, 1, canvas.segment))
    draw = Diagonal().draw(canvas, rng)
    text, image, _, _ = by_span(draw, canvas)
    assert (text != image).all()
    assert len(draw.group[draw.group >= 0].unique()) == 32
    # a document with one span has no partner to give or hide
    draw = Edges(hide=1.0).draw(canvas, rng)
    assert torch.equal(draw.group >= 0, canvas.fillable)


def test_a_mixture_is_drawn_in_its_proportions(pairs, rng: torch.Generator) -> None:
    canvas = pairs(100, 3, 5)
    law = Mixture(((0.2, Diagonal()), (0.3, Edges(text=0, hide=0)), (0.5, Edges(image=0, hide=1))))
    text, image, text_live, image_live = by_span(law.draw(canvas, rng), canvas)
    assert (text_live & image_live).sum() == 20
    assert (image_live & (text == 0)).sum() == 30
    assert (text_live & (image == 1)).sum() == 50


def far_from_uniform(levels: list[Tensor]) -> bool:
    """The test of Kolmogorov and Smirnov at the level 0.001."""
    sample = torch.cat(levels).double().sort().values
    distance = (sample - torch.linspace(0, 1, len(sample), dtype=torch.float64)).abs().max()
    return bool(distance > 1.95 / len(sample) ** 0.5 + 1 / len(sample))


@pytest.mark.parametrize("law", [Square(), Edges(hide=0.5), ALL], ids=str)
def test_parts_of_one_row_have_uniform_levels_in_every_branch(
    law: Times, pairs, rng: torch.Generator
) -> None:
    """T19: the marginal is uniform."""
    canvas = pairs(1, 2, 2)
    # a branch: what is live, and the level of the other one, or which half of [0, 1] it is in
    branches: dict[tuple[bool, float], list[Tensor]] = {}
    for step in range(400):
        text, image, text_live, image_live = by_span(
            law.draw(canvas, rng, Strata(step % 4, 4, step // 4)), canvas
        )
        for live, level, other in ((text_live, text, image), (image_live, image, text)):
            if live and not (text_live and image_live and text == image):
                known = other.item() if other in (0, 1) else other.item() // 0.5 / 2 + 0.1
                branches.setdefault((live is text_live, known), []).append(level)
    assert all(len(levels) > 10 for levels in branches.values())
    assert len(branches) == {"Square": 4, "Edges": 4, "Mixture": 8}[type(law).__name__]
    assert not [branch for branch, levels in branches.items() if far_from_uniform(levels)]


def test_a_batch_sees_every_level_alike(pairs, rng: torch.Generator) -> None:
    canvas = pairs(3, 2, 2)
    draws = [ALL.draw(canvas, rng) for _ in range(150)]
    # the choice of a law, a live span and a level must not know of each other
    assert not far_from_uniform([draw.level[draw.group >= 0].unique() for draw in draws])
    image = [draw.level[:, 3][draw.group[:, 3] >= 0] for draw in draws]
    assert not far_from_uniform(image)


@pytest.mark.parametrize(("num_rows", "count"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_one_level_per_stratum_over_all_parts(num_rows: int, count: int, pairs, rng: torch.Generator) -> None:
    """T19: however eight rows are split."""
    canvas = pairs(num_rows, 2, 2)
    draws = [Square().draw(canvas, rng, Strata(index, count)) for index in range(count)]
    for column in (0, 3):
        levels = torch.cat([draw.level[:, column] for draw in draws])
        assert sorted((levels * 8).ceil().int().tolist()) == list(range(1, 9))


def test_shuffle_is_a_uniform_order_inside_each_group(rng: torch.Generator) -> None:
    group = torch.arange(3000).repeat(
        3
    )  # number 0 .. 2999, of three members each, far apart; and three of none
    group = torch.cat([torch.full((3,), -1), group])
    rank, size = shuffle(group, 5000, rng)
    assert (size == 3).all()
    orders = torch.stack([rank[group == number] for number in (-1, 0)] + list(rank[3:].reshape(3, -1).T))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(3).expand(len(orders), 3))
    counts = (orders[2:] * torch.tensor([9, 3, 1])).sum(dim=1).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-square, five degrees of freedom, level 0.001


def test_wrong_laws_are_refused(pairs, rng: torch.Generator) -> None:
    for wrong in (lambda: Edges(text=-1), lambda: Edges(hide=1.1), lambda: Mixture(()), lambda: Strata(2, 2)):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError, match="above 0"):
        Mixture(((0.0, Square()),))
    with pytest.raises(ValueError, match="span"):
        Square().draw(pairs(1, 1, 1).replace(span=None), rng)


def test_raised_levels_are_squeezed_upwards_and_nothing_else_changes(pairs, rng) -> None:
    canvas = pairs(64, 3, 5)
    plain = Edges(text=1.0, image=2.0, hide=0.3)
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    before, after = plain.draw(canvas, seeds[0]), Raised(plain, floor=0.75).draw(canvas, seeds[1])
    live = before.group >= 0
    assert torch.equal(after.group, before.group)
    assert after.num_groups == before.num_groups
    torch.testing.assert_close(after.level[live], 0.75 + 0.25 * before.level[live])
    assert torch.equal(after.level[~live], before.level[~live])
    assert (after.level[live] > 0.75).all()
    with pytest.raises(ValueError, match="floor must be in"):
        Raised(plain, floor=1.0)


def test_one_modality_alone_is_raised(pairs) -> None:
    canvas, plain = pairs(40, 3, 5), Square()
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    before = plain.draw(canvas, seeds[0])
    after = Raised(plain, floor=0.75, only=IMAGE).draw(canvas, seeds[1])
    image = (before.group >= 0) & (canvas.modality == IMAGE)
    torch.testing.assert_close(after.level[image], 0.75 + 0.25 * before.level[image])
    assert torch.equal(after.level[~image], before.level[~image])
    assert (before.level[~image & (before.group >= 0)] < 0.75).any()
    both = Raised(Diagonal(), floor=0.75, only=IMAGE).draw(canvas, seeds[1])
    for group in both.group[both.group >= 0].unique():
        assert len(both.level[both.group == group].unique()) == 1
    assert int(both.group.max()) < both.num_groups
