"""The recipe for text alone, from its data to its exam, whole and interrupted."""

from __future__ import annotations

import html
import json
import math
import os
import signal
from itertools import product
from pathlib import Path
from random import Random

import pytest

from mmdlm import Pipeline
from mmdlm.training import Trainer

RUN = "train/run.py"
SMALL = ("vocabulary=300", "room=16", "length=40", "documents=8", "dim=32", "depth=1", "exam=6", "draws=2")
SMALL += ("held_out=0.3", "samples_every=2", "steps=4", "progress=false")


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of two captions, and one row without any."""
    file = tmp_path_factory.mktemp("texts") / "captions.jsonl"
    things = [(colour, thing) for colour in ("red", "blue", "green", "white") for thing in range(10)]
    rows = [{"said": [f"a {colour} cat, {n}", f"number {n} is {colour}"]} for colour, n in things]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"other": "no text"}]), "utf-8")
    return file


def test_texts_makes_a_model_of_text_alone_and_examines_it(program, tmp_path, captions):
    out = tmp_path / "mine"
    done = program(RUN, "texts", f"data={captions}", f"out={out}", "column=said", *SMALL)
    assert done.status == 0, done.err
    assert "left out 1 rows" in done.out
    assert "captions.jsonl:41" in done.out

    figures = json.loads((out / "scores.json").read_text("utf-8"))
    parts = ("training", "validation", "exam")
    assert sum(figures[f"rows for {part}"] for part in parts) == 40
    assert all(figures[f"texts for {part}"] == 2 * figures[f"rows for {part}"] for part in parts)
    full = [
        float(figures[f"share of rows that is no padding, {way}"].rstrip("%")) for way in ("packed", "padded")
    ]
    assert full[0] > full[1] + 5
    bits, words = figures["bits a byte"], figures["nats a word"]
    assert bits["trigram"] < bits["unigram"] < bits["model"]  # four steps teach little
    assert bits["model"] / bits["unigram"] == pytest.approx(words["model"] / words["unigram"])
    assert 0 < figures["standard error of the model's, from its draws"] < bits["model"]
    assert 0 < figures["hidden words"] <= figures["exam"]
    assert math.isfinite(figures["perplexity under the trigram"]["generated"])

    pipe = Pipeline.from_pretrained(out / "model")
    assert pipe.codec.image_tokenizer is None
    card = (out / "model" / "README.md").read_text("utf-8")
    assert f"at most {bits['model']:.3f} bits a byte" in card
    assert card.split("\n", 2)[2].strip() in done.out
    texts = (out / "transformer" / "texts-000004.txt").read_text("utf-8").splitlines()
    assert len(texts) == 32
    records = [json.loads(line) for line in (out / "transformer" / "metrics.jsonl").open()]
    assert len([record for record in records if "validation/text" in record]) == 2
    page = (out / "transformer" / "report.html").read_text("utf-8")
    assert "what the model writes" in page
    assert "pipe.text(&quot;&quot;" in page
    assert f"mmdlm text --model {html.escape(str(out / 'model'))}" in page
    assert "text_to_image" not in page
    assert "<td>texts for training</td>" in page

    wrote = program("infer/text.py", "--model", out / "model", "--num", 3, "--quiet", "a red")
    assert wrote.status == 0, wrote.err
    assert wrote.out.count("a red") >= 3
    refused = program("infer/text_to_image.py", "--model", out / "model", "a red cat", "--out", tmp_path)
    assert (refused.status, len(refused.err.splitlines())) == (2, 1)
    assert "this model is one of text alone" in refused.err


def test_texts_takes_plain_files_and_goes_on_exactly_where_it_was_stopped(program, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    lines = [f"{'the old boat ' * (n % 5)}lies at pier {n}" for n in range(60)]
    (tmp_path / "data" / "a.txt").write_text("\n".join(lines[:40]) + "\n", "utf-8")
    (tmp_path / "data" / "b.txt").write_text("\n\n".join(lines[40:]) + "\n", "utf-8")
    arguments = (f"data={tmp_path / 'data'}", *SMALL)
    straight = program(RUN, "texts", f"out={tmp_path / 'straight'}", *arguments)
    assert straight.status == 0, straight.err
    update = Trainer._update

    def stopping(trainer, *given):
        update(trainer, *given)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", stopping)
        assert program(RUN, "texts", f"out={tmp_path / 'halves'}", *arguments).status == 143
    assert not (tmp_path / "halves" / "model").exists()
    again = program(RUN, "texts", f"out={tmp_path / 'halves'}", *arguments)
    assert again.status == 0, again.err
    assert again.out == straight.out
    pipes = [Pipeline.from_pretrained(tmp_path / name / "model") for name in ("straight", "halves")]
    assert pipes[0].fingerprint == pipes[1].fingerprint


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("documents=9", "parts=2"), "documents=9: wanted a multiple of parts=2"),
        (("parts=0",), "wanted a multiple of parts=0"),
        (("room=32", "length=32"), "length=32: wanted more than room=32"),
        (("held_out=0",), "held_out=0.0: wanted a share above 0 and below 1"),
        (("held_out=0.0001",), "leaves a part empty"),
        (("whole=1.5",), "whole=1.5: wanted a share from 0 to 1"),
        (("draws=1",), "draws=1: wanted at least 1 and 2"),
        (("vocabulary=100",), "at least 256 ids"),
        (("dim=33",), "dim must be a multiple of 32"),
        (("column=text",), "not one text could be read"),
        (("device=abacus",), "device=abacus: no such device"),
        (("stepz=4",), "unknown argument 'stepz'"),
    ],
)
def test_what_texts_cannot_do_is_named(program, tmp_path, captions, given, message):
    more = () if given == ("column=text",) else ("column=said",)
    done = program(RUN, "texts", f"data={captions}", f"out={tmp_path / 'x'}", *given, *more)
    assert done.status == 2
    assert message in done.err


def test_texts_explains_its_arguments(program):
    done = program(RUN, "texts", "--help")
    assert done.status == 0
    assert "Tokenizer, transformer on packed texts, exam" in done.out
    for name in ("data: Path", "column: str = 'text'", "room: int = ", "whole: float = ", "held_out: float"):
        assert name in done.out


@pytest.mark.slow
def test_texts_learns_what_its_texts_are_like(program, tmp_path):
    """Sentences of a grammar, most of them never seen: the model is near to what each of them must cost."""
    words = (["a", "the", "one"], ["red", "blue", "green", "black"], ["cat", "dog", "boat", "house"])
    words += (["stands", "lies", "falls"], ["near", "behind", "under"], ["a", "the", "one"], ["tree", "lake"])
    every = [" ".join(said) for said in product(*words)]
    law = math.log(len(every))  # nats of a sentence, all of them being as likely
    file, out = tmp_path / "grammar.txt", tmp_path / "out"
    file.write_text("\n".join(Random(0).sample(every, 900)) + "\n", "utf-8")
    arguments = ("vocabulary=300", "room=12", "length=48", "steps=600", "dim=64", "depth=2", "exam=100")
    arguments += ("held_out=0.3", "samples_every=200", "whole=1", "progress=false")
    done = program(RUN, "texts", f"data={file}", f"out={out}", *arguments)
    assert done.status == 0, done.err
    figures = json.loads((out / "scores.json").read_text("utf-8"))
    bits = figures["bits a byte"]
    assert law - 0.5 < figures["nats a word"]["model"] * len(words) < law + 3
    assert bits["model"] < 0.6 * bits["unigram"]
    made = Pipeline.from_pretrained(out / "model").text(num_samples=64, progress=False).texts
    assert sum(text in set(every) for text in made) > 10  # by chance: none
    assert figures["stands in the training texts"]["generated"] < 0.6
