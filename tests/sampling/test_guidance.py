"""Guidance: the formula, what each branch sees, and what it costs."""

from __future__ import annotations

import pytest
import torch

from mmdlm.canvas import IMAGE, TEXT, Canvas, Part, Rows
from mmdlm.sampling import Counted, Guided, Path, Unmask, denoise, hide, partners


def log_softmax(part: Part) -> torch.Tensor:
    return part.logits.log_softmax(dim=1)


def test_scale_zero_costs_nothing_and_changes_nothing(kit) -> None:
    canvas = Canvas.concat([kit.pair(5, 6), kit.pair(2, 9)])
    counted = Counted(kit.Fake())
    plain = kit.last(denoise(kit.Fake(), canvas, policy=Unmask(), steps=4, mask=kit.mask))
    guided = Guided(counted, partners(text=0.0, image=0.0), mask=kit.mask)
    final = kit.last(denoise(guided, canvas, policy=Unmask(), steps=4, mask=kit.mask))
    assert torch.equal(final.canvas.tokens, plain.canvas.tokens)
    assert (counted.calls, counted.forwards) == (4, 8)
    assert counted.positions == 4 * 2 * canvas.shape[1]


@pytest.mark.parametrize(("text", "image", "calls"), [(1.0, 0.0, 8), (0.0, 1.0, 8), (1.0, 2.0, 12)])
def test_each_guided_modality_costs_one_forward(kit, text: float, image: float, calls: int) -> None:
    counted = Counted(kit.Fake())
    guided = Guided(counted, partners(text=text, image=image), mask=kit.mask)
    kit.last(denoise(guided, kit.pair(8, 9), policy=Unmask(), steps=4, mask=kit.mask))
    assert counted.calls == calls


def test_a_branch_is_not_forwarded_while_its_modality_rests(kit) -> None:
    counted = Counted(kit.Fake())
    guided = Guided(counted, partners(text=1.0, image=1.0), mask=kit.mask)
    policy = Unmask(plan=Path(text=(0.0, 0.5), image=(0.5, 1.0)))
    kit.last(denoise(guided, kit.pair(8, 9), policy=policy, steps=4, mask=kit.mask))
    assert counted.calls == 8


def test_text_alone_has_nothing_to_be_guided_by(kit) -> None:
    counted = Counted(kit.Fake())
    kit.last(
        denoise(
            Guided(counted, partners(text=3.0), mask=kit.mask),
            kit.pair(8, 0),
            policy=Unmask(),
            steps=4,
            mask=kit.mask,
        )
    )
    assert counted.calls == 4


def test_the_formula_holds_for_each_modality_against_itself(kit) -> None:
    canvas = Canvas.concat([kit.pair(4, 5, given=(2, 8)), kit.pair(3, 2)])
    rows = Rows.of(canvas.masked)
    fake = kit.Fake()
    guided = Guided(fake, partners(text=0.7, image=2.5), mask=kit.mask).begin(canvas)(canvas, rows)
    for part, modality, partner, scale in zip(guided, (TEXT, IMAGE), (IMAGE, TEXT), (0.7, 2.5), strict=True):
        own = rows.where(canvas.modality == modality)
        assert torch.equal(part.rows.index, own.index)
        (with_partner,) = fake(canvas, own)
        (without,) = fake(hide(canvas, partner, kit.mask), own)
        expected = (1 + scale) * log_softmax(with_partner) - scale * log_softmax(without)
        torch.testing.assert_close(part.logits, expected)


def test_a_branch_hides_all_of_the_partner_and_only_that(kit) -> None:
    canvas = kit.pair(4, 5, given=(2, 8))
    fake = kit.Fake()
    Guided(fake, partners(image=1.0), mask=kit.mask).begin(canvas)(canvas, Rows.of(canvas.masked))
    (_, asked), (branch, asked_of_branch) = fake.calls
    text = (canvas.modality == TEXT) & (canvas.span >= 0)
    assert branch.masked[text].all()
    assert (branch.tokens[text] == kit.mask).all()
    assert torch.equal(
        branch.tokens[~text], canvas.tokens[~text]
    )  # structure and the image's own given codes
    assert torch.equal(branch.masked[~text], canvas.masked[~text])
    assert set(asked.gather(canvas.modality).tolist()) == {TEXT, IMAGE}
    assert set(asked_of_branch.gather(canvas.modality).tolist()) == {IMAGE}


def test_illegal_ids_stay_illegal(kit) -> None:
    class Strict(kit.Fake):
        def __call__(self, canvas, rows, *, reduce=None):
            parts = super().__call__(canvas, rows)
            for part in parts:
                part.logits[:, 1] = -torch.inf
            return parts

    canvas = kit.pair(4, 5)
    for scale in (3.0, -0.5):
        parts = Guided(Strict(), partners(text=scale, image=scale), mask=kit.mask).begin(canvas)(
            canvas, Rows.of(canvas.masked)
        )
        for part in parts:
            assert part.logits[:, 1].isneginf().all()
            assert not part.logits.isnan().any()
            assert part.logits[:, 0].isfinite().all()


def test_reductions_see_guided_logits(kit) -> None:
    canvas = kit.pair(4, 5)
    predict = Guided(kit.Fake(), partners(text=1.0, image=1.0), mask=kit.mask).begin(canvas)
    rows = Rows.of(canvas.masked)
    sums = predict(canvas, rows, reduce=lambda part: part.logits.sum())
    torch.testing.assert_close(sums, [part.logits.sum() for part in predict(canvas, rows)])


def test_guidance_may_stand_inside_or_outside_the_count(kit) -> None:
    canvas = kit.pair(4, 5)
    outer = Counted(Guided(kit.Fake(), partners(text=1.0, image=1.0), mask=kit.mask))
    outer.begin(canvas)(canvas, Rows.of(canvas.masked))
    inner = Counted(kit.Fake())
    Guided(inner, partners(text=1.0, image=1.0), mask=kit.mask).begin(canvas)(canvas, Rows.of(canvas.masked))
    assert (outer.calls, inner.calls) == (1, 3)
