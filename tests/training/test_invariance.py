"""What a step does not depend on: packing, padding, how its batch is split, how many processes share it.

T17, T19, T20, T29 and T31 are numbers of a list of checks; the other half of each stands beside what it is
about, and bear the number too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ranks
import shares
import torch
from torch import Tensor, nn

from mmdlm.canvas import IMAGE, TEXT, Canvas, Fill, Frame, Part, Rows, pack
from mmdlm.canvas import Run as Span
from mmdlm.data import Batches, Listed, Shuffled
from mmdlm.diffusion import (
    Absorbing,
    Bernoulli,
    Diagonal,
    Draw,
    ExactCount,
    Linear,
    Masking,
    Selection,
    Square,
    Strata,
    Times,
)
from mmdlm.training import Trainer

MASK = shares.MASK


def gradients(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in module.parameters()]


def loss_of(
    module: nn.Module, canvas: Canvas, objective: Masking, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Sum over the corruptible positions, and its gradients."""
    module.zero_grad()
    out = objective(module, canvas, torch.Generator().manual_seed(seed))
    total = torch.stack(list(out.sums.values())).sum()
    total.backward()
    return total.detach(), gradients(module)


def logits_of(module: nn.Module, canvas: Canvas) -> list[Tensor]:
    """By modality, at all live positions."""
    with torch.no_grad():
        return [part.logits for part in module(canvas, Rows.of(canvas.segment >= 0))]


def records(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


# T17


def test_t17_packed_documents_have_the_logits_of_separate_ones() -> None:
    module = shares.network(torch.float32)
    given = [shares.document(number) for number in range(8)]
    noised = [one.hide(one.fillable & (one.tokens % 2 == 0), MASK) for one in given]
    order = pack(noised, 500)  # one row: documents keep their order
    assert order.shape[0] == 1
    together = logits_of(module, order)
    alone = [torch.cat(some) for some in zip(*(logits_of(module, one) for one in noised), strict=True)]
    for packed, separate in zip(together, alone, strict=True):
        torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)


@pytest.mark.parametrize("law", [Square(), Diagonal(), shares.LAWS], ids=lambda law: type(law).__name__)
def test_t17_ids_at_padding_change_neither_loss_nor_gradient(law: Times) -> None:
    module, objective = shares.network(), Masking(Absorbing(MASK), law)
    packed = pack([shares.document(number) for number in range(8)], 70)
    padded = packed.pad_to(packed.shape[1] + 9)
    padding = padded.segment < 0
    assert padding.any(dim=1).all()
    other = padded.replace(
        tokens=torch.where(padding, 7, padded.tokens),
        modality=torch.where(padding, TEXT, padded.modality).to(torch.uint8),
        position=torch.where(padding[..., None], 5, padded.position),
    )
    (loss, grads), (same, others) = (loss_of(module, canvas, objective) for canvas in (padded, other))
    assert loss > 0
    assert torch.equal(loss, same)
    assert all(torch.equal(one, two) for one, two in zip(grads, others, strict=True))


# T19


def spans(canvas: Canvas, draw: Draw) -> dict[int, list[float]]:
    """Levels of all live groups by modality."""
    found: dict[int, list[float]] = {}
    for number in draw.group[draw.group >= 0].unique():
        where = draw.group == number
        found.setdefault(int(canvas.modality[where][0]), []).append(float(draw.level[where][0]))
    return found


