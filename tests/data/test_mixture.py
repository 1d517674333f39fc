"""A mixture draws its sources by their weights, repeats each at its own pace, and resumes exactly."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from mmdlm.data.indexed import Endless, InOrder, Listed, Shuffled
from mmdlm.data.loader import Batches
from mmdlm.data.mixture import Mixture


def three(seed: int = 5) -> Mixture[tuple[str, int]]:
    sources = [
        Listed(lambda index: ("a", index), 5, order=Shuffled(1)),
        Listed(lambda index: ("b", index), 3, order=Shuffled(2)),
        Endless(lambda index: ("c", index)),
    ]
    return Mixture(sources, [3, 1.5, 0.5], seed=seed)


def test_items_come_in_proportion_to_the_weights():
    counts = np.zeros(3)
    follows = np.zeros((3, 3))
    for seed in range(20):
        choices = three(seed).choices(0, 5000)
        counts += np.bincount(choices, minlength=3)
        np.add.at(follows, (choices[::2], choices[1::2]), 1)
    law = np.array([0.6, 0.3, 0.1])
    assert ((counts - 1e5 * law) ** 2 / (1e5 * law)).sum() < 13.8  # 2 degrees of freedom, p = 0.001
    pairs = 5e4 * np.outer(law, law)
    assert ((follows - pairs) ** 2 / pairs).sum() < 26.1  # 8 degrees of freedom, p = 0.001


def test_choices_are_the_stated_integer_arithmetic():
    def mixed(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    key = mixed(mixed(5) ^ 0x3147)
    uniform = [(mixed((n + key) % 2**64) >> 11) / 2**53 for n in range(50)]
    assert three().choices(0, 50).tolist() == [(u >= 0.6) + (u >= 0.6 + 0.3) for u in uniform]
    assert three().choices(7, 9).tolist() == three().choices(0, 16)[7:].tolist()


def test_each_source_goes_epoch_after_epoch():
    items = list(islice(three(), 2000))
    a, b, c = ([number for name, number in items if name == wanted] for wanted in "abc")
    for numbers, size in ((a, 5), (b, 3)):
        for at in range(0, len(numbers) - size, size):
            assert sorted(numbers[at : at + size]) == list(range(size))
    assert c == list(range(len(c)))
    assert "".join(name for name, _ in items) == "".join("abc"[k] for k in three().choices(0, 2000))


@pytest.mark.parametrize("stop", range(40))
def test_a_mixture_resumes_exactly(stop):
    whole = list(islice(three(), 60))
    first = three()
    begun = list(islice(first, stop))
    second = three()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + list(islice(second, 60 - stop)) == whole
    # a loop that was only interrupted goes on as well
    assert begun + list(islice(first, 60 - stop)) == whole


def test_a_resume_across_the_ends_of_blocks_is_exact():
    whole = list(islice(three(), 2100))
    for stop in (1023, 1024, 1025, 2048):
        first = three()
        list(islice(first, stop))
        second = three()
        second.load_state_dict(first.state_dict())
        assert list(islice(second, 2100 - stop)) == whole[stop:]


@pytest.mark.parametrize("able", [True, False])
def test_what_is_skipped_is_what_would_have_come(able):
    class Plain:
        """A source that cannot skip."""

        def __init__(self):
            self.inner = Listed(lambda index: ("d", index), 4)

        def __iter__(self):
            return iter(self.inner)

        def state_dict(self):
            return self.inner.state_dict()

        def load_state_dict(self, state):
            self.inner.load_state_dict(state)

    def mixture():
        return three() if able else Mixture([Plain(), Listed(lambda index: ("b", index), 3)], [1, 2], seed=3)

    whole = list(islice(mixture(), 2100))
    for runs in ([(5, 3), (0, 1), (2, 0)] * 9, [(7, 1100), (30, 1)], [(1, 1023), (1, 3)]):
        skipping, at = mixture(), 0
        stream = iter(skipping)
        for taken, passed in runs:
            assert list(islice(stream, taken)) == whole[at : at + taken]
            skipping.skip(passed)
            at += taken + passed
        assert next(stream) == whole[at]
        before = mixture()
        before.skip(at)
        assert next(iter(before)) == whole[at]
        assert before.state_dict() == skipping.state_dict()
        skipping.load_state_dict(mixture().state_dict())  # what was under way is forgotten
        skipping.skip(at)
        assert next(iter(skipping)) == whole[at]


def test_batches_of_a_mixture_resume_exactly():
    def batches():
        return Batches(three(), 4, collate=lambda items, rng: tuple(items), prefetch=2)

    first, second = batches(), batches()
    whole = [next(first) for _ in range(12)]
    first.load_state_dict(second.state_dict())
    assert [next(first) for _ in range(5)] == whole[:5]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [next(second) for _ in range(7)] == whole[5:]
    first.close()
    second.close()


def test_what_is_no_mixture_is_refused():
    source = Listed(str, 2, order=InOrder())
    with pytest.raises(ValueError, match="at least one source"):
        Mixture([], [])
    for weights in ([1, 0], [1, -1], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ValueError, match="positive and finite"):
            Mixture([source, source], weights)
    with pytest.raises(ValueError, match="a weight for each of 2 sources, got 1"):
        Mixture([source, source], [1])
    state = Mixture([source], [1]).state_dict()
    with pytest.raises(ValueError, match="of 1 sources, this mixture has 2"):
        Mixture([source, source], [1, 1]).load_state_dict(state)


def test_a_source_that_gives_nothing_is_an_error_and_no_hang():
    class Nothing(Listed[str]):
        def __iter__(self):
            return iter(())

    mixture = Mixture([Listed(str, 2), Nothing(str, 2)], [1, 1])
    with pytest.raises(ValueError, match="source 1 of the mixture gave not one item"):
        list(islice(mixture, 100))
