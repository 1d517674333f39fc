"""Pictures for people: stamped sheets, walks through the noise levels, one HTML page. Knows no model."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmdlm.output import Moment

__all__ = ["Page", "save_gif", "sheet", "stamp", "walk"]

INK, PALE, RIGHT, WRONG = (30, 30, 40), (205, 205, 212), (20, 140, 60), (200, 40, 40)
_SCALE = 3  # pixels of a walk for one of the model
_FONT = 13
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
body{color:#1e1e28}
h1{font-size:1.7rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
img{image-rendering:pixelated;max-width:100%}figure{display:inline-block;margin:.4rem;vertical-align:top}
figcaption{font-size:.8rem;max-width:15rem}.right{color:#148c3c}.wrong{color:#c82828}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left}
code,pre{background:#f4f4f6;padding:.1rem .3rem}"""


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

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        self._body.append(f"<table><tr>{cells}</tr>{body}</table>")

    def save(self, path: Path) -> None:
        head = f'<meta charset="utf-8"><title>{self._title}</title><style>{_STYLE}</style>'
        path.write_text(
            f"<!doctype html><html><head>{head}</head><body>{''.join(self._body)}</body></html>\n", "utf-8"
        )


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
