"""The objective: what it noises, counts, weighs and reports, and that nothing else moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from mmdlm.canvas import IMAGE, TEXT, Canvas, Part
from mmdlm.diffusion import (
    Absorbing,
    Bernoulli,
    ByModality,
    Cosine,
    Diagonal,
    Draw,
    Edges,
    Estimator,
    ExactCount,
    Linear,
    LossOutput,
    MaskGIT,
    Masking,
    Mixture,
    Selection,
    Square,
    Strata,
)

ESTIMATORS = [ExactCount(), MaskGIT(), Bernoulli(Cosine())]
MIXED = Mixture(((1.0, Square()), (1.0, Diagonal()), (2.0, Edges(hide=0.5))))


@dataclass(frozen=True)
class Forced:
    """An estimator of the user's own: masks what it is told, where that is in the loss."""

    where: Tensor
    weight: float = 1.0

    def mask(self, draw: Draw, rng: torch.Generator) -> Selection:
        where = self.where & (draw.group >= 0)
        weight = where * torch.tensor(self.weight, dtype=torch.float64)
        return Selection(where, weight, 2 * weight)


class Listener(nn.Module):
    """Even odds everywhere over the ids of the modality, or over all ids; remembers what it was shown."""

    def __init__(self, *, restricted: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))
        self.restricted = restricted
        self.seen: list[Canvas] = []

    def forward(self, canvas: Canvas, rows, *, reduce) -> list[Tensor]:
        self.seen.append(canvas)
        answers = []
        for modality, ids in ((TEXT, slice(0, 3)), (IMAGE, slice(3, 6))):
            some = rows.where(canvas.modality == modality)
            chosen = ids if self.restricted else slice(0, 8)
            if len(some.index):
                answers.append(reduce(Part(some, chosen, self.bias[chosen].expand(len(some.index), -1))))
        return answers


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("times", [Square(), Diagonal(), Edges(hide=0.5), MIXED], ids=str)
def test_given_positions_never_change_and_hidden_ones_do(
    times, estimator: Estimator, pairs, mask_id, rng
) -> None:
    canvas, model = pairs(64, 4, 6), Listener()
    before = canvas.tokens.clone()
    out = Masking(Absorbing(mask_id), times, estimator)(model, canvas, rng)
    noised = model.seen[0]
    assert torch.equal(canvas.tokens, before)
    assert noised.level is not None
    assert noised.level.dtype == torch.float32
    assert not (noised.masked & ~canvas.fillable).any()
    assert torch.equal(noised.tokens[~noised.masked], canvas.tokens[~noised.masked])
    assert (noised.tokens[noised.masked] == mask_id).all()
    assert not (noised.masked & (noised.level == 0)).any(), "what is given is given"
    live = canvas.fillable & (noised.level > 0) & (noised.level < 1)
    assert noised.masked[canvas.fillable & (noised.level == 1)].all(), "what is hidden is hidden"
    assert noised.masked[live].any()
    assert out.counts["text"] == (live & (canvas.modality == TEXT)).sum()
    assert out.counts["image"] == (live & (canvas.modality == IMAGE)).sum()


@pytest.mark.parametrize("times", [Square(), Edges(hide=0.5)], ids=str)
def test_exact_count_masks_at_least_one_of_every_group_and_never_strays(times, pairs, mask_id, rng) -> None:
    canvas, model = pairs(32, 4, 6), Listener()
    out = Masking(Absorbing(mask_id), times)(model, canvas, rng)
    for name in ("text", "image"):  # even odds: the sum is exact whatever was masked
        assert out.sums[name].item() == pytest.approx(out.counts[name].item() * math.log(3), rel=1e-5)
        assert out.per_token()[name].item() == pytest.approx(math.log(3), rel=1e-5)
        assert out.bounds[name].item() == out.sums[name].item()
        assert not out.bounds[name].requires_grad
    noised, draw = model.seen[0], times.draw(canvas, torch.Generator().manual_seed(0))
    count = torch.zeros(draw.num_groups + 1).index_add(
        0, draw.group.flatten() + 1, noised.masked.flatten().float()
    )
    size = torch.zeros(draw.num_groups + 1).index_add(
        0, draw.group.flatten() + 1, torch.ones(draw.group.numel())
    )
    level = torch.zeros(draw.num_groups + 1).scatter(0, draw.group.flatten() + 1, draw.level.flatten())
    assert torch.equal(count[1:], (level * size).ceil()[1:])


