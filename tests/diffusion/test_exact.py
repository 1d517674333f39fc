"""Estimators and bounds against enumeration: small joints that a table knows exactly, all masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmdlm.canvas import IMAGE, TEXT, Canvas
from mmdlm.diffusion import (
    Absorbing,
    Bernoulli,
    Cosine,
    Draw,
    ExactCount,
    Linear,
    LogLinear,
    MaskGIT,
    Polynomial,
    Schedule,
    conditional,
    marginal,
    nelbo,
)
from mmdlm.diffusion.loss import weighted_sums

GOLDEN = torch.tensor([[0.4, 0.1], [0.2, 0.3]], dtype=torch.float64)  # H 1.2799, h(1) .6831, T = 1 gap .0863
Costs = dict[tuple[int, ...], Tensor]


def random_joint(num_slots: int, num_values: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    law = torch.rand((num_values,) * num_slots, generator=rng, dtype=torch.float64) ** 2
    return law / law.sum()


def in_order(joint: Tensor) -> Tensor:
    """Probabilities of the rows of the canvas that holds every value: slot 0 varies fastest."""
    return joint.permute(*reversed(range(joint.ndim))).reshape(-1)


def entropy(joint: Tensor) -> float:
    return -torch.special.xlogy(joint, joint).sum().item()


def mean_entropy(joint: Tensor, size: int) -> float:
    """h(size): mean entropy of the subsets of `size` slots."""
    slots = range(joint.ndim)
    kept = [[slot for slot in slots if slot not in subset] for subset in itertools.combinations(slots, size)]
    return float(np.mean([entropy(joint.sum(dim=others) if others else joint) for others in kept]))


def subsets(num_slots: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, num_slots + 1):
        yield from itertools.combinations(range(num_slots), size)


def find_costs(model: nn.Module, canvas: Canvas, mask_id: int) -> Costs:
    """For each set of masked slots the summed cross-entropy of every row, through the code that training
    runs.
    """
    slots = canvas.fillable[0].nonzero().squeeze(1)
    costs = {}
    for subset in subsets(len(slots)):
        where = torch.zeros(canvas.shape, dtype=torch.bool)
        where[:, slots[list(subset)]] = True
        noised = Absorbing(mask_id).corrupt(canvas, where)
        weights = where.double()[..., None]
        sums = weighted_sums(model, noised, canvas.tokens, where=where, weights=weights)
        costs[subset] = (sums["text"] + sums["image"])[:, 0].detach()
    return costs


def exact_nelbo(costs: Costs) -> Tensor:
    num_slots = max(map(len, costs))
    terms = [cost / len(subset) / math.comb(num_slots, len(subset)) for subset, cost in costs.items()]
    return torch.stack(terms).sum(dim=0)


def one_group(num: int, level: float) -> Draw:
    return Draw(torch.full((1, num), level, dtype=torch.float64), torch.zeros(1, num, dtype=torch.long), 1)


def expected(estimator: ExactCount | MaskGIT, costs: Costs, level: float) -> tuple[Tensor, Tensor]:
    """Expectations of the training sum and of the bound at a level, over all orders of the positions."""
    num = max(map(len, costs))
    sums, bounds = [], []
    for order in itertools.permutations(range(num)):
        chosen = estimator.choose(one_group(num, level), torch.tensor([order]), torch.full((1, num), num))
        where = tuple(chosen.where[0].nonzero()[:, 0].tolist())
        weight, bound = chosen.weight[chosen.where].unique(), chosen.bound[chosen.where].unique()
        sums.append(weight.item() * costs[where])
        bounds.append(bound.item() * costs[where])
    return torch.stack(sums).mean(dim=0), torch.stack(bounds).mean(dim=0)


def bernoulli_at(estimator: Bernoulli, costs: Costs, level: Tensor) -> Tensor:
    """Expectation over all masks at the levels (N,): (N, rows)."""
    num = max(map(len, costs))
    rate, weight = estimator.rates(level)
    terms = [
        (weight * rate ** len(subset) * (1 - rate) ** (num - len(subset)))[:, None] * cost
        for subset, cost in costs.items()
    ]
    return torch.stack(terms).sum(dim=0)


def integrate(values: Tensor, weights: np.ndarray) -> Tensor:
    return (values * torch.from_numpy(weights)[:, None]).sum(dim=0)


def gauss(num: int = 80) -> tuple[Tensor, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(num)
    return torch.from_numpy((nodes + 1) / 2), weights / 2


@pytest.fixture(params=["golden", "random", "inconsistent"])
def case(request: pytest.FixtureRequest, table, every, mask_id: int) -> tuple[Costs, Tensor | None]:
    """Costs of a model, and the joint that it knows if it knows one."""
    if request.param == "golden":
        return find_costs(table.of(GOLDEN), every(1, 1, 2), mask_id), GOLDEN
    if request.param == "random":
        joint = random_joint(3, 3, seed=1)
        return find_costs(table.of(joint), every(2, 1, 3), mask_id), joint
    return find_costs(table.noise(4, 2, seed=2), every(2, 2, 2), mask_id), None


@pytest.mark.parametrize(("shape", "values"), [((1, 1), 2), ((2, 1), 3), ((2, 2), 2)])
def test_t1_t2_the_bound_of_a_perfect_model_is_the_entropy(
    shape, values: int, table, every, mask_id: int
) -> None:
    joint = GOLDEN if shape == (1, 1) else random_joint(sum(shape), values, seed=3)
    costs, law = find_costs(table.of(joint), every(*shape, values), mask_id), in_order(joint)
    assert (law @ exact_nelbo(costs)).item() == pytest.approx(entropy(joint), abs=1e-12)
    for size in range(1, joint.ndim + 1):
        mean = np.mean([(law @ cost).item() / size for subset, cost in costs.items() if len(subset) == size])
        step = mean_entropy(joint, joint.ndim - size + 1) - mean_entropy(joint, joint.ndim - size)
        assert mean == pytest.approx(step, abs=1e-12)


def test_the_golden_values(table, every, mask_id: int) -> None:
    costs = find_costs(table.of(GOLDEN), every(1, 1, 2), mask_id)
    assert (in_order(GOLDEN) @ exact_nelbo(costs)).item() == pytest.approx(1.2799, abs=5e-5)
    assert (in_order(GOLDEN) @ costs[0, 1]).item() == pytest.approx(2 * 0.6831, abs=1e-4)
    assert (in_order(GOLDEN) @ (costs[0, 1] - exact_nelbo(costs))).item() == pytest.approx(0.0863, abs=5e-5)


@pytest.mark.parametrize(
    "schedule", [Linear(), Cosine(), Polynomial(2.0), Polynomial(3.0), LogLinear(0.0)], ids=str
)
def test_t3_the_bound_knows_no_schedule(schedule: Schedule, case) -> None:
    costs, _ = case
    level, weights = gauss()
    found = integrate(bernoulli_at(Bernoulli(schedule, eps=0.0), costs, level), weights)
    torch.testing.assert_close(found, exact_nelbo(costs), rtol=0, atol=1e-10)


def chain(model: nn.Module, row: tuple[int, ...], order: tuple[int, ...]) -> float:
    """log prod p(x_i | what came before in the order), read from the table itself."""
    logits = dict(model.named_parameters())["logits"].detach()
    base, total = logits.shape[2] + 1, 0.0
    seen: dict[int, int] = {}
    for slot in order:
        pattern = sum(seen.get(place, base - 1) * base**place for place in range(len(row)))
        total += logits[pattern, slot].log_softmax(dim=0)[row[slot]].item()
        seen[slot] = row[slot]
    return total


@pytest.mark.parametrize("seed", [0, 1])
def test_t4_t5_the_bound_is_the_mean_over_generation_orders(seed: int, table, every, mask_id: int) -> None:
    model = table.noise(3, 3, seed=seed)
    bound = exact_nelbo(find_costs(model, every(2, 1, 3), mask_id))
    rows = [tuple(reversed(row)) for row in itertools.product(range(3), repeat=3)]  # slot 0 fastest
    orders = list(itertools.permutations(range(3)))
    logs = torch.tensor([[chain(model, row, order) for order in orders] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(bound, -logs.mean(dim=1), rtol=0, atol=1e-10)
    likelihood = logs.exp().mean(dim=1)
    assert likelihood.sum().item() == pytest.approx(1, abs=1e-12)
    assert (-likelihood.log() <= bound).all()


def finite_bound(schedule: Schedule, costs: Costs, law: Tensor, num_steps: int, process: Absorbing) -> float:
    num = max(map(len, costs))
    alpha = schedule.alpha(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64))
    reveal = process.reveal(alpha[1:], alpha[:-1])
    rate = 1 - alpha[1:]
    total = torch.zeros_like(law)
    for subset, cost in costs.items():
        total += (reveal * rate ** len(subset) * (1 - rate) ** (num - len(subset))).sum() * cost
    return (law @ total).item()


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=str)
def test_t6_the_finite_bound_falls_to_the_entropy(schedule: Schedule, table, every, mask_id: int) -> None:
    costs, law = find_costs(table.of(GOLDEN), every(1, 1, 2), mask_id), in_order(GOLDEN)
    steps = [1, 2, 4, 8, 64, 1024]
    gaps = [finite_bound(schedule, costs, law, num, Absorbing(mask_id)) - entropy(GOLDEN) for num in steps]
    assert all(later < earlier for earlier, later in itertools.pairwise(gaps))
    assert gaps[0] == pytest.approx(0.0863, abs=5e-5)  # the total correlation
    assert 0 < gaps[-1] < 2e-4


@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_t7_the_cut_off_in_time_has_its_closed_form(eps: float, case) -> None:
    costs, _ = case
    num = max(map(len, costs))
    level, weights = gauss()
    found = integrate(bernoulli_at(Bernoulli(Linear(), eps=eps), costs, level), weights)
    closed = torch.zeros_like(found)
    for subset, cost in costs.items():
        m = len(subset)
        signed = [
            (-1) ** j * math.comb(num - m, j) * (1 - eps ** (m + j)) / (m + j) for j in range(num - m + 1)
        ]
        closed += sum(signed) / (1 - eps) * cost
    torch.testing.assert_close(found, closed, rtol=0, atol=1e-10)
    assert (closed - exact_nelbo(costs)).abs().max() > eps / 100, "a bias there is"


def test_t8_the_exact_count_is_unbiased(case) -> None:
    costs, joint = case
    num = max(map(len, costs))
    per_count = [expected(ExactCount(), costs, (count - 0.5) / num) for count in range(1, num + 1)]
    for which in (0, 1):
        mean = torch.stack([pair[which] for pair in per_count]).mean(dim=0)
        torch.testing.assert_close(mean, exact_nelbo(costs), rtol=0, atol=1e-10)
    if joint is not None:
        assert (in_order(joint) @ exact_nelbo(costs)).item() == pytest.approx(entropy(joint), abs=1e-12)


@pytest.mark.parametrize("schedule", [Cosine(), Polynomial(0.5), Linear()], ids=str)
def test_maskgit_is_no_bound_but_carries_one(schedule: Schedule, case) -> None:
    costs, _ = case
    num = max(map(len, costs))
    ends = [
        schedule.inverse(torch.tensor(1 - count / num, dtype=torch.float64)).item()
        for count in range(num + 1)
    ]
    trained, bound = torch.zeros_like(costs[0,]), torch.zeros_like(costs[0,])
    for low, high in itertools.pairwise(ends):
        at = expected(MaskGIT(schedule), costs, (low + high) / 2)
        trained += (high - low) * at[0]
        bound += (high - low) * at[1]
    torch.testing.assert_close(bound, exact_nelbo(costs), rtol=0, atol=1e-10)
    is_bound = torch.allclose(trained, exact_nelbo(costs), atol=1e-6)
    assert is_bound == (schedule == Linear())


def test_t9_the_realised_fraction_is_biased_by_one_over_the_length(case) -> None:
    costs, _ = case
    num = max(map(len, costs))

    def mean(count: int) -> Tensor:
        return torch.stack([cost for subset, cost in costs.items() if len(subset) == count]).mean(dim=0)

    # t uniform, each masked with probability t, never none: the counts 0 .. L are alike, and 0 becomes 1
    found = (num * mean(1) + sum(num / count * mean(count) for count in range(1, num + 1))) / (num + 1)
    torch.testing.assert_close(found, num / (num + 1) * (exact_nelbo(costs) + mean(1)), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("num", "deviation"), [(64, 0.30), (1024, 0.076)])
def test_t31_the_exact_count_has_no_variance_of_its_own(num: int, deviation: float) -> None:
    size = torch.full((1, num), num)
    for level in (1e-9, 0.3, 0.5, 1.0):
        rank = torch.randperm(num, generator=torch.Generator().manual_seed(0))[None]
        weight = ExactCount().choose(one_group(num, level), rank, size).weight
        assert weight.sum().item() == pytest.approx(num, rel=1e-12)
    # Bernoulli: E (w K)^2 = w^2 (var K + (E K)^2), integrated over log t
    time = torch.logspace(-3, 0, 20001, dtype=torch.float64)
    rate, weight = Bernoulli(Linear(), eps=1e-3).rates((time - 1e-3) / (1 - 1e-3))
    square = weight**2 * (num * rate * (1 - rate) + (num * rate) ** 2) / (1 - 1e-3)
    assert (torch.trapezoid(square, time).item() / num**2 - 1) ** 0.5 == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("num_draws", [1, 2, 3, 8])
def test_the_estimate_of_the_bound_is_unbiased_and_knows_its_error(
    num_draws: int, table, every, mask_id, rng
) -> None:
    model, canvas, copies = table.noise(4, 2, seed=5), every(2, 2, 2), 400
    exact = exact_nelbo(find_costs(model, canvas, mask_id))
    many = canvas.select(torch.arange(16).repeat(copies))
    found = nelbo(model, many, Absorbing(mask_id), num_draws=num_draws, rng=rng)
    nats = found.nats.reshape(copies, 16)
    spread = nats.std(dim=0) + 1e-12
    assert ((nats.mean(dim=0) - exact).abs() < 4.5 * spread / copies**0.5).all()
    torch.testing.assert_close(found.by_modality["text"] + found.by_modality["image"], found.nats)
    assert found.counts["text"].unique().tolist() == [2]
    if num_draws == 1:
        assert found.error.isinf().all()
    else:
        claimed = found.error.reshape(copies, 16).square().mean(dim=0).sqrt()
        assert (claimed > 0.85 * spread).all()


def test_constant_costs_have_no_error(table, every, mask_id: int, rng: torch.Generator) -> None:
    model, canvas = table(torch.zeros(81, 4, 2, dtype=torch.float64)), every(2, 2, 2)
    found = nelbo(model, conditional(canvas, TEXT), Absorbing(mask_id), num_draws=5, rng=rng)
    torch.testing.assert_close(found.nats, torch.full((16,), 2 * math.log(2), dtype=torch.float64))
    assert found.error.max() < 1e-12
    assert found.by_modality["image"].abs().max() == 0
    assert found.counts["image"].max() == 0


def test_conditional_and_marginal_score_what_they_say(
    table, every, mask_id: int, rng: torch.Generator
) -> None:
    model, canvas, process = table.of(GOLDEN), every(1, 1, 2), Absorbing(mask_id)
    text_law, image_law = GOLDEN.sum(dim=1), GOLDEN.sum(dim=0)
    text, image = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    pair = GOLDEN[text, image]
    wanted = {
        "text": (conditional(canvas, TEXT), pair / image_law[image]),
        "image": (conditional(canvas, IMAGE), pair / text_law[text]),
        "text alone": (marginal(canvas, TEXT, process), text_law[text]),
        "image alone": (marginal(canvas, IMAGE, process), image_law[image]),
    }
    for name, (asked, law) in wanted.items():
        found = nelbo(model, asked, process, num_draws=2, rng=rng)
        torch.testing.assert_close(found.nats, -law.log(), rtol=0, atol=1e-6, msg=name)
    same = [
        nelbo(model, canvas, process, num_draws=3, rng=torch.Generator().manual_seed(4)) for _ in range(2)
    ]
    assert torch.equal(same[0].nats, same[1].nats)


def test_a_bound_needs_a_draw(table, every, mask_id: int, rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match="num_draws"):
        nelbo(table.of(GOLDEN), every(1, 1, 2), Absorbing(mask_id), num_draws=0, rng=rng)
