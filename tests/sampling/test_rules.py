"""Quotas, rules, orders, revisions and blocks against what their papers and their limits say."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from mmdlm.canvas import Canvas
from mmdlm.diffusion import Linear
from mmdlm.sampling import (
    Ancestral,
    Blocks,
    Bounded,
    Capped,
    Constant,
    Counted,
    Doubtful,
    Drawn,
    Edited,
    EntropyBelow,
    Even,
    Factor,
    Fixed,
    Guided,
    Halton,
    Margin,
    NegativeEntropy,
    Path,
    Peak,
    Planned,
    Proportional,
    Proposal,
    Random,
    Renoised,
    Scheduled,
    Stable,
    State,
    Step,
    Term,
    Threshold,
    Unmask,
    Without,
    denoise,
    partners,
)
from mmdlm.sampling.draw import draw
from mmdlm.sampling.order import halton, running


def tokens(kit, policy, canvas: Canvas, steps: int, denoiser=None) -> torch.Tensor:
    denoiser = denoiser or kit.Fake()
    return kit.last(denoise(denoiser, canvas, policy=policy, steps=steps, mask=kit.mask)).canvas.tokens


def forwards(kit, policy, canvas: Canvas, steps: int) -> int:
    counted = Counted(kit.Fake())
    kit.last(denoise(counted, canvas, policy=policy, steps=steps, mask=kit.mask))
    return counted.calls


def step_of(kit, peaks: list[float], **columns: list[float]) -> Step:
    """A text of holes and what is said of them: probabilities of the most probable tokens, in order."""
    canvas = kit.holes(1, len(peaks))
    peak = torch.tensor([peaks]).log()
    more = {name: torch.tensor([values]) for name, values in columns.items()}
    proposal = Proposal(canvas.tokens, peak, peak, canvas.masked, more)
    return Step(State.start(canvas, steps=len(peaks)), proposal)


def written(policy: Unmask, step: Step) -> list[int]:
    return policy.move(step).write[0].nonzero()[:, 0].tolist()


# limits


@pytest.mark.parametrize("block", [4, 8, 16])
def test_a_threshold_above_everything_is_one_at_a_time(kit, block: int) -> None:
    canvas, plan = kit.holes(2, 16), Path(blocks=Blocks(block))
    greedy = {"plan": plan, "temperature": 0.0}
    one = tokens(kit, Unmask(Even(), **greedy), canvas, 16)
    sure = tokens(kit, Unmask(Fixed(1), rule=Threshold(1.0), **greedy), canvas, 16)
    assert torch.equal(one, sure)
    assert forwards(kit, Unmask(Fixed(1), rule=Threshold(1e-9), **greedy), canvas, 16) == 16 // block


def test_a_small_factor_is_one_at_a_time_and_a_large_one_all_at_once(kit) -> None:
    canvas = kit.holes(1, 8)
    one = tokens(kit, Unmask(Fixed(1), temperature=0.0), canvas, 8)
    assert torch.equal(tokens(kit, Unmask(Fixed(1), rule=Factor(1e-6), temperature=0.0), canvas, 8), one)
    assert forwards(kit, Unmask(Fixed(1), rule=Factor(100.0), temperature=0.0), canvas, 8) == 1


def test_no_entropy_allowed_is_the_order_of_entropies_and_all_allowed_is_one_shot(kit) -> None:
    canvas, order = kit.holes(1, 8), NegativeEntropy()
    one = tokens(kit, Unmask(Fixed(1), order, temperature=0.0), canvas, 8)
    bounded = Unmask(Fixed(1), order, rule=Bounded(0.0), temperature=0.0)
    assert torch.equal(tokens(kit, bounded, canvas, 8), one)
    assert forwards(kit, bounded, canvas, 8) == 8
    assert forwards(kit, Unmask(Fixed(1), order, rule=Bounded(1e9)), canvas, 8) == 1
    assert forwards(kit, Unmask(Fixed(1), order, rule=EntropyBelow(1e9)), canvas, 8) == 1


def test_any_divergence_allowed_is_the_threshold(kit) -> None:
    canvas = kit.holes(2, 12)
    stable = Unmask(Fixed(1), rule=Stable(0.4, kl=math.inf, steps=1), temperature=0.0)
    first, second = (
        list(denoise(kit.Fake(), canvas, policy=policy, steps=12, mask=kit.mask))
        for policy in (stable, Unmask(Fixed(1), rule=Threshold(0.4), temperature=0.0))
    )
    assert len(first) == len(second) < 13
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours.canvas.masked, theirs.canvas.masked)
    assert torch.equal(first[-1].canvas.tokens, second[-1].canvas.tokens)
    assert forwards(kit, Unmask(Fixed(1), rule=Stable(0.0, kl=1e9, steps=1)), canvas, 12) == 2
    assert forwards(kit, Unmask(Fixed(1), rule=Stable(0.0, kl=1e9, steps=3)), canvas, 12) == 4


def test_plans_that_never_doubt_are_maskgit(kit) -> None:
    canvas = kit.pair(6, 9)
    plain = tokens(kit, Unmask(temperature=0.7), canvas, 5)
    assert torch.equal(tokens(kit, Unmask(temperature=0.7, revision=Planned(0.0)), canvas, 5), plain)
    assert not torch.equal(tokens(kit, Unmask(temperature=0.7, revision=Planned(5.0)), canvas, 5), plain)


def test_edits_above_certainty_are_none(kit) -> None:
    canvas = kit.pair(6, 9)
    plain = tokens(kit, Unmask(temperature=0.0), canvas, 5)
    assert torch.equal(tokens(kit, Unmask(temperature=0.0, revision=Edited(1.1)), canvas, 5), plain)
    assert not torch.equal(tokens(kit, Unmask(temperature=0.0, revision=Edited(1e-6)), canvas, 5), plain)


def test_remasking_with_no_chance_is_the_plain_walk(kit) -> None:
    canvas = kit.pair(6, 9)
    plain = tokens(kit, Ancestral(), canvas, 6)
    assert torch.equal(tokens(kit, Ancestral(remask=Capped(0.0)), canvas, 6), plain)


@pytest.mark.parametrize("remask", [Capped(0.5), Doubtful(0.8)])
def test_remasking_keeps_the_law_of_an_oracle(kit, remask) -> None:
    """Two independent places: whatever is drawn again is drawn from the same law."""
    law = torch.tensor([0.7, 0.3], dtype=torch.float64)
    oracle = kit.Oracle((law[:, None] * law[None]).flatten(), 2, 2)
    states = list(
        denoise(oracle, kit.holes(8_000, 2), policy=Ancestral(remask=remask), steps=6, mask=kit.mask)
    )
    again = sum(int((b.canvas.masked & ~a.canvas.masked).sum()) for a, b in pairwise(states))
    assert again > 1_000
    if isinstance(remask, Capped):
        assert kit.chi_square(oracle.counts(states[-1].canvas.tokens), oracle.law) < 1


# what a rule says


def test_the_factor_rule_ends_before_the_first_that_fails(kit) -> None:
    """(n + 1) (1 - p_n) <= f; peers with the boundary off by one commit the one that fails too."""
    policy = Unmask(Fixed(1), order=Peak(), rule=Factor(1.0))
    assert written(policy, step_of(kit, [0.95, 0.10])) == [0]
    assert written(policy, step_of(kit, [0.80, 0.60, 0.70])) == [0, 2]  # .7 >= 1 - 1/3, .6 < 1 - 1/4
    assert written(policy, step_of(kit, [0.80, 0.75, 0.70])) == [0, 1]
    assert written(policy, step_of(kit, [0.2, 0.3])) == [1]


def test_entropies_are_summed_without_the_largest(kit) -> None:
    step = step_of(kit, [0.5] * 4, entropy=[0.3, 0.0, 0.1, 0.2])
    policy = Unmask(Fixed(1), order=NegativeEntropy(), rule=Bounded(0.11))
    assert written(policy, step) == [1, 2, 3]  # 0; 0 + .1 - .1; 0 + .1 + .2 - .2; then .3 more - .3 = .3
    assert written(Unmask(Fixed(1), order=NegativeEntropy(), rule=Bounded(0.0)), step) == [1, 2]
    assert written(Unmask(Fixed(1), order=NegativeEntropy(), rule=EntropyBelow(0.2)), step) == [1, 2]


def test_running_sums_and_maxima_are_those_of_a_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    values, score = torch.rand(6, 20, generator=rng), torch.rand(6, 20, generator=rng)
    runs, where = torch.randint(-1, 3, (6, 20), generator=rng), torch.rand(6, 20, generator=rng) < 0.7
    total, largest = running(values, score, where, runs)
    for row in range(6):
        for run in range(-1, 3):
            places = [i for i in range(20) if where[row, i] and runs[row, i] == run]
            ordered = sorted(places, key=lambda i, row=row: -float(score[row, i]))
            for number, place in enumerate(ordered):
                seen = values[row, ordered[: number + 1]].double()
                assert float(total[row, place]) == pytest.approx(float(seen.sum()))
                assert float(largest[row, place]) == pytest.approx(float(seen.max()))


def test_even_splits_put_the_remainder_first(kit) -> None:
    states = list(denoise(kit.Fake(), kit.holes(1, 14), policy=Unmask(Even()), steps=4, mask=kit.mask))
    assert [int(state.canvas.masked.sum()) for state in states] == [14, 10, 6, 3, 0]


def test_proportional_quotas_take_shares_of_what_is_left(kit) -> None:
    policy = Unmask(Proportional(eps=0.0))
    states = list(denoise(kit.Fake(), kit.holes(1, 12), policy=policy, steps=4, mask=kit.mask))
    assert [int(state.canvas.masked.sum()) for state in states] == [12, 9, 6, 3, 0]


def test_margin_and_entropy_are_those_of_the_law() -> None:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 9, generator=rng) * 2
    logits[:, 4] = -torch.inf
    drawn = draw(logits, torch.rand(50, generator=rng).double(), needs=frozenset({"margin", "entropy"}))
    law = logits.double().softmax(dim=1)
    first, second = law.sort(dim=1, descending=True).values[:, :2].unbind(dim=1)
    torch.testing.assert_close(drawn.columns["margin"].double(), first - second, atol=1e-6, rtol=0)
    entropy = torch.special.entr(law).sum(dim=1)
    torch.testing.assert_close(drawn.columns["entropy"].double(), entropy, atol=1e-5, rtol=0)


# orders


@pytest.mark.parametrize("height", [*range(1, 97, 5), 64, 96])
def test_halton_meets_every_cell_once(height: int) -> None:
    for width in (*range(1, 97, 7), 64, 96):
        order = halton(height, width)
        assert torch.equal(order.sort().values, torch.arange(height * width)), (height, width)


@pytest.mark.slow
@pytest.mark.parametrize("height", range(1, 97))
def test_halton_meets_every_cell_of_every_grid_once(height: int) -> None:
    for width in range(1, 97):
        assert torch.equal(halton(height, width).sort().values, torch.arange(height * width)), (height, width)


def test_halton_points_are_the_textbooks() -> None:
    # (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9), (3/8, 2/9) on 4 x 3
    order = halton(4, 3).view(4, 3)
    cells = [(2, 1), (1, 2), (3, 0), (0, 1), (2, 2), (1, 0)]
    assert [int(order[cell]) for cell in cells] == list(range(6))


def test_rolled_orders_differ_by_sample_and_stay_bijections(kit) -> None:
    canvas = kit.pair(0, 12)
    canvas = Canvas.concat([canvas] * 5)
    state = State.start(canvas, steps=12, seeds=3)
    image = canvas.span[0] == 1
    plain, rolled = (Halton((3, 4), rolled).score(state, None)[:, image] for rolled in (False, True))
    assert (plain == plain[0]).all()
    assert len({tuple(row.tolist()) for row in rolled}) > 1
    assert all(sorted(row.tolist()) == sorted(plain[0].tolist()) for row in rolled)


# blocks


def test_blocks_are_filled_one_after_the_other(kit) -> None:
    policy = Unmask(Even(), order=Random(), plan=Path(blocks=Blocks(4)))
    states = list(denoise(kit.Fake(), kit.holes(3, 12), policy=policy, steps=6, mask=kit.mask))
    for state in states:
        left = state.canvas.masked
        for block in range(1, 3):
            begun = ~left[:, 4 * block : 4 * block + 4].all(dim=1)
            assert not (begun & left[:, : 4 * block].any(dim=1)).any()
    assert [int(state.canvas.masked[0].sum()) for state in states] == [12, 10, 8, 6, 4, 2, 0]


def test_blocks_in_flight_begin_before_the_last_is_full(kit) -> None:
    policy = Unmask(
        Fixed(1), order=Random(), rule=Threshold(1.0), plan=Path(blocks=Blocks(4, ahead=0.25, lead=0.25))
    )
    overlap = False
    for state in denoise(kit.Fake(), kit.holes(1, 12), policy=policy, steps=12, mask=kit.mask):
        left = state.canvas.masked[0].view(3, 4).sum(dim=1).tolist()
        for block in (1, 2):
            if left[block] < 4:
                assert left[block - 1] <= 3
                overlap = overlap or left[block - 1] > 0
    assert overlap
    assert not state.canvas.masked.any()


def test_ragged_blocks_are_those_of_lone_rows(kit) -> None:
    rows = [kit.pair(7, 0), kit.pair(4, 0), kit.pair(10, 0)]
    policy = Unmask(Even(), plan=Path(blocks=Blocks(3)), temperature=0.5)
    steps, samples = torch.tensor([9, 4, 8]), torch.tensor([0, 5, 2])
    run = {"policy": policy, "mask": kit.mask, "seeds": 1}
    whole = kit.last(denoise(kit.Fake(), Canvas.concat(rows), steps=steps, samples=samples, **run))
    assert not whole.canvas.masked.any()
    for number, row in enumerate(rows):
        alone = kit.last(
            denoise(kit.Fake(), row, steps=int(steps[number]), samples=samples[number : number + 1], **run)
        )
        assert torch.equal(whole.canvas.tokens[number, : row.shape[1]], alone.canvas.tokens[0])


def test_a_modality_that_ticks_moves_at_its_ticks_only(kit) -> None:
    policy = Unmask(Scheduled(Linear()), plan=Path(image=(0.25, 1.0), ticks=3))
    states = list(denoise(kit.Fake(), kit.pair(0, 9), policy=policy, steps=8, mask=kit.mask))
    left = [int(state.canvas.masked.sum()) for state in states]
    assert sorted(set(left), reverse=True) == [9, 6, 3, 0]
    assert left[2] == 9


def test_spans_together_compete_for_one_quota(kit) -> None:
    policy = Unmask(Fixed(1), order=Random(), plan=Path(together=True))
    states = list(denoise(kit.Fake(), kit.pair(3, 4), policy=policy, steps=7, mask=kit.mask))
    assert [int(state.canvas.masked.sum()) for state in states] == [7, 6, 5, 4, 3, 2, 1, 0]


# guidance


def test_batched_branches_give_what_lone_ones_give(kit) -> None:
    canvas = Canvas.concat([kit.pair(5, 6), kit.pair(2, 9)])
    terms = partners(text=0.7, image=1.5)
    counted = Counted(kit.Fake())
    lone = tokens(kit, Unmask(), canvas, 4, Guided(kit.Fake(), terms, mask=kit.mask))
    batched = tokens(kit, Unmask(), canvas, 4, Guided(counted, terms, mask=kit.mask, batched=True))
    assert torch.equal(lone, batched)
    assert counted.calls == 4


def test_a_branch_asked_every_other_step_costs_half(kit) -> None:
    counted = Counted(kit.Fake())
    term = Term(Without(1), 1.0, 2, every=2)
    kit.last(
        denoise(
            Guided(counted, [term], mask=kit.mask), kit.pair(4, 8), policy=Unmask(), steps=4, mask=kit.mask
        )
    )
    assert counted.calls == 4 + 2


def test_a_partner_noised_to_nothing_guides_nothing_and_to_all_is_hidden(kit) -> None:
    canvas = kit.pair(4, 8, given=(1, 2, 3, 4))
    plain, none = tokens(kit, Unmask(), canvas, 4), Term(Renoised(1, 0.0), 2.0, 2)
    assert torch.equal(tokens(kit, Unmask(), canvas, 4, Guided(kit.Fake(), [none], mask=kit.mask)), plain)
    hidden, all_of_it = Term(Without(1), 2.0, 2), Term(Renoised(1, 1.0), 2.0, 2)
    first, second = (
        tokens(kit, Unmask(), canvas, 4, Guided(kit.Fake(), [term], mask=kit.mask))
        for term in (hidden, all_of_it)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)


def test_noise_on_a_choice_may_stay(kit) -> None:
    step = step_of(kit, [0.5] * 4)
    windows = Path().windows(step.state)
    falling, steady = (
        Unmask(choice_temperature=heat).score(step, windows) - step.proposal.logp
        for heat in (2.0, Constant(2.0))
    )
    torch.testing.assert_close(falling, 0.75 * steady)


def test_orders_of_laws_are_read_where_they_are_needed(kit) -> None:
    for order in (Margin(), NegativeEntropy(), Peak(), Drawn()):
        assert not tokens(kit, Unmask(order=order), kit.pair(4, 5), 3).eq(kit.mask).any()
    step = step_of(kit, [0.5, 0.4])
    with pytest.raises(KeyError, match="names in `needs` what it reads"):
        Unmask(order=Margin()).move(step)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Blocks(0), "at least 1 position"),
        (lambda: Blocks(4, ahead=0.0), "ahead is a share"),
        (lambda: Fixed(0), "at least 1 hole"),
        (lambda: Factor(0.0), "factor must be above 0"),
        (lambda: Bounded(-1.0), "at least 0 nats"),
        (lambda: Planned(-1.0), "eta must be at least 0"),
        (lambda: Capped(1.5), r"eta is a chance in \[0, 1\]"),
        (lambda: Halton((0, 3)), "at least 1 row"),
        (lambda: Path(together=True, blocks=Blocks(4)), "share their window and go as a whole"),
        (lambda: Renoised(1, 1.5), r"noise level is in \[0, 1\]"),
        (lambda: Term(Without(1), 1.0, every=0), "n at least 1"),
        (lambda: Ancestral(eps=1.0), "eps 1.0"),
    ],
)
def test_wrong_settings_are_named(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
