"""Policies on laws known exactly: what is exact, what is not, and what several places at a step cost."""

from __future__ import annotations

import sys
from itertools import pairwise

import print_laws
import pytest
import torch
from oracles import (
    MASK,
    WORLDS,
    Exact,
    Table,
    World,
    all_holes,
    counts_of,
    every,
    law_of,
    p_value,
    values_of,
    written,
)
from print_laws import ONE_RUN, Point, curves, pushed, sampled, variation

from mmdlm.canvas import IMAGE, TEXT, Canvas
from mmdlm.sampling import (
    Ancestral,
    Drawn,
    Even,
    Fixed,
    Halton,
    LeftToRight,
    Margin,
    NegativeEntropy,
    Order,
    Path,
    Peak,
    Policy,
    Random,
    Stable,
    Unmask,
    denoise,
)

# None of them looks at what was drawn.
ORDERS: dict[str, Order] = {
    "left to right": LeftToRight(),
    "random": Random(),
    "peak": Peak(),
    "margin": Margin(),
    "entropy": NegativeEntropy(),
}
SURE = ("threshold", "entropy below", "factor", "bounded")
LOWEST = 1e-3  # a p-value below it refutes
every_world = pytest.mark.parametrize("name", WORLDS)


def filled(world: World, policy: Policy, canvas: Canvas, steps: int) -> Canvas:
    *_, state = denoise(Exact(world), canvas, policy=policy, steps=steps, mask=MASK)
    assert bool(state.done.all())
    return state.canvas


def one_at_a_time(world: World, policy: Policy, rows: int = 3_000) -> float:
    """The p-value of the samples of a policy that takes a step for each place."""
    canvas = filled(world, policy, all_holes(world, rows), len(world.modality))
    return p_value(counts_of(world, canvas), law_of(world))


# the oracles themselves