@pytest.mark.parametrize(("world", "per_rank"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_t19_one_level_per_stratum_over_all_ranks_and_micro_batches(world: int, per_rank: int) -> None:
    """Two documents in each of eight parts: text and picture each have one level in each sixteenth."""
    parts, marginal = world * per_rank, []
    open_pairs = [[shares.document(3 * (2 * index + n) + 1) for n in range(2)] for index in range(parts)]
    canvases = [pack(pair, 64) for pair in open_pairs]
    for step in range(25):
        levels: dict[int, list[float]] = {}
        for rank in range(world):
            for index in range(rank, parts, world):  # as the trainer shares them out
                strata = Masking(Absorbing(MASK), Square()).part(index, parts, step).strata
                rng = torch.Generator().manual_seed(100 * step + index)
                draw = Square().draw(canvases[index], rng, strata)
                for modality, some in spans(canvases[index], draw).items():
                    levels.setdefault(modality, []).extend(some)
        assert len(levels) == 2
        for some in levels.values():
            assert sorted(math.ceil(16 * level - 1e-6) for level in some) == list(range(1, 17))
            marginal.append(some[0])  # of the first document of the first rank, over the steps
    sample = torch.tensor(marginal).sort().values
    distance = (sample - torch.linspace(0, 1, len(sample))).abs().max()
    assert distance < 1.95 / len(sample) ** 0.5 + 1 / len(sample)  # Kolmogorov and Smirnov, 0.001


# T20


@dataclass(frozen=True)
class ByToken:
    """Levels that follow from the ids alone, so that every way to batch documents sees the same noise."""

    def draw(self, canvas: Canvas, rng: torch.Generator, strata: Strata = Strata()) -> Draw:
        row, length = torch.arange(canvas.shape[0])[:, None], canvas.shape[1]
        group = torch.where(canvas.fillable, row * length + canvas.segment, -1)
        level = torch.where(group >= 0, (canvas.tokens % 5 + 1) / 6, 0.0)
        return Draw(level, group, canvas.shape[0] * length)


@dataclass(frozen=True)
class HighLevels:
    """Masks every position whose level is above a third."""

    def mask(self, draw: Draw, rng: torch.Generator) -> Selection:
        where = (draw.group >= 0) & (draw.level > 0.34)
        weight = torch.where(where, 1 / draw.level.clamp_min(0.1), 0.0)
        return Selection(where, weight, weight)


@pytest.mark.parametrize(("documents", "accumulate"), [(8, 2), (4, 4), (2, 8), (1, 16)])
def test_t20_splitting_a_batch_changes_neither_loss_nor_gradient(tmp_path, documents, accumulate) -> None:
    """Sixteen documents of unequal regions, some of them without open text, in one batch or in many."""
    objective, ways = Masking(Absorbing(MASK), ByToken(), HighLevels()), []
    for name, size, parts in (("whole", 16, 1), ("parts", documents, accumulate)):
        batches = shares.batches(size)
        run, _ = shares.run(tmp_path / name, objective=objective, batches=batches, accumulate=parts)
        Trainer(run).fit()
        ways.append((run.module, records(run.folder)))
    (whole, told), (split, same) = ways
    assert len(told) == 3
    for record, other in zip(told, same, strict=True):  # the norm: what AdamW does not see
        assert {*record} >= {"loss", "loss/text", "loss/image", "grad_norm"}
        assert record == pytest.approx(other, rel=1e-11)
    for value, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict[tuple[int, int], str]]:
    """Eight micro-batches a step in one process (1 x 8)."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, shares.train(folder)


@pytest.mark.parametrize(
    "world", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_t20_any_number_of_processes_sees_the_same_noise_and_takes_the_same_step(
    alone, tmp_path, world: int
) -> None:
    """2 x 4, 4 x 2 and 8 x 1: bit for bit the same corruption, the same loss and gradient up to rounding."""
    folder, expected = alone
    assert {index for _, index in expected} == set(range(8))
    found = ranks.launch(world, shares.train, tmp_path)
    for rank, seen in enumerate(found):
        assert {index for _, index in seen} == set(range(rank, 8, world))
    assert {place: digest for seen in found for place, digest in seen.items()} == expected
    assert len({*expected.values()}) == 24
    told, same = records(folder), records(tmp_path)
    assert len(told) == len(same) == 3
    for record, other in zip(told, same, strict=True):
        assert record == pytest.approx(other, rel=1e-10)


# T29


def test_t29_a_batch_without_a_corruptible_token_gives_zeros_and_no_nan() -> None:
    module = shares.network()
    nothing = pack([shares.document(number) for number in range(4)], 64)
    nothing = nothing.replace(fillable=torch.zeros_like(nothing.fillable))
    loss, grads = loss_of(module, nothing, Masking(Absorbing(MASK), shares.LAWS))
    assert float(loss) == 0.0
    assert all(bool((grad == 0).all()) for grad in grads)


@pytest.mark.parametrize("absent", ["text", "image", "both of one micro-batch"])
def test_t29_a_task_without_a_token_leaves_the_others_step_alone(tmp_path, absent: str) -> None:
    """What has no token adds 0: the step is that of the others, finite, and the modality is not reported."""

    def collate(items: list[Canvas], rng: np.random.Generator) -> Canvas:
        packed = pack(items, 64)
        if absent == "both of one micro-batch":
            keep = torch.full_like(packed.fillable, batches.state_dict()["batch"] % 2 == 0)
        else:
            keep = packed.modality != {"text": TEXT, "image": IMAGE}[absent]
        return packed.replace(fillable=packed.fillable & keep)

    batches = Batches(Listed(shares.document, 40, order=Shuffled(3)), 2, collate=collate)
    run, _ = shares.run(tmp_path / "some", batches=batches, accumulate=2)
    Trainer(run).fit()
    told = records(run.folder)
    assert len(told) == 3
    assert all(math.isfinite(value) for record in told for value in record.values())
    assert all(record["grad_norm"] > 0 and "skipped" not in record for record in told)
    assert all((f"loss/{absent}" in record) is False for record in told)
    assert all(bool(weight.isfinite().all()) for weight in run.module.parameters())


# T31


class Even(nn.Module):
    """The same cross-entropy everywhere: log 20 nats."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20, dtype=torch.float64))

    def forward(self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], Tensor]) -> list[Tensor]:
        some = rows.where(canvas.modality == TEXT)
        logits = self.weight.expand(some.index.shape[0], -1)
        return [reduce(Part(some, slice(0, 20), logits))] if some.index.shape[0] else []


