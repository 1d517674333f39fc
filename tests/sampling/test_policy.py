"""Policies against closed forms: how many, which, when, and by what law."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mmdlm.canvas import IMAGE, TEXT, Canvas, Part
from mmdlm.diffusion.schedule import Cosine, Linear, LogLinear, Polynomial
from mmdlm.sampling import (
    Ancestral,
    ByModality,
    Drawn,
    LeftToRight,
    Path,
    Peak,
    Policy,
    Proposal,
    Random,
    Scheduled,
    State,
    Step,
    Threshold,
    Unmask,
    denoise,
)
from mmdlm.sampling.draw import CHOICE, gumbel
from mmdlm.sampling.order import count, rank


def masked_counts(kit, policy, canvas: Canvas, steps: int, modality: int) -> list[int]:
    """Holes of the first row's modality before the first step and after each."""
    states = denoise(kit.Fake(), canvas, policy=policy, steps=steps, mask=kit.mask)
    return [int((state.canvas.masked & (state.canvas.modality == modality)).sum()) for state in states]


def test_ranks_are_those_of_a_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    score = torch.randint(0, 4, (20, 30), generator=rng).double()  # with ties
    runs = torch.randint(-1, 4, (20, 30), generator=rng)
    where = torch.rand(20, 30, generator=rng) < 0.6
    got, numbers = rank(score, where, runs), count(where, runs)
    for row in range(20):
        for run in range(-1, 4):
            places = [i for i in range(30) if where[row, i] and runs[row, i] == run]
            by_score = sorted(places, key=lambda i, row=row: (-float(score[row, i]), i))
            assert [int(got[row, i]) for i in by_score] == list(range(len(places)))
            assert all(int(numbers[row, i]) == len(places) for i in range(30) if runs[row, i] == run)


@pytest.mark.parametrize("steps", [1, 3, 8, 16, 40])
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(2.0), LogLinear()])
def test_confidence_keeps_what_the_schedule_says(kit, schedule, steps: int) -> None:
    counts = masked_counts(kit, Unmask(Scheduled(schedule)), kit.pair(0, 16), steps, IMAGE)
    expected = [16]
    for step in range(1, steps + 1):
        level = 0.0 if step == steps else float(1 - schedule.alpha(torch.tensor(1 - step / steps).double()))
        expected.append(max(0, min(math.floor(16 * level + 1e-9), expected[-1] - 1)))
    assert counts == expected[: len(counts)]
    assert counts[-1] == 0


def test_the_quota_counts_the_holes_of_the_start(kit) -> None:
    """Inpainting: 8 of 16 codes are holes; half way through a linear schedule 4 are left (not 8 of 16)."""
    canvas = kit.pair(0, 16, given=tuple(range(2, 10)))
    assert masked_counts(kit, Unmask(Scheduled(Linear())), canvas, 4, IMAGE) == [8, 6, 4, 2, 0]


def test_exact_tenths_are_not_lost_to_rounding(kit) -> None:
    assert masked_counts(kit, Unmask(Scheduled(Linear())), kit.pair(0, 10), 10, IMAGE) == list(
        range(10, -1, -1)
    )


def test_each_modality_keeps_its_own_clock(kit) -> None:
    canvas = kit.pair(4, 8)
    policy = Unmask(Scheduled(Linear()), plan=Path(text=(0.0, 0.5), image=(0.5, 1.0)))
    assert masked_counts(kit, policy, canvas, 8, TEXT) == [4, 3, 2, 1, 0, 0, 0, 0, 0]
    assert masked_counts(kit, policy, canvas, 8, IMAGE) == [8, 8, 8, 8, 8, 6, 4, 2, 0]
    at_once = Unmask(ByModality(Scheduled(Linear()), Scheduled(Cosine())))
    assert masked_counts(kit, at_once, canvas, 4, TEXT) == [4, 3, 2, 1, 0]
    assert masked_counts(kit, at_once, canvas, 4, IMAGE) == [8, 7, 5, 3, 0]


@pytest.mark.parametrize("policy", [Unmask(Scheduled(Linear())), Ancestral()])
def test_only_spans_whose_clock_ticks_are_asked(kit, policy) -> None:
    path = Path(text=(0.0, 0.5), image=(0.5, 1.0))
    fake = kit.Fake()
    canvas = Canvas.concat([kit.pair(6, 9, seed=seed) for seed in range(8)])
    policy = replace(policy, plan=path)
    for _ in denoise(fake, canvas, policy=policy, steps=4, mask=kit.mask):
        pass
    asked = [set(rows.gather(canvas.modality).tolist()) for canvas, rows in fake.calls]
    assert asked == [{TEXT}, {TEXT}, {IMAGE}, {IMAGE}]


