"""The recipes that come along run from one end to the other and leave models that can be loaded."""

from __future__ import annotations

import html
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizers_mm
from mmdlm import Pipeline, evaluate
from mmdlm.data import InOrder, Shards
from tokenizers_mm import Autoencoder, BytePairTokenizer

RUN = "train/run.py"
SMALL = ("batch=4", "dim=32", "depth=1", "progress=false")


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe does besides its steps is done on less: fewer sentences and pictures."""
    train, exam, measure = BytePairTokenizer.train, evaluate.Exam, tokenizers_mm.measure
    monkeypatch.setattr(
        BytePairTokenizer, "train", staticmethod(lambda texts, size: train(islice(texts, 4000), size))
    )
    monkeypatch.setattr(evaluate, "Exam", lambda **options: exam(**{**options, "num": 8}))
    monkeypatch.setattr(tokenizers_mm, "measure", lambda tokenizer, images: measure(tokenizer, images[:16]))


def test_scenes_makes_its_model_from_nothing(program, tmp_path, little):
    arguments = ("scenes", f"out={tmp_path}", "kinds=one,groups", "tokenizer_steps=2", "steps=2")
    arguments += ("decoder_steps=2",)
    done = program(RUN, *arguments, *SMALL)
    assert done.status == 0, done.err
    pipe = Pipeline.from_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{pipe.transformer.num_parameters():,} parameters" in card
    assert "8 held-out scenes of each kind" in card  # what `little` leaves of any exam
    assert [entry["updates"] for entry in pipe.training["history"]] == [2, 2, 1, 1, 1, 1, 1]
    assert pipe.training["mixture"] == [1.0, 0.0, 0.0, 3.0]
    assert json.loads((tmp_path / "scores.json").read_text())["exam"]["model"] == pipe.fingerprint
    assert pipe.layout.grid == (8, 8)
    assert isinstance(pipe.image_tokenizer, Autoencoder)
    assert pipe.image_tokenizer.config.used is not None  # codes that no scene has are left out
    assert pipe.settings["text_to_image"].steps == 64
    assert pipe.settings["joint"].steps == 64 + pipe.layout.caption
    assert pipe.text_to_image("a small red circle", steps=1, progress=False).images[0].size == (64, 64)
    assert pipe.joint(steps=1, progress=False).texts
    with Image.open(tmp_path / "all" / "samples-000001.png") as sheet:
        assert sheet.width == 8 * 66 + 2
    lines = (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()
    names = {name for line in lines for name in json.loads(line)}
    assert {"text_to_image.one", "caption.groups"} <= names


def test_pairs_makes_a_model_of_a_folder_and_leaves_out_what_cannot_be_read(program, tmp_path, imagefolder):
    arguments = (f"data={imagefolder}", f"out={tmp_path / 'mine'}", "size=16", "text_vocabulary=280")
    arguments += ("tokenizer_steps=2", "steps=2", "samples_every=2", *SMALL)
    done = program(RUN, str(Path(__file__).parents[2] / "train/recipes/pairs.py"), *arguments)
    assert done.status == 0, done.err
    assert "left out 1 pictures" in done.out
    assert "broken.png" in done.out
    home = tmp_path / "mine"
    pipe = Pipeline.from_pretrained(home / "model")
    assert "on 12 pairs" in (home / "model" / "README.md").read_text()
    assert pipe.codec.image_size == 16
    assert pipe.text_to_image("bar on red", steps=1, progress=False).images[0].size == (16, 16)
    for name in ("image_tokenizer/rebuilt-000002.png", "transformer/samples-000002.png"):
        assert Image.open(home / name).height > 0
    told = (home / "transformer" / "captions-000002.txt").read_text("utf-8")
    assert "red with a bar\t" in told
    page = (home / "transformer" / "report.html").read_text("utf-8")
    assert "<td>pictures</td><td>12</td>" in page
    assert f"from_pretrained({html.escape(repr(str(home / 'model')))})" in page
    assert "rebuilt after 2 steps" in (home / "image_tokenizer" / "report.html").read_text("utf-8")


def test_pairs_takes_the_rows_that_are_wanted_evenly_and_reports_on_them(program, tmp_path, imagefolder):
    arguments = (f"data={imagefolder}", f"out={tmp_path / 'mine'}", "size=16", "text_vocabulary=280")
    arguments += ("rows=4", "without=red", "tokenizer_steps=2", "steps=2", *SMALL)
    done = program(RUN, "pairs", *arguments)
    assert done.status == 0, done.err
    card = (tmp_path / "mine/model/README.md").read_text()
    assert "on 4 pairs" in card
    assert "measured on the training pairs" in card
    assert "measured on the training pairs" in done.out
    told = (tmp_path / "mine/transformer/captions-000002.txt").read_text("utf-8")
    texts = [line.split("\t")[0] for line in told.splitlines()]
    assert texts == [f"{colour} with a bar" for colour in ("lime", "white", "blue", "lime")]


def test_pairs_needs_a_picture_that_can_be_read(program, tmp_path, imagefolder):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    done = program(RUN, "pairs", f"data={tmp_path / 'data'}", f"out={tmp_path}", *SMALL)
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert "not one picture could be read" in done.err
    done = program(RUN, "pairs", f"data={tmp_path / 'nowhere'}", f"out={tmp_path}", *SMALL)
    assert done.status == 2
    assert "nowhere" in done.err


@pytest.mark.parametrize("name", ["scenes", "pairs"])
def test_an_argument_that_a_recipe_does_not_take_prints_what_it_takes(program, name):
    done = program(RUN, name, "stepz=4")
    assert done.status == 2
    assert "unknown argument 'stepz' (did you mean 'steps'?)" in done.err
    assert "recipe takes:" in done.err
    assert "\n  steps: int = " in done.err
    assert "out: Path" in done.err


@pytest.mark.parametrize("name", ["scenes", "pairs"])
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("precision=float7",), "precision=float7: wanted one of float32, bfloat16"),
        (("batch=9", "parts=2"), "batch=9: wanted a multiple of parts=2"),
        (("parts=0",), "wanted a multiple of parts=0"),
    ],
)
def test_a_choice_that_is_none_is_refused(program, tmp_path, name, choice, message, imagefolder):
    more = (f"data={imagefolder}",) if name == "pairs" else ()
    done = program(RUN, name, f"out={tmp_path / 'x'}", *choice, *more)
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert message in done.err


# codes once and for all


def test_an_imagefolder_becomes_codes(program, tmp_path, tiny, tiny_folder, imagefolder):
    done = program(
        "train/encode_images.py", imagefolder, "--out", tmp_path / "codes", "--model", tiny_folder, "--skip"
    )
    assert (done.status, done.lines) == (0, [f"{tmp_path / 'codes'}: 12 pairs"])
    assert "left out 1" in done.err
    assert "broken.png" in done.err
    source = Shards(tmp_path / "codes", order=InOrder())
    assert source.grid == tiny.layout.grid
    pairs = list(source)
    assert [pair.name for pair in pairs] == [f"{number}.png" for number in range(12)]
    assert pairs[0].texts == ("red with a bar", "bar on red")
    assert pairs[1].texts == ("lime with a bar",)
    pictures = [Image.open(imagefolder / pair.name) for pair in pairs]
    codes = torch.from_numpy(np.stack([pair.codes for pair in pairs])).long()
    assert torch.equal(codes, tiny.encode_images(pictures))
    assert len(codes.flatten(1).unique(dim=0)) > 1


def test_a_broken_picture_stops_the_encoding_unless_it_may_be_left_out(
    program, tmp_path, tiny_folder, imagefolder
):
    done = program("train/encode_images.py", imagefolder, "--out", tmp_path / "codes", "--model", tiny_folder)
    assert done.status == 2
    assert "broken.png" in done.err.splitlines()[-1]
    assert not (tmp_path / "codes").exists()


# more recipes


def write_idx(path: Path, values: np.ndarray) -> None:
    """A file of unsigned bytes as Fashion-MNIST has them: magic number, sizes, values."""
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(head + values.astype(np.uint8).tobytes())


@pytest.fixture
def garments(tmp_path) -> Path:
    """A root of torchvision's FashionMNIST with few pictures: class c is a bar of c + 1 rows."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, num in (("train", 40), ("t10k", 20)):
        labels = np.arange(num) % 10
        pictures = np.zeros((num, 28, 28))
        for number, label in enumerate(labels):
            pictures[number, : 2 * label + 2] = 255
        write_idx(raw / f"{part}-images-idx3-ubyte", pictures)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return tmp_path / "data"


