"""Tests of differences are the textbook's; sentences say what came out, whichever way; pages show it all."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from xml.etree import ElementTree

import pytest

from mmdlm.evaluate import Rate
from mmdlm.figures import Comparison, compare, fisher, joint_sentences, show_curves, show_joint
from mmdlm.report import Page
from mmdlm.sweep import ORDERS, OWN, POLICIES, Curves, Measurement, Paper

AT_ONCE, TEXT_FIRST, IMAGE_FIRST, PARALLEL = ORDERS
LINES = (OWN, *POLICIES)
POWER = "With 200 samples each, a difference of less than about 14 points may go unseen."
LAW = {"count": 0.04, "background": 0.56, "relation": 0.1}
LAWFUL = "In the share of lawful captions no difference can be told."


def pairs(line: str, forwards: int, right: int, *, total: int = 200) -> Measurement:
    return measured(
        "joint", "joint", line, forwards, right, total=total, lawful=total - 10, distinct=total // 2, law=LAW
    )


def measured(
    figure: str, task: str, line: str, x: float, right: int, *, total: int = 200, **more
) -> Measurement:
    settings = {"steps": 16, "guidance": 0.0, "policy": "Unmask()"}
    return Measurement(
        figure=figure, task=task, line=line, x=x, **settings, right=right, total=total,
        forwards=int(total * x), seconds=1.0, **more,
    )  # fmt: skip


def compared(*rights: tuple[int, ...]) -> list[Measurement]:
    """(forwards, right at once, text first, image first, from a quarter on if given) of 200."""
    return [
        pairs(line, forwards, right)
        for forwards, *each in rights
        for line, right in zip(ORDERS[: len(each)], each, strict=True)
    ]


@pytest.fixture
def page_of(tmp_path):
    """The text of a page that was filled by a function, and the drawings on it."""

    def fill(show) -> tuple[str, list[ElementTree.Element]]:
        page = Page("page")
        show(page)
        page.save(tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text("utf-8")
        return text, [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]

    return fill


# tests of differences


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (Rate(3, 4), Rate(1, 4), 34 / 70),  # Fisher's lady, who tastes whether milk came first
        (Rate(8, 10), Rate(1, 6), 0.034965),  # the example of scipy.stats.fisher_exact
        (Rate(1, 10), Rate(11, 14), 0.00275946),  # Wikipedia's article on the test
        (Rate(0, 5), Rate(0, 9), 1.0),
        (Rate(7, 7), Rate(0, 7), 2 / 3432),
        (Rate(0, 0), Rate(3, 5), 1.0),
    ],
)
def test_fishers_test_is_the_textbooks(first, second, p):
    assert fisher(first, second) == pytest.approx(p, rel=1e-4)
    assert fisher(second, first) == pytest.approx(p, rel=1e-4)


def test_fishers_test_is_seldom_wrong_where_there_is_no_difference():
    """At equal true rates at most 5 % of tables are called different: all tables, by enumeration."""
    from math import comb

    n, share = 12, 0.4
    chance = [comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    wrong = sum(
        chance[a] * chance[b]
        for a in range(n + 1)
        for b in range(n + 1)
        if fisher(Rate(a, n), Rate(b, n)) < 0.05
    )
    assert 0.001 < wrong <= 0.05


def test_many_comparisons_are_corrected_together():
    rates = {
        1: (Rate(60, 100), Rate(40, 100)),
        2: (Rate(70, 100), Rate(40, 100)),
        3: (Rate(50, 100), Rate(49, 100)),
    }
    raw = {key: fisher(*pair) for key, pair in rates.items()}
    found = {key: comparison.p for key, comparison in compare(rates).items()}
    assert found == {1: pytest.approx(2 * raw[1]), 2: pytest.approx(3 * raw[2]), 3: pytest.approx(raw[3])}
    assert list(found) == [1, 2, 3]
    alone = compare({1: rates[1]})[1]
    assert alone.p == raw[1]
    equal = compare({n: (Rate(55, 100), Rate(44, 100)) for n in range(3)})  # p never falls along the order
    assert len({comparison.p for comparison in equal.values()}) == 1


def test_the_sign_of_a_comparison_is_told_only_where_it_can_be():
    low, high = Rate(1, 10), Rate(9, 10)
    assert [Comparison(high, low, 0.01).sign, Comparison(low, high, 0.01).sign] == [1, -1]
    assert [Comparison(high, low, 0.05).sign, Comparison(low, high, 0.3).sign] == [0, 0]


# sentences


def test_no_difference_is_said_to_be_none():
    assert joint_sentences(compared((8, 80, 85, 78), (32, 100, 90, 104))) == [
        "At equal forwards no difference can be told between both at once and one after the other in how "
        "often caption and picture agree.",
        POWER,
        LAWFUL,
    ]


def test_better_everywhere_is_said():
    assert joint_sentences(compared((8, 160, 80, 90), (32, 170, 100, 90))) == [
        "Both at once against text first: caption and picture agree more often at 8 and 32 forwards.",
        "Both at once against image first: caption and picture agree more often at 8 and 32 forwards.",
        LAWFUL,
    ]


def test_worse_everywhere_is_said():
    assert joint_sentences(compared((16, 60, 120, 130))) == [
        "Both at once against text first: caption and picture agree less often at 16 forwards.",
        "Both at once against image first: caption and picture agree less often at 16 forwards.",
        LAWFUL,
    ]


def test_a_mixture_is_said_point_by_point():
    told = joint_sentences(
        compared((8, 150, 80, 150), (16, 150, 80, 150), (32, 60, 120, 62), (64, 100, 101, 95))
    )
    assert told == [
        "Both at once against text first: caption and picture agree more often at 8 and 16 forwards, "
        "but less often at 32 forwards; at 64 forwards no difference can be told.",
        "Both at once against image first: caption and picture agree neither more nor less often, "
        "as far as can be told, at 8, 16, 32 and 64 forwards.",
        POWER,
        LAWFUL,
    ]


def test_a_difference_in_lawful_captions_is_said_too():
    same = compared((8, 100, 100, 100))
    broken = [replace(found, lawful=20) if found.line == TEXT_FIRST else found for found in same]
    lead, power, *lawful = joint_sentences(broken)
    assert lead.startswith("At equal forwards no difference can be told")
    assert power == POWER
    assert lawful == [
        "Both at once against text first: captions are lawful more often at 8 forwards.",
        "Both at once against image first: captions are lawful neither more nor less often, as far as can be "
        "told, at 8 forwards.",
    ]


def test_orders_that_are_not_all_there_are_compared_where_they_are():
    assert joint_sentences([pairs(AT_ONCE, 8, 100)]) == ["Not all orders have been measured yet."]
    told = joint_sentences([pairs(AT_ONCE, 8, 150), pairs(TEXT_FIRST, 8, 50), pairs(TEXT_FIRST, 16, 90)])
    assert told[0] == "Both at once against text first: caption and picture agree more often at 8 forwards."


def test_sentences_do_not_depend_on_the_order_of_the_file():
    measurements = compared((8, 150, 80, 150), (32, 60, 120, 62))
    assert joint_sentences(measurements[::-1]) == joint_sentences(measurements)


# pages


def test_pairs_are_shown_with_intervals_tests_and_forwards(page_of):
    found = compared((8, 150, 80, 150, 9), (32, 60, 120, 62, 8))
    text, drawings = page_of(lambda page: show_joint(page, found))
    assert len(drawings) == 2
    for drawing in drawings:
        bars = [one for one in drawing.iter("polyline") if one.get("class") == "interval"]
        assert len(bars) == 4 * 2
        assert set(ORDERS) <= {words.text for words in drawing.iter("text")}
    assert "Both at once against text first: caption and picture agree more often at 8 forwards, but" in text
    low, high = Rate(150, 200).interval
    assert f"<td>75.0 [{100 * low:.1f}, {100 * high:.1f}]</td>" in text
    assert text.count("<td>100</td>") == 8  # distinct captions
    assert text.count("<td>background 0.56</td>") == 8
    assert "<td>&lt; 0.0001</td>" in text
    assert text.count("<tr>") == 1 + 8


def steps(task: str, right) -> list[Measurement]:
    return [measured("steps", task, line, x, right(line, x)) for line in LINES for x in (2, 16, 64)]


def test_every_figure_stands_on_the_page_with_its_table(page_of):
    found = [
        *steps("text_to_image", lambda line, x: 20 + x),
        *steps("caption", lambda line, x: 100 + x),
        *(
            measured("guidance", "text_to_image", "own", w, right)
            for w, right in ((0.0, 60), (1.0, 120), (3.0, 66))
        ),
        *compared((8, 100, 100, 100)),
    ]
    curves = Curves(model="0123abcd", paper=Paper(), measurements=tuple(found))
    text, drawings = page_of(lambda page: show_curves(page, curves))
    assert len(drawings) == 2 + 2 + 1 + 2
    assert text.count("<table>") == 4
    assert "0123abcd" in text
    assert "200 held-out scenes (one, two, three, groups) of seed 0" in text
    for line in POLICIES:
        assert text.count(f"<td>{line}</td>") == 2  # a row for each task
        assert sum(line in {words.text for words in one.iter("text")} for one in drawings) >= 2
    guided = "Against no guidance, pictures are exactly right more often at scale 1; at scale 3 no difference"
    assert guided in text


def test_points_lie_where_forwards_were_spent_in_ascending_order(page_of):
    found = [
        replace(measured("steps", "caption", OWN, x, 50), forwards=int(200 * spent))
        for x, spent in ((8, 9.5), (16, 9.25), (32, 22), (64, 22))
    ]
    curves = Curves(model="m", paper=Paper(), measurements=tuple(found))
    _, drawings = page_of(lambda page: show_curves(page, curves))
    told = [title.text or "" for title in drawings[0].iter("title")]
    at = [re.search(r" at ([\d.]+): ", word) for word in told]
    assert [each and each[1] for each in at] == ["9.25", "9.5", "22", "22"]


def test_what_was_not_measured_is_not_shown(page_of):
    curves = Curves(model="m", paper=Paper(), measurements=tuple(steps("caption", lambda line, x: 50)))
    text, drawings = page_of(lambda page: show_curves(page, curves))
    assert len(drawings) == 2
    assert "Captions of pictures" in text
    assert "Pictures from prompts" not in text
    assert "guidance" not in text


def test_the_default_is_the_cheapest_that_cannot_be_told_from_the_best(page_of):
    best, cheap = escape(LINES[0]), LINES[1]

    def right(line: str, x: float) -> int:
        return {(LINES[0], 64): 150, (cheap, 16): 141}.get((line, x), 60)

    curves = Curves(model="m", paper=Paper(), measurements=tuple(steps("caption", right)))
    text, _ = page_of(lambda page: show_curves(page, curves))
    assert f"Best of {3 * len(LINES)} points: {best} with 64 forwards a sample, 75.0 [" in text
    assert f"cannot be told from it (Fisher&#x27;s exact test, 5 %): {cheap} with 16, 70.5 [" in text
    alone = Curves(model="m", paper=Paper(), measurements=curves.measurements[:3])
    text, _ = page_of(lambda page: show_curves(page, alone))
    assert "With fewer forwards every policy is told from it" in text
    assert "forwards that it took" not in text
    early = [replace(found, forwards=found.forwards // 4) for found in curves.measurements[:3]]
    text, _ = page_of(
        lambda page: show_curves(page, Curves(model="m", paper=Paper(), measurements=tuple(early)))
    )
    assert f"{best} with 16 forwards a sample, 75.0 [" in text
    assert "<td>- forwards that it took</td><td>0.5</td><td>4.0</td><td>16.0</td>" in text
    least = Curves(model="m", paper=Paper(), measurements=curves.measurements[:1])
    text, _ = page_of(lambda page: show_curves(page, least))
    assert "(the best of many is flattered by chance).</p>" in text
