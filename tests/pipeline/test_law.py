"""Distances from the law of scenes: the known ones; intervals cover, and chance is what chance gives."""

from __future__ import annotations

import numpy as np
import pytest

from mmdlm import law
from mmdlm.data import Description, Look
from mmdlm.law import as_mixture, distances

ONE = (1.0, 0.0, 0.0, 0.0)
GROUNDS = ("white", "black", "grey", "brown")


def said(background: str, *looks: Look) -> Description:
    return Description(looks or (Look("small", "red", "cross"),), background)


@pytest.fixture
def fair(monkeypatch):
    """A law of four equally likely backgrounds, everything else fixed."""
    marginals = law._marginals([*map(said, GROUNDS)] * 5000)
    monkeypatch.setattr(law, "_law", lambda mixture: marginals)
    monkeypatch.setattr(law, "_RESAMPLES", 300)


def test_the_distance_is_half_the_sum_of_differences(fair):
    found = distances([said("white")] * 3 + [said("black")], ONE)
    assert found["background"].value == 0.5  # |3/4 - 1/4| + 0 + 1/4 + 1/4
    assert [found[name].value for name in ("count", "shape", "colour", "size", "relation")] == [0.0] * 5
    assert distances([None, *map(said, GROUNDS)], ONE)["background"].value == 0.2
    assert {d.value for d in distances([None], ONE).values()} == {1.0}


def test_every_object_counts(fair):
    two = said("white", Look("small", "red", "cross"), Look("large", "red", "star"))
    found = distances([two], ONE)
    assert (found["count"].value, found["size"].value, found["shape"].value) == (1.0, 0.5, 0.5)
    assert found["colour"].value == 0.0


def skewed(rng: np.random.Generator, num: int, skew: float) -> list[Description]:
    chances = np.array([0.25 + skew, 0.25 + skew / 2, 0.25 - skew / 2, 0.25 - skew])
    return [said(GROUNDS[int(i)]) for i in rng.choice(4, size=num, p=chances)]


def test_intervals_cover_the_distance_of_the_laws(fair):
    """In about 95 of 100 samples, although the distances of samples themselves are too large."""
    rng, covered, values = np.random.default_rng(5), 0, []
    for seed in range(120):
        found = distances(skewed(rng, 300, 0.08), ONE, seed=seed)["background"]
        low, high = found.interval
        covered += low <= 0.12 <= high
        values.append(found.value)
    assert np.mean(values) > 0.12
    assert 0.88 < covered / 120 <= 0.99


def test_chance_is_the_mean_distance_of_samples_of_the_law(fair):
    rng = np.random.default_rng(7)
    found = [distances(skewed(rng, 150, 0.0), ONE, seed=seed)["background"] for seed in range(60)]
    values, chances = [d.value for d in found], [d.chance for d in found]
    assert np.std(chances) < 0.003
    assert abs(np.mean(values) - np.mean(chances)) < 4 * np.std(values) / 60**0.5
    assert 0.9 <= np.mean([d.value <= d.chance_high for d in found]) < 1
    more = distances(skewed(rng, 600, 0.0), ONE)["background"]
    assert more.chance == pytest.approx(np.mean(chances) / 2, rel=0.15)


def test_the_law_is_that_of_captions_of_the_mixture(small_law):
    counts = law._law((2.0, 1.0, 1.0, 0.0))["count"]
    shares = {held: num / counts.total() for held, num in counts.items()}
    assert shares == pytest.approx({("1",): 0.5, ("2",): 0.25, ("3",): 0.25}, abs=0.05)


@pytest.mark.parametrize(
    "weights", [(1, 0, 0), (1, 2, 3, -1), (0, 0, 0, 0), ("x", 0, 0, 1), (float("inf"), 1, 1, 1)]
)
def test_a_mixture_is_four_weights(weights):
    assert as_mixture(["0.5", 0, 0, 1]) == (0.5, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError):
        as_mixture(weights)
