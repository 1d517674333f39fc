"""The law of draws over a codebook of 8,192 in 16 and 32 bits, alone and through the loop, by chi-square.

Two peers draw their noise in the precision of the logits: over a flat law of 8,192 codes in bfloat16, 87 % of
the draws land on the 512 lowest ids.
"""

from __future__ import annotations

import pytest
import torch
from oracles import p_value

from mmdlm.canvas import IMAGE, Canvas, Part, Rows
from mmdlm.sampling import Fixed, Guided, Random, Term, Unmask, Without, denoise
from mmdlm.sampling.draw import TOKEN, draw, uniform

CODES = 8192
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LOWEST = 1e-3  # a p-value below it refutes
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def flat() -> torch.Tensor:
    return torch.full((CODES,), 3.0)


def lopsided() -> torch.Tensor:
    """As a trained model's: a long tail in no order, and a few codes that hold most of the law."""
    rank = torch.randperm(CODES, generator=torch.Generator().manual_seed(0)) + 1
    return 20.0 - 0.9 * rank.double().log()


LAWS = {"flat": flat, "lopsided": lopsided}


def draws(logits: torch.Tensor, count: int) -> torch.Tensor:
    """(CODES,) long: how often each code comes in `count` draws from one row of logits."""
    zero = torch.tensor(0)
    u = uniform(zero, zero, zero, torch.arange(count), TOKEN)
    # a few at a time, in what the processor keeps at hand: four times as fast
    tokens = [draw(logits.expand(len(piece), -1), piece).tokens for piece in u.split(64)]
    return torch.bincount(torch.cat(tokens), minlength=CODES)


def check(counts: torch.Tensor, law: torch.Tensor) -> None:
    """Code by code, by neighbourhood and by place in it: no block of ids is favoured, none skipped."""
    assert p_value(counts, law) > LOWEST
    for shape in (
        lambda x: x.unflatten(0, (-1, 64)).sum(dim=1),
        lambda x: x.unflatten(0, (-1, 64)).sum(dim=0),
    ):
        assert p_value(shape(counts), shape(law)) > LOWEST


@every_dtype
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("flat", 42_000),  # 5 of each code
        ("lopsided", 30_000),
        *(pytest.param(name, 400_000, marks=pytest.mark.slow) for name in LAWS),
    ],
)
def test_draws_over_a_large_codebook_have_their_law(dtype: torch.dtype, name: str, count: int) -> None:
    logits = LAWS[name]().to(dtype)
    law = logits.double().softmax(dim=0)  # of the logits as they were rounded
    check(draws(logits, count), law)


def test_the_check_tells_rounded_noise_from_exact() -> None:
    """What peers do: exponential or Gumbel noise in bfloat16 has few values, and ties go to low ids."""
    u = torch.rand(1024, CODES, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    noise = -torch.log(-torch.log(u.clamp(min=1e-20)))
    counts = torch.bincount((flat().to(torch.bfloat16) + noise).argmax(dim=1), minlength=CODES)
    assert float(counts[:512].sum()) / 1024 > 0.5  # want 0.06
    ranges = counts.unflatten(0, (-1, 64)).sum(dim=1)
    assert p_value(ranges, torch.ones(128)) < 1e-9


class Codebook:
    """One law over all codes at every place of a picture, in some precision."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def begin(self, canvas: Canvas) -> Codebook:
        return self

    def __call__(self, canvas: Canvas, rows: Rows, *, reduce=None) -> list:
        part = Part(rows, slice(0, CODES), self.logits.expand(rows.index.shape[0], -1))
        return [part if reduce is None else reduce(part)]


@every_dtype
@pytest.mark.parametrize("guided", [False, True])
def test_pictures_have_the_law_of_their_logits(kit, dtype: torch.dtype, guided: bool) -> None:
    """Through the loop, all at once and a few at a step, and through guidance that changes nothing."""
    logits = lopsided().to(dtype)
    canvas = kit.holes(4, 224)
    canvas = canvas.replace(modality=torch.full_like(canvas.modality, IMAGE))
    model = Codebook(logits)
    if guided:
        model = Guided(model, [Term(Without(IMAGE), 1.5, IMAGE)], mask=CODES)
    counts = torch.zeros(CODES, dtype=torch.long)
    for policy, steps, seed in ((Unmask(Fixed(224), Random()), 1, 0), (Unmask(Fixed(32), Random()), 7, 1)):
        *_, state = denoise(model, canvas, policy=policy, steps=steps, seeds=seed, mask=CODES)
        counts += torch.bincount(state.canvas.tokens.flatten(), minlength=CODES)
    check(counts, logits.double().softmax(dim=0))