def test_two_texts_of_a_row_are_two_spans(kit) -> None:
    canvas = kit.pair(8, 0)
    span = canvas.span.clone()
    span[:, 3:9] = 1
    states = list(
        denoise(
            kit.Fake(), canvas.replace(span=span), policy=Unmask(Scheduled(Linear())), steps=2, mask=kit.mask
        )
    )
    left = states[1].canvas.masked[0]
    assert [int(left[1:3].sum()), int(left[3:9].sum())] == [1, 3]


def test_without_a_span_column_each_modality_is_a_span(kit) -> None:
    canvas = kit.pair(4, 6)
    policy = Unmask(Scheduled(Linear()), order=Random())
    first, second = (
        kit.last(denoise(kit.Fake(), each, policy=policy, steps=3, mask=kit.mask)).canvas.tokens
        for each in (canvas, canvas.replace(span=None))
    )
    assert torch.equal(first, second)


def test_noise_on_the_choice_starts_anew_each_step(kit) -> None:
    """At every step the scale is start value * (1 - clock): no compounding."""
    canvas = kit.pair(3, 4)
    policy = Unmask(Scheduled(Linear()), choice_temperature=ByModality(0.0, 4.0))
    zeros = torch.zeros(canvas.shape)
    for step in range(6):
        state = State.start(canvas, steps=6, seeds=3)
        state = replace(state, step=torch.tensor([step]))
        proposal = Proposal(canvas.tokens, zeros - 1.5, zeros, canvas.masked)
        score = policy.score(Step(state, proposal), policy.plan.windows(state))
        noise = gumbel(state.uniform(CHOICE)) * 4.0 * (1 - (step + 1) / 6)
        expected = torch.where(canvas.modality == IMAGE, noise - 1.5, -1.5)
        torch.testing.assert_close(score, expected, check_dtype=False)


def test_the_surest_positions_go_first(kit) -> None:
    canvas = kit.pair(0, 5)
    state = State.start(canvas, steps=5)
    logp = torch.tensor([[0.0, 0.0, -3.0, -1.0, -2.0, -0.5, -4.0]])
    peak = torch.tensor([[0.0, 0.0, -3.0, -2.0, -2.0, -2.5, -0.1]])
    step = Step(state, Proposal(canvas.tokens, logp, peak, canvas.masked))
    for order, place in ((Drawn(), 5), (Peak(), 6), (LeftToRight(), 2)):
        move = Unmask(Scheduled(Linear()), order=order).move(step)
        assert move.write.nonzero().tolist() == [[0, place]]
        assert not move.noise.any()


@pytest.mark.parametrize(
    "order",
    [Peak(), Random(), LeftToRight()],
    ids=lambda order: type(order).__name__,
)
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_one_position_at_a_time_samples_an_oracle_exactly(kit, order, noise: float) -> None:
    oracle = kit.Oracle(law := joint(), 4, 3)
    policy = Unmask(Scheduled(Linear()), order=order, choice_temperature=noise)
    final = kit.last(denoise(oracle, kit.holes(8_000, 4), policy=policy, steps=4, mask=kit.mask))
    assert kit.chi_square(oracle.counts(final.canvas.tokens), law) < 1


def test_an_order_that_looks_at_the_draw_is_not_exact(kit) -> None:
    """And the test above can tell: the order of MaskGIT and LLaDA prefers what is probable."""
    oracle = kit.Oracle(law := joint(), 4, 3)
    final = kit.last(
        denoise(oracle, kit.holes(8_000, 4), policy=Unmask(Scheduled(Linear())), steps=4, mask=kit.mask)
    )
    assert kit.chi_square(oracle.counts(final.canvas.tokens), law) > 10


def test_a_draw_ordered_law_has_its_closed_form(kit) -> None:
    """Two independent places with P(1) = q: the likelier draw is kept, so 11 comes with q ** 3."""
    q = 0.3
    law = torch.tensor([(1 - q) ** 2, (1 - q) * q, q * (1 - q), q * q])
    oracle = kit.Oracle(law, 2, 2)
    final = kit.last(
        denoise(oracle, kit.holes(10_000, 2), policy=Unmask(Scheduled(Linear())), steps=2, mask=kit.mask)
    )
    counts = oracle.counts(final.canvas.tokens)
    # the left place wins ties; what is not kept is drawn anew
    sharp = torch.tensor([(1 - q) ** 2 * (1 + q), (1 - q) * q, 2 * q * q * (1 - q), q**3])
    assert kit.chi_square(counts, sharp) < 1


