"""A tiny run through the real trainer learns eight pairs and gives them back both ways, stopped or not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmdlm import Pipeline
from mmdlm.canvas import Canvas, Layout
from mmdlm.codec import Codec
from mmdlm.data import Batches, Listed, Shuffled
from mmdlm.diffusion import Absorbing, Edges, ExactCount, Masking, Mixture, Square
from mmdlm.pretrained import Settings
from mmdlm.sampling import Ancestral, Unmask
from mmdlm.training import AdamW, Ema, Run, Trainer, WarmupCosine
from tokenizers_mm import Vocab

SIDE, PATCH = 2, 4  # codes and pixels a side
WORDS = ("red", "green", "blue", "white", "left", "right", "above", "below")
COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1], [1, 1, -1]])
PAIRS = [
    ("red left", (0, 4, 0, 4)),
    ("red right", (4, 0, 4, 0)),
    ("green above", (1, 1, 4, 4)),
    ("green below", (4, 4, 1, 1)),
    ("blue left above", (2, 5, 4, 5)),
    ("blue right below", (5, 4, 5, 2)),
    ("white", (3, 3, 3, 3)),
    ("white left red right", (3, 0, 3, 0)),
]
STEPS = 300


class Words:
    """A text tokenizer whose tokens are words."""

    size = len(WORDS)

    def encode(self, text: str) -> list[int]:
        return [WORDS.index(word) for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(WORDS[i] for i in ids)


class Tiles:
    """An image tokenizer whose codes are the colours of flat tiles."""

    size, downsample, digits = len(COLOURS), PATCH, None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // PATCH, width // PATCH

    def encode(self, images: Tensor) -> Tensor:
        tiles = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).mean(dim=(4, 5))
        return (
            torch.cdist(tiles.permute(0, 2, 3, 1).flatten(1, 2), COLOURS).argmin(2).unflatten(1, (SIDE, -1))
        )

    def decode(self, codes: Tensor) -> Tensor:
        return COLOURS[codes].permute(0, 3, 1, 2).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


class Stop(Exception):
    """The machine went down."""


def untrained() -> Pipeline:
    words, tiles = Words(), Tiles()
    vocab = Vocab.build(num_text=words.size, num_codes=tiles.size)
    layout = Layout(vocab=vocab, grid=(SIDE, SIDE), caption=5, question=1, answer=1)
    surest = Settings(steps=4, policy=Unmask(temperature=0.0))
    settings = dict.fromkeys(("text_to_image", "caption", "inpaint"), surest)
    settings["joint"] = Settings(steps=30, policy=Ancestral())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pipeline.untrained(Codec(words, tiles, layout), dim=64, depth=1, settings=settings)


def train(pipe: Pipeline, folder: Path, *, steps: int = STEPS, stop: int | None = None) -> None:
    """The whole run, or what is left of it; at step `stop` a hook raises."""

    def collate(numbers: list[int], rng: np.random.Generator) -> Canvas:
        texts, codes = zip(*(PAIRS[number] for number in numbers), strict=True)
        ids = [pipe.text_tokenizer.encode(text) for text in texts]
        return pipe.layout.pairs(ids, torch.tensor(codes).unflatten(1, (SIDE, SIDE)))

    def hook(moment) -> None:
        if moment.step == stop:
            raise Stop

    laws = Mixture(((0.3, Square()), (0.7, Edges(text=0.5, image=0.5, hide=0.0))))
    run = Run(
        module=pipe.transformer,
        objective=Masking(Absorbing(pipe.layout.vocab.mask), laws, ExactCount()),
        batches=Batches(Listed(int, len(PAIRS), order=Shuffled()), 64, collate=collate),
        steps=steps,
        folder=folder,
        optimizer=AdamW(lr=6e-3, weight_decay=0.0),
        learning_rate=WarmupCosine(warmup=10, floor=0.05),
        ema=Ema(decay=0.9),
        hooks=((10, hook),),
        checkpoint_every=steps // 2 - 5,
        progress=False,
    )
    Trainer(run).fit()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipe = untrained()
    train(pipe, tmp_path_factory.mktemp("eight"))
    return pipe


def pictures(pipe: Pipeline) -> list[Image.Image]:
    codes = torch.tensor([codes for _, codes in PAIRS]).unflatten(1, (SIDE, SIDE))
    return list(pipe.decode_images(codes))


def test_texts_give_their_pictures(pipe):
    drawn = pipe.text_to_image([text for text, _ in PAIRS], progress=False).images
    assert pipe.encode_images(drawn).flatten(1).tolist() == [list(codes) for _, codes in PAIRS]


def test_pictures_give_their_texts(pipe):
    assert pipe.caption(pictures(pipe), progress=False).texts == tuple(text for text, _ in PAIRS)


def test_pairs_that_are_dreamt_are_those_that_were_learnt(pipe):
    dreamt = pipe.joint(num_samples=40, seed=1, progress=False)
    codes = pipe.encode_images(dreamt.images).flatten(1).tolist()
    found = [(text, tuple(code)) for text, code in zip(dreamt.texts, codes, strict=True)]
    assert sum(pair in PAIRS for pair in found) >= 14  # by chance: none
    assert len(set(found) & set(PAIRS)) >= 4


def test_a_hidden_tile_is_drawn_as_the_text_says(pipe):
    mask = Image.new("L", (SIDE * PATCH, SIDE * PATCH))
    mask.putpixel((1, 1), 255)
    drawn = pipe.inpaint(pictures(pipe), [mask] * 8, [text for text, _ in PAIRS], progress=False).images
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in pictures(pipe)]


def test_a_pair_that_was_learnt_is_likelier_than_one_that_was_not(pipe):
    texts = [text for text, _ in PAIRS]
    right = pipe.score(pictures(pipe), texts, draws=9, progress=False)
    wrong = pipe.score(pictures(pipe), texts[1:] + texts[:1], draws=9, progress=False)
    for name in ("joint", "text_given_image", "image_given_text", "pmi"):
        learnt, other = (np.array(getattr(score, name)) for score in (right, wrong))
        assert (learnt - other).mean() > 3.0, name  # nats
    assert np.mean(right.text) == pytest.approx(math.log(1 / 8), abs=1.0)


def test_a_run_that_broke_off_ends_with_the_same_weights(tmp_path):
    whole, broken, resumed = untrained(), untrained(), untrained()
    train(whole, tmp_path / "whole", steps=40)
    with pytest.raises(Stop):
        train(broken, tmp_path / "broken", steps=40, stop=20)
    train(resumed, tmp_path / "broken", steps=40)
    assert untrained().fingerprint != whole.fingerprint == resumed.fingerprint
    weights = resumed.transformer.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.transformer.state_dict().items())
