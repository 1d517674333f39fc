"""The loop's promises: what is given stays, rows are independent of one another, nothing is left masked."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mmdlm.canvas import IMAGE, TEXT, Canvas, Part
from mmdlm.diffusion.schedule import Linear
from mmdlm.sampling import (
    Ancestral,
    ByModality,
    Counted,
    Guided,
    LeftToRight,
    Move,
    Path,
    Peak,
    Policy,
    Random,
    Scheduled,
    State,
    Threshold,
    Unmask,
    denoise,
    partners,
    resume,
)

POLICIES = {
    "confidence": Unmask(choice_temperature=2.0),
    "greedy": Unmask(Scheduled(Linear()), temperature=0.0),
    "peak": Unmask(order=Peak(), temperature=0.8, top_k=4),
    "by modality": Unmask(
        quota=ByModality(Scheduled(Linear()), Scheduled(Linear())),
        temperature=ByModality(0.0, 1.0),
        top_p=ByModality(None, 0.9),
        order=ByModality(LeftToRight(), Random()),
    ),
    "text first": Unmask(plan=Path(text=(0.0, 0.5), image=(0.5, 1.0)), choice_temperature=1.0),
    "sure": Unmask(Scheduled(Linear()), order=Random(), rule=ByModality(None, Threshold(0.9999))),
    "ancestral": Ancestral(),
    "image first": Ancestral(plan=Path(text=(0.4, 1.0), image=(0.0, 0.6)), top_p=0.95),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())

# text and image sizes of the members of a ragged batch, and their steps
MEMBERS = [(3, 4, 5), (6, 9, 3), (1, 2, 8), (5, 1, 1), (2, 12, 6)]


def members(kit) -> list[Canvas]:
    return [kit.pair(text, image, seed=number) for number, (text, image, _) in enumerate(MEMBERS)]


def run(denoiser, kit, canvas: Canvas, policy: Policy, steps, samples=None, seeds=5) -> State:
    states = denoise(
        denoiser, canvas, policy=policy, steps=steps, seeds=seeds, samples=samples, mask=kit.mask
    )
    return kit.last(states)


@every_policy
def test_given_tokens_stay_and_no_mask_is_emitted(kit, policy: Policy) -> None:
    canvas = kit.pair(6, 9, given=(2, 4, 8, 11))
    # a given token that happens to hold the mask id is given all the same; what a hole holds does not matter
    tokens = canvas.tokens.clone()
    tokens[0, 4] = kit.mask
    tokens[0, 1] = 3
    canvas = canvas.replace(tokens=tokens)
    given = ~canvas.masked
    states = list(denoise(kit.Fake(), canvas, policy=policy, steps=4, mask=kit.mask))
    for state in states:
        assert torch.equal(state.canvas.tokens[given], tokens[given])
        assert not state.canvas.masked[given].any()
    final = states[-1]
    assert final.done.all()
    assert not final.canvas.masked.any()
    text, image = final.canvas.modality == TEXT, final.canvas.modality == IMAGE
    written = final.canvas.tokens[~given & text]
    assert ((written >= kit.text_ids.start) & (written < kit.text_ids.stop)).all()
    assert (final.canvas.tokens[image] >= kit.image_ids.start).all()
    assert (final.canvas.tokens[image] < kit.image_ids.stop).all()


def test_a_model_that_wants_the_mask_does_not_get_it(kit) -> None:
    class Eager(kit.Fake):
        def __call__(self, canvas, rows, *, reduce=None):
            parts = super().__call__(canvas, rows)
            for part in parts:
                part.logits[:, kit.mask - part.ids.start] = 50.0
            return parts

    fake = Eager(ids=((TEXT, slice(0, kit.mask + 1)), (IMAGE, slice(0, kit.mask + 1))))
    for policy in POLICIES.values():
        final = run(fake, kit, kit.pair(5, 6), policy, 4)
        assert not (final.canvas.tokens == kit.mask).any()


@every_policy
@pytest.mark.parametrize("model", ["fake", "transformer"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_ragged_batch_gives_the_tokens_of_its_members(
    kit, policy: Policy, model: str, guidance: float
) -> None:
    denoiser = kit.Fake() if model == "fake" else kit.lively()
    if guidance:
        denoiser = Guided(denoiser, partners(text=0.5 * guidance, image=guidance), mask=kit.mask)
    rows = members(kit)
    steps, samples = torch.tensor([steps for *_, steps in MEMBERS]), torch.tensor([4, 0, 9, 2, 7])
    seeds = torch.tensor([1, 1, 2, 3, 1])
    together = run(denoiser, kit, Canvas.concat(rows), policy, steps, samples, seeds).canvas
    assert not together.masked.any()
    for number, row in enumerate(rows):
        alone = run(denoiser, kit, row, policy, int(steps[number]), samples[number], seeds[number]).canvas
        length = row.shape[1]
        assert torch.equal(together.tokens[number, :length], alone.tokens[0])


@every_policy
def test_a_row_that_joins_later_gives_the_tokens_of_its_lone_run(kit, policy: Policy) -> None:
    fake = kit.Fake()
    first, second, third = members(kit)[:3]
    alone = [run(fake, kit, row, policy, 7, number) for number, row in enumerate((first, second, third))]

    def after(states, steps: int) -> State:
        for _ in range(steps + 1):
            state = next(states)
        return state

    state = after(denoise(fake, first, policy=policy, steps=7, seeds=5, samples=0, mask=kit.mask), 3)
    newcomer = State.start(second, steps=7, seeds=5, samples=1)
    state = after(resume(fake, State.join(state, newcomer), policy=policy, mask=kit.mask), 2)
    state = State.join(State.start(third, steps=7, seeds=5, samples=2), state)  # in front, and shorter
    finished = kit.last(resume(fake, state, policy=policy, mask=kit.mask))
    for row, lone in zip((1, 2, 0), alone, strict=True):
        length = lone.canvas.shape[1]
        assert torch.equal(finished.canvas.tokens[row, :length], lone.canvas.tokens[0])


@every_policy
def test_rows_that_are_selected_go_on_as_they_would_have(kit, policy: Policy) -> None:
    canvas = Canvas.concat(members(kit))
    states = list(denoise(kit.Fake(), canvas, policy=policy, steps=6, mask=kit.mask))
    for rows in (torch.tensor([4, 1]), torch.tensor([True, False, False, True, False])):
        rest = kit.last(resume(kit.Fake(), states[2].select(rows), policy=policy, mask=kit.mask))
        assert torch.equal(rest.canvas.tokens, states[-1].canvas.tokens[rows])


@every_policy
def test_rows_commit_each_hole_once_and_finished_rows_stay(kit, policy: Policy) -> None:
    canvas = Canvas.concat(members(kit))
    steps = torch.tensor([steps for *_, steps in MEMBERS])
    states = list(denoise(kit.Fake(), canvas, policy=policy, steps=steps, mask=kit.mask))
    initial = states[0].initial
    committed = torch.zeros_like(initial, dtype=torch.long)
    for before, after in pairwise(states):
        committed += (before.canvas.masked & ~after.canvas.masked).long()
        kept = ~before.canvas.masked
        assert torch.equal(before.canvas.tokens[kept], after.canvas.tokens[kept])
        assert torch.equal(before.step[before.done], after.step[before.done])
    assert torch.equal(committed, initial.long())
    assert (states[-1].step <= steps).all()
    assert len(states) <= int(steps.max()) + 1


def test_samples_differ_by_sample_and_by_seed(kit) -> None:
    canvas = Canvas.concat([kit.pair(6, 9)] * 6)
    fake, policy = kit.Fake(), Unmask(order=Random())
    seeds, samples = torch.tensor([0, 0, 1, 1, 0, -7]), torch.tensor([0, 1, 0, 1, 0, 0])
    tokens = run(fake, kit, canvas, policy, 5, samples, seeds).canvas.tokens
    assert torch.equal(tokens[0], tokens[4])
    assert len({tuple(row) for row in tokens.tolist()}) == 5
    by_default = run(fake, kit, canvas, policy, 5, None, 0).canvas.tokens
    assert torch.equal(by_default[:2], tokens[:2])


def test_no_global_randomness_is_touched(kit) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    first = run(kit.Fake(), kit, kit.pair(5, 6), POLICIES["confidence"], 4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    torch.rand(3)
    second = run(kit.Fake(), kit, kit.pair(5, 6), POLICIES["confidence"], 4)
    assert torch.equal(first.canvas.tokens, second.canvas.tokens)


def test_who_stops_iterating_cancels(kit) -> None:
    counted = Counted(kit.Fake())
    states = denoise(counted, kit.pair(6, 9), policy=Unmask(), steps=8, mask=kit.mask)
    assert counted.calls == 0
    next(states)
    assert counted.calls == 0  # the canvas as it came
    next(states)
    next(states)
    states.close()
    assert counted.calls == 2


def test_rows_that_are_done_are_not_counted(kit) -> None:
    counted = Counted(kit.Fake())
    canvas = kit.pair(3, 0), kit.pair(3, 0, given=(1, 2))
    steps = torch.tensor([3, 3])
    for _ in denoise(
        counted, Canvas.concat(list(canvas)), policy=Unmask(Scheduled(Linear())), steps=steps, mask=kit.mask
    ):
        pass
    assert (counted.calls, counted.forwards) == (3, 4)


def test_states_are_handed_out_with_gradients_as_the_caller_has_them(kit) -> None:
    for _ in denoise(kit.Fake(), kit.pair(2, 2), policy=Unmask(), steps=3, mask=kit.mask):
        assert torch.is_grad_enabled()


def test_one_state_a_step_and_one_before(kit) -> None:
    states = list(
        denoise(kit.Fake(), kit.pair(12, 12), policy=Unmask(Scheduled(Linear())), steps=5, mask=kit.mask)
    )
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4, 5]
    assert [bool(state.done) for state in states] == [False] * 5 + [True]


def test_a_canvas_without_holes_is_done_at_once(kit) -> None:
    canvas = kit.pair(2, 2, given=(1, 2, 4, 5))
    counted = Counted(kit.Fake())
    states = list(denoise(counted, canvas, policy=Unmask(), steps=5, mask=kit.mask))
    assert len(states) == 1
    assert counted.calls == 0


def test_holes_that_may_not_be_filled_stay_hidden(kit) -> None:
    """The unconditional walk: the partner is a hole for good."""
    canvas = kit.pair(4, 5)
    canvas = canvas.replace(fillable=canvas.fillable & (canvas.modality == IMAGE))
    final = run(kit.Fake(), kit, canvas, Unmask(), 3).canvas
    assert torch.equal(final.masked, canvas.masked & (canvas.modality == TEXT))
    assert torch.equal(final.tokens[final.modality == TEXT], canvas.tokens[canvas.modality == TEXT])


def test_noise_reopens_only_what_was_a_hole(kit) -> None:
    class Restless(Policy):
        """Writes everything, then takes it back but at the last step."""

        def move(self, step):
            everywhere = torch.ones_like(step.proposal.valid)
            last = (step.state.step + 1 == step.state.num_steps).unsqueeze(1)
            return Move(everywhere, everywhere & (step.state.step % 2 == 1).unsqueeze(1) & ~last)

    canvas = kit.pair(4, 5, given=(2, 7))
    states = [
        state.canvas
        for state in resume(kit.Fake(), State.start(canvas, steps=1), policy=Restless(), mask=kit.mask)
    ]
    assert not states[-1].masked.any()
    start = State.start(Canvas.concat([canvas]), steps=4)
    start = replace(start, step=torch.tensor([1]))
    states = resume(kit.Fake(), start, policy=Restless(), mask=kit.mask)
    next(states)
    again = next(states).canvas
    assert torch.equal(again.masked, canvas.masked)
    assert (again.tokens[again.masked] == kit.mask).all()
    assert torch.equal(again.tokens[~canvas.masked], canvas.tokens[~canvas.masked])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": torch.tensor([3, 3])}, "steps must be one number or 1"),
        ({"steps": 3, "seeds": torch.tensor([[1]])}, "seeds must be one number or 1"),
        ({"steps": 3, "samples": torch.tensor([1, 2])}, "samples must be one number or 1"),
    ],
)
def test_wrong_settings_are_named(kit, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        denoise(kit.Fake(), kit.pair(2, 2), policy=Unmask(), mask=kit.mask, **settings)


def test_a_level_column_is_refused(kit) -> None:
    canvas = kit.pair(2, 2)
    with pytest.raises(ValueError, match="level"):
        State.start(canvas.replace(level=torch.zeros(canvas.shape)), steps=3)


def test_parts_may_share_one_range_of_ids(kit) -> None:
    """Families with one softmax answer with a single part over both modalities."""

    class One(kit.Fake):
        def __call__(self, canvas, rows, *, reduce=None):
            parts = super().__call__(canvas, rows)
            logits = torch.full((rows.index.shape[0], kit.mask + 1), -torch.inf, dtype=torch.float64)
            for part in parts:
                places = torch.searchsorted(rows.index, part.rows.index)
                logits[places, part.ids] = part.logits
            return [Part(rows, slice(0, kit.mask + 1), logits)]

    for name in ("by modality", "ancestral"):
        for scale in (0.0, 2.0):
            shared, split = (
                Guided(fake, partners(text=scale, image=0.5 * scale), mask=kit.mask)
                for fake in (One(), kit.Fake())
            )
            canvas = Canvas.concat(members(kit))
            first, second = (run(fake, kit, canvas, POLICIES[name], 5).canvas for fake in (shared, split))
            assert torch.equal(first.tokens, second.tokens)
