"""Curves on a page: plots, tables, and sentences that say what came out, whichever way. Samples nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmdlm.evaluate import Rate
from mmdlm.report import Line, Page, plot
from mmdlm.sweep import HALTON, ORDERS, OWN, POLICIES, Curves, Measurement

__all__ = ["Comparison", "compare", "fisher", "joint_sentences", "show_curves", "show_joint"]

_LEVEL = 0.05  # a difference is told below this p
_TITLES = {"text_to_image": "Pictures from prompts", "caption": "Captions of pictures"}
# Two panels for legibility; the first line is in both, and what the others are seen against.
_PANELS = {
    "surest first": (OWN, *(name for name in POLICIES if name.startswith("surest"))),
    "other orders": (OWN, *(name for name in POLICIES if not name.startswith("surest")), HALTON),
}


@dataclass(frozen=True)
class Comparison:
    """Two rates, and how surprising their difference were if there were none."""

    first: Rate
    second: Rate
    p: float  # two-sided, corrected for the other comparisons made with it

    @property
    def sign(self) -> int:
        """1 where the first is right more often, -1 where less often, 0 where that cannot be told."""
        if self.p >= _LEVEL:
            return 0
        return 1 if self.first.share > self.second.share else -1


def fisher(first: Rate, second: Rate) -> float:
    """Fisher's exact test of equal rates, two-sided: the chance of a table as improbable as this, or more."""
    right = first.right + second.right
    least, most = max(0, right - second.total), min(right, first.total)
    ways = {k: math.comb(first.total, k) * math.comb(second.total, right - k) for k in range(least, most + 1)}
    return sum(way for way in ways.values() if way <= ways[first.right]) / sum(ways.values())


def compare(pairs: Mapping[float, tuple[Rate, Rate]]) -> dict[float, Comparison]:
    """Each pair tested, the p-values corrected together (Holm, Scand. J. Statist. 6, 1979)."""
    chances = {key: fisher(*rates) for key, rates in pairs.items()}
    corrected, largest = {}, 0.0
    for place, key in enumerate(sorted(chances, key=chances.__getitem__)):
        largest = max(largest, min(1.0, chances[key] * (len(chances) - place)))
        corrected[key] = largest
    return {key: Comparison(*rates, corrected[key]) for key, rates in pairs.items()}


def joint_sentences(measurements: Sequence[Measurement]) -> list[str]:
    """What the comparison of both at once with each order came to, in plain words."""
    agreeing, lawful = (_comparisons(measurements, rate) for rate in (_right, _lawful))
    if not agreeing:
        return ["Not all orders have been measured yet."]
    every = [comparison for comparisons in agreeing.values() for comparison in comparisons.values()]
    if any(comparison.sign for comparison in every):
        sentences = _against(agreeing, "caption and picture agree")
    else:
        sentences = [
            "At equal forwards no difference can be told between both at once and one after the other in how "
            "often caption and picture agree."
        ]
    if any(comparison.sign for comparisons in lawful.values() for comparison in comparisons.values()):
        return [*sentences, *_power(every), *_against(lawful, "captions are lawful")]
    return [*sentences, *_power(every), "In the share of lawful captions no difference can be told."]


def show_curves(page: Page, curves: Curves) -> None:
    """All figures that were measured, with a table under each."""
    paper = curves.paper
    page.paragraph(
        f"Model {curves.model}; {paper.num} held-out scenes ({', '.join(paper.kinds)}) of seed {paper.seed}, "
        "the same for every point, judged by a reader that recovers the exact scene from pixels. Bars and "
        "brackets are Wilson's 95 % intervals."
    )
    for task in _TITLES:
        if curves.of("steps", task):
            _show_steps(page, task, curves.of("steps", task))
    if curves.of("guidance", "text_to_image"):
        _show_guidance(page, curves.of("guidance", "text_to_image"))
    if curves.of("joint", "joint"):
        show_joint(page, curves.of("joint", "joint"))


