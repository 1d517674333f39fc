"""The canvas, rows and layouts: shapes, padding, reading back, and what must be refused."""

from __future__ import annotations

import pytest
import torch

from mmdlm.canvas import IMAGE, PAD, TEXT, Canvas, Fill, Frame, Layout, Rows, Run
from tokenizers_mm.vocab import Vocab

VOCAB = Vocab.build(num_text=10, num_codes=16)
LAYOUT = Layout(vocab=VOCAB, grid=(2, 3), caption=5, question=4, answer=2)


def codes(batch: int) -> torch.Tensor:
    return torch.arange(batch * 6).reshape(batch, 2, 3) % 16


def test_pair_row_has_the_stated_order_and_positions():
    canvas = LAYOUT.pairs([[1, 2], [3, 4, 5, 6]], codes(2))
    specials = VOCAB.specials
    end = specials["end"]
    assert canvas.tokens[0].tolist() == [
        specials["begin_caption"], 1, 2, end, end, end, specials["begin_image"],
        *(VOCAB.image.start + i for i in range(6)), specials["end_image"],
    ]  # fmt: skip
    assert canvas.span[0].tolist() == [-1, 0, 0, 0, 0, 0, -1, 1, 1, 1, 1, 1, 1, -1]
    # the image starts at offset 7; the next run starts at 7 + max(2, 3)
    assert canvas.position[0, 7:13].tolist() == [[7, 7], [7, 8], [7, 9], [8, 7], [8, 8], [8, 9]]
    assert canvas.position[0, 13].tolist() == [10, 10]
    assert torch.equal(canvas.fillable, canvas.span >= 0)
    assert not canvas.masked.any()


def test_reading_back_inverts_and_cuts_at_the_first_end():
    canvas = LAYOUT.pairs([[1, 2], []], codes(2))
    assert LAYOUT.read_texts(LAYOUT.pair_frame, canvas, 0) == [[1, 2], []]
    assert torch.equal(LAYOUT.read_codes(LAYOUT.pair_frame, canvas, 1), codes(2))
    tail = canvas.replace(tokens=canvas.tokens.index_fill(1, torch.tensor([5]), 7))  # a token behind the end
    assert LAYOUT.read_texts(LAYOUT.pair_frame, tail, 0) == [[1, 2], []]


def test_reading_back_ignores_padding():
    canvas = LAYOUT.questions(codes(2), [[1], [2, 3]], [[4], [5]])
    padded = canvas.pad_to(40)
    assert LAYOUT.read_texts(LAYOUT.question_frame, padded, 2) == [[4], [5]]


@pytest.mark.parametrize(
    ("canvas", "holes", "given"),
    [
        (LAYOUT.text_to_image([[1, 2]]), 6, {1, 2}),
        (LAYOUT.captioning(codes(1)), 5, {VOCAB.image.start + 5}),
        (LAYOUT.answering(codes(1), [[3]]), 2, {3}),
        (LAYOUT.joint([[1]]), 10, {1}),
        (LAYOUT.infilling([[1, None, 2]], codes(1)), 1, {1, 2}),
        (
            LAYOUT.inpainting(codes(1), torch.tensor([[[True, False, False], [False, False, True]]]), [[1]]),
            2,
            {1},
        ),
    ],
)
def test_every_task_leaves_its_holes_and_only_those(canvas: Canvas, holes: int, given: set[int]):
    assert int(canvas.masked.sum()) == holes
    assert torch.equal(canvas.masked, canvas.fillable)
    assert (canvas.tokens[canvas.masked] == VOCAB.mask).all()
    assert not (canvas.tokens[~canvas.masked] == VOCAB.mask).any()
    assert given <= set(canvas.tokens.flatten().tolist())


def test_whole_canvases_open_only_what_may_be_noised():
    canvas = LAYOUT.questions(codes(1), [[1]], [[2]])
    assert canvas.fillable[0].nonzero().squeeze(1).tolist() == [14, 15]


