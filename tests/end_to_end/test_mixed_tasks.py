"""One model of three sources: pairs, texts and documents, packed; it learns them and fills what is open."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas, Gap, Layout, Packed, Passage, pack
from mmdlm.codec import Codec
from mmdlm.data import Batches, Encoded, InOrder, Listed, Mixture, OnlineEncoded, Sample, Shuffled
from mmdlm.diffusion import Absorbing, Edges, Masking, Square
from mmdlm.diffusion import Mixture as Laws
from mmdlm.diffusion.loss import weighted_sums
from mmdlm.model import Predictor, Transformer, TransformerConfig
from mmdlm.rows import Collator
from mmdlm.sampling import Even, Unmask, sample
from tokenizers_mm import Vocab

WORDS = ("red", "green", "blue")
LENGTH = 96
STEPS = 150


class Words:
    """A text tokenizer whose tokens are words."""

    size = len(WORDS)

    def encode(self, text: str) -> list[int]:
        return [WORDS.index(word) for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(WORDS[number] for number in ids)


class Flat:
    """An image tokenizer of pictures of one colour, 2 x 2 codes each: 2 * colour above, one more below."""

    size, downsample, digits = 6, 2, None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 2, width // 2

    def encode(self, images: Tensor) -> Tensor:
        colour = (images[:, 0, 0, 0] + 1).round().long()[:, None, None]
        return 2 * colour + torch.tensor([[0, 0], [1, 1]])

    def decode(self, codes: Tensor) -> Tensor:
        pixels = (codes // 2 - 1.0).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return pixels[:, None].expand(-1, 3, -1, -1)


VOCAB = Vocab.build(num_text=Words.size, num_codes=Flat.size)
LAYOUT = Layout(vocab=VOCAB, grid=(2, 2), caption=2, question=1, answer=1)
CODEC = Codec(Words(), Flat(), LAYOUT)
COLLATE = Collator(CODEC)


def picture(colour: int) -> np.ndarray:
    return np.full((4, 4, 3), round(colour * 127.5), np.uint8)


def codes(colour: int) -> np.ndarray:
    return np.array([[2 * colour] * 2, [2 * colour + 1] * 2], np.int32)


def encode(images: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([codes(round(float(image.mean()) / 127.5)) for image in images])


def pair(number: int) -> Encoded:
    return Encoded(f"pair {number}", codes(number % 3), (WORDS[number % 3],))


def words(number: int) -> Sample:
    """The colours that follow one another, from this one on."""
    return Sample(f"text {number}", None, (" ".join(WORDS[(number + k) % 3] for k in range(3)),))


def document(number: int) -> Sample:
    """A colour, its picture, another one, its picture; every fourth lacks the first word."""
    first, second = number % 3, number // 3 % 3
    pieces = (WORDS[first], picture(first), WORDS[second], picture(second))
    return Sample(f"document {number}", pieces=pieces if number % 4 else pieces[1:])


def tasks(seed: int = 0) -> Mixture:
    """One pair to two texts and three documents, whose pictures are encoded on the way."""
    documents = OnlineEncoded(
        Listed(document, 36, order=InOrder()), encode, batch_size=8, order=Shuffled(seed)
    )
    sources = [Listed(pair, 3, order=Shuffled(seed)), Listed(words, 3, order=Shuffled(seed)), documents]
    return Mixture(sources, [1, 2, 3], seed=seed)


def network(dtype: torch.dtype = torch.float32) -> Predictor:
    config = TransformerConfig(
        vocab_size=VOCAB.size,
        text=(VOCAB.text.start, VOCAB.text.stop),
        image=(VOCAB.image.start, VOCAB.image.stop),
        mask=VOCAB.mask,
        dim=64,
        depth=2,
        num_heads=2,
        grid=(2, 2),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Predictor(Transformer(config)).to(dtype)


def losses(module: Predictor, clean: Canvas, holes: Canvas) -> Tensor:
    """(2,) sums of text and image at the holes; `level` holds the weight of each position."""
    assert holes.level is not None
    weights = holes.level[..., None].to(module.network.norm.weight.dtype)
    sums = weighted_sums(module, holes, clean.tokens, where=holes.masked, weights=weights)
    return torch.stack([sums["text"].sum(), sums["image"].sum()])


@cache
def trained() -> tuple[Predictor, list[dict[str, float]]]:
    """The model after all steps, and the loss of each modality at each step."""
    module, rng = network(), torch.Generator().manual_seed(0)
    laws = Laws(((0.3, Square()), (0.7, Edges(text=0.5, image=0.5, hide=0.0))))
    objective = Masking(Absorbing(VOCAB.mask), laws)
    batches = Batches(tasks(), 24, collate=Packed(COLLATE, LENGTH))
    optimizer, history = torch.optim.AdamW(module.parameters(), lr=5e-3), []
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
    for _ in range(STEPS):
        loss = objective(module, next(batches), rng).per_token()
        optimizer.zero_grad()
        (loss["text"] + loss["image"]).backward()
        optimizer.step()
        decay.step()
        history.append({name: float(value.detach()) for name, value in loss.items()})
    return module.eval(), history


def test_the_loss_of_both_modalities_falls():
    _, history = trained()
    for name in ("text", "image"):
        first, last = (np.mean([one[name] for one in some]) for some in (history[:10], history[-20:]))
        assert last < 0.4 * first, f"{name}: {first} to {last}"


@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"]
)
def test_packed_tasks_cost_what_padded_ones_do(dtype: torch.dtype, bar: float):
    items = next(Batches(tasks(), 30, collate=lambda some, rng: some))
    assert len({item.name.split()[0] for item in items}) == 3
    padded = COLLATE(items, np.random.default_rng(0))
    rng = torch.Generator().manual_seed(1)
    padded = padded.replace(level=torch.rand(padded.shape, generator=rng) + 0.5)
    holes = padded.hide(padded.fillable & (torch.rand(padded.shape, generator=rng) < 0.6), VOCAB.mask)
    module = network(dtype)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=rng).to(dtype))
    found = []
    for arrange in (lambda canvas: canvas, lambda canvas: pack([canvas], LENGTH)):
        module.zero_grad()
        sums = losses(module, arrange(padded), arrange(holes))
        sums.sum().backward()
        gradient = torch.cat(
            [weight.grad.flatten() for weight in module.parameters() if weight.grad is not None]
        )
        found.append((sums.detach(), gradient))
    (one, ours), (other, theirs) = found
    assert bool((one > 0).all())
    assert bool(((one - other).abs() <= bar * one).all())
    assert float((ours - theirs).norm()) <= bar * float(ours.norm())


def test_a_mixture_of_tasks_resumes_exactly():
    def batches() -> Batches:
        return Batches(tasks(3), 10, collate=Packed(Collator(CODEC, tail=2), LENGTH), seed=1)

    whole = batches()
    expected = [next(whole) for _ in range(8)]
    for stop in (1, 4, 7):
        begun, resumed = batches(), batches()
        for _ in range(stop):
            next(begun)
        resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
        for batch in expected[stop:]:
            found = next(resumed)
            for name, value in vars(batch).items():
                assert value is None or torch.equal(value, getattr(found, name)), name


def filled(*documents: Sequence[str | np.ndarray | Gap]) -> tuple[Canvas, Canvas]:
    """Documents before and after the loop, which changes nothing that is given."""
    before = COLLATE.completing(documents)
    policy = Unmask(Even(), temperature=0.0)
    after = sample(trained()[0], before, policy=policy, steps=4, seeds=0, mask=VOCAB.mask).canvas
    assert not after.masked.any()
    assert torch.equal(after.tokens[~before.masked], before.tokens[~before.masked])
    inside = before.masked & (before.modality == IMAGE)
    assert bool(
        ((after.tokens[inside] >= VOCAB.image.start) & (after.tokens[inside] < VOCAB.image.stop)).all()
    )
    inside = before.masked & (before.modality == TEXT)
    assert bool((after.tokens[inside] < VOCAB.text.stop).all())
    return before, after


PAIRS = [(a, b) for a in range(3) for b in range(3)]


def test_a_picture_in_the_middle_of_a_document_is_drawn():
    _, after = filled(*[(WORDS[a], Gap(), WORDS[b], picture(b)) for a, b in PAIRS])
    frame = LAYOUT.document_frame([Passage([0]), Gap(), Passage([0]), Gap()])
    drawn, given = (LAYOUT.read_codes(frame, after, span).numpy() for span in (1, 3))
    assert sum(bool((drawn[n] == codes(a)).all()) for n, (a, _) in enumerate(PAIRS)) >= 7
    assert (given == np.stack([codes(b) for _, b in PAIRS])).all()


def test_a_text_after_a_picture_is_written():
    asked = [(WORDS[a], codes(a), Gap(2), codes(b)) for a, b in PAIRS]
    _, after = filled(*asked)
    frame = LAYOUT.document_frame([Passage([0]), Gap(), Gap(2), Gap()])
    texts = LAYOUT.read_texts(frame, after, 2)
    assert sum(ids == [b] for ids, (_, b) in zip(texts, PAIRS, strict=True)) >= 7
    # documents of other lengths beside it change nothing
    alone = filled(asked[6])[1]
    assert torch.equal(alone.tokens[0], after.tokens[6])
    beside = filled((Gap(), "red", picture(0)), asked[6], (Gap(4),))[1]
    assert torch.equal(beside.tokens[1, : alone.shape[1]], alone.tokens[0])


def test_a_text_alone_is_written_as_the_texts_are():
    _, after = filled((Gap(4),))
    (ids,) = LAYOUT.read_texts(LAYOUT.document_frame([Gap(4)]), after, 0)
    assert len(ids) == 3
    assert all((second - first) % 3 == 1 for first, second in pairwise(ids))
