"""Second thoughts: edits behind a full block, checks by shadows, uniform noise; when a row is done."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mmdlm.canvas import Canvas, Part, Rows
from mmdlm.model import Predictor
from mmdlm.sampling import (
    Ancestral,
    Blocks,
    Bounded,
    Capped,
    Counted,
    Drawn,
    Edited,
    Ended,
    Even,
    Fixed,
    Guided,
    Halton,
    NegativeEntropy,
    Path,
    Planned,
    Random,
    Shadowed,
    State,
    Threshold,
    Uniform,
    Unmask,
    Verified,
    denoise,
    partners,
    presets,
)
from mmdlm.sampling.state import UNSETTLED


class Restless:
    """Says, surely, the number of the call at every position, and from call `calm` on `calm`."""

    def __init__(self, calm: int) -> None:
        self.calm, self.calls = calm, 0

    def begin(self, canvas: Canvas):
        return self

    def __call__(self, canvas, rows: Rows, *, reduce=None) -> list[Part]:
        self.calls += 1
        logits = torch.zeros(rows.index.shape[0], 6)
        logits[:, min(self.calls, self.calm)] = 50.0
        return [Part(rows, slice(0, 6), logits)]


def walk(kit, policy: Unmask, canvas: Canvas, denoiser, steps: int) -> list[State]:
    return list(denoise(denoiser, canvas, policy=policy, steps=steps, mask=kit.mask))


# edits


@pytest.mark.parametrize(
    ("after", "calls", "first", "second"), [(0, 2, 1, 2), (1, 4, 2, 4), (2, 5, 3, 4), (16, 7, 4, 4)]
)
def test_a_full_block_is_edited_until_nothing_is(
    kit, after: int, calls: int, first: int, second: int
) -> None:
    plan, edits = Path(blocks=Blocks(4)), Edited(0.9, after)
    policy = Unmask(Even(), rule=Threshold(0.5), plan=plan, temperature=0.0, revision=edits)
    model = Restless(4)
    last = walk(kit, policy, kit.holes(1, 8), model, 8)[-1]
    assert last.canvas.tokens[0].tolist() == [first] * 4 + [second] * 4
    assert model.calls == calls
    assert bool(last.done.all())


def test_edits_after_the_end_are_those_of_lone_rows(kit) -> None:
    policy = Unmask(
        Even(), rule=Threshold(0.3), plan=Path(blocks=Blocks(4)), temperature=0.0, revision=Edited(0.3, 3)
    )
    both = Canvas.concat([kit.holes(1, 8), kit.holes(1, 5)])
    steps = torch.tensor([30, 20])
    together = kit.last(denoise(kit.Fake(), both, policy=policy, steps=steps, mask=kit.mask)).canvas.tokens
    for row, (length, own) in enumerate([(8, 30), (5, 20)]):
        canvas, sample = kit.holes(1, length), torch.tensor([row])
        lone = denoise(kit.Fake(), canvas, policy=policy, steps=own, samples=sample, mask=kit.mask)
        assert torch.equal(kit.last(lone).canvas.tokens[0], together[row, :length])


# checks


@pytest.fixture(scope="module")
def shallow(kit) -> Predictor:
    return kit.lively(depth=1, num_heads=4)


def test_one_layer_says_of_a_shadow_what_it_says_of_a_hole(kit, shallow) -> None:
    canvas = Canvas.concat([kit.pair(5, 4, given=(1, 3, 4, 7)), kit.pair(3, 4, given=(0, 5))])
    rows = Rows.of(canvas.segment >= 0)
    said = _at(Shadowed(shallow, mask=kit.mask).begin(canvas)(canvas, rows), canvas)
    plain = _at(shallow(canvas, rows), canvas)
    assert torch.allclose(said[canvas.masked], plain[canvas.masked], atol=1e-12)
    for row, place in (~canvas.masked & (canvas.segment >= 0)).nonzero().tolist():
        where = torch.zeros_like(canvas.masked)
        where[row, place] = True
        left_out = canvas.hide(where, kit.mask)
        alone = _at(shallow(left_out, Rows.of(where)), canvas)
        assert torch.allclose(said[row, place], alone[row, place], atol=1e-12)
        assert not torch.allclose(said[row, place], plain[row, place], atol=1e-3)


def _at(parts: list[Part], canvas: Canvas) -> torch.Tensor:
    """(B, L, 24): the log-probabilities of each position, 0 where nothing was said."""
    said = torch.zeros(*canvas.shape, 24, dtype=torch.float64)
    for part in parts:
        wide = torch.zeros(part.rows.index.shape[0], 24, dtype=torch.float64)
        wide[:, part.ids] = part.logits.double().log_softmax(dim=1).clamp(min=-1e3)
        said = part.rows.scatter(wide, said)
    return said


def test_shadows_want_a_canvas_in_which_all_see_each_other(kit, shallow) -> None:
    canvas = kit.holes(1, 4)
    with pytest.raises(ValueError, match="block"):
        Shadowed(shallow, mask=kit.mask).begin(canvas.replace(block=canvas.tokens))


def test_doubted_tokens_become_holes_again_and_rows_fill_up(kit, shallow) -> None:
    canvas = kit.pair(8, 12)
    strict = Unmask(Fixed(3), temperature=0.0, revision=Verified(1.0))
    states = walk(kit, strict, canvas, Shadowed(kit.Fake(), mask=kit.mask), 40)
    left = [int(state.open.sum()) for state in states]
    assert any(bool((now.canvas.masked & ~before.canvas.masked).any()) for before, now in pairwise(states))
    assert all(now < before for before, now in pairwise(left))  # every step gains
    assert left[-1] == 0
    assert len(states) < 40
    lenient = Unmask(Fixed(3), temperature=0.0, revision=Verified(1e-9))
    plain = Unmask(Fixed(3), temperature=0.0)
    one = walk(kit, lenient, canvas, Shadowed(shallow, mask=kit.mask), 20)[-1]
    assert torch.equal(one.canvas.tokens, walk(kit, plain, canvas, shallow, 20)[-1].canvas.tokens)


def test_shadows_cost_positions_only_where_something_is_doubted(kit) -> None:
    counted = Counted(kit.Fake())
    canvas = kit.holes(1, 6)
    walk(kit, Unmask(Even(), temperature=0.0), canvas, Shadowed(counted, mask=kit.mask), 3)
    assert counted.positions == 18


# uniform noise


def independent(law: torch.Tensor):
    """A model of (L, V) laws that looks at nothing."""

    class Independent:
        def begin(self, canvas):
            return self

        def __call__(self, canvas, rows, *, reduce=None):
            place = rows.index % canvas.shape[1]
            return [Part(rows, slice(0, law.shape[1]), law.log()[place])]

    return Independent()


def test_uniform_noise_never_shows_a_mask_and_keeps_the_law(kit) -> None:
    law = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]], dtype=torch.float64)
    policy = Unmask(Fixed(1), NegativeEntropy(), Bounded(0.7), revision=Uniform(text=(0, 3)))
    states = walk(kit, policy, kit.holes(4000, 3), independent(law), 6)
    seen = torch.stack([state.canvas.tokens for state in states])
    assert int(seen.max()) < 3
    assert not bool(states[-1].canvas.masked.any())
    assert torch.bincount(seen[0].flatten(), minlength=3).min() > 3700  # even noise at the start
    found = torch.nn.functional.one_hot(states[-1].canvas.tokens, 3).double().mean(dim=0)
    chi = (4000 * (found - law).square() / law).sum(dim=1)
    assert float(chi.max()) < 13.8  # two degrees of freedom, p 0.001


def test_what_stands_under_uniform_noise_is_drawn_anew(kit) -> None:
    canvas = kit.pair(6, 9)
    policy = Unmask(Even(), Drawn(), temperature=1.0, revision=Uniform(text=(0, 6), image=(8, 19)))
    states = walk(kit, policy, canvas, kit.Fake(), 5)
    noise = [state.memory[UNSETTLED] for state in states[1:]]
    assert not any(bool((state.canvas.masked & state.initial).any()) for state in states)
    assert any(bool((now & ~before).any()) for before, now in pairwise(noise))
    assert not bool(noise[-1].any())


def test_a_model_is_shown_the_noise(kit, shallow) -> None:
    canvas = kit.pair(6, 9)
    policy = Unmask(Even(), revision=Uniform(text=(0, 6), image=(8, 19)))
    first, second = (
        kit.last(denoise(shallow, canvas, policy=policy, steps=1, seeds=seed, mask=kit.mask)).canvas.tokens
        for seed in (0, 1)
    )
    begun = [policy.begin(State.start(canvas, steps=1, seeds=seed)).canvas for seed in (0, 1)]
    said = [_at(shallow(one, Rows.of(canvas.masked)), canvas) for one in begun]
    assert not torch.allclose(said[0], said[1])
    assert not torch.equal(first, second)


def test_uniform_noise_wants_ids_for_all_holes(kit) -> None:
    with pytest.raises(ValueError, match="no ids for image"):
        walk(kit, Unmask(revision=Uniform(text=(0, 6))), kit.pair(3, 4), kit.Fake(), 2)


# bad input


def test_a_grid_that_is_not_the_canvas_is_refused(kit) -> None:
    with pytest.raises(ValueError, match=r"grid of \(3, 3\) for spans of \[8\]"):
        walk(kit, Unmask(order=Halton((3, 3))), kit.holes(1, 8), kit.Fake(), 4)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Edited(0.9, -1), "0 times or more"),
        (lambda: Verified(0.0), "probability in"),
        (lambda: Uniform(text=(3, 3)), "behind the last"),
    ],
)
def test_wrong_settings_are_named(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_checks_end_with_the_time_of_a_block(kit) -> None:
    for steps in (2, 4, 8, 16):
        canvas = kit.holes(2, 16)
        doubt = presets.wino(block=8, threshold=0.99, keep=0.99)
        states = walk(kit, doubt, canvas, Shadowed(kit.Fake(), mask=kit.mask), steps)
        assert not bool(states[-1].canvas.masked.any())


@pytest.mark.parametrize("revision", [Planned(1.0), Uniform(text=(0, 6))], ids=str)
def test_what_opens_spans_again_wants_them_whole(revision) -> None:
    with pytest.raises(ValueError, match="wants spans as wholes"):
        Unmask(plan=Path(blocks=Blocks(4)), revision=revision)
    with pytest.raises(ValueError, match="wants spans as wholes"):
        Ancestral(plan=Path(blocks=Blocks(4)), remask=Capped())


def test_plans_want_scores_that_are_log_probabilities_and_no_rule() -> None:
    with pytest.raises(ValueError, match="Drawn or Peak"):
        Unmask(order=Random(), revision=Planned(1.0))
    with pytest.raises(ValueError, match="no rule"):
        Unmask(rule=Threshold(0.9), revision=Planned(1.0))


def test_noise_is_no_end_of_a_text(kit) -> None:
    """The end is written once, in the last place: uniform noise before it may show it and ends nothing."""
    ids = 6
    law = torch.full((4, ids), 1e-6, dtype=torch.float64)
    law[:3, 1], law[3, 5] = 1.0, 1.0
    policy = Ended(Unmask(Fixed(1), NegativeEntropy(), revision=Uniform(text=(0, ids))), 5)
    states = walk(kit, policy, kit.holes(200, 4), independent(law / law.sum(dim=1, keepdim=True)), 4)
    assert (states[0].canvas.tokens[:, :3] == 5).any()
    assert states[-1].canvas.tokens.unique(dim=0).tolist() == [[1, 1, 1, 5]]


def test_shadows_stand_next_to_the_model(kit) -> None:
    with pytest.raises(ValueError, match="next to a model"):
        Shadowed(Guided(kit.Fake(), partners(text=1.0), mask=kit.mask), mask=kit.mask)
