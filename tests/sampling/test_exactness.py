"""What is exact, as inference engines should assert it of themselves: what no other file holds.

By the numbers of the list that we work from (the functions without a file are below):

1. Exact block caches, for blocks of 1, 4, 8 and all: test_caching,
   test_committed_blocks_give_the_tokens_of_no_cache and test_logits_of_kept_blocks_are_those_of_no_cache;
   test_a_block_committed_in_a_forward_of_its_own_says_the_same.
2. Ragged batches: test_loop, test_a_ragged_batch_gives_the_tokens_of_its_members; test_joining.
3. Approximations that refresh everything: test_caching, test_a_refresh_at_every_call_is_no_cache and
   test_a_selector_that_takes_everything_is_no_cache.
4. (Of caches that drop keys; there is none.)
5. Limits of rules: test_rules, "limits"; test_a_threshold_of_one_is_lladas_one_a_step.
6. Guidance of scale 0: test_guidance, test_scale_zero_costs_nothing_and_changes_nothing;
   test_a_second_term_of_scale_zero_is_not_there.
7. Revisions that revise nothing: test_rules, "limits"; test_revise, "checks".
8. Conservation: test_loop, test_rows_commit_each_hole_once_and_finished_rows_stay and
   test_given_tokens_stay_and_no_mask_is_emitted; the end of a text: test_presets and below.
9. Halton's order on every grid: test_rules, test_halton_meets_every_cell_once.
10. Oracles: test_oracles.
11. Draws in 16 bits: test_draw_law.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmdlm.canvas import IMAGE, TEXT, Canvas, Rows
from mmdlm.model import Predictor
from mmdlm.sampling import (
    Blocks,
    Cached,
    Committed,
    Counted,
    Ended,
    Even,
    Fixed,
    Guided,
    LeftToRight,
    Order,
    Path,
    Peak,
    Random,
    Term,
    Threshold,
    Unmask,
    Without,
    WithoutGiven,
    denoise,
    presets,
    sample,
)
from mmdlm.sampling.order import halton
from mmdlm.sampling.scale import During


@pytest.fixture(scope="module")
def model(kit) -> Predictor:
    return kit.lively(seed=1)


def in_blocks(kit, length: int, size: int) -> Canvas:
    """A text in blocks of `size` behind its first position, which belongs to the first block."""
    canvas = kit.pair(length, 0, seed=length)
    return canvas.replace(block=((torch.arange(length + 2) - 1).clamp(min=0) // size)[None])


# 1


class CommitsFirst:
    """Hears of every block in a forward of its own once it is full, before anything else is asked."""

    def __init__(self, denoiser: Cached) -> None:
        self.denoiser = denoiser
        self.commits = 0

    def begin(self, canvas: Canvas) -> Any:
        predict, full = self.denoiser.begin(canvas), torch.zeros_like(canvas.masked)

        def ask(now: Canvas, rows: Rows, *, reduce=None) -> list:
            assert now.block is not None
            left = now.block.masked_fill(~now.masked, 99).amin(dim=1, keepdim=True)
            done = (now.block < left) & (now.segment >= 0)
            if bool((done & ~full).any()):
                self.commits += 1
                predict(now, Rows.of(done & ~full))
                full.copy_(done)
            return predict(now, rows)

        return ask


@pytest.mark.parametrize("size", [1, 4, 8])
def test_a_block_committed_in_a_forward_of_its_own_says_the_same(kit, model, size: int) -> None:
    canvas = in_blocks(kit, 16, size)
    policy = Unmask(Even(), Peak(), plan=Path(blocks=Blocks(size)))
    run = {"policy": policy, "steps": 16, "mask": kit.mask}
    apart = CommitsFirst(Cached(model, Committed()))
    plain, fused, separate = (
        kit.last(denoise(denoiser, canvas, **run)).canvas.tokens
        for denoiser in (model, Cached(model, Committed()), apart)
    )
    assert torch.equal(fused, plain)
    assert torch.equal(separate, plain)
    assert apart.commits == 16 // size - 1


def test_a_later_block_is_not_kept_over_a_change_that_was_asked_about(kit, model) -> None:
    """All is asked; the first block changes, and is asked alone; then the second one is."""
    canvas = in_blocks(kit, 8, 4)
    assert canvas.block is not None
    first, second = (Rows.of(canvas.masked & (canvas.block == number)) for number in (0, 1))
    changed = canvas.replace(
        tokens=canvas.tokens.index_fill(1, torch.tensor([1]), 3),
        masked=canvas.masked & (torch.arange(10) != 1),
    )
    predict = Cached(model, Committed()).begin(canvas)
    predict(canvas, Rows.of(canvas.masked))
    predict(changed, first.where(changed.masked))
    (ours,), (theirs,) = predict(changed, second), model(changed, second)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-10, rtol=0)


# 5


@pytest.mark.parametrize("block", [4, 16])
def test_a_threshold_of_one_is_lladas_one_a_step(kit, block: int) -> None:
    class Sharp(kit.Fake):
        """Nearly sure of most places."""

        def __call__(self, canvas, rows, *, reduce=None):
            return [replace(part, logits=2.0 * part.logits) for part in super().__call__(canvas, rows)]

    model, canvas = Sharp(), kit.pair(16, 0, given=(3, 9), seed=4)
    one, sure = (
        sample(model, canvas, policy=policy, steps=16, mask=kit.mask)
        for policy in (presets.llada(block=block), presets.fast_dllm(block=block, threshold=1.0))
    )
    assert torch.equal(one.canvas.tokens, sure.canvas.tokens)
    assert one.forwards == sure.forwards == 14
    low = presets.fast_dllm(block=block, threshold=1e-9)
    assert sample(model, canvas, policy=low, steps=16, mask=kit.mask).forwards == 16 // block


# 6


def test_a_second_term_of_scale_zero_is_not_there(kit) -> None:
    """Two branches for the pictures, as MMaDA-Parallel has; one of them without a weight."""
    canvas = Canvas.concat([kit.pair(5, 6, given=(1, 2)), kit.pair(2, 9)])
    run = {"policy": Unmask(), "steps": 4, "mask": kit.mask}
    first, idle = Term(Without(TEXT), 1.5, IMAGE), Term(WithoutGiven(), 0.0, IMAGE)
    counted, single = Counted(kit.Fake()), Counted(kit.Fake())
    double = kit.last(denoise(Guided(counted, [first, idle], mask=kit.mask), canvas, **run))
    alone = kit.last(denoise(Guided(single, [first], mask=kit.mask), canvas, **run))
    assert torch.equal(double.canvas.tokens, alone.canvas.tokens)
    assert counted.calls == single.calls == 8
    plain = kit.last(denoise(kit.Fake(), canvas, **run))
    assert not torch.equal(plain.canvas.tokens, alone.canvas.tokens)


def test_guidance_over_a_stretch_costs_forwards_in_it_alone(kit) -> None:
    canvas = kit.pair(0, 8)
    canvas = canvas.replace(modality=torch.where(canvas.span < 0, TEXT, canvas.modality))
    term = Term(WithoutGiven(), During(1.0, 0.0, 0.5), IMAGE)
    counted = Counted(kit.Fake())
    kit.last(
        denoise(
            Guided(counted, [term], mask=kit.mask),
            canvas,
            policy=Unmask(Fixed(1), Random()),
            steps=8,
            mask=kit.mask,
        )
    )
    assert counted.calls == 8 + 4  # at levels 4/8, 3/8, 2/8 and 1/8


# 8


@pytest.mark.parametrize("order", [LeftToRight(), Random(), Peak()], ids=str)
@pytest.mark.parametrize("rule", [None, Threshold(0.6)], ids=str)
def test_nothing_but_ends_stands_behind_an_end(kit, order: Order, rule: Threshold | None) -> None:
    """In any order: as soon as the end stands with no hole before it, and whatever stood behind it."""
    end, fake = 5, kit.Fake()
    canvas = Canvas.concat([kit.pair(10, 4, seed=seed) for seed in range(12)])
    policy = Ended(Unmask(Fixed(1), order, rule), end)
    ended = 0
    for state in denoise(fake, canvas, policy=policy, steps=12, mask=kit.mask):
        behind = _behind(state.canvas, end)
        assert (state.canvas.tokens[behind] == end).all()
        assert not state.canvas.masked[behind].any()
        ended += int(behind.sum())
    assert ended > 0
    assert not state.canvas.masked.any()
    for shown, rows in fake.calls:
        asked = rows.scatter(rows.valid, torch.zeros_like(shown.masked))
        assert not (asked & _behind(shown, end)).any()


def _behind(canvas: Canvas, end: int) -> torch.Tensor:
    """(B, L) bool: places of the text behind an end that has no hole before it."""
    assert canvas.span is not None
    text = (canvas.modality == TEXT) & (canvas.span >= 0)
    behind = torch.zeros_like(text)
    for row in range(canvas.shape[0]):
        ended = False
        for place in text[row].nonzero()[:, 0].tolist():
            behind[row, place] = ended
            if not ended and bool(canvas.masked[row, place]):
                break
            ended = ended or int(canvas.tokens[row, place]) == end
    return behind


# 9


@pytest.mark.parametrize(("height", "width"), [(1, 7), (5, 3), (8, 8), (16, 12), (24, 40), (64, 64)])
def test_cells_come_in_the_order_in_which_points_meet_them(height: int, width: int) -> None:
    """Against a loop over points in exact fractions; the released code misses 6 cells of 64 x 64."""
    met: dict[tuple[int, int], int] = {}
    number = 0
    while len(met) < height * width:
        number += 1
        cell = (_inverse(number, 2, height), _inverse(number, 3, width))
        met.setdefault(cell, len(met))
    order = halton(height, width).view(height, width)
    assert all(int(order[cell]) == place for cell, place in met.items())


def _inverse(number: int, base: int, size: int) -> int:
    """The radical inverse of a number, times `size`, rounded down."""
    digits, scale = 0, 1
    while number:
        digits, number, scale = digits * base + number % base, number // base, scale * base
    return digits * size // scale