@pytest.mark.parametrize("estimator", [ExactCount(), MaskGIT(), Bernoulli(Linear())], ids=str)
def test_every_position_of_a_group_is_masked_alike(estimator: Estimator, rng: torch.Generator) -> None:
    num = 4000
    draw = Draw(torch.full((num, 5), 0.5), torch.arange(num)[:, None].expand(num, 5), num)
    chosen = estimator.mask(draw, rng)
    share = chosen.where.float().mean(dim=0)
    target = {"ExactCount": 0.6, "MaskGIT": 0.8, "Bernoulli": 0.5005}[type(estimator).__name__]
    assert ((share - target).abs() < 4 * 0.5 / num**0.5).all()
    if not isinstance(estimator, Bernoulli):
        assert (chosen.where.sum(dim=1) == round(5 * target)).all()
        assert torch.allclose(chosen.weight.sum(dim=1), torch.full((num,), 5.0))
    together = (chosen.where[:, 0] & chosen.where[:, 4]).float().mean()
    pair = {"ExactCount": 0.3, "MaskGIT": 0.6, "Bernoulli": 0.25}[type(estimator).__name__]
    assert (together - pair).abs() < 4 * 0.5 / num**0.5


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_t29_no_live_position_is_zero_with_a_graph(estimator: Estimator, pairs, mask_id, rng) -> None:
    canvas, model = pairs(4, 3, 3), Listener()
    nothing = canvas.replace(fillable=torch.zeros_like(canvas.fillable))
    out = Masking(Absorbing(mask_id), MIXED, estimator)(model, nothing, rng)
    assert not model.seen[0].masked.any()
    for name in ("text", "image"):
        assert (out.sums[name].item(), out.counts[name].item(), out.bounds[name].item()) == (0, 0, 0)
        assert out.per_token()[name].item() == 0
    sum(out.per_token().values(), torch.zeros(())).backward()
    assert model.bias.grad is not None
    assert model.bias.grad.abs().max() == 0
    # one modality without a position, the other with some
    text = canvas.replace(fillable=canvas.fillable & (canvas.modality == TEXT))
    out = Masking(Absorbing(mask_id), Square(), estimator)(model, text, rng)
    out.sums["image"].backward(retain_graph=True)
    assert out.sums["image"].item() == 0
    assert out.counts["text"] == 12


def test_t18_the_question_is_never_noised_and_weighs_nothing(pairs, table, mask_id, rng) -> None:
    canvas = pairs(16, 2, 2)
    canvas = canvas.replace(fillable=canvas.fillable & (canvas.span == 1))
    model = table.noise(4, 3, seed=0)
    Masking(Absorbing(mask_id), MIXED)(model, canvas, rng).sums["image"].backward()
    gradient = model.logits.grad
    assert gradient is not None
    assert gradient[:, 2:].abs().max() > 0
    assert gradient[:, :2].abs().max() == 0
    digits = torch.arange(256)[:, None] // 4 ** torch.arange(4) % 4
    assert gradient[(digits[:, :2] == 3).any(dim=1)].abs().max() == 0, "the prompt is always visible"


def test_t17_padding_changes_nothing(pairs, table, mask_id, rng) -> None:
    canvas, model = pairs(8, 2, 2), table.noise(4, 3, seed=0)
    where = torch.rand(canvas.shape, generator=rng) < 0.5
    longer = canvas.pad_to(10)
    longer = longer.replace(tokens=longer.tokens.masked_fill(longer.modality == 0, 5))
    wider = torch.ones(8, 10, dtype=torch.bool)
    wider[:, :6] = where
    outs = [
        Masking(Absorbing(mask_id), Diagonal(), Forced(chosen))(model, some, rng)
        for some, chosen in ((canvas, where), (longer, wider))
    ]
    assert torch.equal(outs[0].sums["text"], outs[1].sums["text"])
    assert torch.equal(outs[0].sums["image"], outs[1].sums["image"])
    assert outs[0].counts == outs[1].counts


def test_t20_parts_add_up_to_the_whole(pairs, table, mask_id, rng) -> None:
    canvas, model = pairs(8, 2, 2), table.noise(4, 3, seed=0)
    canvas = canvas.replace(fillable=canvas.fillable & (torch.rand(canvas.shape, generator=rng) < 0.7))
    where = torch.rand(canvas.shape, generator=rng) < 0.6

    def part(rows: Tensor) -> LossOutput:
        objective = Masking(Absorbing(mask_id), Square(), Forced(where[rows]))
        return objective(model, canvas.select(rows), rng)

    whole = part(torch.arange(8))
    split = part(torch.arange(3)) + part(torch.arange(3, 8))
    for name in ("text", "image"):
        torch.testing.assert_close(whole.per_token()[name], split.per_token()[name], rtol=1e-12, atol=0)
        torch.testing.assert_close(whole.bounds[name], split.bounds[name], rtol=1e-12, atol=0)
        assert whole.counts[name] == split.counts[name]
    merged = LossOutput({"pixels": torch.ones(())}, {"pixels": torch.ones(())}) + whole
    assert set(merged.sums) == {"pixels", "text", "image"}
    assert set(merged.bounds) == {"text", "image"}


