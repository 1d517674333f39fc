"""Caches: exact ones give the tokens of no cache, in fewer positions; what cannot be exact is refused."""

from __future__ import annotations

import pytest
import torch

from mmdlm.canvas import Canvas, Rows
from mmdlm.model import Predictor
from mmdlm.sampling import Blocks, Even, Guided, Path, Unmask, denoise, partners
from mmdlm.sampling.caching import (
    Approximate,
    Cached,
    Committed,
    Drifting,
    Faintest,
    Holes,
    Suffix,
    Unchanged,
    Window,
    padded,
)


@pytest.fixture(scope="module")
def model(kit) -> Predictor:
    return kit.lively(depth=3, num_heads=4, num_kv_heads=2, grid=(24, 24))


def blocked(canvas: Canvas, length: int) -> Canvas:
    """Block-causal in blocks of positions of the whole row."""
    column = torch.arange(canvas.shape[1]) // length
    return canvas.replace(block=column.expand(canvas.shape))


def text(kit, length: int, given: int) -> Canvas:
    return kit.pair(length, 0, given=tuple(range(1, given + 1)), seed=length)


@pytest.mark.parametrize("length", [1, 4, 8, 18])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_committed_blocks_give_the_tokens_of_no_cache(kit, model, length: int, temperature: float) -> None:
    canvas = blocked(Canvas.concat([text(kit, 16, 4), text(kit, 16, 9)]), length)
    policy = Unmask(Even(), plan=Path(blocks=Blocks(length)), temperature=temperature)
    run = {"policy": policy, "steps": 16, "mask": kit.mask}
    cached = Cached(model, Committed())
    plain = kit.last(denoise(model, canvas, **run)).canvas.tokens
    ours = kit.last(denoise(cached, canvas, **run)).canvas.tokens
    assert torch.equal(plain, ours)
    assert not (ours == kit.mask).any()