def test_fashion_makes_a_model_and_has_it_judged(program, tmp_path, garments):
    out = tmp_path / "out"
    arguments = (f"data={garments}", f"out={out}", "judge_steps=60", "tokenizer_steps=2", "steps=2")
    done = program(RUN, "fashion", *arguments, "exam=20", "samples_every=2", *SMALL)
    assert done.status == 0, done.err
    figures = json.loads((out / "scores.json").read_text())
    assert figures["judge on real pictures"] == 1.0  # bars of ten heights are no art
    assert figures["exam"] == 20
    assert "on 40 pictures of Fashion-MNIST" in (out / "model" / "README.md").read_text()
    pipe = Pipeline.from_pretrained(out / "model")
    assert pipe.layout.grid == (7, 7)
    assert pipe.text_to_image("a bag", steps=1, progress=False).images[0].size == (28, 28)
    for name in ("drawn.png", "image_tokenizer/rebuilt-000002.png", "transformer/samples-000002.png"):
        assert Image.open(out / name).height > 0


def test_fashion_says_what_it_wants(program, tmp_path):
    done = program(RUN, "fashion", f"data={tmp_path}", f"out={tmp_path}")
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert f"{tmp_path} holds no FashionMNIST/raw" in done.err
    done = program(RUN, "fashion", f"data={tmp_path}", f"out={tmp_path}", "batch=128", "parts=128")
    assert "parts=128, which is to divide 64 as well" in done.err  # the tokenizer's batch


