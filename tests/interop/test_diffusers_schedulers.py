"""Schedulers of diffusers in our loop give what their own plain loop gives, and the same in any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas, Rows
from mmdlm.interop.diffusers_schedulers import _NOISE, _SEED, SchedulerPolicy, UniformSchedulerPolicy
from mmdlm.sampling import Ended, denoise, sample
from mmdlm.sampling.draw import uniform
from tokenizers_mm import prepare_torchvision

prepare_torchvision()
from diffusers.schedulers import (  # noqa: E402
    AmusedScheduler,
    BlockRefinementScheduler,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
)

MASK, TEXT_IDS, CODES = 15, (0, 16), (16, 27)


def rows(batch: int, length: int, *, given: int = 0, modality: int = TEXT) -> Canvas:
    """One span a row; its first `given` positions are given, and differ from row to row."""
    first, behind = TEXT_IDS if modality == TEXT else CODES
    place = torch.arange(length).expand(batch, length)
    number = torch.arange(batch).unsqueeze(1)
    tokens = first + (7 * place + 3 * number) % (behind - first - 1)
    fillable, zeros = place >= given, torch.zeros_like(tokens)
    canvas = Canvas(
        tokens,
        torch.full_like(tokens, modality, dtype=torch.uint8),
        fillable,
        torch.zeros_like(fillable),
        place.unsqueeze(2).expand(batch, length, 2),
        zeros,
        span=zeros,
    )
    return canvas.hide(fillable, MASK)


def answer(model, canvas: Canvas, tokens: Tensor, hole: int | None = None) -> Tensor:
    """(B, L, V): the model's logits on `tokens`, among which `hole` is the mask."""
    masked = torch.zeros_like(canvas.masked) if hole is None else tokens == hole
    with torch.no_grad():
        (part,) = model(canvas.replace(tokens=tokens, masked=masked), Rows.of(canvas.segment >= 0))
    return part.logits.reshape(*canvas.shape, -1)


def chance(step: int, place: int = 0, row: int = 0, kind: int = _SEED) -> Tensor:
    """The number of the row's own stream, seed 5."""
    return uniform(*(torch.tensor(number) for number in (5, row, step, place)), kind)


