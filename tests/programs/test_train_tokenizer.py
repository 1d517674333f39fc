"""The program that trains one tokenizer leaves it in a folder, and says in a line what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import signal

import torch
from PIL import Image

from mmdlm.training import Trainer
from tokenizers_mm import Autoencoder, BytePairTokenizer

PROGRAM = "train/train_tokenizer.py"
SMALL = ("--steps", 2, "--batch", 2, "--size", 16, "--channels", "4,8", "--levels", "4,4")
SMALL += ("--predict-steps", 2, "--context", 1)


def test_an_image_tokenizer_is_trained_and_taken_up_again(program, tmp_path):
    rows = []
    for number in range(12):
        Image.new("RGB", (20, 20), (20 * number, 0, 90)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": "a"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out"
    done = program(PROGRAM, "image", tmp_path, "--out", out, *SMALL)
    assert done.status == 0, done.err
    assert done.lines[0] == f"{out}: on 1 pictures kept apart"
    assert done.lines[1] == "pictures: 1, each 4 x 4 codes"
    assert done.lines[-2].endswith(
        "2 steps of 32 rows on 11 training pictures, seed 0; 16 noise levels a picture"
    )
    assert done.lines[-1] == f"with pictures in {out / 'report.html'}"
    assert (out / "report.html").read_text("utf-8").startswith("<!doctype html>")
    tokenizer = Autoencoder.from_pretrained(out)
    assert (tokenizer.size, tokenizer.downsample) == (16, 4)
    assert program(PROGRAM, "image", tmp_path, "--out", out, *SMALL).out == done.out
    again = Autoencoder.from_pretrained(out).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in tokenizer.state_dict().items())


def test_an_image_tokenizer_that_was_stopped_goes_on_exactly(program, tmp_path, imagefolder, monkeypatch):
    data = shutil.copytree(imagefolder, tmp_path / "data")
    shutil.copy(data / "0.png", data / "broken.png")
    calls = ("image", data, *SMALL, "--steps", 6, "--parts", 2, "--predict-steps", 0)
    done = program(PROGRAM, *calls, "--out", tmp_path / "straight")
    assert done.status == 0, done.err
    update = Trainer._update

    def stopping(trainer, *arguments):
        update(trainer, *arguments)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", stopping)
        assert program(PROGRAM, *calls, "--out", tmp_path / "halves").status == 143
    assert not (tmp_path / "halves" / "config.json").exists()
    assert [path.name for path in (tmp_path / "halves/run/checkpoints").iterdir()] == ["step-00000003"]
    again = program(PROGRAM, *calls, "--out", tmp_path / "halves")
    assert again.status == 0, again.err
    assert again.lines[1:-1] == done.lines[1:-1]
    weights = [Autoencoder.from_pretrained(tmp_path / name).state_dict() for name in ("straight", "halves")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_scenes_are_read_and_the_small_model_can_be_skipped(program, tmp_path):
    coarse = ("--channels", "4,4,4,4", "--levels", "4", "--context", 1, "--predict-steps", 0)
    out = tmp_path / "out"
    done = program(
        PROGRAM, "image", "scenes", "--out", out, "--steps", 1, "--batch", 2, "--held-out", 5, *coarse
    )
    assert done.status == 0, done.err
    assert done.lines[1] == "pictures: 5, each 4 x 4 codes"
    read = [line for line in done.lines if line.startswith("read exactly, ")]
    assert sum(int(line.split(" of ")[1].partition(",")[0]) for line in read) == 5
    assert done.lines[-2] == "the masked model: skipped: no steps were asked for"


def test_a_text_tokenizer_is_trained(program, tmp_path, imagefolder):
    (tmp_path / "a.txt").write_text("a red circle\na red square\n" * 9)
    for data, text in ((tmp_path / "a.txt", "a red circle"), (imagefolder, "red with a bar")):
        out = tmp_path / text
        done = program(PROGRAM, "text", data, "--out", out, "--vocabulary", 280)
        tokenizer = BytePairTokenizer.load(out)
        assert done == (0, f"{out}: {tokenizer.size} tokens\n", "")
        assert 256 < tokenizer.size <= 280
        assert len(tokenizer.encode(text)) < len(text) / 2


def test_wrong_input_is_named(program, tmp_path, imagefolder):
    def refused(*arguments: object) -> str:
        done = program(PROGRAM, *arguments, "--out", tmp_path / "out")
        assert (done.status, done.out) == (2, "")
        return done.err.splitlines()[-1]

    assert "nowhere is not a folder" in refused("image", tmp_path / "nowhere", *SMALL)
    assert "wanted one imagefolder, got 2 paths" in refused("image", imagefolder, imagefolder, *SMALL)
    assert "broken.png" in refused("image", imagefolder, *SMALL[:-2], "--steps", 9)
    assert "--levels 4;4: wanted whole numbers" in refused("image", imagefolder, "--levels", "4;4")
    assert "must be at least 0, got -1" in refused("image", imagefolder, *SMALL, "--predict-steps", -1)
    assert "--batch 2: wanted a multiple of --parts 3" in refused("image", imagefolder, *SMALL, "--parts", 3)
    assert "no such device" in refused("image", imagefolder, *SMALL, "--device", "abacus")
    assert "at least 256 ids" in refused("text", imagefolder, "--vocabulary", 20)
    assert "nowhere.txt" in refused("text", tmp_path / "nowhere.txt")
    assert not (tmp_path / "out" / "config.json").exists()