@pytest.fixture
def hands(tmp_path) -> list[Path]:
    """Two folders of the same twenty things, red and blue, and a broken picture in each."""
    folders = []
    for style, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        folder = tmp_path / style
        folder.mkdir()
        rows = []
        for number in range(20):
            Image.new("RGB", (8, 8), colour).save(folder / f"{number}.png")
            rows.append(json.dumps({"file_name": f"{number}.png", "text": f"thing {number}", "style": style}))
        (folder / "broken.png").write_bytes(b"no picture")
        rows.append(json.dumps({"file_name": "broken.png", "text": "nothing", "style": style}))
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
        folders.append(folder)
    return folders


def test_styles_leaves_pairs_of_thing_and_style_out_and_asks_for_them(program, tmp_path, hands):
    out = tmp_path / "out"
    arguments = (f"data={hands[0]},{hands[1]}", f"out={out}", "size=8", "text_vocabulary=280")
    arguments += ("tokenizer_steps=2", "steps=2", "samples_every=2", *SMALL)
    done = program(RUN, "styles", *arguments)
    assert done.status == 0, done.err
    assert done.out.count("left out 1 pictures") == 2
    figures = json.loads((out / "scores.json").read_text())
    assert figures["unseen"] >= 1
    card = (out / "model" / "README.md").read_text()
    assert f"on {40 - figures['unseen']} pictures in 2 styles" in card
    assert Pipeline.from_pretrained(out / "model").codec.image_size == 8
    assert Image.open(out / "drawn.png").height > 0


def test_styles_wants_a_column_and_things_that_are_shared(program, tmp_path, hands):
    done = program(RUN, "styles", f"data={hands[0]}", f"out={tmp_path / 'x'}", "style=hand", "size=8")
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert "has no column 'hand'" in done.err
    done = program(RUN, "styles", f"data={hands[0]}", f"out={tmp_path / 'x'}", "size=8")
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert "wanted folders that share texts" in done.err
