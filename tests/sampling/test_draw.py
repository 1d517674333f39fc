"""Uniforms are uniform and independent; categorical draws follow their law in every precision."""

from __future__ import annotations

import pytest
import torch

from mmdlm.sampling.draw import CHOICE, ORDER, REVEAL, TOKEN, draw, gumbel, uniform

ZERO = torch.tensor(0)


def stream(count: int, *, seed: int = 0, sample: int = 0, step: int = 0, kind: int = TOKEN, first: int = 0):
    seeds, samples, steps = (torch.tensor(value) for value in (seed, sample, step))
    return uniform(seeds, samples, steps, torch.arange(first, first + count), kind)


def test_uniforms_are_uniform(kit) -> None:
    u = stream(200_000)
    assert u.dtype == torch.float64
    assert ((u > 0) & (u < 1)).all()
    assert kit.chi_square(torch.bincount((u * 256).long(), minlength=256), torch.ones(256)) < 1
    low_bits = (u * 2**40) % 256  # the lower bits are as good as the upper ones
    assert kit.chi_square(torch.bincount(low_bits.long(), minlength=256), torch.ones(256)) < 1


@pytest.mark.parametrize("counter", ["position", "step", "sample", "seed"])
def test_each_counter_alone_gives_uniforms(kit, counter: str) -> None:
    counters = dict.fromkeys(("seed", "sample", "step", "position"), ZERO)
    counters[counter] = torch.arange(-50_000, 50_000)
    u = uniform(*counters.values(), REVEAL)
    assert kit.chi_square(torch.bincount((u * 64).long(), minlength=64), torch.ones(64)) < 1


@pytest.mark.parametrize(
    "other",
    [
        {"kind": CHOICE},
        {"kind": REVEAL},
        {"kind": ORDER},
        {"step": 1},
        {"sample": 1},
        {"seed": 1},
        {"seed": -1},
        {"first": 1},
    ],
)
def test_streams_are_independent(kit, other: dict) -> None:
    first, second = stream(100_000), stream(100_000, **other)
    cells = (first * 16).long() * 16 + (second * 16).long()
    assert kit.chi_square(torch.bincount(cells, minlength=256), torch.ones(256)) < 1
    assert not torch.equal(first, second)


def test_a_seed_is_not_a_shift_of_another_seed() -> None:
    """(seed + 1, sample) and (seed, sample + 1) are different streams."""
    assert not torch.isclose(stream(64, seed=1), stream(64, sample=1)).any()
    assert not torch.isclose(stream(64, sample=1), stream(64, step=1)).any()


def test_gumbel_noise_has_its_mean() -> None:
    assert abs(gumbel(stream(100_000)).mean() - 0.57722) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_draws_follow_a_flat_law_over_many_ids(kit, dtype: torch.dtype) -> None:
    logits = torch.zeros(4096, 2048, dtype=dtype)
    tokens = draw(logits, stream(4096)).tokens
    assert kit.chi_square(torch.bincount(tokens // 64, minlength=32), torch.ones(32)) < 1
    assert kit.chi_square(torch.bincount(tokens % 64, minlength=64), torch.ones(64)) < 1  # none is skipped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_draws_follow_a_peaked_law(kit, dtype: torch.dtype, temperature: float) -> None:
    logits = torch.tensor([9.0, 8.0, 3.0, -torch.inf, 7.0, 4.0, 4.0, 9.0]).to(dtype)
    law = (logits.double() / temperature).softmax(0)
    drawn = draw(logits.expand(20_000, -1), stream(20_000), temperature=temperature)
    assert kit.chi_square(torch.bincount(drawn.tokens, minlength=8), law) < 1
    exact = logits.double().log_softmax(0)
    torch.testing.assert_close(drawn.logp.double(), exact[drawn.tokens], rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.peak.double(), exact.max().expand(20_000), rtol=0, atol=1e-5)
    assert drawn.logp.dtype == torch.float32


def test_temperature_zero_is_the_first_of_the_best() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]])
    assert draw(logits, stream(2), temperature=0.0).tokens.tolist() == [1, 0]
    assert draw(logits, stream(2), temperature=torch.tensor([0.0, 0.0])).tokens.tolist() == [1, 0]


def test_tiny_temperatures_do_not_overflow() -> None:
    logits = torch.tensor([[100.0, 99.0, -torch.inf]])
    assert draw(logits, torch.tensor([0.999]), temperature=1e-6).tokens.tolist() == [0]


def test_top_k_keeps_k_ids_and_top_p_the_smallest_set(kit) -> None:
    law = torch.tensor([0.1, 0.4, 0.1, 0.3, 0.1])
    logits = law.log().expand(50_000, -1)
    u = stream(50_000)

    def counts(**cut):
        return torch.bincount(draw(logits, u, **cut).tokens, minlength=5)

    assert (
        kit.chi_square(counts(top_k=3), torch.tensor([0.1, 0.4, 0, 0.3, 0])) < 1
    )  # the first of the three equals
    assert kit.chi_square(counts(top_p=0.5), torch.tensor([0, 0.4, 0, 0.3, 0])) < 1
    assert kit.chi_square(counts(top_p=0.75), torch.tensor([0.1, 0.4, 0, 0.3, 0])) < 1
    assert kit.chi_square(counts(top_k=2, top_p=0.99), torch.tensor([0, 0.4, 0, 0.3, 0])) < 1
    assert torch.equal(counts(top_k=1), counts(temperature=0.0))
    assert torch.equal(counts(top_k=9, top_p=1.0), counts())


def test_settings_by_row_are_those_of_the_row() -> None:
    logits = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    u = stream(64)
    odd = torch.arange(64) % 2 == 1
    mixed = draw(
        logits,
        u,
        temperature=torch.where(odd, 0.7, 0.0),
        top_k=torch.where(odd, 3, 1 << 62),
        top_p=torch.where(odd, 0.8, 1.0),
    )
    cut = draw(logits, u, temperature=0.7, top_k=3, top_p=0.8)
    assert torch.equal(mixed.tokens, torch.where(odd, cut.tokens, logits.argmax(1)))


def test_an_impossible_id_is_never_drawn_at_either_end() -> None:
    edges = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    for size in (3, 7, 1000):
        logits = torch.zeros(4, size)
        logits[:, 0] = logits[:, -1] = -torch.inf
        tokens = draw(logits, edges).tokens
        assert ((tokens > 0) & (tokens < size - 1)).all()


def test_nothing_asked_is_nothing_drawn() -> None:
    assert draw(torch.zeros(0, 5), stream(0)).tokens.shape == (0,)


def test_pieces_are_drawn_like_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    temperature = torch.linspace(0, 2, 50)
    whole = draw(logits, stream(50), temperature=temperature, top_k=4)
    monkeypatch.setattr("mmdlm.sampling.draw._CHUNK", 60)
    assert torch.equal(whole.tokens, draw(logits, stream(50), temperature=temperature, top_k=4).tokens)
