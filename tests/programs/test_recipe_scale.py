"""The recipe for eight billion parameters, with a few thousand: shards, packing, sharded weights, a model."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mmdlm import Pipeline
from mmdlm.canvas import IMAGE, TEXT
from mmdlm.data import InOrder, Listed, Sample, ShardPlan, Shards, encode_shards
from mmdlm.model import Transformer
from mmdlm.pretrained import fingerprint
from tokenizers_mm import Autoencoder, AutoencoderConfig, BytePairTokenizer, Vocab

ROOT = Path(__file__).resolve().parents[2]
RUN = "train/run.py"
SMALL = ("dim=16", "depth=2", "heads=2", "hidden=16", "caption=16", "length=64", "documents=4")
SMALL += ("warmup=1", "log_every=1", "compiled=false", "precision=float32", "device=cpu", "progress=false")
SMALL += ("validate_every=2", "checkpoint_every=2")


SAID = [
    f"{size} {colour} {thing}"
    for size in ("a", "one")
    for colour in ("red", "blue", "dark green")
    for thing in ("cube", "ball", "very long cone", "bar", "ring")
]
MINE = AutoencoderConfig(channels=(8, 8), encoder_blocks=(0, 0), decoder_blocks=(0, 0), levels=(4, 4))
OTHER = replace(MINE, levels=(2, 8))


def encode_some(home: Path, folder: Path, numbers: range, tokenizer: str) -> None:
    """Shards of some of the pairs; a picture's codes are its own pixels."""
    pictures = np.random.default_rng(0).integers(0, 256, (len(SAID), 8, 8, 3), np.uint8)
    samples = [Sample(f"{n}.png", pictures[n], (SAID[n], SAID[n] + " again")) for n in numbers]
    source = Listed(samples.__getitem__, len(samples))
    plan = ShardPlan(num_codes=16, tokenizer=tokenizer, made_of={}, shard_size=8)
    assert encode_shards(
        source, folder, encode=lambda images: np.stack([x[:4, :4, 0] % 16 for x in images]), plan=plan
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Shards of 24 pairs and of 6 others, and the tokenizers that are to have made them."""
    folder = tmp_path_factory.mktemp("scale")
    BytePairTokenizer.train(SAID, size=280).save(folder / "text")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = Autoencoder(MINE)
    image.save_pretrained(folder / "image")
    encode_some(folder, folder / "codes", range(24), fingerprint(image))
    encode_some(folder, folder / "held", range(24, 30), fingerprint(image))
    return folder


def arguments(home: Path, out: Path, *more: str) -> list[str]:
    """Those of a small run, but for `more`."""
    given = (f"codes={home / 'codes'}", f"held_out={home / 'held'}", f"tokenizer={home / 'text'}")
    words = (*given, f"out={out}", *SMALL, *more)
    return ["eight_billion", *{word.partition("=")[0]: word for word in words}.values()]


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "transformer" / "metrics.jsonl").read_text().splitlines()]


def test_the_recipe_trains_validates_saves_and_leaves_a_model(program, tmp_path, home):
    out = tmp_path / "out"
    more = ("steps=4", "accumulate=2", "ema=0.9", "recompute=2", f"image_tokenizer={home / 'image'}")
    done = program(RUN, *arguments(home, out, *more))
    assert done.status == 0, done.err
    found = records(out)
    losses = [record["loss"] for record in found if "loss" in record]
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)
    bounds = [record["validation/image"] for record in found if "validation/image" in record]
    assert len(bounds) == 2
    assert bounds[0] == pytest.approx(math.log(16), rel=0.1)  # a new network: all codes alike
    assert len(list((out / "transformer" / "checkpoints").glob("step-*"))) == 2
    pipe = Pipeline.from_pretrained(out / "model")
    config = pipe.transformer.config
    assert (config.dim, config.depth, config.hidden_dim, config.rope_base) == (16, 2, 16, 500_000.0)
    assert (config.qk_norm, config.tied) == (False, False)
    assert config.image == (config.text[1] + 7, config.text[1] + 23)
    assert pipe.layout.caption == 16
    assert "on 24 pairs of 4 x 4 codes" in (out / "model" / "README.md").read_text()
    assert pipe.text_to_image("a red cube", steps=1, progress=False).images[0].size == (16, 16)


def recipe_file():
    """The recipe as a module."""
    path = ROOT / "train" / "recipes" / "eight_billion.py"
    spec = importlib.util.spec_from_file_location("recipe_eight_billion", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Other:
    """A text tokenizer that is not one of ours."""

    size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()


def first_run(home: Path, **options):
    """The run of a small recipe, on a CPU."""
    small = {"dim": 16, "depth": 1, "heads": 2, "hidden": 16, "caption": 16, "length": 128, "compiled": False}
    given = {"codes": home / "codes", "tokenizer": home / "text", "device": "cpu"}
    return next(recipe_file().recipe(**given, **small, **options))


def test_texts_have_their_own_room_and_some_the_whole_and_rows_are_packed(home):
    text, source = BytePairTokenizer.load(home / "text"), Shards(home / "codes", order=InOrder())
    vocab = Vocab.build(num_text=text.size, num_codes=16)
    end, batches = vocab.specials["end"], first_run(home, documents=24).batches
    rooms, ends = [], []
    for _ in range(20):
        packed = next(batches)
        assert packed.shape[1] in (64, 128)
        assert int(packed.segment.max()) >= 1
        images = packed.tokens[packed.modality == IMAGE] - vocab.image.start
        codes = torch.from_numpy(source.take(range(24))).long().flatten()
        assert torch.equal(images.sort().values, codes.sort().values)  # an epoch a batch
        for number in range(packed.shape[0]):
            for document in range(int(packed.segment[number].max()) + 1):
                mine = (packed.segment[number] == document) & (packed.modality[number] == TEXT)
                rooms.append(int((mine & (packed.span[number] >= 0)).sum()))
                ends.append(int((packed.tokens[number][mine] == end).sum()))
    own = {len(text.encode(said)) + 1 for pair in source for said in pair.texts}
    assert {*rooms} == {min(room, 16) for room in own} | {16}
    assert all(count == 1 or room == 16 for room, count in zip(rooms, ends, strict=True))
    assert 0.06 < sum(count > 1 for count in ends) / len(ends) < 0.14


def test_a_model_that_could_not_be_saved_is_not_trained(home, monkeypatch):
    assert first_run(home, image_tokenizer=home / "image").steps
    monkeypatch.setattr(BytePairTokenizer, "load", lambda folder: Other())
    with pytest.raises(ValueError, match=r"tokenizer=.*text: a whole model wants tokenizer\.json"):
        first_run(home, image_tokenizer=home / "image")
    assert first_run(home).steps  # the transformer alone is kept as checkpoints


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("precision=float7",), "precision=float7: wanted one of bfloat16, float32"),
        (("kernel=flash",), "kernel=flash: wanted one of default, sdpa, xformers"),
        (("caption=64",), "length=64: a pair takes up to 83 positions"),
        (("length=100",), "length=100: wanted a multiple of 64"),
        (("documents=0",), "documents=0: wanted at least 1"),
        (("held_out={other}",), "its codes are of another tokenizer or grid"),
        (("image_tokenizer={another}",), "are of another one"),
        (("codes={text}",), "index.json"),
        (("tokenizer={other}",), "transformers finds no tokenizer in"),
    ],
)
def test_what_does_not_fit_is_refused(program, tmp_path, home, words, message):
    Autoencoder(OTHER).save_pretrained(tmp_path / "another")
    encode_some(home, tmp_path / "other", range(4), "x")
    places = {"other": tmp_path / "other", "another": tmp_path / "another", "text": home / "text"}
    wrong = [word.format(**places) for word in words]
    done = program(RUN, *arguments(home, tmp_path / "out", *wrong))
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_processes_hold_half_of_the_weights_each_and_do_what_one_does(tmp_path, home, precision):
    """Also where each goes on with what the other has left."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def start(name: str, steps: int, command: list[str]) -> None:
        more = (f"steps={steps}", "decay=1", "accumulate=4", f"precision={precision}", "ema=0.9")
        more += (f"image_tokenizer={home / 'image'}",)
        done = subprocess.run(
            [*command, str(ROOT / RUN), *arguments(home, tmp_path / name, *more)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    for name, commands in (("two", (torchrun, [sys.executable])), ("one", ([sys.executable], torchrun))):
        for steps, command in zip((3, 5), commands, strict=True):
            start(name, steps, command)
    losses = [
        [
            (record["step"], key, value)
            for record in records(tmp_path / name)
            for key, value in record.items()
            if key.startswith(("loss", "validation", "flops"))
        ]
        for name in ("one", "two")
    ]
    assert {step for step, _, _ in losses[0]} == {1, 2, 3, 4, 5}
    bar = 1e-4 if precision == "float32" else 0.03
    for (*place, value), (*same, other) in zip(*losses, strict=True):
        assert place == same
        assert "flops" in place[1] or value == pytest.approx(other, rel=bar), place
    one, two = (Pipeline.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    if precision == "float32":
        for mine, theirs in zip(one.transformer.parameters(), two.transformer.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5)


def test_blocks_are_compiled_once_for_all_batches(program, tmp_path, home, monkeypatch):
    """Rows differ from batch to batch in number and length: a first compilation and a general one do."""
    counter = CompileCounterWithBackend("eager")
    compile_blocks = Transformer.compile_blocks
    monkeypatch.setattr(
        Transformer, "compile_blocks", lambda network: compile_blocks(network, backend=counter)
    )
    torch.compiler.reset()
    losses = []
    for out, compiled in ((tmp_path / "plain", "false"), (tmp_path / "compiled", "true")):
        more = ("steps=4", "accumulate=2", f"compiled={compiled}", "recompute=0", "held_out=none")
        done = program(RUN, *arguments(home, out, *more))
        assert done.status == 0, done.err
        losses.append([record["loss"] for record in records(out) if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert 1 <= counter.frame_count <= 4