def test_captions_are_open_as_a_whole_or_inside_holes():
    holes = torch.tensor([[True, False, True, False, False], [True] * 5])
    for make in (LAYOUT.captionings, lambda codes, captions, **more: LAYOUT.pairs(captions, codes, **more)):
        whole = make(codes(2), [[1, 2, 3], [4]])
        some = make(codes(2), [[1, 2, 3], [4]], holes=holes)
        caption = whole.span == 0
        assert whole.fillable[caption].all()
        assert torch.equal(some.fillable[caption], holes.flatten())
        assert torch.equal(some.fillable[~caption], whole.fillable[~caption])
        assert torch.equal(some.tokens, whole.tokens)
        assert not some.masked.any()


def test_texts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit 5 places"):
        LAYOUT.text_to_image([[1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match=r"outside 0\.\.9"):
        LAYOUT.text_to_image([[VOCAB.specials["begin_image"]]])
    with pytest.raises(ValueError, match=r"must be \(B, 2, 3\)"):
        LAYOUT.captioning(torch.zeros(1, 3, 3, dtype=torch.long))


def test_concat_pads_with_positions_that_belong_to_nothing():
    pair, question = LAYOUT.pairs([[1]], codes(1)), LAYOUT.questions(codes(1), [[1]], [[2]])
    both = Canvas.concat([pair, question])
    assert both.shape == (2, 16)
    assert both.modality[0, 14:].tolist() == [PAD, PAD]
    assert both.segment[0, 14:].tolist() == [-1, -1]
    assert both.span is not None
    assert both.span[0, 14:].tolist() == [-1, -1]
    assert not both.fillable[0, 14:].any()
    with pytest.raises(ValueError, match="present in 1 of 2"):
        Canvas.concat([pair, question.replace(span=None)])


def test_copies_to_the_host_are_waited_for(monkeypatch):
    """From CUDA a copy that does not block lands in pinned memory, which may be read too early."""
    asked: list[tuple[str, bool]] = []

    def note(column, device, *, non_blocking):
        asked.append((str(device), non_blocking))
        return column

    canvas = LAYOUT.pairs([[1]], codes(1))
    monkeypatch.setattr(torch.Tensor, "to", note)
    canvas.to("cpu")
    canvas.to(torch.device("cpu"))
    canvas.to("cuda:0")
    assert set(asked) == {("cpu", False), ("cuda:0", True)}


def test_modalities_cover_spans():
    canvas = LAYOUT.pairs([[1]], codes(1))
    assert (canvas.modality[canvas.span == 0] == TEXT).all()
    assert (canvas.modality[canvas.span == 1] == IMAGE).all()


def test_rows_gather_and_scatter_are_inverse():
    where = torch.tensor([[True, False, True], [False, False, True]])
    rows = Rows.of(where)
    assert rows.index.tolist() == [0, 2, 5]
    values = torch.arange(6).reshape(2, 3)
    assert rows.gather(values).tolist() == [0, 2, 5]
    assert rows.scatter(torch.tensor([7, 8, 9]), values).tolist() == [[7, 1, 8], [3, 4, 9]]
    assert rows.where(torch.tensor([[False, True, True], [True, True, True]])).index.tolist() == [2, 5]
    assert [chunk.index.tolist() for chunk in rows.chunks(2)] == [[0, 2], [5]]


def test_frames_refuse_fills_of_another_shape():
    frame = Frame((Run(length=3, before=(9,)),))
    with pytest.raises(ValueError, match="1 x 3 ids was given"):
        frame.canvas([Fill(torch.zeros(1, 4, dtype=torch.long))], mask=0)
    with pytest.raises(ValueError, match="0 fills for 1 runs"):
        frame.canvas([], mask=0)


def test_text_alone_is_written_beside_an_image_that_stays_unknown():
    for canvas, open_places in (
        (LAYOUT.writing([[1, 2]]), [3, 4, 5]),
        (LAYOUT.infilling([[1, 2, None]], None), [3]),
    ):
        image = canvas.span == 1
        assert canvas.masked[image].all()
        assert not canvas.fillable[image].any()
        assert canvas.fillable[0].nonzero().squeeze(1).tolist() == open_places
        assert canvas.tokens[0, 1:3].tolist() == [1, 2]
