"""The page needs nothing but itself, shows text as text, and its walks are pictures that can be opened."""

from __future__ import annotations

import base64
import io
import math
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageSequence

from mmdlm.output import Moment
from mmdlm.report import Line, Page, plot, save_gif, sheet, stamp, walk

NASTY = "<script>alert('x')</script> & \"quoted\" <b>"


class Reader(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def images(self) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def moments(num: int = 4, *, texts: bool = True, images: bool = True) -> list[Moment]:
    return [
        Moment(
            step=step,
            steps=num - 1,
            levels={"text": 1 - step / (num - 1), "image": 1 - step / (num - 1)},
            texts=(f"a word at {step} " * 9,) if texts else (),
            images=(Image.new("RGB", (64, 64), (60 * step, 0, 0)),) if images else (),
        )
        for step in range(num)
    ]


def drawn(*lines: Line, **changes) -> str:
    lines = lines or (Line(NASTY, [(2, 0.2, 0.1, 0.35), (8, 0.5, 0.4, 0.6)]),)
    return plot(lines, **{"title": NASTY, "x_label": NASTY, "y_label": NASTY, **changes})


def numbers(element: ElementTree.Element) -> list[list[float]]:
    return [list(map(float, point.split(","))) for point in element.get("points", "").split()]


@pytest.fixture
def page(tmp_path):
    page = Page(NASTY)
    page.heading(NASTY)
    page.paragraph(NASTY)
    page.line(NASTY)
    page.figure(Image.new("RGB", (8, 8), "red"), NASTY, right=True)
    page.figure(Image.new("RGB", (8, 8), "blue"), "wrong", right=False)
    page.figure(Image.new("RGB", (8, 8)))
    page.table((NASTY, "b"), [("1", NASTY), ("2", "3")])
    path = tmp_path / "walk.gif"
    save_gif(walk(moments(), title="walk"), path)
    page.figure(path, "a walk")
    page.drawing(drawn())
    page.save(tmp_path / "index.html")
    return (tmp_path / "index.html").read_text("utf-8")


def test_a_page_needs_no_other_file(page):
    for tag, attributes in Reader(page).tags:
        assert tag not in ("link", "script", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert page.startswith("<!doctype html>")
    assert '<meta charset="utf-8">' in page


def test_text_is_shown_as_text(page):
    read = Reader(page)
    assert "<script" not in page
    assert "b" not in [tag for tag, _ in read.tags]
    # title, h1, h2, p, pre, figcaption, th, td; of the plot title, axes and name
    assert read.words.count(NASTY) == 8 + 4
    assert read.images()[0]["alt"] == NASTY


def test_the_pictures_of_a_page_are_inside_it(page):
    shown = []
    for attributes in Reader(page).images():
        kind, _, data = attributes["src"].partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert kind == f"data:image/{image.format.lower()}"
        shown.append((image.format, image.size))
    assert shown[:3] == [("PNG", (8, 8))] * 3
    assert shown[3][0] == "GIF"


def test_right_and_wrong_are_marked(page):
    marks = [attributes.get("class") for tag, attributes in Reader(page).tags if tag == "figcaption"]
    assert marks == ["right", "wrong", None]


def test_a_walk_has_a_frame_a_moment_and_its_animation_opens(tmp_path):
    frames = walk(moments(5), title="joint")
    assert len(frames) == 5
    assert len({frame.tobytes() for frame in frames}) == 5
    assert len({frame.size for frame in frames}) == 1
    save_gif(frames, tmp_path / "walk.gif", milliseconds=50)
    with Image.open(tmp_path / "walk.gif") as image:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
        assert image.info["loop"] == 0
        assert image.size == frames[0].size
    assert durations == [50, 50, 50, 50, 2500]


def test_a_walk_shows_what_was_given(tmp_path):
    given = Image.new("RGB", (64, 64), (10, 200, 30))
    (frame, *_) = walk(moments(2, images=False), title="caption", image=given)
    assert frame.getpixel((60, 80)) == (10, 200, 30)
    told, untold = (walk(moments(2, texts=False), title="draw", text=text)[0] for text in ("a circle", None))
    assert told.tobytes() != untold.tobytes()


def test_the_point_walks_from_the_upper_right_to_the_lower_left():
    first, *_, last = walk(moments(4), title="joint")
    start, middle, end = (394, 54), (325, 123), (258, 190)
    ink = [[sum(frame.getpixel(place)) < 600 for place in (start, middle, end)] for frame in (first, last)]
    assert ink == [[True, False, False], [True, True, True]]


def test_stamps_are_green_or_red_around_the_picture():
    picture = Image.new("RGB", (10, 12), (1, 2, 3))
    right, wrong = stamp(picture, True), stamp(picture, False)
    assert right.size == wrong.size == (28, 32)
    assert right.getpixel((14, 16)) == (1, 2, 3)
    red, green, _ = right.getpixel((0, 0))
    assert green > red
    red, green, _ = wrong.getpixel((0, 0))
    assert red > green


def test_a_sheet_holds_its_pictures_in_rows():
    pictures = [Image.new("RGB", (10, 10), (20 * number, 0, 0)) for number in range(5)]
    board = sheet(pictures, columns=3, gap=2)
    assert board.size == (3 * 12 + 2, 2 * 12 + 2)
    for number in range(5):
        assert board.getpixel((7 + 12 * (number % 3), 7 + 12 * (number // 3))) == (20 * number, 0, 0)
    assert board.getpixel((31, 20)) == (255, 255, 255)
    with pytest.raises(ValueError, match="at least one picture"):
        sheet([])


# plots


def test_a_plot_is_well_formed_and_says_all_its_words():
    root = ElementTree.fromstring(drawn(Line(NASTY, [(1, 0.5, 0.4, 0.6)]), Line("b", [(2, 0.2, 0.1, 0.3)])))
    assert root.tag == "svg"
    words = [element.text for element in root.iter("text")]
    assert words.count(NASTY) == 4  # title, both axes, one of the lines
    assert "b" in words
    assert {"1", "2"} <= set(words)
    assert root.get("aria-label") == NASTY


def test_ticks_that_are_asked_for_stand_within_the_points():
    line = Line(
        "a", [(1.9, 0.5, 0.4, 0.6), (3.99, 0.5, 0.4, 0.6), (4.0, 0.5, 0.4, 0.6), (9.3, 0.5, 0.4, 0.6)]
    )
    words = {text.text for text in ElementTree.fromstring(drawn(line, ticks=[1, 2, 4, 8, 16])).iter("text")}
    assert {"2", "4", "8"} <= words
    assert not {"1", "16", "1.9", "3.99", "9.3"} & words


def test_every_point_has_its_interval_at_the_right_height():
    points = [(2, 0.2, 0.1, 0.35), (4, 0.25, 0.2, 0.3), (8, 0.5, 0.4, 0.6)]
    root = ElementTree.fromstring(drawn(Line("a", points)))
    marks = {text.text: float(text.get("y", "")) - 4.5 for text in root.iter("text")}
    zero, height = marks["0 %"], (marks["0 %"] - marks["20 %"]) / 20
    bars = [numbers(one) for one in root.iter("polyline") if one.get("class") == "interval"]
    assert len(bars) == len(points)
    for (_, _, low, high), ((left, bottom), (right, top)) in zip(points, bars, strict=True):
        assert left == right
        assert (bottom, top) == pytest.approx(
            (zero - 100 * low * height, zero - 100 * high * height), abs=0.11
        )
    (line,) = [numbers(one) for one in root.iter("polyline") if len(numbers(one)) == 3]
    assert [y for _, y in line] == pytest.approx([zero - 100 * y * height for _, y, *_ in points], abs=0.11)
    told = [title.text for title in root.iter("title")]
    assert told[0] == "a at 2: 20.0 % [10.0, 35.0]"
    assert len(told) == 3


def test_the_scale_of_x_is_the_one_asked_for():
    line = Line("a", [(x, 0.5, 0.4, 0.6) for x in (2, 4, 16)])
    ticks = {}
    for name, scale in (("log", math.log2), ("plain", float)):
        root = ElementTree.fromstring(drawn(line, scale=scale))
        ticks[name] = {t.text: float(t.get("x", "")) for t in root.iter("text") if t.text in ("2", "4", "16")}
    for name, share in (("log", 1 / 3), ("plain", 1 / 7)):
        left, middle, right = (ticks[name][x] for x in ("2", "4", "16"))
        assert (middle - left) / (right - left) == pytest.approx(share, abs=0.002)


def test_lines_can_be_told_apart_without_colour():
    lines = [Line(f"line {n}", [(1, 0.5, 0.4, 0.6), (2, 0.5, 0.4, 0.6)], dashed=n % 2 == 1) for n in range(7)]
    root = ElementTree.fromstring(drawn(*lines))
    shapes, colours = ({path.get(name) for path in root.iter("path")} for name in ("d", "fill"))
    assert len(shapes) == len(colours) == 7
    assert sum(line.get("stroke-dasharray") is not None for line in root.iter("polyline")) == 3
    heights = sorted(float(t.get("y", "")) for t in root.iter("text") if (t.text or "").startswith("line "))
    assert min(b - a for a, b in pairwise(heights)) > 16  # names do not overlap


@pytest.mark.parametrize(("high", "top"), [(0.0, "1 %"), (0.034, "4 %"), (0.31, "40 %"), (1.0, "100 %")])
def test_the_axis_ends_above_the_highest_interval(high, top):
    root = ElementTree.fromstring(drawn(Line("a", [(1, 0.0, 0.0, high)])))
    marks = [t for t in root.iter("text") if (t.text or "").endswith(" %")]
    assert marks[-1].text == top
    assert 2 <= len(marks) <= 7


def test_a_plot_without_points_is_refused():
    for lines in ([], [Line("a", [(1, 0.5, 0.4, 0.6)]), Line("b", [])]):
        with pytest.raises(ValueError, match="a plot needs points"):
            plot(lines, title="", x_label="", y_label="")
