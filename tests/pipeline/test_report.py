"""The page needs nothing but itself, shows text as text, and its walks are pictures that can be opened."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import pytest
from PIL import Image, ImageSequence

from mmdlm.output import Moment
from mmdlm.report import Page, save_gif, sheet, stamp, walk

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
    # title, h1, h2, p, pre, figcaption, th, td
    assert read.words.count(NASTY) == 8
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