@every_world
def test_oracles_say_what_their_tables_say(name: str) -> None:
    """Forward and backward passes against sums over all outcomes, for patterns of holes of all kinds."""
    world = WORLDS[name]
    states = every(world.size + 1, len(world.modality))
    states = states[:: 1 + len(states) // 400]
    holes, values = states == world.size, states.clamp(max=world.size - 1)
    table = Table(law_of(world), world.size, world.modality, world.grid)
    torch.testing.assert_close(world.laws(values, holes), table.laws(values, holes), atol=1e-12, rtol=0)


def test_the_p_value_is_the_textbooks() -> None:
    assert p_value(torch.tensor([18, 22, 20]), torch.ones(3)) == pytest.approx(0.8187, abs=1e-4)  # exp(-0.2)
    assert p_value(torch.tensor([30, 10, 20]), torch.ones(3)) == pytest.approx(0.00674, abs=1e-5)  # exp(-5)
    rare = torch.tensor([1.0, 1.0, 1e-4, 1e-4])
    assert p_value(torch.tensor([50, 50, 0, 0]), rare / rare.sum()) > 0.9


# one token a step


@every_world
@pytest.mark.parametrize("order", ORDERS)
def test_one_token_a_step_is_exact_in_any_order(name: str, order: str) -> None:
    world = WORLDS[name]
    assert one_at_a_time(world, Unmask(Fixed(1), ORDERS[order], plan=ONE_RUN)) > LOWEST


@every_world
def test_the_spread_order_is_exact_and_so_is_noise_on_the_choice(name: str) -> None:
    world = WORLDS[name]
    for policy in (
        Unmask(Fixed(1), Halton(world.grid, rolled=True), plan=ONE_RUN),
        Unmask(Even(), Peak(), plan=ONE_RUN, choice_temperature=2.0),
    ):
        assert one_at_a_time(world, policy) > LOWEST


@every_world
def test_an_order_that_looks_at_the_draw_is_not_exact(name: str) -> None:
    """MaskGIT's and LLaDA's prefers what is probable, even one token a step, beyond any sampling error."""
    assert one_at_a_time(WORLDS[name], Unmask(Fixed(1), Drawn(), plan=ONE_RUN)) < 1e-9


@pytest.mark.parametrize("given", [TEXT, IMAGE])
def test_one_modality_given_the_other_is_the_conditional(given: int) -> None:
    """Captions and pictures: what is given has its own law, and what is filled in completes the joint one."""
    world = WORLDS["pairs"]
    canvas = all_holes(world, 3_000)
    rng = torch.Generator().manual_seed(4)
    whole = every(3, 4)[torch.multinomial(law_of(world), 3_000, replacement=True, generator=rng)]
    holes = canvas.modality != given
    canvas = written(world, whole, holes).replace(fillable=holes)
    done = filled(world, Unmask(Fixed(1), Peak()), canvas, 2)
    assert torch.equal(values_of(world, done)[~holes], whole[~holes])
    assert p_value(counts_of(world, done), law_of(world)) > LOWEST


@pytest.mark.parametrize(
    "plan", [Path(text=(0.0, 0.5), image=(0.5, 1.0)), Path(text=(0.5, 1.0), image=(0.0, 0.5))], ids=str
)
def test_one_modality_after_the_other_is_exact(plan: Path) -> None:
    assert one_at_a_time(WORLDS["pairs"], Unmask(Fixed(1), Peak(), plan=plan)) > LOWEST


def test_a_word_and_a_code_at_every_step_are_not_exact() -> None:
    """Both modalities at once fill a place each: fewer forwards, and their dependence is lost."""
    world = WORLDS["pairs"]
    found = sampled(Point("", Unmask(Fixed(1), Peak()), 4), world, rows=3_000)
    assert found.forwards == 2.0
    assert p_value(found.law * 3_000, law_of(world)) < 1e-9


def test_a_finer_grid_of_times_comes_closer() -> None:
    """The ancestral walk fills several places at a step by chance, half as often with twice the steps."""
    world = WORLDS["pairs"]
    fine, finer, finest = (
        variation(pushed(Point("", Ancestral(), steps), world).law, law_of(world)) for steps in (16, 32, 64)
    )
    assert fine < 0.05
    assert finer == pytest.approx(fine / 2, rel=0.1)
    assert finest == pytest.approx(finer / 2, rel=0.1)


# several tokens a step


@every_world
def test_all_at_once_is_the_product_of_the_marginals(name: str) -> None:
    world = WORLDS[name]
    outcomes, law = every(world.size, len(world.modality)), law_of(world)
    marginals = world.laws(outcomes[:1], torch.ones_like(outcomes[:1], dtype=torch.bool))[0]
    product = marginals[torch.arange(outcomes.shape[1]), outcomes].prod(dim=1)
    for points in curves(world).values():
        found = pushed(points[-1], world)
        torch.testing.assert_close(found.law, product, atol=1e-12, rtol=0)
        assert found.forwards == pytest.approx(1.0)
    assert variation(product, law) > 0.05


@every_world
def test_curves_begin_exact_and_pay_for_fewer_forwards(name: str) -> None:
    """From one place a step to all at once forwards fall, and at the end most is lost.

    Where the model says what is sure, more is lost the further one goes; by the clock not always, see below.
    """
    world = WORLDS[name]
    law, n = law_of(world), len(world.modality)
    for rule, points in curves(world).items():
        some = [point for point in points[:-1:2] if point.steps <= 8]
        found = [pushed(point, world) for point in (*some, points[-1])]
        away = [variation(each.law, law) for each in found]
        if rule != "ancestral":  # which is never exact, see below
            assert found[0].forwards == pytest.approx(n), rule
            assert away[0] < 1e-9, rule
        for earlier, later in pairwise(found):
            assert later.forwards <= earlier.forwards + 1e-9, rule
        assert max(away) < 1.01 * away[-1], rule
        if rule in SURE:
            assert all(later > 0.9 * earlier for earlier, later in pairwise(away)), (rule, away)


def test_several_at_a_step_are_exact_where_what_stands_separates_them() -> None:
    """Of a strip of spins the middle column first, alone; then its two sides are independent."""
    world = WORLDS["ising"]
    point = curves(world)["cosine, surest first"][2]
    found = pushed(point, world)
    assert (point.setting, found.forwards) == ("steps=4", pytest.approx(4.0))
    assert variation(found.law, law_of(world)) < 1e-9


# settings in the middle of their curves
SOME = {
    "threshold": 4,
    "entropy below": 3,
    "factor": 3,
    "bounded": 3,
    "even, surest first": 1,
    "even, spread": 2,
    "cosine, surest first": 1,
    "ancestral": 4,
}


@pytest.mark.parametrize("rule", SOME)
def test_samples_have_the_law_that_is_pushed_through_the_steps(rule: str) -> None:
    """The loop against the sum over everything that it may do; and the sum is not the oracle's own law."""
    for world in (WORLDS["chain"], WORLDS["ising"]):
        point = curves(world)[rule][SOME[rule]]
        exact, found = pushed(point, world), sampled(point, world, rows=3_000)
        assert p_value(found.law * 3_000, exact.law) > LOWEST
        assert found.forwards == pytest.approx(exact.forwards, abs=0.05)


def test_a_rule_that_remembers_is_exact_where_it_waits_for_certainty() -> None:
    world = WORLDS["hidden chain"]
    law = law_of(world)
    strict, loose = (
        sampled(Point("", Unmask(Fixed(1), Peak(), rule, plan=ONE_RUN), 6), world, rows=3_000)
        for rule in (Stable(1.0, 0.0), Stable(0.0, 99.0, 1))
    )
    assert p_value(strict.law * 3_000, law) > LOWEST
    assert p_value(loose.law * 3_000, law) < 1e-9
    assert (strict.forwards, loose.forwards) == (6.0, 2.0)  # the first law has none before it


def test_the_curves_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {rule: curves(WORLDS["pairs"])[rule][:2] for rule in ("factor", "ancestral")}
    monkeypatch.setattr(sys, "argv", ["print_laws.py", "--draws", "1", "--rows", "500"])
    monkeypatch.setattr(print_laws, "WORLDS", {"pairs": WORLDS["pairs"]})
    monkeypatch.setattr(print_laws, "curves", lambda world: rules)
    print_laws.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("pairs: 4 places of 3 values")
    assert lines[3].split() == ["factor", "factor=1e-09", "4.00", "0.0000"]
    assert len(lines) == 3 + 4 + len(print_laws.stable(WORLDS["pairs"]))