def test_committed_blocks_are_computed_once_more_and_no_more(kit, model) -> None:
    """Blocks of 5 (with the frame), 4, 4, 4, a hole a step: a block each step, and again when it is full."""
    canvas = kit.pair(16, 0)
    canvas = canvas.replace(block=((torch.arange(18) - 1).clamp(min=0) // 4).expand(1, 18))
    cached = Cached(model, Committed())
    policy = Unmask(Even(), plan=Path(blocks=Blocks(4)))
    kit.last(denoise(cached, canvas, policy=policy, steps=16, mask=kit.mask))
    assert cached.positions == 4 * (5 + 4 + 4 + 4) + 5 + 4 + 4  # the last block is not asked again


def test_logits_of_kept_blocks_are_those_of_no_cache(kit, model) -> None:
    canvas = blocked(kit.pair(12, 6, seed=3), 5)
    filled = canvas.replace(masked=canvas.masked & (torch.arange(20) >= 5), tokens=canvas.tokens.clamp(max=5))
    predict = Cached(model, Committed()).begin(canvas)
    for shown in (canvas, filled, filled.replace(tokens=filled.tokens.roll(1, dims=1)), canvas):
        rows = Rows.of(shown.masked)
        for ours, theirs in zip(predict(shown, rows), model(shown, rows), strict=True):
            assert torch.equal(ours.rows.index, theirs.rows.index)
            torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-10, rtol=1e-10)


def test_a_prompt_that_sees_no_answer_is_computed_once(kit, model) -> None:
    canvas = text(kit, 12, 6)
    canvas = canvas.replace(block=(torch.arange(14) >= 7).long().expand(1, 14))
    cached = Cached(model, Committed())
    run = {"policy": Unmask(Even()), "steps": 6, "mask": kit.mask}
    ours = kit.last(denoise(cached, canvas, **run)).canvas.tokens
    assert torch.equal(ours, kit.last(denoise(model, canvas, **run)).canvas.tokens)
    assert cached.positions == 7 + 6 * 7


def test_a_row_that_does_not_change_is_not_computed(kit, model) -> None:
    canvas = Canvas.concat([kit.pair(5, 6), kit.pair(3, 4)])
    cached = Cached(model, Unchanged())
    predict = cached.begin(canvas)
    rows = Rows.of(canvas.masked)
    first = predict(canvas, rows)
    again = predict(canvas, rows)
    assert cached.positions == canvas.shape[0] * canvas.shape[1]
    for ours, theirs in zip(again, first, strict=True):
        assert torch.equal(ours.logits, theirs.logits)
    policy = Unmask(temperature=0.5)
    run = {"policy": policy, "steps": 4, "mask": kit.mask}
    plain = kit.last(denoise(model, canvas, **run)).canvas.tokens
    assert torch.equal(kit.last(denoise(cached, canvas, **run)).canvas.tokens, plain)


def test_branches_of_guidance_keep_their_own_memory(kit, model) -> None:
    canvas = blocked(kit.pair(8, 6), 4)
    policy = Unmask(temperature=0.7)
    run = {"policy": policy, "steps": 5, "mask": kit.mask}
    terms = partners(text=0.5, image=1.0)
    plain = kit.last(denoise(Guided(model, terms, mask=kit.mask), canvas, **run))
    ours = kit.last(denoise(Guided(Cached(model, Committed()), terms, mask=kit.mask), canvas, **run))
    assert torch.equal(ours.canvas.tokens, plain.canvas.tokens)


def test_an_exact_block_cache_is_refused_where_all_see_all(kit, model) -> None:
    with pytest.raises(ValueError, match="every change reaches every position"):
        Cached(model, Committed()).begin(kit.pair(4, 4))


def test_chosen_positions_are_packed_to_the_left() -> None:
    chosen = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert padded(chosen).tolist() == [[1, 3], [4, 4], [0, 4]]
    assert padded(torch.zeros(2, 3).bool()) is None


SELECTORS = [Suffix(4), Window(4), Holes(), Faintest(0.2), Drifting(0.2)]


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_a_refresh_at_every_call_is_no_cache(kit, model, selector) -> None:
    canvas = Canvas.concat([kit.pair(8, 9), kit.pair(4, 5)])
    policy = Unmask(Even(), plan=Path(blocks=Blocks(4)), temperature=0.5)
    run = {"policy": policy, "steps": 8, "mask": kit.mask}
    plain = kit.last(denoise(model, canvas, **run)).canvas.tokens
    every = Cached(model, Approximate(selector, every=1))
    assert torch.equal(kit.last(denoise(every, canvas, **run)).canvas.tokens, plain)
    assert not every.exact


@pytest.mark.parametrize("selector", [Suffix(99), Window(99), Faintest(1.0), Drifting(1.0)], ids=str)
def test_a_selector_that_takes_everything_is_no_cache(kit, model, selector) -> None:
    canvas = kit.pair(0, 9)
    run = {"policy": Unmask(Even(), temperature=0.5), "steps": 8, "mask": kit.mask}
    # without the frame, which the holes would see as it was at first
    frame = canvas.replace(segment=torch.where(canvas.span >= 0, 0, 1))
    plain = kit.last(denoise(model, frame, **run)).canvas.tokens
    cached = Cached(model, Approximate(selector))
    assert torch.equal(kit.last(denoise(cached, frame, **run)).canvas.tokens, plain)


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_approximations_compute_less_and_fill_everything(kit, model, selector) -> None:
    canvas = kit.pair(16, 0)
    policy = Unmask(Even(), plan=Path(blocks=Blocks(4)), temperature=0.0)
    cached = Cached(model, Approximate(selector))
    states = list(denoise(cached, canvas, policy=policy, steps=16, mask=kit.mask))
    assert not states[-1].canvas.masked.any()
    assert cached.positions < 16 * 18


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_an_approximation_of_a_row_does_not_depend_on_its_batch(kit, model, selector) -> None:
    rows = [kit.pair(8, 9, seed=1), kit.pair(4, 5, seed=2)]
    policy = Unmask(Even(), plan=Path(blocks=Blocks(4)), temperature=0.5)
    run = {"policy": policy, "steps": 8, "mask": kit.mask}
    cached = Cached(model, Approximate(selector, every=3))
    whole = kit.last(denoise(cached, Canvas.concat(rows), **run)).canvas.tokens
    for number, row in enumerate(rows):
        samples = torch.tensor([number])
        alone = kit.last(denoise(cached, row, samples=samples, **run)).canvas.tokens
        assert torch.equal(whole[number, : row.shape[1]], alone[0])


def test_the_dual_cache_computes_a_block_a_step(kit, model) -> None:
    canvas = kit.pair(16, 0)
    policy = Unmask(Even(), plan=Path(blocks=Blocks(4)))
    dual, prefix = (Cached(model, Approximate(selector)) for selector in (Window(4), Suffix(4)))
    for cached in (dual, prefix):
        kit.last(denoise(cached, canvas, policy=policy, steps=16, mask=kit.mask))
    assert dual.positions == 4 * 18 + 12 * 4
    assert prefix.positions == 4 * 18 + 3 * (17 + 13 + 9 + 5)