def show_joint(page: Page, measurements: Sequence[Measurement]) -> None:
    """Pairs at equal forwards: both at once, or one after the other."""
    page.heading("Together, or one after the other? Equal numbers of forwards")
    page.paragraph(" ".join(joint_sentences(measurements)))
    shares = (("caption and picture agree", "agree exactly", _right), ("lawful captions", "lawful", _lawful))
    for title, label, rate in shares:
        lines = _lines(measurements, ORDERS, rate)
        page.drawing(_plot(lines, f"Pairs from nothing: {title}", "forwards a pair", label))
    told, rows = {rate: _comparisons(measurements, rate) for *_, rate in shares}, []
    for found in sorted(measurements, key=lambda found: (found.x, ORDERS.index(found.line))):
        cells = []
        for rate, comparisons in told.items():
            comparison = comparisons.get(found.line, {}).get(found.x)
            cells += [_percent(rate(found)), "" if comparison is None else _chance(comparison.p)]
        rows.append((f"{found.spent:g}", found.line, *cells, f"{found.distinct}", _farthest(found)))
    head = (
        "forwards",
        "order",
        "agree, %",
        "p against at once",
        "lawful, %",
        "p against at once",
        "distinct",
        "farthest from the law",
    )
    page.table(head, rows)
    page.paragraph(
        "The model's own policy for pairs, with a linear schedule, without threshold and guidance, on three "
        "walks. One after the other, each modality gets half of the forwards, but not more than it has "
        "places; every forward fills one place at least, so that with many forwards the shorter span is full "
        "early. Lawful: the grammar can read the caption. Distinct: different captions. Farthest from the "
        "law: of what captions tell (count, shape, colour, size, relation, background) that whose total "
        "variation from the law of training is largest. p: Fisher's exact test, two-sided, corrected for all "
        "comparisons of its column (Holm)."
    )


def _show_steps(page: Page, task: str, measurements: Sequence[Measurement]) -> None:
    page.heading(f"{_TITLES[task]}: exactness against forwards")
    page.paragraph(_choice(measurements))
    for name, lines in _PANELS.items():
        drawn = _lines(measurements, lines, _right, _spent)
        if drawn:
            page.drawing(_plot(drawn, f"{_TITLES[task]}: {name}", "forwards a sample", "exactly right"))
    steps = sorted({found.x for found in measurements})
    rows = []
    for line in dict.fromkeys(found.line for found in measurements):
        found = {one.x: one for one in _sorted(measurements, line)}
        rows.append((line, *(_percent(found[x].rate) if x in found else "" for x in steps)))
        if any(round(one.spent, 1) < one.x for one in found.values()):
            spent = (f"{found[x].spent:.1f}" if x in found else "" for x in steps)
            rows.append(("- forwards that it took", *spent))
    page.table(("exactly right, %, by steps", *(f"{x:g}" for x in steps)), rows)


def _show_guidance(page: Page, measurements: Sequence[Measurement]) -> None:
    page.heading("Pictures from prompts: exactness against guidance")
    found = sorted(measurements, key=lambda found: found.x)
    rates = {one.x: one.rate for one in found}
    told = compare({x: (rate, rates[0.0]) for x, rate in rates.items() if x}) if 0.0 in rates else {}
    if told:
        subject = "Against no guidance, pictures are exactly right"
        page.paragraph(" ".join([_tell(subject, told, "scale {}"), *_power(list(told.values()))]))
    page.paragraph(f"At {found[0].steps} steps of the model's own policy, {found[0].policy}.")
    lines = _lines(found, (found[0].line,), _right)
    title = "Pictures from prompts: guidance"
    page.drawing(plot(lines, title=title, x_label="guidance scale", y_label="exactly right"))
    rows = []
    for one in found:
        p = _chance(told[one.x].p) if one.x in told else ""
        rows.append((f"{one.x:g}", _percent(one.rate), p, f"{one.spent:.3g}"))
    page.table(("scale", "exactly right, %", "p against scale 0 (Fisher, Holm)", "forwards a picture"), rows)


def _choice(measurements: Sequence[Measurement]) -> str:
    """The best point, and the cheapest one that cannot be told from it."""
    best = max(measurements, key=lambda found: (found.rate.share, -found.spent))
    equal = [found for found in measurements if fisher(found.rate, best.rate) >= _LEVEL]
    cheap = min(equal, key=lambda found: (found.spent, -found.rate.share))
    said = (
        f"Best of {len(measurements)} points: {best.line} with {best.spent:.3g} forwards a sample, "
        f"{_percent(best.rate)} % (the best of many is flattered by chance)."
    )
    if best.spent == min(found.spent for found in measurements):
        return said
    if cheap.spent == best.spent:
        return f"{said} With fewer forwards every policy is told from it (Fisher's exact test, 5 %)."
    return (
        f"{said} The fewest forwards that cannot be told from it (Fisher's exact test, 5 %): {cheap.line} "
        f"with {cheap.spent:.3g}, {_percent(cheap.rate)} %."
    )


