"""Encoding in several processes, killed and damaged: the shards are those of one undisturbed process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdlm.data import InOrder, Shards
from tokenizers_mm import Autoencoder, AutoencoderConfig

ROOT = Path(__file__).resolve().parents[2]
ENCODE = "train/encode_images.py"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Forty pictures of noise, and one file that is none."""
    folder = tmp_path_factory.mktemp("data") / "noise"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"noise {number}"})
    (folder / "39.png").write_bytes(b"none")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """An untrained image tokenizer in a folder of its own."""
    import torch

    folder = tmp_path_factory.mktemp("tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        none = (0, 0)
        config = AutoencoderConfig(channels=(8, 8), encoder_blocks=none, decoder_blocks=none, levels=(8, 8))
        Autoencoder(config).save_pretrained(folder)
    return folder


def command(pictures: Path, tokenizer: Path, out: Path, *more: object) -> list[str]:
    options = ("--model", tokenizer, "--size", 16, "--shard-size", 8, "--batch", 4, "--skip", *more)
    return [str(word) for word in (pictures, "--out", out, *options)]


def test_two_processes_and_ranks_write_what_one_writes(program, tmp_path, pictures, tokenizer, monkeypatch):
    done = program(ENCODE, *command(pictures, tokenizer, tmp_path / "one", "--processes", 1))
    assert (done.status, done.lines) == (0, [f"{tmp_path / 'one'}: 39 pairs"])
    assert "39.png" in done.err
    alone = digests(tmp_path / "one")
    assert len(alone) == 11
    source = Shards(tmp_path / "one", order=InOrder())
    assert (source.grid, source.num_codes) == (Autoencoder.from_pretrained(tokenizer).grid(16, 16), 64)
    assert len(np.unique(source.take(range(39)))) > 8

    done = program(ENCODE, *command(pictures, tokenizer, tmp_path / "two", "--processes", 2))
    assert (done.status, done.lines) == (0, [f"{tmp_path / 'two'}: 39 pairs"])
    assert digests(tmp_path / "two") == alone

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("1", "rank 1 of 2 is done, others are not"), ("0", "39 pairs")):
        monkeypatch.setenv("RANK", rank)  # as torchrun does
        done = program(ENCODE, *command(pictures, tokenizer, tmp_path / "ranks", "--processes", 1))
        assert done.lines == [f"{tmp_path / 'ranks'}: {said}"]
    assert digests(tmp_path / "ranks") == alone

    for name, change in (
        ("shard-00000.safetensors", lambda data: data[:-1]),
        ("shard-00001.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("shard-00002.json", lambda data: data.replace(b"39", b"38")),
    ):
        (tmp_path / "one" / name).write_bytes(change((tmp_path / "one" / name).read_bytes()))
    (tmp_path / "one" / "shard-00004.safetensors").unlink()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="2 of 5 shards are damaged"):
        Shards(tmp_path / "one")
    done = program(ENCODE, *command(pictures, tokenizer, tmp_path / "one", "--processes", 1))
    assert done.lines == [f"{tmp_path / 'one'}: 39 pairs"]
    assert digests(tmp_path / "one") == alone


@pytest.mark.slow
def test_a_killed_run_is_taken_up_and_its_processes_end_with_it(program, tmp_path, pictures, tokenizer):
    out, words = tmp_path / "killed", command(pictures, tokenizer, tmp_path / "killed", "--processes", 2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, ROOT / ENCODE, *words, "--shard-size", "1"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("shard-*.json")) and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    started.kill()
    started.wait()
    stood = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert stood
    wanted = command(pictures, tokenizer, tmp_path / "whole", "--processes", 1, "--shard-size", 1)
    assert program(ENCODE, *wanted).status == 0
    count = -1  # the processes of the killed one end by themselves, at the latest when all is done
    while count != len(list(out.glob("shard-*.json"))):
        count = len(list(out.glob("shard-*.json")))
        time.sleep(0.3)
    assert program(ENCODE, *words[:-2], "--processes", 1, "--shard-size", 1).status == 0
    assert digests(out) == digests(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in stood} == stood  # not made again


def test_wrong_input_ends_in_a_line(program, tmp_path, pictures, tokenizer):
    out = tmp_path / "codes"

    def refused(message: str, *words: object) -> None:
        done = program(ENCODE, *words)
        assert done.status == 2
        assert message in done.err.splitlines()[-1]
        assert not out.exists()

    some = command(pictures, tokenizer, out)
    refused("39.png", *(word for word in some if word != "--skip"), "--shard-size", 64)
    (tmp_path / "lacking.jsonl").write_text('{"text": "no picture", "image": null}\n')
    lacking = command(tmp_path / "lacking.jsonl", tokenizer, out, "--image-column", "image")
    refused("lacking.jsonl:1: has no picture", *(word for word in lacking if word != "--skip"))
    refused("multiples of", *some, "--size", 15, "--processes", 1)
    refused("say with --size", pictures, "--out", out, "--model", tokenizer, "--processes", 1)
    refused("no such file", tmp_path / "nowhere", "--out", out)
    refused("found .png", pictures / "0.png", "--out", out)


@pytest.mark.slow
def test_what_stops_one_process_stops_all_and_is_said_once(program, tmp_path, pictures, tokenizer):
    words = command(pictures, tokenizer, tmp_path / "codes", "--processes", 2)
    done = program(ENCODE, *(word for word in words if word != "--skip"))
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith(f"encode_images.py: {pictures / '39.png'}: ")
    assert not (tmp_path / "codes" / "index.json").exists()


def test_documents_become_shards(program, tmp_path, pictures, tokenizer):
    rows = [
        {"texts": [f"a {n}", None, None, "b"], "images": [None, f"{n}.png", f"{n + 1}.png", None]}
        for n in range(0, 20, 2)
    ]
    rows[3]["images"][1] = "39.png"  # no picture
    for number in (*range(20), 39):
        (tmp_path / f"{number}.png").write_bytes((pictures / f"{number}.png").read_bytes())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "codes"
    words = command(tmp_path / "rows.jsonl", tokenizer, out, "--pieces", "texts,images", "--processes", 1)
    done = program(ENCODE, *words)
    assert (done.status, done.lines) == (0, [f"{out}: 9 documents"])
    assert "rows.jsonl:4" in done.err
    found = list(Shards(out, order=InOrder()))
    assert [item.all_texts for item in found] == [(f"a {n}", "b") for n in range(0, 20, 2) if n != 6]
    assert all([isinstance(one, str) for one in item.pieces] == [True, False, False, True] for item in found)
    done = program(ENCODE, *words[:-3], "images", "--processes", 1)  # another column
    assert done.status == 2
