"""Finite scalar quantisation: vectors and codes are one to one."""

import itertools
import math

import pytest
import torch

from tokenizers_mm import FSQ, Compact, Quantizer

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


def test_a_compact_quantiser_that_lists_everything_is_the_plain_one():
    fsq = FSQ((4, 3, 2))
    whole: Quantizer = Compact(fsq, (1, 2), (tuple(range(4)), tuple(range(6))))
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * 2
    assert (whole.size, whole.dim, whole.levels) == (24, 3, (4, 6))
    assert torch.equal(whole(z)[1], fsq(z)[1])
    torch.testing.assert_close(whole(z)[0], fsq(z)[0])
    assert torch.equal(whole.codes_to_vectors(torch.arange(24)), fsq.codes_to_vectors(torch.arange(24)))


def test_a_compact_quantiser_knows_what_was_seen_and_what_that_makes_together():
    fsq = FSQ((4, 3, 2))
    seen = torch.tensor([[1 + 4 * 2, 3 + 4 * 5], [1 + 4 * 2, 3 + 4 * 2]])  # numbers 1, 3 and 2, 5
    used = Compact.seen(fsq, (1, 2), seen)
    assert used == ((1, 3), (2, 5))
    small = Compact(fsq, (1, 2), used)
    every = small.codes_to_vectors(torch.arange(4))
    assert fsq.vectors_to_codes(every).tolist() == [9, 11, 21, 23]  # 21 = 1 + 4 * 5 was not seen as a whole
    z = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) * 2
    vectors, codes = small(z)
    torch.testing.assert_close(vectors, small.codes_to_vectors(codes))
    assert set(codes.tolist()) == set(range(4))
    first, rest = fsq(z)[0].split([1, 2], dim=-1)
    for part, ours, theirs in (
        (every[:2, :1], vectors[:, :1], first),
        (every[::2, 1:], vectors[:, 1:], rest),
    ):
        nearest = torch.cdist(theirs, part).amin(dim=1)
        torch.testing.assert_close((ours - theirs).norm(dim=1), nearest)


def test_of_numbers_equally_near_the_first_is_taken():
    fsq = FSQ((8, 8))  # 0 = (0, 0), 2 = (2, 0), 16 = (0, 2); (1, 0) is as far from 0 as from 2
    compact = Compact(fsq, (2,), ((0, 2, 16),))
    assert compact.get_buffer("place0")[[0, 1, 2, 8, 9]].tolist() == [0, 0, 1, 0, 0]


def test_gradients_pass_a_compact_quantiser_as_they_pass_the_plain_one():
    fsq, rng = FSQ((4, 3, 2)), torch.Generator().manual_seed(0)
    z = torch.randn(20, 3, generator=rng, requires_grad=True)
    twin = z.detach().clone().requires_grad_()
    Compact(fsq, (3,), ((0, 7, 23),))(z)[0].sum().backward()
    fsq(twin)[0].sum().backward()
    assert z.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(z.grad, twin.grad)


@pytest.mark.parametrize(
    ("groups", "used", "words"),
    [
        ((1, 1), ((0,), (0,)), "3 in all"),
        ((1, 2), ((0,),), "2 groups of channels want as many lists, got 1"),
        ((1, 2), ((0,), ()), r"group 1 wants some of 0\.\.5"),
        ((1, 2), ((1, 0), (0,)), "group 0 wants some of 0..3, ascending"),
        ((1, 2), ((0,), (6,)), r"got \[6\]"),
    ],
)
def test_lists_that_do_not_fit_are_named(groups, used, words):
    with pytest.raises(ValueError, match=words):
        Compact(FSQ((4, 3, 2)), groups, used)
