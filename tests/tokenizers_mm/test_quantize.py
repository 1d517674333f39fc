"""Finite scalar quantisation: vectors and codes are one to one."""

import itertools
import math

import pytest
import torch

from tokenizers_mm import FSQ, Quantizer

LEVELS = [(8, 8, 8), (8, 5, 5, 5), (7,), (2, 3), (2, 2, 2, 2)]


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_and_vectors_are_one_to_one(levels):
    fsq = FSQ(levels)
    codes = torch.arange(fsq.size)
    vectors = fsq.codes_to_vectors(codes)
    assert fsq.size == math.prod(levels)
    assert vectors.shape == (fsq.size, len(levels))
    assert len(set(map(tuple, vectors.tolist()))) == fsq.size
    assert torch.equal(fsq.vectors_to_codes(vectors), codes)


@pytest.mark.parametrize("levels", LEVELS)
def test_a_quantised_vector_is_its_own_quantisation(levels):
    fsq = FSQ(levels)
    vectors = fsq.codes_to_vectors(torch.arange(fsq.size))
    assert torch.equal(fsq.quantise(vectors), vectors)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_is_reachable_and_its_vector_is_what_codes_to_vectors_says(levels):
    fsq = FSQ(levels)
    line = torch.linspace(-6, 6, 401)[:, None]
    reached = [
        dict(zip(FSQ((count,))(line)[1].tolist(), line[:, 0].tolist(), strict=True)) for count in levels
    ]
    assert [len(values) for values in reached] == list(levels)
    z = torch.tensor(list(itertools.product(*[values.values() for values in reached])))
    vectors, codes = fsq(z)
    assert codes.dtype == torch.long
    assert sorted(codes.tolist()) == list(range(fsq.size))
    assert torch.equal(fsq.quantise(vectors), fsq.codes_to_vectors(codes))
    torch.testing.assert_close(vectors, fsq.codes_to_vectors(codes), rtol=0, atol=1e-6)


def test_the_first_digit_is_the_fastest():
    fsq = FSQ((4, 3, 2))
    digits = [(d0, d1, d2) for d2 in range(2) for d1 in range(3) for d0 in range(4)]
    expected = [[(d0 - 2) / 2, (d1 - 1) / 1, (d2 - 1) / 1] for d0, d1, d2 in digits]
    assert fsq.codes_to_vectors(torch.arange(24)).tolist() == expected


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_codes_rise_with_the_value_and_extremes_hold(count):
    fsq = FSQ((count,))
    codes = fsq(torch.linspace(-50, 50, 2001)[:, None])[1]
    assert codes[0] == 0
    assert codes[-1] == count - 1
    assert (codes.diff() >= 0).all()
    assert fsq(torch.zeros(1, 1))[0].item() == 0.0
    lowest, highest = (fsq.bound(torch.tensor([[-50.0], [50.0]])) * (count // 2)).flatten().tolist()
    assert lowest == pytest.approx(-(count // 2), abs=0.01)
    assert highest == pytest.approx(count - 1 - count // 2, abs=0.01)


def test_the_gradient_is_that_of_the_bound():
    fsq = FSQ((8, 5))
    z = torch.tensor([[0.3, -0.7], [1.1, 0.2]], requires_grad=True)
    fsq(z)[0].sum().backward()
    twin = z.detach().clone().requires_grad_()
    fsq.bound(twin).sum().backward()
    assert z.grad is not None
    assert twin.grad is not None
    assert (z.grad > 0).all()
    torch.testing.assert_close(z.grad, twin.grad)


def test_a_cast_to_bfloat16_moves_no_level():
    fsq = FSQ((8, 8, 8))
    z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * 2
    codes = fsq(z)[1]
    assert torch.equal(fsq.bfloat16()(z)[1], codes)
    assert torch.equal(fsq.codes_to_vectors(codes), FSQ((8, 8, 8)).codes_to_vectors(codes))


def test_it_is_a_quantizer():
    quantizer: Quantizer = FSQ((4, 4))
    assert (quantizer.size, quantizer.dim, quantizer.levels) == (16, 2, (4, 4))


def test_wrong_levels_and_shapes_are_refused():
    with pytest.raises(ValueError, match="at least 2 levels"):
        FSQ((8, 1))
    with pytest.raises(ValueError, match="at least 2 levels"):
        FSQ(())
    with pytest.raises(ValueError, match="3 channels"):
        FSQ((8, 8, 8))(torch.zeros(2, 4))
