"""The denoiser: what it must not see, what it must not say, and that chunks and batches change nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.canvas import IMAGE, NOISY, PAD, PLAIN, TEXT, Canvas, Part, Rows
from mmdlm.model import Predictor, Reference, Transformer, TransformerConfig

NUM_TEXT, FIRST_CODE, CODES, MASK = 10, 13, 24, 37
CONFIG = TransformerConfig(
    vocab_size=38,
    text=(0, 10),
    image=(13, 37),
    mask=MASK,
    dim=32,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    digits=(4, 6),
)


def build(config: TransformerConfig = CONFIG, **options) -> Predictor:
    """A float64 predictor whose logits are far from uniform."""
    torch.manual_seed(0)
    predictor = Predictor(Transformer(config), **options).double()
    with torch.no_grad():
        for weight in predictor.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return predictor


def pair(rows: int, text: int, side: int, *, seed: int = 0, offset: int = 0) -> Canvas:
    """`rows` rows of `text` text positions, one structure token, side x side codes; half of it masked."""
    rng = torch.Generator().manual_seed(seed)
    length = text + 1 + side * side
    ids = torch.cat(
        [
            torch.randint(0, NUM_TEXT, (rows, text), generator=rng),
            torch.full((rows, 1), 11),
            torch.randint(FIRST_CODE, FIRST_CODE + CODES, (rows, side * side), generator=rng),
        ],
        dim=1,
    )
    modality = torch.full((rows, length), TEXT, dtype=torch.uint8)
    modality[:, text + 1 :] = IMAGE
    fillable = torch.ones(rows, length, dtype=torch.bool)
    fillable[:, text] = False
    index = torch.arange(text + 1)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).reshape(-1, 2) + text + 1
    position = torch.cat([torch.stack([index, index], -1), grid])[None].expand(rows, -1, -1) + offset
    segment = torch.zeros(rows, length, dtype=torch.long)
    canvas = Canvas(ids, modality, fillable, torch.zeros_like(fillable), position, segment)
    where = fillable & (torch.rand(rows, length, generator=rng) < 0.5)
    where[:, 0] = where[:, -1] = True
    return canvas.hide(where, MASK)


def table(predictor: Predictor, canvas: Canvas, where: Tensor | None = None) -> Tensor:
    """(B, L, V) logits of one call, -inf where nothing was said."""
    rows = Rows.of(canvas.masked if where is None else where)
    out = torch.full((canvas.tokens.numel(), CONFIG.vocab_size), float("-inf"), dtype=torch.float64)
    with torch.no_grad():
        for part in predictor(canvas, rows):
            out[part.rows.index, part.ids] = part.logits
    return out.view(*canvas.shape, -1)


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shift", [False, True])
def test_a_row_that_nothing_is_asked_of_costs_nothing(monkeypatch, shift: bool) -> None:
    predictor, canvas = build(shift=shift), pair(5, 4, 3)
    whole = table(predictor, canvas)
    seen: list[int] = []
    features = predictor.network.features

    def watched(canvas: Canvas) -> Tensor:
        seen.append(canvas.shape[0])
        return features(canvas)

    monkeypatch.setattr(predictor.network, "features", watched)
    where = canvas.masked.clone()
    where[[0, 3]] = False
    some = table(predictor, canvas, where)
    assert seen == [3]
    same(some[where], whole[where])
    assert some[~where].isneginf().all()


def test_the_other_modality_is_exactly_impossible() -> None:
    canvas = pair(3, 5, 3)
    predictor = build()
    parts = predictor(canvas, Rows.of(canvas.masked))
    assert [part.ids for part in parts] == [slice(0, 10), slice(13, 37)]
    assert sum(part.rows.index.numel() for part in parts) == int(canvas.masked.sum())
    chance = table(predictor, canvas).softmax(-1)[canvas.masked]
    text = canvas.modality[canvas.masked] == TEXT
    assert not chance[text][:, 10:].any()
    assert not chance[~text][:, :13].any()
    assert not chance[:, MASK].any()


def test_slices_can_only_lower_the_loss() -> None:
    canvas = pair(3, 5, 3)
    clean = pair(3, 5, 3).replace(tokens=torch.where(canvas.modality == TEXT, 3, 20))
    restricted = table(build(), canvas)[canvas.masked]
    shared = dataclasses.replace(CONFIG, text=(0, 38), image=(13, 37))
    whole = build(shared, text=slice(0, 38), image=slice(0, 38))
    (part,) = whole(canvas, Rows.of(canvas.masked))
    target = clean.tokens[canvas.masked]
    gap = F.cross_entropy(part.logits, target, reduction="none") - F.cross_entropy(
        restricted, target, reduction="none"
    )
    assert gap.min() > 0


def test_a_shared_softmax_never_says_mask_or_illegal_ids() -> None:
    canvas = pair(2, 5, 2)
    everything = slice(0, 38)
    predictor = build(text=everything, image=everything, illegal=(11, 12))
    (part,) = predictor(canvas, Rows.of(canvas.masked))
    assert part.logits.shape == (int(canvas.masked.sum()), 38)
    forbidden = part.logits.isinf()
    assert forbidden[:, [11, 12, MASK]].all()
    assert int(forbidden.sum()) == 3 * part.logits.shape[0]
    assert part.logits.softmax(-1).sum(-1).allclose(torch.ones(()).double())


def test_ids_under_masked_positions_are_never_read() -> None:
    canvas = pair(3, 5, 3)
    scrambled = canvas.replace(tokens=canvas.tokens.masked_fill(canvas.masked, 10**9))
    assert torch.equal(table(build(), canvas), table(build(), scrambled))
    visible = canvas.replace(tokens=torch.where(canvas.masked, canvas.tokens, (canvas.tokens + 1) % 37))
    assert not table(build(), canvas).allclose(table(build(), visible))


def test_masked_positions_differ_by_position_and_modality() -> None:
    canvas = pair(1, 2, 2)
    canvas = canvas.hide(canvas.fillable, MASK)
    logits = table(build(dataclasses.replace(CONFIG, modality_embedding=False)), canvas)
    assert (logits[0, 0, :10] - logits[0, 1, :10]).abs().max() > 1e-6
    turned = canvas.replace(position=canvas.position.flip(-1))
    assert (logits - table(build(dataclasses.replace(CONFIG, modality_embedding=False)), turned))[
        0, 4, 13:37
    ].any()


@pytest.mark.parametrize("extra", [1, 8])
def test_padding_is_invisible(extra: int) -> None:
    """T17: padding, whatever stands there."""
    canvas, predictor = pair(3, 5, 3), build()
    plain, length = table(predictor, canvas), canvas.shape[1]
    padded = canvas.pad_to(length + extra)
    same(table(predictor, padded)[:, :length], plain)
    other = padded.replace(tokens=padded.tokens.clone(), modality=padded.modality.clone())
    other.tokens[:, length:] = 7
    other.modality[:, length:] = TEXT
    assert torch.equal(table(predictor, other), table(predictor, padded))
    # padding that is asked for gives nothing, and nothing becomes NaN, with a gradient too
    every = predictor(padded, Rows.of(torch.ones_like(padded.masked)))
    assert sum(part.logits.shape[0] for part in every) == 3 * length
    assert all(part.logits.isfinite().all() for part in every)
    torch.stack([part.logits.square().sum() for part in every]).sum().backward()
    assert all(weight.grad is None or bool(weight.grad.isfinite().all()) for weight in predictor.parameters())


def test_left_padding_is_invisible_too() -> None:
    canvas, predictor = pair(2, 5, 2), build()
    padded = canvas.pad_to(canvas.shape[1] + 3)
    rolled = Canvas(**{name: value.roll(3, 1) for name, value in vars(padded).items() if value is not None})
    same(table(predictor, rolled)[:, 3:], table(predictor, canvas))


def test_packed_rows_are_separate_rows() -> None:
    """T17: logits."""
    first, second, predictor = pair(2, 5, 2, seed=1), pair(2, 3, 3, seed=2, offset=40), build()
    columns = {
        name: torch.cat([value, getattr(second, name)], dim=1)
        for name, value in vars(first).items()
        if value is not None
    }
    columns["segment"] = torch.cat([first.segment, second.segment + 1], dim=1)
    packed = Canvas(**columns).pad_to(30)
    logits, cut = table(predictor, packed), first.shape[1]
    same(logits[:, :cut], table(predictor, first))
    same(logits[:, cut : cut + second.shape[1]], table(predictor, second))


def test_a_row_does_not_depend_on_its_batch() -> None:
    canvas, predictor = pair(4, 5, 3), build()
    together = table(predictor, Canvas.concat([canvas, pair(2, 7, 4, seed=5)]))
    for row in range(4):
        alone = canvas.select(torch.tensor([row]))
        same(together[row : row + 1, : canvas.shape[1]], table(predictor, alone))


def test_noisy_copy_does_not_leak_its_own_block() -> None:
    """Block diffusion: x_0 beside x_t; logits of block b ignore the clean tokens of blocks >= b, exactly."""
    canvas, predictor = pair(2, 6, 0), build()
    length = canvas.shape[1]
    block = (torch.arange(length) // 2).expand(2, -1)
    clean = canvas.replace(tokens=torch.full_like(canvas.tokens, 4), masked=torch.zeros_like(canvas.masked))
    columns = {
        name: torch.cat([value, getattr(canvas, name)], 1)
        for name, value in vars(clean).items()
        if value is not None
    }
    both = Canvas(**columns, block=torch.cat([block, block], 1)).replace(
        copy=torch.tensor([PLAIN] * length + [NOISY] * length, dtype=torch.uint8).expand(2, -1)
    )
    before = table(predictor, both)[:, length:]
    for place in range(length):
        changed = both.replace(tokens=both.tokens.clone())
        changed.tokens[:, place] = 9
        after = table(predictor, changed)[:, length:]
        leaked = (before != after).any(-1)
        assert not leaked[:, : (place // 2 + 1) * 2].any()
        asked = canvas.masked & (block > place // 2)
        assert torch.equal(leaked & asked, asked)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_reduce_sees_every_row_once_with_the_same_gradient(chunk: int) -> None:
    canvas, predictor = pair(3, 5, 3), build()
    target = torch.where(canvas.modality == TEXT, 3, 20)
    sizes: list[int] = []

    def loss(part: Part) -> Tensor:
        sizes.append(part.logits.shape[0])
        return F.cross_entropy(part.logits, part.local(part.rows.gather(target)), reduction="sum")

    rows = Rows.of(canvas.masked)
    whole = torch.stack([loss(part) for part in predictor(canvas, rows)]).sum()
    whole.backward()
    grads = [weight.grad.clone() for weight in predictor.parameters() if weight.grad is not None]
    predictor.zero_grad()
    sizes.clear()
    chunked = torch.stack(predictor(canvas, rows, reduce=loss, chunk=chunk)).sum()
    assert max(sizes) <= chunk
    assert sum(sizes) == int(canvas.masked.sum())
    chunked.backward()
    same(chunked, whole)
    for weight, grad in zip([w for w in predictor.parameters() if w.grad is not None], grads, strict=True):
        assert weight.grad is not None
        same(weight.grad, grad)


def test_pieces_hold_a_set_number_of_logits_and_the_last_keep_theirs(monkeypatch) -> None:
    canvas, predictor = pair(3, 5, 3), build()
    rows = Rows.of(canvas.masked)
    expected = {part.ids.start: part.logits.shape for part in predictor(canvas, rows)}
    monkeypatch.setattr("mmdlm.model.predictor.PIECE", 4 * CODES)
    shapes: list[tuple[int, int]] = []

    def total(part: Part) -> Tensor:
        shapes.append((part.logits.shape[0], part.ids.start))
        return part.logits[:, 0].square().sum()

    results = predictor(canvas, rows, reduce=total)
    forward, length = list(shapes), expected[FIRST_CODE][0]
    assert length > 8
    assert all(number * (NUM_TEXT if first == 0 else CODES) <= 4 * CODES for number, first in forward)
    codes = [number for number, first in forward if first == FIRST_CODE]
    assert sum(codes) == length
    assert len(codes) == -(-length // 4), "even pieces, as few as there can be"
    assert sum(number for number, first in forward if first == 0) == expected[0][0]
    torch.stack(results).sum().backward()
    again = shapes[len(forward) :]
    assert sorted(again) == sorted(forward[:-1]), "all but the last are computed again"
    shapes.clear()
    with torch.no_grad():
        predictor(canvas, rows, reduce=total)
    assert shapes == forward


def test_small_pieces_are_never_computed_again() -> None:
    canvas, predictor = pair(3, 5, 3), build()
    calls: list[int] = []

    def total(part: Part) -> Tensor:
        calls.append(1)
        return part.logits[:, 0].sum()

    torch.stack(predictor(canvas, Rows.of(canvas.masked), reduce=total)).sum().backward()
    assert len(calls) == 2


def test_a_modality_without_rows_gives_no_part_on_the_cpu() -> None:
    canvas, predictor = pair(2, 5, 2), build()
    (part,) = predictor(canvas, Rows.of(canvas.masked & (canvas.modality == IMAGE)))
    assert part.ids == slice(13, 37)
    assert predictor(canvas, Rows.of(torch.zeros_like(canvas.masked))) == []
    assert predictor(canvas, Rows.of(torch.zeros_like(canvas.masked)), reduce=lambda part: part) == []


def test_shift_reads_the_position_before_within_the_segment() -> None:
    first, second = pair(1, 4, 0, seed=1), pair(1, 4, 0, seed=2)
    columns = {
        name: torch.cat([value, getattr(second, name)], 1)
        for name, value in vars(first).items()
        if value is not None
    }
    packed = Canvas(**columns).replace(segment=torch.tensor([[0] * 5 + [1] * 5]))
    every = torch.ones_like(packed.masked)
    plain, shifted = table(build(), packed, every), table(build(shift=True), packed, every)
    same(shifted[:, 1:5], plain[:, :4])
    same(shifted[:, 6:], plain[:, 5:9])
    same(shifted[:, [0, 5]], plain[:, [0, 5]])


def test_reference_kernel_gives_the_same_logits() -> None:
    canvas = pair(2, 5, 3).pad_to(20)
    predictor, other = build(), build()
    other.network.kernel = Reference()
    same(table(predictor, canvas), table(other, canvas))


def test_soft_column_is_added_to_the_embeddings() -> None:
    canvas, predictor = pair(2, 5, 2), build()
    nothing = torch.zeros(*canvas.shape, CONFIG.dim, dtype=torch.float64)
    assert torch.equal(table(predictor, canvas.replace(soft=nothing)), table(predictor, canvas))
    assert not table(predictor, canvas.replace(soft=nothing + 1)).allclose(table(predictor, canvas))


def test_predictor_names_itself() -> None:
    predictor = Predictor(Transformer(CONFIG), slice(0, 10), slice(13, 37), MASK)
    assert predictor.config is predictor.network.config
    assert predictor.mask == MASK
    assert predictor.num_parameters() == sum(weight.numel() for weight in predictor.state_dict().values())
    canvas = pair(1, 2, 2)
    assert predictor.begin(canvas) is predictor
    with pytest.raises(ValueError, match="mask id 3"):
        Predictor(Transformer(CONFIG), mask=3)


def test_rows_at_padding_are_dropped() -> None:
    canvas = pair(1, 2, 2).pad_to(12)
    assert bool((canvas.modality[:, 7:] == PAD).all())
    parts = build()(canvas, Rows.of(canvas.segment < 0))
    assert parts == []


def test_it_learns_a_tiny_joint() -> None:
    """Text names the code: after some steps every pair is given back from either side."""
    torch.manual_seed(0)
    predictor = Predictor(Transformer(dataclasses.replace(CONFIG, dim=48)))
    canvas = pair(8, 1, 1).replace(masked=torch.zeros(8, 3, dtype=torch.bool))
    number = torch.arange(8)
    canvas = canvas.replace(tokens=torch.stack([number, torch.full_like(number, 11), 13 + 3 * number], 1))
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=3e-3)
    sides = [canvas.hide(canvas.modality.eq(side) & canvas.fillable, MASK) for side in (TEXT, IMAGE)]
    both = Canvas.concat(sides)
    target = torch.cat([canvas.tokens] * 2)

    def right(part: Part) -> Tensor:
        return (part.logits.argmax(-1) == part.local(part.rows.gather(target))).float().mean()

    def loss(part: Part) -> Tensor:
        return F.cross_entropy(part.logits, part.local(part.rows.gather(target)))

    for _ in range(60):
        torch.stack(predictor(both, Rows.of(both.masked), reduce=loss)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.stack(predictor(both, Rows.of(both.masked), reduce=right)).min() == 1