def test_ancestral_steps_through_an_oracle_converge(kit) -> None:
    law = torch.randn(27, generator=torch.Generator().manual_seed(2), dtype=torch.float64).mul(1.2).exp()
    oracle, canvas = kit.Oracle(law, 3, 3), kit.holes(4_000, 3)
    fine, coarse = (
        kit.last(denoise(oracle, canvas, policy=Ancestral(), steps=steps, mask=kit.mask)) for steps in (64, 1)
    )
    assert kit.chi_square(oracle.counts(fine.canvas.tokens), law) < 1
    assert kit.chi_square(oracle.counts(coarse.canvas.tokens), law) > 3


class CopyPairs:
    """Places 2i and 2i + 1 hold the same id, which is uniform."""

    def __init__(self, size: int) -> None:
        self.size = size

    def begin(self, canvas):
        return self

    def __call__(self, canvas, rows, *, reduce=None):
        flip = torch.arange(canvas.shape[1]) ^ 1
        known = (
            torch.nn.functional.one_hot(canvas.tokens[:, flip].clamp(max=self.size - 1), self.size)
            .double()
            .log()
        )
        logits = known.masked_fill(canvas.masked[:, flip].unsqueeze(2), 0.0)
        return [Part(rows, slice(0, self.size), rows.gather(logits))]


@pytest.mark.parametrize(
    ("policy", "steps", "collision"),
    [
        (Ancestral(Linear()), 1, 1.0),
        (Ancestral(Linear()), 4, 1 / 4),
        (Ancestral(Linear()), 16, 1 / 16),
        # a token is revealed in (t, s] with probability alpha_s - alpha_t, both of a pair with its square
        (Ancestral(Polynomial(2.0)), 4, sum((((k + 1) / 4) ** 2 - (k / 4) ** 2) ** 2 for k in range(4))),
        # a text window of two of the four steps is a walk of two steps
        (Ancestral(Linear(), plan=Path(text=(0.25, 0.75))), 4, 1 / 2),
        # one place at a time: never both at once
        (Unmask(Scheduled(Linear()), order=Random()), 16, 0.0),
    ],
)
def test_copy_pairs_break_as_often_as_the_exact_law_says(kit, policy, steps: int, collision: float) -> None:
    """A pair breaks when both are revealed in one step and differ: collision * (1 - 1 / V)."""
    size, rows, pairs = 8, 2_000, 8
    final = kit.last(
        denoise(CopyPairs(size), kit.holes(rows, 2 * pairs), policy=policy, steps=steps, mask=kit.mask)
    )
    tokens = final.canvas.tokens
    broken = (tokens[:, 0::2] != tokens[:, 1::2]).double()
    expected = collision * (1 - 1 / size)
    assert abs(float(broken.mean()) - expected) <= 5 * math.sqrt(expected * (1 - expected) / broken.numel())
    assert kit.chi_square(torch.bincount(tokens[:, 0], minlength=size), torch.ones(size)) < 1


@pytest.mark.parametrize("order", [Random(), LeftToRight()], ids=lambda order: type(order).__name__)
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_an_order_known_beforehand_asks_only_where_it_writes(kit, order, noise: float) -> None:
    class AsksAll(Unmask):
        def ask(self, state):
            return Policy.ask(self, state)

    canvas = Canvas.concat([kit.pair(6, 9, seed=seed) for seed in range(4)])
    settings = {"quota": Scheduled(Linear()), "order": order, "choice_temperature": noise}
    frugal, lavish = kit.Fake(), kit.Fake()
    first = list(denoise(frugal, canvas, policy=Unmask(**settings), steps=4, mask=kit.mask))
    second = list(denoise(lavish, canvas, policy=AsksAll(**settings), steps=4, mask=kit.mask))
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours.canvas.tokens, theirs.canvas.tokens)
        assert torch.equal(ours.canvas.masked, theirs.canvas.masked)
    holes = 4 * (6 + 9)
    assert sum(rows.index.shape[0] for _, rows in frugal.calls) == holes
    assert sum(rows.index.shape[0] for _, rows in lavish.calls) > 2 * holes


