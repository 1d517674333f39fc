"""Text alone: a pipeline without pictures, and the documents that it is trained on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm import Pipeline
from mmdlm.canvas import PAD, Canvas, Packed, efficiency
from mmdlm.codec import Codec, TextLayout
from mmdlm.data import Batches, Listed, Sample, Shuffled
from mmdlm.diffusion import Absorbing, Masking, Square
from mmdlm.pretrained import Settings
from mmdlm.rows import Collator
from mmdlm.sampling import Fixed, Peak, Unmask
from mmdlm.texts import Excerpt, TextDocuments, apart, bound, cut, whole_rows
from tokenizers_mm import BytePairTokenizer

SAID = [f"a {colour} {thing} on a mat" for colour in ("red", "blue") for thing in ("cat", "dog", "boat")]
ROOM = 12


@pytest.fixture(scope="module")
def writer() -> Pipeline:
    """An untrained pipeline of text alone; its weights are so large that every input matters."""
    tokenizer = BytePairTokenizer.train(SAID * 5, size=300)
    layout = TextLayout.build(num_text=tokenizer.size, room=ROOM)
    own = Settings(steps=ROOM, policy=Unmask(Fixed(1), order=Peak()))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        codec = Codec(tokenizer, None, layout)
        pipe = Pipeline.untrained(codec, dim=32, depth=1, settings={"text": own, "infill": own})
        for weight in pipe.transformer.parameters():
            weight.mul_(4.0)
    pipe.transformer.eval()
    return pipe


def pieces_of(pipe: Pipeline, texts: list[str]) -> list[Excerpt]:
    return cut(texts, pipe.text_tokenizer, pipe.layout.caption)


# the pipeline


def test_a_row_of_text_alone_holds_nothing_but_the_text(writer):
    frame = writer.layout.pair_frame
    assert (frame.length, frame.places[0]) == (1 + ROOM, slice(1, 1 + ROOM))
    vocab = writer.layout.vocab
    assert (vocab.num_codes, vocab.mask) == (0, vocab.size - 1)
    assert writer.transformer.config.grid is None


def test_it_writes_and_fills_in_as_any_pipeline(writer):
    made = writer.text("a red", num_samples=3, seed=2, progress=False)
    assert len(made.texts) == 3
    assert all(text.startswith("a red") for text in made.texts)
    assert made.images == ()
    assert made.texts == writer.text("a red", num_samples=3, seed=2, progress=False).texts
    filled = writer.infill(["a ___ cat on a mat", "a ___ ___"], progress=False).texts
    assert filled[0].startswith("a")
    assert filled[0].endswith(" cat on a mat")
    levels = [moment.levels for moment in writer.stream_text(seed=1)]
    assert (levels[0], levels[-1]) == ({"text": 1.0, "image": 0.0}, {"text": 0.0, "image": 0.0})


def test_its_folder_has_no_image_tokenizer_and_gives_it_back(writer, tmp_path):
    writer.save_pretrained(tmp_path / "model", card="# texts\n")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert sorted(name for name in index if not name.startswith("_")) == ["text_tokenizer", "transformer"]
    assert not (tmp_path / "model" / "image_tokenizer").exists()
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    assert (loaded.layout, loaded.settings) == (writer.layout, writer.settings)
    assert loaded.fingerprint == writer.fingerprint
    assert loaded.codec.image_tokenizer is None
    assert loaded.text(seed=5, progress=False).texts == writer.text(seed=5, progress=False).texts


PICTURE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda pipe: pipe.text_to_image("a cat", progress=False), "text_to_image makes pictures"),
        (lambda pipe: next(pipe.stream_text_to_image("a cat")), "text_to_image makes pictures"),
        (lambda pipe: pipe.joint(progress=False), "joint makes pictures"),
        (lambda pipe: pipe.caption(PICTURE, progress=False), "no image tokenizer"),
        (lambda pipe: pipe.answer(PICTURE, "what?", progress=False), "no image tokenizer"),
        (lambda pipe: pipe.infill("a ___", PICTURE, progress=False), "no image tokenizer"),
        (lambda pipe: pipe.inpaint(PICTURE, PICTURE, "a", progress=False), "no image tokenizer"),
        (lambda pipe: pipe.score(PICTURE, "a cat", progress=False), "no image tokenizer"),
        (lambda pipe: pipe.encode_images(PICTURE), "no image tokenizer"),
        (lambda pipe: pipe.decode_images(torch.zeros(1, 0, 0).long()), "no image tokenizer"),
        (lambda pipe: pipe.image_tokenizer, "no image tokenizer"),
    ],
)
def test_whatever_has_to_do_with_pictures_is_refused(writer, ask, message):
    with pytest.raises(ValueError, match=f"{message}.*") as refused:
        ask(writer)
    assert "text alone" in str(refused.value)


def test_a_layout_with_codes_wants_an_image_tokenizer(tiny):
    codec = Codec(tiny.text_tokenizer, None, tiny.layout)  # enough to train on codes
    with pytest.raises(ValueError, match="a layout with 64 image codes wants an image tokenizer"):
        Pipeline.untrained(codec, dim=32, depth=1)
    with pytest.raises(ValueError, match="pictures want an image tokenizer"):
        codec.pixels([PICTURE])
    with pytest.raises(ValueError, match="2 positions, got 1"):
        TextLayout.build(num_text=300, room=1)


# texts apart, and in pieces


def test_the_texts_of_a_row_stay_together_wherever_it_lies():
    samples = [Sample(f"a:{n}", texts=(f"text {n}", f"the same {n}")) for n in range(400)]
    parts = apart(samples, 0.2)
    assert sorted(s.name for part in parts for s in part) == sorted(s.name for s in samples)
    assert 300 < len(parts[0]) < 340
    assert 25 < len(parts[1]) < 55
    elsewhere = [Sample(f"b:{s.name}", texts=s.texts) for s in reversed(samples)] + samples[:7]
    texts = [{text for s in part for text in s.texts} for part in parts]
    again = [{text for s in part for text in s.texts} for part in apart(elsewhere, 0.2)]
    assert again == texts


def test_a_part_without_a_row_is_named():
    with pytest.raises(ValueError, match=r"held_out=0.1 of 1 rows leaves a part empty: training"):
        apart([Sample("a", texts=("a",))], 0.1)
    with pytest.raises(ValueError, match="held_out=1: wanted a share above 0 and below 1"):
        apart([Sample("a", texts=("a",))], 1)


def test_a_long_text_is_cut_and_nothing_of_it_is_lost(writer):
    text = " and ".join(SAID)
    ids = writer.text_tokenizer.encode(text)
    found = pieces_of(writer, ["a cat", text])
    assert found[0].ids == tuple(writer.text_tokenizer.encode("a cat"))
    assert all(len(piece.ids) == ROOM - 1 for piece in found[1:-1])
    assert [token for piece in found[1:] for token in piece.ids] == ids
    assert [piece.ids for piece in cut([""], writer.text_tokenizer, ROOM)] == [()]  # its end is something


# documents and rows


def documents_of(canvas: Canvas) -> list[tuple[list[int], list[bool], list[list[int]]]]:
    """Tokens, what is open, and positions of every document of a canvas, in a fixed order."""
    found = []
    for row in range(canvas.shape[0]):
        for number in range(int(canvas.segment[row].max()) + 1):
            inside = canvas.segment[row] == number
            columns = (canvas.tokens, canvas.fillable, canvas.position)
            found.append(tuple(column[row, inside].tolist() for column in columns))
    return sorted(found)


def test_packed_rows_hold_the_documents_of_padded_ones_batch_by_batch(writer):
    pieces = pieces_of(writer, SAID * 10)
    collate = TextDocuments(writer.layout, 0.3)

    def stream(make):
        return Batches(Listed(pieces.__getitem__, len(pieces), order=Shuffled(1)), 8, collate=make, seed=3)

    packed, padded = stream(Packed(collate, 30)), stream(collate)
    gains = []
    for _ in range(12):
        rows, loose = next(packed), next(padded)
        assert packed.names() == padded.names()
        assert documents_of(rows) == documents_of(loose)
        assert rows.shape[0] < loose.shape[0] == 8
        gains.append(efficiency(rows) - efficiency(loose))
        assert torch.equal(loose.modality == PAD, loose.segment < 0)
    assert min(gains) >= 0 < sum(gains)


def test_a_share_of_the_documents_has_all_its_room_and_the_others_one_end(writer):
    pieces = pieces_of(writer, SAID) * 50
    end, begin = (writer.layout.vocab.specials[name] for name in ("end", "begin_caption"))
    canvas = TextDocuments(writer.layout, 0.25)(pieces, np.random.default_rng(0))
    sizes = (canvas.segment >= 0).sum(dim=1).tolist()
    assert {size - len(piece.ids) for size, piece in zip(sizes, pieces, strict=True) if size <= ROOM} == {2}
    assert sum(size == 1 + ROOM for size in sizes) / len(sizes) == pytest.approx(0.25, abs=0.1)
    for row, size, piece in zip(canvas.tokens.tolist(), sizes, pieces, strict=True):
        assert row[:size] == [begin, *piece.ids, *[end] * (size - 1 - len(piece.ids))]
    assert torch.equal(canvas.fillable, (canvas.segment >= 0) & (torch.arange(1 + ROOM) > 0))
    with pytest.raises(ValueError, match="whole=2: wanted a share from 0 to 1"):
        TextDocuments(writer.layout, 2)


@pytest.mark.parametrize("whole", [0.0, 0.5, 1.0])
def test_the_collator_makes_texts_as_they_are_written(writer, whole):
    items = [Sample(text, texts=(text,)) for text in SAID] * 10
    rows = Collator(writer.codec, whole=whole)(items, np.random.default_rng(0))
    ids = [writer.text_tokenizer.encode(text) for text in SAID]
    begun = writer.layout.writing(ids)
    size = begun.shape[1]
    share = ((rows.segment >= 0).sum(dim=1) == size).float().mean()
    assert float(share) == pytest.approx(whole, abs=0.2)
    for name in ("tokens", "position", "modality", "span"):
        for number, known in enumerate(1 + len(some) for some in ids):
            mine, theirs = getattr(rows, name)[number], getattr(begun, name)[number]
            assert torch.equal(mine[:known], theirs[:known]), name
    if whole == 1:
        (wanted,) = whole_rows(writer.layout, pieces_of(writer, SAID))
        for name in ("tokens", "fillable", "position", "segment", "span", "modality"):
            assert torch.equal(getattr(rows, name)[: len(SAID)], getattr(wanted, name)), name


def test_the_bound_is_that_of_what_is_generated(writer):
    """An untrained model of even logits: every position of the room costs log V, be it a word or an end."""
    pipe = Pipeline(
        transformer=writer.transformer, text_tokenizer=writer.text_tokenizer, image_tokenizer=None,
        layout=writer.layout,
    )  # fmt: skip
    texts = [*SAID, " and ".join(SAID)]
    num = len(pieces_of(pipe, texts))
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    try:
        with torch.no_grad():
            for value in pipe.transformer.parameters():
                value.zero_()
        nats, error = bound(pipe, texts, draws=4, seed=0)
    finally:
        pipe.transformer.load_state_dict(weights)
    assert nats == pytest.approx(num * ROOM * math.log(pipe.text_tokenizer.size + 1), rel=1e-5)
    assert error < 1e-3
    other = bound(writer, texts, draws=4, seed=0)
    assert other == bound(writer, texts, draws=4, seed=0)
    assert other[0] > nats
    assert other[1] > 1


def test_the_loss_of_a_batch_is_finite_and_all_its_text(writer):
    rows = whole_rows(writer.layout, pieces_of(writer, SAID))
    objective = Masking(Absorbing(writer.layout.vocab.mask), Square())
    loss = objective(writer.transformer, rows[0], torch.Generator().manual_seed(0))
    assert {name: int(count) for name, count in loss.counts.items()} == {"text": 6 * ROOM, "image": 0}
    assert torch.isfinite(loss.sums["text"])
