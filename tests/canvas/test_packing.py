"""Packing: every document whole in one row, little padding, the same rows again, exact to resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmdlm.canvas import IMAGE, PAD, TEXT, Canvas, Fill, Frame, Packed, Run, efficiency, pack
from mmdlm.canvas.packing import place
from mmdlm.data import Batches

MASK = 99


def document(number: int, text: int, grid: tuple[int, int] | None = None) -> Canvas:
    """One row: a structure token, `text` tokens that count from 100 * number, and a picture on wish."""
    runs = [Run(length=text, before=(90,))] + ([] if grid is None else [Run(grid=grid, after=(91,))])
    fills = [
        Fill(100 * number + torch.arange(run.size)[None], open=torch.ones(1, run.size, dtype=torch.bool))
        for run in runs
    ]
    return Frame(tuple(runs)).canvas(fills, mask=MASK)


def documents(count: int = 40, seed: int = 0) -> list[Canvas]:
    """Of 2 to 66 positions, some with a picture."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        grid = (int(rng.integers(1, 8)), int(rng.integers(1, 8))) if rng.random() < 0.5 else None
        made.append(document(number, int(rng.integers(1, 16)), grid))
    return made


def unpacked(canvas: Canvas) -> list[Canvas]:
    """The documents of packed rows, from the left."""
    found = []
    for row in range(canvas.shape[0]):
        segment = canvas.segment[row]
        for number in range(int(segment.max()) + 1):
            where = segment == number
            columns = {
                name: value[row][where][None] for name, value in vars(canvas).items() if value is not None
            }
            found.append(Canvas(**columns))
    return found


def test_every_document_comes_back_whole_in_one_row():
    given = documents()
    packed = pack(given, 80)
    found = {int(each.tokens[0, 1]) // 100: each for each in unpacked(packed)}
    assert sorted(found) == list(range(40))
    for number, each in enumerate(given):
        back = found[number]
        for name in ("tokens", "modality", "fillable", "masked", "position"):
            assert torch.equal(getattr(back, name), getattr(each, name)), name
        assert back.span is not None
        assert each.span is not None
        first = back.span[back.span >= 0].min()
        assert torch.equal(torch.where(back.span < 0, -1, back.span - first), each.span)


def test_spans_and_documents_are_numbered_on_and_padding_is_at_the_end():
    packed = pack(documents(), 80).pad_to(80)
    assert packed.span is not None
    for row in range(packed.shape[0]):
        segment, span = packed.segment[row], packed.span[row]
        live = segment >= 0
        assert bool((live[:-1] | ~live[1:]).all()), "padding comes last"
        assert bool((segment[live].diff() >= 0).all())
        assert segment[live].unique().tolist() == list(range(int(segment.max()) + 1))
        inside = span >= 0
        assert span[inside].unique().tolist() == list(range(int(span.max()) + 1))
        assert bool((span[inside].diff() >= 0).all())
        pairs = torch.stack([segment[inside], span[inside]], dim=1).unique(dim=0)
        assert len(pairs) == int(span.max()) + 1, "a span lies in one document"
        assert bool((packed.modality[row][~live] == PAD).all())
        assert not packed.fillable[row][~live].any()
        assert bool((span[~live] == -1).all())


def test_rows_are_few_even_and_keep_the_order():
    rng = np.random.default_rng(1)
    sizes = rng.integers(75, 330, 200).tolist()
    rows = place(sizes, 2048)
    assert sorted(number for row in rows for number in row) == list(range(200))
    filled = [sum(sizes[number] for number in row) for row in rows]
    assert max(filled) <= 2048
    assert max(filled) - min(filled) < 150
    assert len(rows) == -(-sum(sizes) // 2048)
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert place([5, 5], 10) == [[0, 1]]
    assert place([3, 0, 3, 2, 4], 6) == [[0, 2], [3, 4]]
    assert place([3, 3, 2, 2, 2], 6) == [[0, 1], [2, 3, 4]], "evenly would be 7 and 5"


def test_hardly_anything_is_padding():
    given = documents(200)
    assert efficiency(Canvas.concat(given)) < 0.45
    assert efficiency(pack(given, 512)) > 0.98
    assert efficiency(pack([document(0, 4)], 10)) == 1.0
    assert efficiency(pack([document(0, 4)], 10).pad_to(10)) == 0.5


def test_what_is_padded_already_and_several_rows_a_canvas():
    one, two = document(1, 3), document(2, 5)
    together = Canvas.concat([one, two]).pad_to(30)
    packed = pack([together, document(3, 2)], 16).pad_to(16)
    assert packed.shape == (1, 16)
    assert packed.segment[0].tolist() == [0] * 4 + [1] * 6 + [2] * 3 + [-1] * 3
    assert torch.equal(packed.tokens, pack([one, two, document(3, 2)], 16).pad_to(16).tokens)


def test_optional_columns_go_with_their_documents():
    one, two = (
        each.replace(level=torch.full(each.shape, 0.1 * n), soft=torch.full((*each.shape, 2), float(n)))
        for n, each in enumerate((document(1, 3), document(2, 5)), 1)
    )
    packed = pack([one, two], 12).pad_to(12)
    assert packed.level is not None
    assert packed.soft is not None
    torch.testing.assert_close(packed.level[0], torch.tensor([0.1] * 4 + [0.2] * 6 + [0.0] * 2))
    assert packed.soft[0, :, 1].tolist() == [1.0] * 4 + [2.0] * 6 + [0.0] * 2
    with pytest.raises(ValueError, match="'level' is present in 1 of 2"):
        pack([one, document(2, 5)], 12)


def test_what_cannot_be_packed_is_named():
    with pytest.raises(ValueError, match="document 1 has 9 positions, a row has 8"):
        pack([document(0, 3), document(1, 8)], 8)
    with pytest.raises(ValueError, match="row 0 holds several documents"):
        pack([pack([document(0, 3), document(1, 3)], 8)], 8)
    with pytest.raises(ValueError, match="no document"):
        pack([], 8)
    with pytest.raises(ValueError, match="not one position"):
        pack([document(0, 3).replace(segment=torch.full((1, 4), -1))], 8)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        Packed(lambda items, rng: [document(0, 3)], 0)


def test_packed_batches_resume_exactly():
    pool = documents(50)

    def collate(numbers: list[int], rng: np.random.Generator) -> list[Canvas]:
        return [
            pool[number].replace(level=torch.full(pool[number].shape, rng.random())) for number in numbers
        ]

    def batches(prefetch: int = 0) -> Batches:
        return Batches(lambda n: n, 12, collate=Packed(collate, 96), seed=3, size=50, prefetch=prefetch)

    whole = batches()
    first = [next(whole) for _ in range(9)]
    assert all(sum(int(row.max()) + 1 for row in batch.segment) == 12 for batch in first)
    began = batches(prefetch=2)
    for _ in range(4):
        next(began)
    state = began.state_dict()
    began.close()
    resumed = batches()
    resumed.load_state_dict(state)
    for expected in first[4:]:
        batch = next(resumed)
        for name, value in vars(expected).items():
            assert value is None or torch.equal(value, getattr(batch, name)), name


def test_modalities_of_a_packed_row():
    packed = pack([document(1, 2, (2, 2)), document(2, 1)], 12).pad_to(12)
    assert packed.modality[0].tolist() == [TEXT] * 3 + [IMAGE] * 4 + [TEXT] * 3 + [PAD] * 2