def test_t31_constant_costs_the_exact_count_has_no_variance_and_bernoulli_that_of_its_formula() -> None:
    """Var = c^2 L (log(1 / eps) - 1 + eps) / (1 - eps) for t uniform on (eps, 1] and the weight 1 / t."""
    length, eps, cost, copies = 64, 0.05, math.log(20), 4000
    stated = cost**2 * length * (math.log(1 / eps) - 1 + eps) / (1 - eps)
    # by the objective: every draw of an exact count gives the same loss, those of Bernoulli do not
    ids = torch.zeros(1, length, dtype=torch.long)
    whole = Fill(ids, open=torch.ones_like(ids, dtype=torch.bool))
    text, sums = Frame((Span(length=length),)).canvas([whole], mask=MASK), {}
    for name, estimator in (("exact", ExactCount()), ("coins", Bernoulli(Linear(), eps=eps))):
        objective = Masking(Absorbing(MASK), Diagonal(), estimator)
        draws = [objective(Even(), text, torch.Generator().manual_seed(seed)) for seed in range(20)]
        sums[name] = torch.stack([draw.sums["text"].detach() for draw in draws])
    torch.testing.assert_close(sums["exact"], torch.full_like(sums["exact"], cost * length))
    assert sums["coins"].std() > 0.4 * stated**0.5
    # by the estimators alone, many rows at once
    rng = torch.Generator().manual_seed(0)
    level = torch.rand(copies, 1, generator=rng).expand(copies, length)
    draw = Draw(level, torch.arange(copies)[:, None].expand(copies, length), copies)
    exact, coins = (
        cost * each.mask(draw, rng).weight.double().sum(dim=1)
        for each in (ExactCount(), Bernoulli(Linear(), eps=eps))
    )
    assert float(exact.std()) < 1e-5 * cost * length
    assert float(coins.mean()) == pytest.approx(cost * length, abs=4 * (stated / copies) ** 0.5)
    assert float(coins.var()) == pytest.approx(stated, rel=0.15)
    # and without drawing: the mean over t, with the rates that the estimator uses
    rate, weight = Bernoulli(Linear(), eps=eps).rates((torch.arange(100_000) + 0.5) / 100_000)
    second = (cost * weight) ** 2 * (length * rate * (1 - rate) + (length * rate) ** 2)
    assert float(second.mean()) - (cost * length) ** 2 == pytest.approx(stated, rel=1e-4)
