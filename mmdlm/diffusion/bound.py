"""Upper bounds on -log p in nats, row by row, with standard errors. Knows no network and no gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdlm.canvas import MODALITIES, Canvas
from mmdlm.diffusion.estimator import ExactCount
from mmdlm.diffusion.loss import corrupt, weighted_sums
from mmdlm.diffusion.process import Absorbing
from mmdlm.diffusion.times import Diagonal, Draw, uniform


@dataclass(frozen=True)
class Bound:
    """Estimates of the NELBO of every row of a canvas, float64.

    Errors are standard errors over the draws: they hold what masks and counts leave to chance, not the gap
    between the bound and -log p. With a single draw they are infinite.
    """

    nats: Tensor  # (B,)
    error: Tensor  # (B,)
    by_modality: dict[str, Tensor]  # (B,) each; they add up to `nats`
    errors: dict[str, Tensor]  # (B,) each
    counts: dict[str, Tensor]  # (B,) long, positions that are scored


def conditional(canvas: Canvas, modality: int) -> Canvas:
    """`canvas` with only the positions of `modality` left to score; everything else is given."""
    return canvas.replace(fillable=canvas.fillable & (canvas.modality == modality))


def marginal(canvas: Canvas, modality: int, process: Absorbing) -> Canvas:
    """`canvas` with only the positions of `modality` left to score, the other fillable ones unknown."""
    return conditional(process.corrupt(canvas, canvas.modality != modality), modality)


def nelbo(
    module: nn.Module, canvas: Canvas, process: Absorbing, *, num_draws: int, rng: torch.Generator
) -> Bound:
    """Any-order bound on -log p(fillable positions | the others), `num_draws` forwards of the whole batch.

    What is fillable is scored: a pair with both open has its joint bound, `conditional` and `marginal` give
    the others, and marginal(text) + marginal(image) - joint estimates the pointwise mutual information (a
    difference of bounds, so neither a lower nor an upper one). Positions that come masked stay unknown.
    Exact-count estimates: the number k of masked positions is spread evenly over the draws of a row, so with
    as many draws as positions each k occurs once. Put the module in evaluation mode first.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}, it must be at least 1")
    with torch.no_grad():
        samples = [_sample(module, canvas, process, (i, num_draws), rng) for i in range(num_draws)]
    # (num_draws, B) each
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in MODALITIES}
    total = sum(stacked.values(), torch.zeros_like(samples[0]["text"]))
    scored = canvas.fillable & ~canvas.masked
    return Bound(
        nats=total.mean(dim=0),
        error=_error(total),
        by_modality={name: values.mean(dim=0) for name, values in stacked.items()},
        errors={name: _error(values) for name, values in stacked.items()},
        counts={name: (scored & (canvas.modality == value)).sum(dim=1) for name, value in MODALITIES.items()},
    )


def _sample(
    module: nn.Module, canvas: Canvas, process: Absorbing, stratum: tuple[int, int], rng: torch.Generator
) -> dict[str, Tensor]:
    """(B,) float64 by modality: one unbiased estimate, every document at a level from the `stratum`."""
    number, num = stratum
    draw = Diagonal().draw(canvas, rng)
    live = draw.group >= 0
    jitter = 1 - uniform(draw.num_groups, rng, canvas.device)[draw.group.clamp_min(0)]
    level = torch.where(live, (number + jitter) / num, draw.level.double())
    draw = Draw(level, draw.group, draw.num_groups)
    chosen = ExactCount().mask(draw, rng)
    noised = corrupt(process, canvas, draw, chosen.where)
    weights = chosen.bound[..., None]
    sums = weighted_sums(module, noised, canvas.tokens, where=chosen.where, weights=weights)
    return {name: value[:, 0].double() for name, value in sums.items()}


def _error(values: Tensor) -> Tensor:
    """Standard error of the mean of `values` (num_draws, B), which come from neighbouring strata in order.

    The spread between strata is no error of a stratified mean, so strata are collapsed in pairs, the last
    three together if their number is odd (W. G. Cochran, Sampling Techniques, section 5A.12): on average not
    too small.
    """
    num = len(values)
    if num < 2:
        return torch.full_like(values[0], torch.inf)
    paired = num - 3 if num % 2 else num
    squares = (values[0:paired:2] - values[1:paired:2]).square().sum(dim=0)
    if num % 2:
        squares = squares + 3 * values[paired:].var(dim=0)
    return squares.sqrt() / num
