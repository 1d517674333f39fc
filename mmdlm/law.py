"""How far what captions say is from the law of `Scenes`, marginal by marginal. Knows no pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Any

import numpy as np

from mmdlm.data import Description, Scenes, read_caption

__all__ = ["Distance", "Mixture", "as_mixture", "distances"]

Mixture = tuple[float, float, float, float]  # weights of one, two and three objects and of groups
_LAW_SCENES = 20_000  # captions of the generator that stand for its law
_RESAMPLES = 1000  # of the bootstrap and of the law


@dataclass(frozen=True)
class Distance:
    """The total variation between a sample and a law, and what to hold it against.

    A sample is never quite like the law it is drawn from: `chance` is the mean distance of as many captions
    of the law itself, and one in twenty such samples is farther than `chance_high`. `interval` is the basic
    bootstrap's 95 % interval (captions resampled) of the distance of the two laws: it reflects the resamples'
    distances at the sample's own, which takes the part of chance out of them, so it may lie below `value`. It
    covers a distance well above `chance` in about 95 % of cases, one below it in 65 to 90 %.
    """

    value: float
    interval: tuple[float, float]
    chance: float
    chance_high: float


def as_mixture(weights: Iterable[Any]) -> Mixture:
    """Four weights >= 0 of the kinds of scene. Raises ValueError for anything else."""
    numbers = tuple(map(float, weights))
    if len(numbers) != 4 or not all(map(isfinite, numbers)) or min(numbers) < 0 or sum(numbers) <= 0:
        raise ValueError(f"wanted four weights >= 0, not all 0 (one, two, three, groups), got {numbers}")
    one, two, three, groups = numbers
    return one, two, three, groups


def distances(said: Sequence[Description | None], mixture: Mixture, *, seed: int = 0) -> dict[str, Distance]:
    """Total variation of each marginal of what is said from what captions of the training split say.

    `mixture` weighs the kinds of scene. None, for a caption that does not parse, is a value of its own.
    Resamples are drawn from `seed`.
    """
    rng, sample, law = np.random.default_rng(seed), _marginals(said), _law(mixture)
    return {name: _distance(sample[name], law[name], rng) for name in _FEATURES}


# What a description holds, each as a list of values: the marginals of the law.
_FEATURES: dict[str, Callable[[Description], list[Any]]] = {
    "count": lambda said: [len(said.looks)],
    "shape": lambda said: [look.shape for look in said.looks],
    "colour": lambda said: [look.colour for look in said.looks],
    "size": lambda said: [look.size for look in said.looks],
    "relation": lambda said: [relation.direction for relation in said.relations] or ["none"],
    "background": lambda said: [said.background],
}
_Marginal = Counter[tuple[str, ...]]  # how many captions hold these values, sorted


def _marginals(said: Sequence[Description | None]) -> dict[str, _Marginal]:
    return {
        name: Counter(
            ("unreadable",) if one is None else tuple(sorted(map(str, feature(one)))) for one in said
        )
        for name, feature in _FEATURES.items()
    }


@cache
def _law(mixture: Mixture) -> dict[str, _Marginal]:
    source = Scenes(mixture=mixture)
    return _marginals(
        [read_caption(source.caption(source.scene(index), index)) for index in range(_LAW_SCENES)]
    )


def _distance(sample: _Marginal, law: _Marginal, rng: np.random.Generator) -> Distance:
    values = sorted({value for held in (*sample, *law) for value in held})

    def counted(marginal: _Marginal, times: np.ndarray) -> np.ndarray:
        """How often each value occurs, (..., values); what captions hold occurs `times`, (..., holdings)."""
        return times @ np.array([[held.count(value) for value in values] for held in marginal])

    def drawn(marginal: _Marginal, num: int) -> np.ndarray:
        """Counts of resamples of `num` captions: (resamples, values)."""
        chances = np.array(list(marginal.values())) / marginal.total()
        return counted(marginal, rng.multinomial(num, chances, size=_RESAMPLES))

    found, expected = (counted(each, np.array(list(each.values()))) for each in (sample, law))
    value, num = float(_variation(found, expected)), sample.total()
    again = _variation(drawn(sample, num), expected)
    ends = [2 * value - float(np.quantile(again, at)) for at in (0.975, 0.025)]
    fair = _variation(drawn(law, num), drawn(law, law.total()))  # the law too is known from a sample
    interval = round(max(ends[0], 0.0), 4), round(min(ends[1], 1.0), 4)
    chance, high = round(float(fair.mean()), 4), round(float(np.quantile(fair, 0.95)), 4)
    return Distance(round(value, 4), interval, chance, high)


def _variation(counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Half the sum of |p - q|, of counts (..., V) that are normalised."""
    p, q = (law / law.sum(axis=-1, keepdims=True) for law in (counts, expected))
    return 0.5 * np.abs(p - q).sum(axis=-1)