def test_t28_a_softmax_over_the_modality_costs_less(pairs, mask_id) -> None:
    canvas = pairs(8, 3, 3)
    objective = Masking(Absorbing(mask_id), MIXED)
    small, large = (
        objective(Listener(restricted=flag), canvas, torch.Generator().manual_seed(1))
        for flag in (True, False)
    )
    for name in ("text", "image"):
        assert small.per_token()[name].item() == pytest.approx(math.log(3), abs=0.5)
        ratio = large.sums[name].item() / small.sums[name].item()
        assert ratio == pytest.approx(math.log(8) / math.log(3), rel=1e-5)


def test_an_emphasis_changes_the_loss_and_not_the_bound(pairs, table, mask_id) -> None:
    canvas, model = pairs(8, 2, 2), table.noise(4, 3, seed=0)
    plain = Masking(Absorbing(mask_id), MIXED)
    twice = replace(plain, emphasis=ByModality(text=2.0, image=0.0))
    first, second = (
        objective(model, canvas, torch.Generator().manual_seed(3)) for objective in (plain, twice)
    )
    torch.testing.assert_close(second.sums["text"], 2 * first.sums["text"])
    assert second.sums["image"].item() == 0
    for name in ("text", "image"):
        assert second.bounds[name].item() == pytest.approx(first.bounds[name].item(), rel=1e-6)
        assert first.bounds[name].item() > 0
        assert second.counts[name] == first.counts[name]


def test_favoured_ids_weigh_more_and_the_best_law_stays_that_of_the_data(pairs, mask_id, rng) -> None:
    canvas = pairs(64, 4, 4)
    factors = torch.tensor([1.0, 5.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    plain = Masking(Absorbing(mask_id), Square(), Forced(torch.ones(canvas.shape, dtype=torch.bool)))
    favouring = replace(plain, favoured=factors)
    biased = replace(plain, emphasis=lambda canvas: factors[canvas.tokens])

    model = Listener()
    often = torch.bincount(canvas.tokens[canvas.fillable], minlength=8)[:6].float()
    model.bias.data[:6] = often.log()  # the law of the data, which every position has here
    out, untold, reference = (each(model, canvas, rng) for each in (favouring, biased, plain))
    for name in ("text", "image"):
        (slope,) = torch.autograd.grad(out.sums[name], model.bias, retain_graph=True)
        (slope_of_biased,) = torch.autograd.grad(untold.sums[name], model.bias, retain_graph=True)
        assert slope.abs().max() < 1e-3
        assert slope_of_biased.abs().max() > 10
        torch.testing.assert_close(out.bounds[name], reference.bounds[name])


def test_weights_and_losses_survive_low_precision(pairs, mask_id, rng) -> None:
    model = Listener().to(torch.bfloat16)
    out = Masking(Absorbing(mask_id), Square())(model, pairs(4, 3, 3), rng)
    assert out.sums["text"].dtype == torch.float32
    assert out.per_token()["text"].item() == pytest.approx(math.log(3), rel=1e-6)


def test_a_target_outside_its_part_fails(pairs, mask_id, rng) -> None:
    canvas = pairs(2, 2, 2)
    wrong = canvas.replace(tokens=torch.where(canvas.span == 1, -97, canvas.tokens))  # -100 in its part
    with pytest.raises(IndexError):
        Masking(Absorbing(mask_id), Square())(Listener(), wrong, rng)


def test_bernoulli_refuses_an_impossible_eps() -> None:
    with pytest.raises(ValueError, match="eps"):
        Bernoulli(Linear(), eps=1.0)


def test_micro_batches_know_their_counts_before_the_forward_pass(pairs, mask_id) -> None:
    objective = Masking(Absorbing(mask_id), MIXED)
    for index in range(3):
        part = objective.part(index, 3, step=5)
        assert part.strata == Strata(index, 3, 5)
        canvas = pairs(16, 4, 6)
        said = part.counts(canvas, torch.Generator().manual_seed(index))
        out = part(Listener(), canvas, torch.Generator().manual_seed(index))
        assert {name: int(count) for name, count in said.items()} == {
            name: int(count) for name, count in out.counts.items()
        }
        assert sum(map(int, said.values())) > 0
