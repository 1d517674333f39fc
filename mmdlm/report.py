"""Pictures for people: stamped sheets, walks through noise, line plots, one HTML page. Knows no model."""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmdlm.output import Moment

__all__ = ["Line", "Page", "plot", "save_gif", "sheet", "stamp", "walk"]

INK, PALE, RIGHT, WRONG = (30, 30, 40), (205, 205, 212), (20, 140, 60), (200, 40, 40)
_SCALE = 3  # pixels of a walk for one of the model
_FONT = 13
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
body{color:#1e1e28}
h1{font-size:1.7rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
img{image-rendering:pixelated;max-width:100%}figure{display:inline-block;margin:.4rem;vertical-align:top}
figcaption{font-size:.8rem;max-width:15rem}.right{color:#148c3c}.wrong{color:#c82828}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left}
code,pre{background:#f4f4f6;padding:.1rem .3rem}
.wide{overflow-x:auto;font-variant-numeric:tabular-nums}.wide td,.wide th{white-space:nowrap;font-size:.8rem;
padding:.2rem .5rem}
svg{display:block;width:100%;max-width:880px;height:auto;margin:.8rem 0}"""


def stamp(image: Image.Image, right: bool, *, scale: int = 2) -> Image.Image:
    """The picture enlarged, in a frame that is green for right and red for wrong."""
    large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    framed = Image.new("RGB", (large.width + 8, large.height + 8), RIGHT if right else WRONG)
    framed.paste(large, (4, 4))
    return framed


def sheet(images: Sequence[Image.Image], *, columns: int = 8, gap: int = 2) -> Image.Image:
    """Pictures of one size in rows on white. Raises ValueError for none."""
    if not images:
        raise ValueError("a sheet needs at least one picture")
    width, height = images[0].width + gap, images[0].height + gap
    rows = -(-len(images) // columns)
    board = Image.new("RGB", (min(columns, len(images)) * width + gap, rows * height + gap), "white")
    for place, image in enumerate(images):
        board.paste(image, (place % columns * width + gap, place // columns * height + gap))
    return board


def walk(
    moments: Sequence[Moment], *, title: str, image: Image.Image | None = None, text: str | None = None
) -> list[Image.Image]:
    """Frames of one generation: picture, text, and the way through the noise levels (text right, image up).

    `image` or `text` is what was given, for the modality that the generation does not make.
    """
    trail: list[tuple[float, float]] = []
    frames = []
    for moment in moments:
        trail.append((moment.levels["text"], moment.levels["image"]))
        picture = moment.images[0] if moment.images else image
        words = moment.texts[0] if moment.texts else text
        frames.append(_frame(title, f"step {moment.step} of {moment.steps}", picture, words or "", trail))
    return frames


def save_gif(frames: Sequence[Image.Image], path: Path | str, *, milliseconds: int = 180) -> None:
    """An endless animation that rests on its last frame."""
    durations = [milliseconds] * (len(frames) - 1) + [2500]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


class Page:
    """An HTML page that grows section by section and needs no other file. Text is escaped."""

    def __init__(self, title: str) -> None:
        self._title = html.escape(title)
        self._body = [f"<h1>{self._title}</h1>"]

    def heading(self, text: str) -> None:
        self._body.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self._body.append(f"<p>{html.escape(text)}</p>")

    def line(self, text: str) -> None:
        """Text as a program prints it."""
        self._body.append(f"<pre>{html.escape(text)}</pre>")

    def figure(self, picture: Image.Image | Path, caption: str = "", *, right: bool | None = None) -> None:
        """A picture, or an image file as it is; `right` marks the caption."""
        if isinstance(picture, Path):
            kind, data = picture.suffix.lstrip("."), picture.read_bytes()
        else:
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            kind, data = "png", buffer.getvalue()
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        mark = "" if right is None else f' class="{"right" if right else "wrong"}"'
        words = f"<figcaption{mark}>{html.escape(caption)}</figcaption>" if caption else ""
        self._body.append(f'<figure><img src="{source}" alt="{html.escape(caption)}">{words}</figure>')

    def drawing(self, svg: str) -> None:
        """An SVG element as it is, such as `plot` makes."""
        self._body.append(svg)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        self._body.append(f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>')

    def save(self, path: Path) -> None:
        head = f'<meta charset="utf-8"><title>{self._title}</title><style>{_STYLE}</style>'
        path.write_text(
            f"<!doctype html><html><head>{head}</head><body>{''.join(self._body)}</body></html>\n", "utf-8"
        )


@dataclass(frozen=True)
class Line:
    """One line of a plot: points (x, share, low, high), the shares in [0, 1], and how it is stroked."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    dashed: bool = False


def plot(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    scale: Callable[[float], float] = float,
    ticks: Sequence[float] | None = None,
) -> str:
    """An SVG element of shares in per cent against x, each point with its interval, each line with its name.

    The x axis is `scale` (say math.log2) of the values, ticked at those `ticks` that lie within them, or
    where points are. Lines differ in colour, in marker and by the name at their end; a point tells its
    numbers to the mouse. Raises ValueError for no points.
    """
    values = sorted({x for line in lines for x, *_ in line.points})
    if not values or not all(line.points for line in lines):
        raise ValueError(f"a plot needs points in each of its lines, got {len(lines)} lines")
    step, top = _ticks(max(high for line in lines for *_, high in line.points))
    start, span = scale(values[0]), scale(values[-1]) - scale(values[0])

    def across(x: float) -> float:
        return _LEFT + _WIDE * (0.04 + 0.92 * ((scale(x) - start) / span if span else 0.5))

    def up(share: float) -> float:
        return _TOP + _HIGH * (1.0 - 100.0 * share / top)

    middle = (_LEFT + _WIDE / 2, _TOP + _HIGH / 2)
    parts = [_words(_LEFT, 22, title, 'font-size="16" font-weight="600"')]
    for percent in range(0, top + 1, step):
        parts.append(_stroke([(_LEFT, up(percent / 100)), (_LEFT + _WIDE, up(percent / 100))], _GRID))
        parts.append(_words(_LEFT - 8, up(percent / 100) + 4.5, f"{percent} %", 'text-anchor="end"'))
    for x in values if ticks is None else [tick for tick in ticks if values[0] <= tick <= values[-1]]:
        parts.append(_stroke([(across(x), _TOP + _HIGH), (across(x), _TOP + _HIGH + 5)], _AXIS))
        parts.append(_words(across(x), _TOP + _HIGH + 21, f"{x:g}", 'text-anchor="middle"'))
    parts.append(_stroke([(_LEFT, _TOP + _HIGH), (_LEFT + _WIDE, _TOP + _HIGH)], _AXIS))
    parts.append(_words(middle[0], _TOP + _HIGH + 44, x_label, 'text-anchor="middle"'))
    turned = f'text-anchor="middle" transform="rotate(-90 16 {middle[1]:.1f})"'
    parts.append(_words(16, middle[1], y_label, turned))
    labels = _apart([up(line.points[-1][1]) for line in lines])
    for number, line in enumerate(lines):
        aside = _ASIDE * (number - (len(lines) - 1) / 2)
        places = [(across(x) + aside, up(y), up(low), up(high)) for x, y, low, high in line.points]
        parts += _line(line, number, places)
        end = across(line.points[-1][0]) + aside + 8, up(line.points[-1][1])
        colour, name = _COLOURS[number % len(_COLOURS)], _LEFT + _WIDE + 14
        parts.append(_stroke([end, (name - 4, labels[number])], colour, 'stroke-opacity="0.45"'))
        parts.append(_marker(name + 5, labels[number], number))
        parts.append(_words(name + 16, labels[number] + 4.5, line.name))
    box = f'viewBox="0 0 {_LEFT + _WIDE + _NAMES} {_TOP + _HIGH + 58}" font-size="13.5" fill="{_INK}"'
    font = "font-family=\"system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif\""
    return f'<svg role="img" aria-label="{html.escape(title)}" {box} {font}>{"".join(parts)}</svg>'


_LEFT, _TOP, _WIDE, _HIGH, _NAMES = 70, 44, 590, 300, 220  # of a plot: margins, the field, room for names
_ASIDE = 5  # lines stand this far apart, so that their intervals do not hide one another
_INK, _AXIS, _GRID = "#1e1e28", "#8a8a94", "#e6e6ea"
# Okabe and Ito's colours, which the colour-blind can tell apart; without the yellow, too pale on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#3a3a44")
_MARKERS = (  # around the middle, for a radius of about 4.5
    "M-4.4 0a4.4 4.4 0 1 0 8.8 0a4.4 4.4 0 1 0 -8.8 0z",
    "M-4 -4h8v8h-8z",
    "M0 -5.2L5 3.8L-5 3.8z",
    "M0 -5.6L5.6 0L0 5.6L-5.6 0z",
    "M0 5.2L5 -3.8L-5 -3.8z",
    "M-5 -2.2h2.8v-2.8h4.4v2.8h2.8v4.4h-2.8v2.8h-4.4v-2.8h-2.8z",
    "M0 -5.2L5 -1.2L3.1 4.6L-3.1 4.6L-5 -1.2z",
)


def _ticks(share: float) -> tuple[int, int]:
    """The distance of ticks and the end of the axis, in per cent, for shares up to `share`."""
    percent = min(100.0, max(1.0, 100.0 * share))
    step = next(step for step in (1, 2, 5, 10, 20) if percent <= 6 * step)
    return step, min(100, step * math.ceil(percent / step - 1e-9))


def _line(line: Line, number: int, places: Sequence[tuple[float, float, float, float]]) -> list[str]:
    """Intervals, the line, and its markers on top, at places (x, share, low, high) of the drawing."""
    colour = _COLOURS[number % len(_COLOURS)]
    parts = [
        _stroke([(x + side, y) for side in ends], colour, 'stroke-width="1.3" stroke-opacity="0.7"')
        for x, _, low, high in places
        for y, ends in ((low, (-3, 3)), (high, (-3, 3)))
    ]
    parts += [
        _stroke([(x, low), (x, high)], colour, 'stroke-width="1.3" stroke-opacity="0.7" class="interval"')
        for x, _, low, high in places
    ]
    dash = ' stroke-dasharray="7 4"' if line.dashed else ""
    parts.append(_stroke([place[:2] for place in places], colour, f'stroke-width="2.2"{dash}'))
    for (x, y, *_), (value, share, low, high) in zip(places, line.points, strict=True):
        told = f"{line.name} at {value:g}: {100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        parts.append(_marker(x, y, number, told))
    return parts


def _apart(heights: Sequence[float], gap: float = 18.0) -> list[float]:
    """The heights, moved as little as keeps them `gap` apart and inside the field."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    places = [heights[number] for number in order]
    for _ in range(200):
        for first in range(len(places) - 1):
            lack = gap - (places[first + 1] - places[first])
            if lack > 0:
                places[first] -= lack / 2
                places[first + 1] += lack / 2
        low, high = min(places[0] - _TOP, 0.0), max(places[-1] - _TOP - _HIGH, 0.0)
        places[0] -= low
        places[-1] -= high
    moved = dict(zip(order, places, strict=True))
    return [moved[number] for number in range(len(heights))]


def _stroke(places: Sequence[tuple[float, float]], colour: str, more: str = "") -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" {more}/>'


def _marker(x: float, y: float, number: int, told: str = "") -> str:
    colour, shape = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    inside = f"<title>{html.escape(told)}</title>" if told else ""
    place = f'transform="translate({x:.1f} {y:.1f})"'
    return f'<path d="{shape}" {place} fill="{colour}" stroke="#fff" stroke-width="1">{inside}</path>'


def _words(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(text)}</text>'


def _frame(
    title: str, note: str, picture: Image.Image | None, words: str, trail: Sequence[tuple[float, float]]
) -> Image.Image:
    board = Image.new("RGB", (430, 290), "white")
    pen = ImageDraw.Draw(board)
    font, large = ImageFont.load_default(_FONT), ImageFont.load_default(_FONT + 2)
    pen.text((12, 8), title, fill=INK, font=large)
    pen.text((236, 10), note, fill=INK, font=font)
    if picture is not None:
        size = (picture.width * _SCALE, picture.height * _SCALE)
        board.paste(picture.resize(size, Image.Resampling.NEAREST), (12, 34))
        pen.rectangle((11, 33, 12 + size[0], 34 + size[1]), outline=PALE)
    for number, part in enumerate(textwrap.wrap(words, 60)[:3]):
        pen.text((12, 234 + 17 * number), part, fill=INK, font=font)
    _square(pen, trail, font)
    return board


def _square(
    pen: ImageDraw.ImageDraw,
    trail: Sequence[tuple[float, float]],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    left, top, side = 256, 52, 140
    pen.rectangle((left, top, left + side, top + side), outline=PALE, width=2)
    pen.text((left, top + side + 6), "0   noise of the text   1", fill=INK, font=font)
    pen.text((left, top - 17), "1  noise of the image, up", fill=INK, font=font)
    points = [(left + side * x, top + side * (1 - y)) for x, y in trail]
    if len(points) > 1:
        pen.line(points, fill=INK, width=2)
    x, y = points[-1]
    pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=RIGHT if len(points) > 1 else INK)
