"""N-gram laws are laws, say what a count by hand says, and know what they have read."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmdlm.ngrams import NGrams

TEXTS = [[0, 1, 2], [0, 1, 1], [2, 1], [0, 1, 2, 3], []]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_every_law_sums_to_one_and_is_the_one_that_texts_are_scored_by(order):
    grams = NGrams(TEXTS, order=order, size=6)
    for text in ([0, 1, 2, 3], [5, 5, 0], []):
        laws = [grams.law(text[:place]) for place in range(len(text) + 1)]
        assert all(law.sum() == pytest.approx(1.0) and law.min() > 0 for law in laws)
        said = [law[token] for law, token in zip(laws, [*text, grams.end], strict=True)]
        assert grams.nats(text) == pytest.approx(-np.log(said).sum())


def test_all_texts_of_up_to_a_length_have_a_probability_below_one_together():
    grams = NGrams([[0], [0, 1], [1, 1, 0]], order=3, size=2)
    texts = [[]]
    total = 0.0
    for _ in range(12):
        total += sum(math.exp(-grams.nats(text)) for text in texts)
        texts = [[*text, token] for text in texts for token in (0, 1)]
    assert 0.9 < total < 1.0


def test_a_unigram_and_a_bigram_by_hand():
    texts = [[0, 1], [0, 0], [2]]  # unigrams: 0 three times, the end three times, 1 and 2 once
    assert NGrams(texts, order=1, size=4).law([]) == pytest.approx(
        [(3 - 0.5 + 0.4) / 8, (1 - 0.5 + 0.4) / 8, (1 - 0.5 + 0.4) / 8, 0.4 / 8, (3 - 0.5 + 0.4) / 8]
    )  # no count is 2: a half is taken off each of four counts, so 4 * 0.5 / 5 = 0.4 go to each id
    # bigrams: begin 0 twice, begin 2, 0 1, 0 0, 0 end, 1 end, 2 end once: D = 6 / (6 + 2) = 0.75
    law = NGrams(texts, order=2, size=4).law([0])
    # behind: 0 has two kinds of neighbour before it, 1 and 2 one, the end three: D = 2 / (2 + 2) = 0.5
    below = (np.array([1.5, 0.5, 0.5, 0.0, 2.5]) + 4 * 0.5 / 5) / 7
    assert law == pytest.approx((np.array([0.25, 0.25, 0, 0, 0.25]) + 0.75 * 3 * below) / 3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_what_stands_between_is_scored_from_both_sides(order):
    grams = NGrams(TEXTS, order=order, size=6)
    for before, after in (([0], [2]), ([], [1, 2]), ([0, 1], []), ([], [])):
        whole = np.array([grams.nats([*before, token, *after]) for token in range(6)])
        found = grams.between(before, after)
        assert found - found[0] == pytest.approx(whole - whole[0])


def test_what_was_read_is_likelier_and_more_context_tells_more():
    rng = np.random.default_rng(0)
    texts = [[int(start), *((start + 7 * np.arange(1, 6)) % 40)] for start in rng.integers(40, size=300)]
    texts = [[int(token) for token in text] for text in texts]
    nats = [sum(map(NGrams(texts[:250], order=order, size=40).nats, texts[250:])) for order in (1, 2)]
    assert nats[1] < nats[0] / 3
    grams = NGrams(texts[:250], order=3, size=40)
    assert grams.nats(texts[0]) < grams.nats(texts[0][::-1]) - 5


@pytest.mark.parametrize(
    ("texts", "order", "size", "message"),
    [
        ([], 2, 4, "at least one sequence"),
        ([[4]], 2, 4, r"ids in 0 .. 3, got \[4\]"),
        ([[-1]], 2, 4, r"ids in 0 .. 3, got \[-1\]"),
        ([[0]], 0, 4, "order >= 1"),
    ],
)
def test_what_is_no_text_is_refused(texts, order, size, message):
    with pytest.raises(ValueError, match=message):
        NGrams(texts, order=order, size=size)
