"""The recipes that come along run from one end to the other and leave models that can be loaded."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizers_mm
from mmdlm import Pipeline, evaluate
from mmdlm.data import EncodedFolder, InOrder
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


def test_pairs_takes_the_rows_that_are_wanted_evenly_and_reports_on_them(program, tmp_path, imagefolder):
    arguments = (f"data={imagefolder}", f"out={tmp_path / 'mine'}", "size=16", "text_vocabulary=280")
    arguments += ("rows=3", "without=red", "tokenizer_steps=2", "steps=2", *SMALL)
    done = program(RUN, "pairs", *arguments)
    assert done.status == 0, done.err
    card = (tmp_path / "mine/model/README.md").read_text()
    assert "on 3 pairs" in card
    assert "measured on the training pairs" in card
    assert "measured on the training pairs" in done.out
    told = (tmp_path / "mine/transformer/captions-000002.txt").read_text("utf-8")
    texts = [line.split("\t")[0] for line in told.splitlines()]
    assert texts == ["lime with a bar", "white with a bar", "white with a bar"]


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
    source = EncodedFolder(tmp_path / "codes", order=InOrder())
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