def _comparisons(
    measurements: Sequence[Measurement], rate: Callable[[Measurement], Rate]
) -> dict[str, dict[float, Comparison]]:
    """Both at once against each other order, by order and forwards, where both were measured."""
    rates = {(found.line, found.x): rate(found) for found in measurements}
    totals = sorted(x for line, x in rates if line == ORDERS[0])
    keys = [(line, x) for line in ORDERS[1:] for x in totals if (line, x) in rates]
    corrected = compare({number: (rates[ORDERS[0], key[1]], rates[key]) for number, key in enumerate(keys)})
    told: dict[str, dict[float, Comparison]] = {}
    for number, (line, x) in enumerate(keys):
        told.setdefault(line, {})[x] = corrected[number]
    return told


def _against(told: Mapping[str, Mapping[float, Comparison]], what: str) -> list[str]:
    return [
        _tell(f"Both at once against {rival}: {what}", each, "{} forwards") for rival, each in told.items()
    ]


def _tell(subject: str, comparisons: Mapping[float, Comparison], place: str) -> str:
    """One sentence for every mixture of more often, less often, and cannot be told."""
    at = {
        sign: "at " + place.format(_listed([x for x, one in comparisons.items() if one.sign == sign]))
        for sign in {one.sign for one in comparisons.values()}
    }
    clauses = [f"{how} often {at[sign]}" for sign, how in ((1, "more"), (-1, "less")) if sign in at]
    if not clauses:
        return f"{subject} neither more nor less often, as far as can be told, {at[0]}."
    rest = f"; {at[0]} no difference can be told" if 0 in at else ""
    return f"{subject} {', but '.join(clauses)}{rest}."


def _power(comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence on how large a difference would have been seen; none where every difference was told."""
    unclear = [comparison for comparison in comparisons if not comparison.sign]
    if not unclear:
        return []
    num = min(min(one.first.total, one.second.total) for one in unclear)
    # what is seen 8 times of 10 at rates near 1/2, the worst case: 1.96 + 0.84 standard errors
    points = 100 * min(1.0, (1.96 + 0.84) * math.sqrt(0.5 / num))
    return [f"With {num} samples each, a difference of less than about {points:.0f} points may go unseen."]


def _listed(values: Sequence[float]) -> str:
    words = [f"{value:g}" for value in values]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _lines(
    measurements: Sequence[Measurement],
    names: Sequence[str],
    rate: Callable[[Measurement], Rate],
    by: Callable[[Measurement], float] | None = None,
) -> list[Line]:
    """The named lines that have points, at x or `by` another number; cosine schedules are dashed."""
    lines = []
    for name in names:
        found = [(one.x if by is None else by(one), rate(one)) for one in _sorted(measurements, name)]
        points = sorted((x, one.share, *one.interval) for x, one in found)
        lines += [Line(name, points, dashed="cosine" in name)] if points else []
    return lines


def _right(found: Measurement) -> Rate:
    return found.rate


def _spent(found: Measurement) -> float:
    return found.spent


def _lawful(found: Measurement) -> Rate:
    return found.lawful_rate


def _farthest(found: Measurement) -> str:
    """The marginal that is off the most, and by how much."""
    if not found.law:
        return ""
    value, name = max((value, name) for name, value in found.law.items())
    return f"{name} {value:.2f}"


def _plot(lines: Sequence[Line], title: str, x_label: str, y_label: str) -> str:
    ticks = [2.0**power for power in range(11)]
    return plot(lines, title=title, x_label=x_label, y_label=y_label, scale=math.log2, ticks=ticks)


def _sorted(measurements: Sequence[Measurement], line: str) -> list[Measurement]:
    return sorted((found for found in measurements if found.line == line), key=lambda found: found.x)


def _chance(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def _percent(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
