"""Rows of every kind of sample: what they hold, what is open, refused or cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from row_kinds import (
    BEGIN,
    CODEC,
    COLLATE,
    END,
    END_PICTURE,
    KINDS,
    LAYOUT,
    PICTURE,
    VOCAB,
    Brightness,
    grid,
    picture,
    rng,
)
from tokenizers import Tokenizer

from mmdlm.canvas import IMAGE, TEXT, Canvas, Gap, Packed, Passage, efficiency
from mmdlm.codec import Codec
from mmdlm.data import Encoded, SampleError
from mmdlm.rows import Collator
from tokenizers_mm import BytePairTokenizer, Vocab


def row(canvas: Canvas, number: int) -> list[int]:
    return canvas.tokens[number][canvas.segment[number] >= 0].tolist()


def image(codes) -> list[int]:
    return [PICTURE, *(VOCAB.image.start + np.asarray(codes).flatten()).tolist(), END_PICTURE]


def text(said: str) -> list[int]:
    return [BEGIN, *said.encode(), END]


def test_row_n_is_item_n_whatever_it_is():
    canvas = COLLATE(KINDS, rng())
    assert canvas.shape[0] == len(KINDS)
    assert not canvas.masked.any()
    assert row(canvas, 0) == LAYOUT.pairs([list(b"a cat")], torch.tensor(grid())[None]).tokens[0].tolist()
    assert row(canvas, 1) == text("two words")
    assert row(canvas, 2) == image(grid(4))
    assert row(canvas, 3) == [*text("one"), *image(grid(1)), *text(""), *image(grid(2)), *image(grid(3))]
    asked = LAYOUT.questions(torch.tensor(grid(5))[None], [list(b"who?")], [list(b"I")])
    assert row(canvas, 4) == asked.tokens[0].tolist()
    assert row(canvas, 5) == LAYOUT.questions(None, [list(b"why?")], [list(b"no")]).tokens[0].tolist()
    assert row(canvas, 6)[-6:] == image([7] * 4)
    assert row(canvas, 7) == [*text("dark"), *image([1] * 4), *text("light"), *image([14] * 4)]

    spans = [sorted(set(one[one >= 0].tolist())) for one in canvas.span]
    assert [len(one) for one in spans] == [2, 1, 1, 5, 3, 2, 2, 4]
    opened = [canvas.span[n][canvas.fillable[n]].unique().tolist() for n in range(len(KINDS))]
    assert opened == [[0, 1], [0], [0], [0, 1, 2, 3, 4], [2], [1], [0, 1], [0, 1, 2, 3]]
    for n in range(len(KINDS)):
        inside = canvas.span[n] >= 0
        assert bool((canvas.fillable[n] <= inside).all())
        assert bool(((canvas.modality[n] == IMAGE) == (canvas.tokens[n] >= VOCAB.image.start)).all())


def test_positions_run_on_through_a_document():
    """Text (i, i); a picture of 2 x 2 at a running offset, which it moves on by 2."""
    canvas = COLLATE([Encoded("d", pieces=("ab", grid(), "c"))], rng())
    at = canvas.position[0].tolist()
    assert at[:5] == [[n, n] for n in range(5)]
    assert at[5:9] == [[5, 5], [5, 6], [6, 5], [6, 6]]
    assert at[9:] == [[n, n] for n in range(7, 11)]


def test_packed_rows_hold_the_same():
    padded, packed = COLLATE(KINDS, rng()), Packed(COLLATE, 80)(KINDS, rng())
    assert packed.shape[0] < len(KINDS)
    assert efficiency(packed) > 0.85 > efficiency(padded)
    found = []
    for number in range(packed.shape[0]):
        segment, columns = packed.segment[number], (packed.tokens[number], packed.position[number])
        for document in range(int(segment.max()) + 1):
            found.append([column[segment == document].tolist() for column in columns])
    wanted = []
    for number in range(len(KINDS)):
        live = padded.segment[number] >= 0
        wanted.append([padded.tokens[number][live].tolist(), padded.position[number][live].tolist()])
    assert sorted(found) == sorted(wanted)


def test_one_text_is_drawn_and_questions_with_them():
    items = [Encoded("p", grid(), ("a", "b"), "q", "c") for _ in range(900)]
    canvas, again = (COLLATE(items, rng()) for _ in range(2))
    assert torch.equal(canvas.tokens, again.tokens)
    begins = canvas.tokens[:, 0] == VOCAB.specials["begin_caption"]
    counts = [int((begins & (canvas.tokens[:, 1] == ord(one))).sum()) for one in "ab"]
    counts.append(int((~begins).sum()))
    assert sum(counts) == 900
    assert all(abs(count - 300) < 60 for count in counts)
    texts = [pair.texts[0] for pair in items]
    drawn = COLLATE([replace(pair, texts=("a", "b"), question=None, answer=None) for pair in items], rng())
    picks = rng()
    wanted = ["ab"[int(picks.integers(2))] for _ in texts]  # as they were drawn before there were kinds
    assert drawn.tokens[:, 1].tolist() == [ord(one) for one in wanted]


@pytest.mark.parametrize("said", ["<|mask|>", "<begin_image>", "[MASK]<end_image>", "\ufdd0260", "end"])
def test_what_users_write_is_never_a_control_token(said):
    items = [
        Encoded("a", grid(), (said[:9],)),
        Encoded("b", None, (said,)),
        Encoded("c", pieces=(said, grid(), said)),
    ]
    canvas = COLLATE(items, rng())
    inside = (canvas.span >= 0) & (canvas.modality == TEXT)
    assert bool((canvas.tokens[inside] <= END).all())  # text ids, and the end that the row maker puts
    assert not (canvas.tokens == VOCAB.mask).any()
    frame = LAYOUT.document_frame([Passage(list(said.encode())), torch.tensor(grid()), Gap(2)])
    ids = LAYOUT.read_texts(frame, canvas.select(torch.tensor([2])), 0)[0]
    assert bytes(ids).decode() == said


def test_tokens_that_a_tokenizer_adds_cannot_be_typed(tmp_path):
    BytePairTokenizer.train(["a cat"], size=256).save(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|mask|>"])
    ours, control = BytePairTokenizer(tokenizer), tokenizer.token_to_id("<|mask|>")
    assert control == ours.size - 1
    layout = replace(LAYOUT, vocab=Vocab.build(num_text=ours.size, num_codes=16), caption=16)
    collate = Collator(Codec(ours, Brightness(), layout))
    said = "<|mask|>"
    items = [Encoded("a", grid(), (said,)), Encoded("b", None, (said,)), Encoded("c", pieces=(said, grid()))]
    for canvas in (collate(items, rng()), collate.completing([[said, Gap()]])):
        assert not (canvas.tokens == control).any()
        assert int((canvas.tokens[:, :16] == ours.encode(said)[-1]).sum()) == canvas.shape[0]  # spelled out


LONG = [
    (Encoded("n", grid(), ("x" * 12,)), "n: 'xxxxxxxxxxxx' is 12 tokens long, there is room for 11"),
    (Encoded("n", grid(), (), "x" * 8, "a"), "n: 'xxxxxxxx' is 8 tokens long, there is room for 7"),
    (Encoded("n", grid(), (), "q", "x" * 4), "n: 'xxxx' is 4 tokens long, there is room for 3"),
    (Encoded("n", None, ("x" * 40,)), "n: a document of 42 positions, a row has 40"),
    (Encoded("n", pieces=("x" * 30, grid(), "y")), "n: a document of 41 positions, a row has 40"),
]


@pytest.mark.parametrize(("item", "message"), LONG, ids=[message for _, message in LONG])
def test_what_is_too_long_is_named_or_cut_where_asked_for(item, message):
    collate = Collator(CODEC, length=40)
    with pytest.raises(SampleError, match=message) as caught:
        collate([KINDS[0], item], rng())
    assert caught.value.name == "n"
    canvas = Collator(CODEC, length=40, truncate=True)([item], rng())
    assert canvas.shape[1] <= 40
    if item.codes is not None:
        assert canvas.tokens[0].tolist().count(ord("x")) in (11, 7, 3)
        assert END in canvas.tokens[0]


def test_documents_are_cut_at_their_end():
    def cut(length: int, *pieces) -> list[int]:
        return row(Collator(CODEC, length=length, truncate=True)([Encoded("n", pieces=pieces)], rng()), 0)

    whole = [*text("abc"), *image(grid()), *text("de")]
    assert cut(15, "abc", grid(), "de") == whole
    assert cut(14, "abc", grid(), "de") == whole[:14]  # all words, and not that it ends there
    assert cut(13, "abc", grid(), "de") == whole[:13]
    assert cut(12, "abc", grid(), "de") == whole[:11]  # not a word of it
    assert cut(10, "abc", grid(), "de") == whole[:5]  # no half pictures
    assert cut(3, "abc", grid(), "de") == [BEGIN, *b"ab"]
    with pytest.raises(SampleError, match="n: not a piece of it fits 5 positions"):
        cut(5, grid(), "a")


def test_texts_of_documents_may_have_further_ends():
    items = [Encoded("d", pieces=("ab", grid(), "c"))] * 200
    canvas = Collator(CODEC, tail=3)(items, rng())
    ends = [
        (canvas.tokens[:, :9] == END).sum(dim=1),
        ((canvas.tokens == END) & (canvas.span == 2)).sum(dim=1),
    ]
    for some in ends:
        assert some.unique().tolist() == [1, 2, 3, 4]
        assert min(some.bincount()[1:].tolist()) > 30
    short = Collator(CODEC, length=15, tail=3)(items, rng())
    assert short.shape[1] == 15  # 13 positions and what is over
    assert row(Collator(CODEC)(items[:1], rng()), 0).count(END) == 2


def test_texts_of_pairs_and_questions_may_be_as_long_as_they_are():
    pair, question = Encoded("p", grid(), ("ab",)), Encoded("q", grid(), (), "who", "I")
    exact, full = (Collator(CODEC, whole=share)([pair, question], rng()) for share in (0.0, 1.0))
    begins = [VOCAB.specials[name] for name in ("begin_caption", "begin_question", "begin_answer")]
    assert row(exact, 0) == [begins[0], *b"ab", END, *image(grid())]
    assert row(exact, 1) == [*image(grid()), begins[1], *b"who", END, begins[2], *b"I", END]
    assert torch.equal(full.tokens, COLLATE([pair, question], rng()).tokens)
    some = Collator(CODEC, whole=0.25)([pair] * 400, rng())
    sizes = (some.segment >= 0).sum(dim=1)
    assert sizes.unique().tolist() == [10, 19]
    assert abs(int((sizes == 19).sum()) - 100) < 30
    packed = Packed(Collator(CODEC, whole=0.0), 40)([pair] * 8, rng())
    assert (packed.shape, efficiency(packed)) == ((2, 40), 1.0)


BAD = [
    (Encoded("n"), "n: has neither a picture nor a text"),
    (Encoded("n", None, ("a\ud800",)), "n: .*surrogate"),
    (Encoded("n", grid(), ("a",), "q"), "n: question 'q' and answer None: one is missing"),
    (
        Encoded("n", np.zeros((2, 3), np.int32), ("a",)),
        r"n: codes of shape \(2, 3\), this model has \(2, 2\)",
    ),
    (Encoded("n", pieces=("a", grid(13))), "n: codes from 13 to 16, this model has 0 to 15"),
    (Encoded("n", pieces=("a", grid(-1))), "n: codes from -1 to 2, this model has 0 to 15"),
]


@pytest.mark.parametrize(("item", "message"), BAD, ids=[message for _, message in BAD])
def test_what_can_be_no_row_is_named(item, message):
    for collate in (COLLATE, Collator(CODEC, length=30, truncate=True)):
        with pytest.raises(SampleError, match=message):
            collate([*KINDS, item], rng())


def test_questions_without_a_picture_are_asked_as_they_are_trained():
    trained = LAYOUT.questions(None, [list(b"why?")], [list(b"no")])
    asked = LAYOUT.answering(None, [list(b"why?")])
    assert torch.equal(asked.masked, trained.fillable)
    assert torch.equal(asked.tokens[~asked.masked], trained.tokens[~asked.masked])


def test_without_an_image_tokenizer_codes_are_rows_and_pictures_are_named():
    collate = Collator(replace(CODEC, image_tokenizer=None))
    coded = [item for item in KINDS if isinstance(item, Encoded)]
    assert torch.equal(collate(coded, rng()).tokens, COLLATE(coded, rng()).tokens)
    with pytest.raises(SampleError, match="has a picture, and no image tokenizer") as caught:
        collate(KINDS, rng())
    assert caught.value.name == "raw pair"


def test_wrong_settings_are_refused():
    for options in ({"length": 0}, {"tail": -1}):
        with pytest.raises(ValueError, match="wanted length >= 1 and tail >= 0"):
            Collator(CODEC, **options)
    with pytest.raises(ValueError, match=r"whole is a share from 0 to 1, got 1\.5"):
        Collator(CODEC, whole=1.5)
    with pytest.raises(ValueError, match="a document wants pieces"):
        LAYOUT.documents([[]])
    with pytest.raises(ValueError, match="a document wants pieces"):
        LAYOUT.completing([[Passage([1]), Gap(0)]])
    with pytest.raises(ValueError, match="a text holds ids outside"):
        LAYOUT.documents([[Passage([1, END])]])


def test_gaps_are_all_that_is_open():
    canvas = COLLATE.completing([["ab", Gap(), "c", picture(3)], ["ab", grid(2), Gap(6)]])
    assert torch.equal(canvas.masked, canvas.fillable)
    assert [canvas.span[n][canvas.masked[n]].unique().tolist() for n in range(2)] == [[1], [2]]
    assert canvas.masked.sum(dim=1).tolist() == [4, 6]
    assert bool((canvas.tokens[canvas.masked] == VOCAB.mask).all())
    whole = COLLATE([Encoded("d", pieces=("ab", grid(), "c", np.full((2, 2), 3)))], rng())
    known = ~canvas.masked[0][: whole.shape[1]]
    assert torch.equal(canvas.tokens[0][: whole.shape[1]][known], whole.tokens[0][known])
    for name in ("position", "span", "modality"):
        assert torch.equal(getattr(canvas, name)[0][: whole.shape[1]], getattr(whole, name)[0])
    frame = LAYOUT.document_frame([Passage(list(b"ab")), torch.tensor(grid()), Gap(6)])
    second = canvas.select(torch.tensor([1]))
    assert LAYOUT.read_texts(frame, second, 0) == [list(b"ab")]
    assert LAYOUT.read_codes(frame, second, 1).tolist() == grid(2)[None].tolist()
    with pytest.raises(SampleError, match="document 1: codes of shape"):
        COLLATE.completing([["a"], [np.zeros((1, 1), np.int32)]])
