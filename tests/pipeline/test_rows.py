"""Rows of every kind of sample: what they hold, what is open, refused or cut, which levels they get."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas, Gap, Layout, Packed, Passage, efficiency
from mmdlm.codec import Codec
from mmdlm.data import Encoded, Sample, SampleError
from mmdlm.diffusion import Absorbing, Diagonal, Draw, Edges, Masking, Mixture, Square
from mmdlm.model import Predictor, Transformer, TransformerConfig
from mmdlm.rows import Collator
from tokenizers_mm import BytePairTokenizer, Vocab


class Bytes:
    """A text tokenizer of bytes; no lone surrogates, as ours."""

    size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())  # a UnicodeEncodeError is a ValueError

    def decode(self, ids) -> str:
        return bytes(ids).decode()


class Brightness:
    """An image tokenizer: of each 4 x 4 patch the brightness in 16 steps."""

    size, downsample, digits = 16, 4, None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 4, width // 4

    def encode(self, images: Tensor) -> Tensor:
        patches = images.mean(dim=1).unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(3, 4))
        return ((patches + 1) * 7.5).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        pixels = (codes / 7.5 - 1).repeat_interleave(4, 1).repeat_interleave(4, 2)
        return pixels[:, None].expand(-1, 3, -1, -1)


VOCAB = Vocab.build(num_text=256, num_codes=16)
LAYOUT = Layout(vocab=VOCAB, grid=(2, 2), caption=12, question=8, answer=4)
CODEC = Codec(Bytes(), Brightness(), LAYOUT)
BEGIN, PICTURE, END_PICTURE = (VOCAB.specials[name] for name in ("begin_text", "begin_image", "end_image"))
END = VOCAB.specials["end"]
COLLATE = Collator(CODEC)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def grid(first: int = 0) -> np.ndarray:
    return np.arange(first, first + 4, dtype=np.int32).reshape(2, 2)


def picture(code: int) -> np.ndarray:
    """8 x 8 pixels of one code."""
    return np.full((8, 8, 3), round(code * 17), np.uint8)


KINDS = [
    Encoded("pair", grid(), ("a cat",)),
    Encoded("text", None, ("two words",)),
    Encoded("picture", grid(4)),
    Encoded("document", pieces=("one", grid(1), "", grid(2), grid(3))),
    Encoded("question", grid(5), (), "who?", "I"),
    Encoded("asked", None, (), "why?", "no"),
    Sample("raw pair", picture(7), ("grey",)),
    Sample("raw document", pieces=("dark", picture(1), "light", picture(14))),
]


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


# levels


def documents(count: int) -> Canvas:
    """Documents of 2 to 7 pieces, packed."""
    draws = rng()
    items = []
    for number in range(count):
        kinds = draws.integers(2, size=draws.integers(2, 8))
        items.append(Encoded(f"{number}", pieces=tuple(grid(number % 12) if k else "ab" for k in kinds)))
    return Packed(COLLATE, 100)(items, rng())


def by_span(canvas: Canvas, draw: Draw) -> list[list[tuple[float, bool, int]]]:
    """Of each document and span the level, whether it is in the loss, and the modality; each must be one."""
    found = []
    for number in range(canvas.shape[0]):
        for document in range(int(canvas.segment[number].max()) + 1):
            found.append([])
            mine = canvas.segment[number] == document
            for span in canvas.span[number][mine & (canvas.span[number] >= 0)].unique():
                where = canvas.span[number] == span
                (level,) = draw.level[number][where].unique().tolist()
                (live,) = (draw.group[number][where] >= 0).unique().tolist()
                (kind,) = canvas.modality[number][where].unique().tolist()
                found[-1].append((level, live, kind))
    return found


def drawn(law, count: int = 300) -> list[list[tuple[float, bool, int]]]:
    canvas = documents(count)
    assert int(canvas.segment.max()) > 2
    return by_span(canvas, law.draw(canvas, torch.Generator().manual_seed(0)))


def test_square_has_a_level_for_every_span():
    found = drawn(Square())
    levels = [level for document in found for level, _, _ in document]
    assert len(found) == 300
    assert all(live for document in found for _, live, _ in document)
    assert len(set(levels)) == len(levels) > 1000
    counts, _ = np.histogram(levels, bins=10, range=(0, 1))
    assert counts.max() - counts.min() <= 4  # spread evenly over both modalities


def test_diagonal_has_one_level_for_a_document():
    found = drawn(Diagonal())
    assert all(len({level for level, _, _ in document}) == 1 for document in found)
    assert len({document[0][0] for document in found}) == 300


def test_edges_have_one_live_span_and_the_others_alike():
    hide, hidden, images = 0.25, 0, 0
    found = drawn(Edges(text=1.0, image=1.0, hide=hide))
    for document in found:
        (live,) = [(level, kind) for level, is_live, kind in document if is_live]
        assert 0 < live[0] <= 1
        rest = {level for level, is_live, _ in document if not is_live}
        assert rest in ({0.0}, {1.0})
        hidden += rest == {1.0}
        images += live[1] == IMAGE
    assert abs(hidden - 300 * hide) < 3  # stratified by the modality of what is live
    share = sum(sum(kind == IMAGE for _, _, kind in document) / len(document) for document in found)
    assert abs(images - share) < 30  # every span is as likely as another
    only = drawn(Edges(text=0.0, image=1.0, hide=0.0))
    for document in only:
        (live,) = [kind for _, is_live, kind in document if is_live]
        assert live == IMAGE or all(kind == TEXT for _, _, kind in document)


def test_a_mixture_gives_every_document_one_law():
    found = drawn(Mixture(((1.0, Diagonal()), (1.0, Edges(hide=0.0)))))
    alike = [document for document in found if len({level for level, _, _ in document}) == 1]
    assert abs(len(alike) - 150) < 15
    assert all(sum(live for _, live, _ in document) == 1 for document in found if document not in alike)


# tasks that are not there


def network() -> Predictor:
    config = TransformerConfig(
        vocab_size=VOCAB.size,
        text=(VOCAB.text.start, VOCAB.text.stop),
        image=(VOCAB.image.start, VOCAB.image.stop),
        mask=VOCAB.mask,
        dim=32,
        depth=1,
        num_heads=2,
        grid=(2, 2),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Predictor(Transformer(config))


@pytest.mark.parametrize("law", [Square(), Diagonal(), Edges(text=0.0, image=1.0, hide=1.0)], ids=repr)
@pytest.mark.parametrize("kinds", [["text"], ["picture"], ["asked", "text"], ["question"]], ids=str)
def test_a_task_without_a_token_adds_nothing_and_no_nan(law, kinds):
    items = [item for item in KINDS if item.name in kinds]
    module, objective = network(), Masking(Absorbing(VOCAB.mask), law)
    for collate in (COLLATE, Packed(COLLATE, 80)):
        out = objective(module, collate(items, rng()), torch.Generator().manual_seed(0))
        loss = {name: float(value.detach()) for name, value in out.per_token().items()}
        absent = "text" if kinds == ["picture"] else "image"
        present = "image" if absent == "text" else "text"
        assert (int(out.counts[absent]), float(out.sums[absent].detach()), loss[absent]) == (0, 0, 0)
        assert int(out.counts[present]) > 0
        assert loss[present] > 0
        module.zero_grad()
        (out.per_token()["text"] + out.per_token()["image"]).backward()
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in module.parameters())


def test_a_batch_in_which_nothing_is_open_is_zero():
    canvas = COLLATE(KINDS[:3], rng())
    canvas = canvas.replace(fillable=torch.zeros_like(canvas.fillable))
    out = Masking(Absorbing(VOCAB.mask), Square())(network(), canvas, torch.Generator().manual_seed(0))
    assert {name: (int(out.counts[name]), float(out.sums[name].detach())) for name in out.sums} == {
        "text": (0, 0.0),
        "image": (0, 0.0),
    }
