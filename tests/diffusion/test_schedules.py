"""Schedules against numerical derivatives and their own inverses; the process against Bayes."""

from __future__ import annotations

import math

import pytest
import torch

from mmdlm.diffusion import Absorbing, Cosine, Linear, LogLinear, Polynomial, Schedule

SCHEDULES = [Linear(), Cosine(), Polynomial(2.0), Polynomial(0.5), LogLinear(), LogLinear(0.1)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_keeps_its_contract(schedule: Schedule) -> None:
    time = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    alpha = schedule.alpha(time)
    assert (alpha.diff() < 0).all()
    assert schedule.alpha(torch.zeros(1)).item() == 1
    step = 1e-6
    slope = (schedule.alpha(time + step) - schedule.alpha(time - step)) / (2 * step)
    torch.testing.assert_close(schedule.weight(time), -slope / (1 - alpha), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(schedule.inverse(alpha), time, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_dtype_is_kept_and_the_inside_is_float64(schedule: Schedule) -> None:
    time = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for function in (schedule.alpha, schedule.weight, schedule.inverse):
        answer = function(time)
        assert answer.dtype == torch.float32
        assert torch.equal(answer, function(time.double()).float())


def test_the_schedules_end_where_they_say() -> None:
    one = torch.ones(1, dtype=torch.float64)
    for schedule in (Linear(), Cosine(), Polynomial(3.0)):
        assert abs(schedule.alpha(one).item()) < 1e-15
    assert LogLinear(1e-3).alpha(one).item() == pytest.approx(1e-3, abs=1e-15)
    # MaskGIT: with a third of the way gone, cos(pi / 6) of the positions are still masked
    assert 1 - Cosine().alpha(2 / 3 * one).item() == pytest.approx(math.cos(math.pi / 6))


@pytest.mark.parametrize("wrong", [lambda: Polynomial(0), lambda: LogLinear(1.0), lambda: LogLinear(-0.1)])
def test_impossible_schedules_are_refused(wrong) -> None:
    with pytest.raises(ValueError):
        wrong()


def test_reveal_is_the_posterior_of_bayes(pairs, mask_id: int) -> None:
    alpha_t, alpha_s = torch.tensor([0.1, 0.5, 0.0]), torch.tensor([0.3, 0.5, 1.0])
    masked_then = (1 - alpha_t) / (1 - alpha_s)  # q(z_t = mask | z_s = mask) = 1, so by Bayes:
    stays = (1 - alpha_s) * 1 / (1 - alpha_t)
    torch.testing.assert_close(Absorbing(mask_id).reveal(alpha_t, alpha_s), 1 - stays)
    assert masked_then[1] == 1


def test_corrupt_touches_only_what_is_fillable(pairs, mask_id: int) -> None:
    canvas = pairs(3, 2, 4)
    noised = Absorbing(mask_id).corrupt(canvas, torch.ones(canvas.shape, dtype=torch.bool))
    assert torch.equal(noised.masked, canvas.fillable)
    assert (noised.tokens[canvas.fillable] == mask_id).all()
    assert torch.equal(noised.tokens[~canvas.fillable], canvas.tokens[~canvas.fillable])