def generator(step: int, place: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(int(chance(step, place) * 2.0**52))


def last(model, canvas: Canvas, policy, steps: int, **more) -> Canvas:
    return sample(model, canvas, policy=policy, steps=steps, seeds=5, mask=MASK, **more).canvas


@pytest.mark.parametrize("given", [0, 8, 11])
@pytest.mark.parametrize(("threshold", "editing"), [(0.3, None), (2.0, 0.2), (0.3, 0.2)])
def test_block_refinement_gives_what_its_own_loop_gives(model, given: int, threshold: float, editing) -> None:
    canvas, length, steps = rows(3, 24, given=given), 8, 5
    scheduler = BlockRefinementScheduler(threshold=threshold, editing_threshold=editing)
    scheduler.set_timesteps(steps, block_length=length)
    tokens, forwards = canvas.tokens.clone(), 0
    for start in range(given // length * length, 24, length):
        block = slice(start, start + length)
        for step in range(steps):
            if not (tokens[:, block] == MASK).any():
                break
            logits, forwards = answer(model, canvas, tokens, MASK)[:, block], forwards + 1
            full = ~(tokens[:, block] == MASK).any(dim=1, keepdim=True)  # a row of ours has gone on by then
            out = scheduler.step(
                logits, step, tokens[:, block], mask_token_id=MASK, prompt_mask=~canvas.fillable[0, block]
            )
            tokens[:, block] = torch.where(full, tokens[:, block], out.prev_sample)
    policy = SchedulerPolicy(scheduler, block=length)
    blocks = 3 - given // length
    ours = sample(model, canvas, policy=policy, steps=steps * blocks, mask=MASK)
    assert torch.equal(ours.canvas.tokens, tokens)
    assert not ours.canvas.masked.any()
    assert ours.forwards <= forwards
    assert threshold > 1 or forwards < steps * blocks


def test_block_refinement_draws_what_its_own_loop_draws(model) -> None:
    canvas = rows(1, 8, given=2)
    scheduler = BlockRefinementScheduler(threshold=2.0, block_length=8)
    scheduler.set_timesteps(4)
    tokens = canvas.tokens
    told = {"temperature": 1.5, "top_p": 0.9, "top_k": 9}
    for step in range(4):
        given = {"mask_token_id": MASK, "generator": generator(step), **told}
        tokens = scheduler.step(answer(model, canvas, tokens, MASK), step, tokens, **given).prev_sample
    ours = last(model, canvas, SchedulerPolicy(scheduler, options=told), 4)
    assert torch.equal(ours.tokens, tokens)
    assert not torch.equal(ours.tokens, last(model, canvas, SchedulerPolicy(scheduler), 4).tokens)


@pytest.mark.parametrize(("schedule", "given"), [("cosine", 0), ("linear", 5)])
def test_amused_gives_what_its_own_loop_gives(model, schedule: str, given: int) -> None:
    canvas = rows(1, 16, given=given, modality=IMAGE)
    scheduler = AmusedScheduler(mask_token_id=11, masking_schedule=schedule)
    scheduler.set_timesteps(5, temperature=(4, 0))
    codes = torch.where(canvas.masked, 11, canvas.tokens - CODES[0])
    for step, timestep in enumerate(scheduler.timesteps):
        logits = answer(model, canvas, codes + CODES[0], 11 + CODES[0])
        codes = scheduler.step(logits, int(timestep), codes, generator=generator(step)).prev_sample
    ours = last(model, canvas, SchedulerPolicy(scheduler, options={"temperature": (4, 0)}), 5)
    assert torch.equal(ours.tokens - CODES[0], codes)


UNIFORM = [
    (EntropyBoundScheduler(entropy_bound=3.0), {}),
    (EntropyBoundScheduler(entropy_bound=3.0), {"entropy_bound": 0.5}),
    (DiscreteDDIMScheduler(), {}),
    (DiscreteDDIMScheduler(), {"temperature": 1.3}),
    (BlockRefinementScheduler(threshold=0.6), {}),
    (BlockRefinementScheduler(threshold=0.6), {"temperature": 0.8, "editing_threshold": 0.3}),
]


@pytest.mark.parametrize(("scheduler", "options"), UNIFORM)
@pytest.mark.parametrize("modality", [TEXT, IMAGE])
def test_uniform_schedulers_give_what_their_own_loop_gives(model, scheduler, options, modality) -> None:
    canvas, steps = rows(1, 10, given=3, modality=modality), 6
    first, behind = ids = TEXT_IDS if modality == TEXT else CODES
    tokens = canvas.tokens.clone()
    noise = torch.stack([chance(0, place, kind=_NOISE) for place in range(3, 10)])
    tokens[0, 3:] = first + (noise * (behind - first)).floor().long()
    scheduler.set_timesteps(steps)
    for step in range(steps):
        logits = answer(model, canvas, tokens)[:, 3:]
        out = scheduler.step(logits, step, tokens[:, 3:] - first, generator=generator(step), **options)
        tokens[:, 3:] = out.prev_sample + first
    policy = UniformSchedulerPolicy(scheduler, ids, options)
    ours = sample(model, canvas, policy=policy, steps=steps, seeds=5, mask=MASK)
    assert torch.equal(ours.canvas.tokens, tokens)
    assert ours.forwards == steps
    assert not ours.canvas.masked.any()


POLICIES = [
    SchedulerPolicy(BlockRefinementScheduler(threshold=0.7), block=4, options={"temperature": 1.0}),
    *(UniformSchedulerPolicy(scheduler, TEXT_IDS, options) for scheduler, options in UNIFORM[1::2]),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sample_depends_neither_on_its_batch_nor_on_padding(model, policy) -> None:
    short, long = rows(1, 8, given=2), rows(2, 12, given=4)
    batch = Canvas.concat([short, long])
    steps = torch.tensor([6, 6, 12])
    together = last(model, batch, policy, steps=steps, samples=torch.tensor([0, 1, 2]))
    for number, alone in enumerate([short, long.select(torch.tensor([0])), long.select(torch.tensor([1]))]):
        ours = last(model, alone, policy, steps=int(steps[number]), samples=torch.tensor([number]))
        assert torch.equal(ours.tokens[0], together.tokens[number, : alone.shape[1]])
    assert torch.equal(together.tokens[~batch.fillable], batch.tokens[~batch.fillable])


def test_every_span_is_a_block_of_its_own(model) -> None:
    canvas = rows(1, 12)
    two = canvas.replace(span=(torch.arange(12) // 6).expand(1, 12))
    policy = SchedulerPolicy(BlockRefinementScheduler(threshold=2.0))
    *states, _ = denoise(model, two, policy=policy, steps=3, mask=MASK)
    assert [int(state.canvas.masked[0, :6].sum()) for state in states] == [6, 4, 2]
    assert [int(state.canvas.masked[0, 6:].sum()) for state in states] == [6, 4, 2]


def test_nothing_is_drawn_behind_the_end(model) -> None:
    canvas = rows(2, 16, given=4)
    policy = SchedulerPolicy(BlockRefinementScheduler(threshold=0.5), block=8)
    end = int(last(model, canvas, policy, steps=16).tokens[0, 9])
    tokens = last(model, canvas, Ended(policy, end), steps=16).tokens
    assert (tokens[0, 9:] == end).all()
    assert not (tokens == MASK).any()


def test_what_cannot_be_done_is_refused(model) -> None:
    block, bound = BlockRefinementScheduler(), EntropyBoundScheduler()
    with pytest.raises(ValueError, match="has no option temprature: there are editing_threshold"):
        SchedulerPolicy(block, options={"temprature": 1.0})
    with pytest.raises(ValueError, match="there are entropy_bound"):
        UniformSchedulerPolicy(bound, TEXT_IDS, options={"generator": None})
    with pytest.raises(ValueError, match="knows no mask"):
        SchedulerPolicy(bound)
    with pytest.raises(ValueError, match="fills masks"):
        UniformSchedulerPolicy(AmusedScheduler(11), CODES)
    with pytest.raises(ValueError, match="corrector"):
        UniformSchedulerPolicy(DiscreteDDIMScheduler(corrector_steps=1), CODES)
    with pytest.raises(ValueError, match="the one behind the last"):
        UniformSchedulerPolicy(bound, (4, 4))
    with pytest.raises(ValueError, match="wanted a multiple"):
        last(model, rows(1, 16), SchedulerPolicy(block, block=8), steps=5)
    with pytest.raises(ValueError, match="mask 4 is an id that the model emits; wanted 11"):
        last(model, rows(1, 16, modality=IMAGE), SchedulerPolicy(AmusedScheduler(4)), steps=5)
    with pytest.raises(ValueError, match=r"wanted a model of the ids \(0, 9\)"):
        last(model, rows(1, 16), UniformSchedulerPolicy(bound, (0, 9)), steps=5)