def test_each_modality_asks_as_its_own_order_does(kit) -> None:
    fake = kit.Fake()
    policy = Unmask(Scheduled(Linear()), order=ByModality(Random(), Drawn()))
    for _ in denoise(fake, kit.pair(4, 8), policy=policy, steps=4, mask=kit.mask):
        pass
    asked = [rows.gather(canvas.modality).tolist() for canvas, rows in fake.calls]
    assert [each.count(TEXT) for each in asked] == [1, 1, 1, 1]
    assert [each.count(IMAGE) for each in asked] == [8, 6, 4, 2]


def test_what_is_sure_enough_is_written_beside_the_quota(kit) -> None:
    canvas = kit.pair(2, 3)
    state = State.start(canvas, steps=5)
    peak = torch.tensor([[0.0, 0.91, 0.95, 0.0, 0.2, 0.91, 0.3]]).log()
    step = Step(state, Proposal(canvas.tokens, torch.zeros_like(peak), peak, canvas.masked))

    def written(rule) -> list[int]:
        policy = Unmask(Scheduled(Linear()), order=LeftToRight(), rule=rule)
        return policy.move(step).write.nonzero()[:, 1].tolist()

    assert written(None) == [1, 4]
    assert written(Threshold(0.9)) == [1, 2, 4, 5]
    assert written(Threshold(0.94)) == [1, 2, 4]
    assert written(ByModality(Threshold(0.9), None)) == [1, 2, 4]
    assert written(ByModality(None, Threshold(0.25))) == [1, 4, 5, 6]


def test_a_threshold_ends_early_and_breaks_no_copied_pair(kit) -> None:
    """The other of a pair is certain once one is known, and comes a step later, whatever else does."""
    policy = Unmask(Scheduled(Linear()), order=Random(), rule=Threshold(0.99))
    states = list(denoise(CopyPairs(8), kit.holes(200, 16), policy=policy, steps=16, mask=kit.mask))
    tokens = states[-1].canvas.tokens
    assert torch.equal(tokens[:, 0::2], tokens[:, 1::2])
    assert len(states) - 1 < 14  # 16 without
    assert kit.chi_square(torch.bincount(tokens[:, ::2].flatten(), minlength=8), torch.ones(8)) < 1


def test_what_is_sure_is_drawn_from_its_own_law(kit) -> None:
    """Independent places, each 1 with probability 0.1: all are sure, and rare ones come as often as told."""
    law = torch.tensor([0.9, 0.1], dtype=torch.float64)
    oracle = kit.Oracle((law[:, None] * law[None]).flatten(), 2, 2)
    policy = Unmask(Scheduled(Linear()), order=Random(), rule=Threshold(0.8))
    states = list(denoise(oracle, kit.holes(8_000, 2), policy=policy, steps=2, mask=kit.mask))
    assert len(states) == 2  # before and after the only step
    assert kit.chi_square(oracle.counts(states[-1].canvas.tokens), oracle.law) < 1


def test_an_order_without_a_score_is_named(kit) -> None:
    class Silent:
        def score(self, state, proposal):
            return None

    with pytest.raises(ValueError, match="gives no score although"):
        list(denoise(kit.Fake(), kit.pair(2, 2), policy=Unmask(order=Silent()), steps=2, mask=kit.mask))


def test_a_step_that_reveals_nothing_costs_no_forward(kit) -> None:
    fake = kit.Fake()
    states = list(denoise(fake, kit.pair(1, 1), policy=Ancestral(), steps=200, mask=kit.mask))
    assert len(states) > 3
    assert len(fake.calls) <= 2


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Path(text=(0.5, 0.5)), "text window"),
        (lambda: Path(image=(0.5, 1.5)), "image window"),
        (lambda: Unmask(temperature=-1.0), "temperature must not be negative"),
        (
            lambda: Unmask(choice_temperature=ByModality(0.0, -1.0)),
            "choice_temperature must not be negative",
        ),
        (lambda: Ancestral(top_k=0), "top_k must be at least 1"),
        (lambda: Unmask(top_p=ByModality(None, 0.0)), "top_p must be in"),
        (lambda: Unmask(rule=Threshold(0.0)), "threshold is a probability in"),
        (lambda: Unmask(rule=ByModality(None, Threshold(1.1))), "threshold is a probability in"),
    ],
)
def test_wrong_settings_are_named(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def joint() -> torch.Tensor:
    """A lopsided law over four places of three ids, with impossible outcomes."""
    rng = torch.Generator().manual_seed(1)
    law = torch.randn(81, generator=rng, dtype=torch.float64).mul(1.5).exp()
    law[torch.rand(81, generator=rng) < 0.3] = 0.0
    return law / law.sum()
