"""Read a data set once and say what is wrong with it: `python train/check_data.py DATA`.

DATA is an imagefolder, files of rows (.jsonl, .parquet, .tar, .txt) or a folder of them, or code shards.
Every row is read and every picture decoded; shards are read to the last byte. Printed are all bad rows with
the reason, how many rows, texts and pictures there are, how many of them twice, and how large they are; 16
samples go to the contact sheet --out, those of shards drawn by --model, or else each code as one colour.
Exit status: 0 all is well; 1 there are bad rows; 2 wrong input.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmdlm.program import load, options, run

if TYPE_CHECKING:
    from PIL import Image

    from mmdlm import Pipeline
    from mmdlm.data import Census, Encoded, Indexed, Sample, Shards

SHOWN, SIDE, LINES = 16, 160, 4  # samples on the sheet; pixels a side of their pictures; lines of text


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.set_defaults(model=None)  # only the sheet of shards needs one
    add = parser.add_argument
    add("data", type=Path, help="folder or file")
    add("--columns", help="columns with texts (default: text)")
    add("--image-column", help="column with pictures (default: what is usual)")
    add("--pieces", help="column with documents of texts and pictures; or TEXTS,PICTURES")
    add("--out", type=Path, default=Path("out/check.png"), help="contact sheet (default: out/check.png)")
    given = parser.parse_args(arguments)
    from tqdm import tqdm

    from mmdlm.data import Census

    found = Census()
    if (given.data / "index.json").is_file():
        from mmdlm.data import InOrder, Shards

        try:
            source = Shards(given.data, order=InOrder())
        except ValueError as error:
            print(f"{given.data}: {error}")
            raise SystemExit(1) from None
        rows = encoded(source, found)
        size = f"{source.grid[0]} x {source.grid[1]} of {source.num_codes} codes"
        kind = f"{len(source.shards)} code shards, {size}, by tokenizer {source.tokenizer}"
    else:
        source, pictures = find_source(given)
        rows, kind = samples(source, found, pictures), type(source).__name__
    shown = {len(source) * number // SHOWN for number in range(SHOWN)}
    kept: list[Sample | Encoded] = []
    for index, item in tqdm(rows, desc="check", total=len(source), disable=None):
        found.add(item)
        wanted = sum(start <= index for start in shown)  # so many should be kept by now
        if len(kept) < wanted:
            kept.append(item)
    print(f"{given.data}: {kind}, {len(source)} rows")
    print("\n".join(found.lines()))
    if kept:
        draw(kept, given)
        print(f"{given.out}: {len(kept)} samples")
    if found.bad:
        raise SystemExit(1)


def find_source(given: argparse.Namespace) -> tuple[Indexed[Sample], bool]:
    """The source of what lies there, and whether each of its samples should have a picture.

    An imagefolder is read by its JSON lines: ImageFolder ends at the first bad one.
    """
    from mmdlm.data import Columns, InOrder, JsonLines, open_source

    table = given.data / "metadata.jsonl"
    columns = Columns.named(given.columns, given.image_column, given.pieces)
    if given.pieces or not table.is_file():
        return open_source(given.data, columns=columns), False
    columns = columns or Columns()
    columns = replace(columns, image=columns.image or "file_name")
    return JsonLines(table, columns=columns, order=InOrder()), True


def samples(source: Indexed[Sample], found: Census, pictures: bool) -> Iterator[tuple[int, Sample]]:
    """Those that can be had; the others, or those without their picture, are bad rows."""
    from mmdlm.data import SampleError

    for index in range(len(source)):
        try:
            sample = source[index]
            if pictures and sample.image is None:
                raise SampleError(sample.name, "names no picture")
        except SampleError as error:
            again = f" (row {index})" if error.name in found.bad else ""
            found.bad[error.name + again] = error.reason
        else:
            yield index, sample


def encoded(source: Shards, found: Census) -> Iterator[tuple[int, Encoded]]:
    """Those of the shards that are whole; the others are bad, as are pictures left out when encoding."""
    found.bad |= {name: f"left out when encoding ({reason})" for name, reason in source.skipped.items()}
    damaged = dict(source.faults())
    found.bad |= damaged
    first = 0
    for shard in source.shards:
        if str(source.path / shard.file) not in damaged:
            for index in range(first, first + shard.samples):
                yield index, source[index]
        first += shard.samples


def picture_of(item: Sample | Encoded, pipe: Pipeline | None) -> Image.Image | None:
    """The first picture; codes as the model draws them, or else in one colour each."""
    import numpy as np
    from PIL import Image

    from mmdlm.data import Sample

    if isinstance(item, Sample):
        return Image.fromarray(item.all_images[0]) if item.all_images else None
    if not item.all_codes:
        return None
    codes = item.all_codes[0]
    if pipe is None:
        colours = (codes[..., None] + 1) * np.array([73, 151, 199]) % 256
        return Image.fromarray(colours.astype(np.uint8))
    import torch

    return pipe.decode_images(torch.from_numpy(codes)[None].long())[0]


def draw(kept: Sequence[Sample | Encoded], given: argparse.Namespace) -> None:
    """The contact sheet: of each sample the first picture, and its first text below."""
    from PIL import Image, ImageDraw, ImageFont

    from mmdlm.data import Letterbox, fit
    from mmdlm.report import sheet

    pipe = load(given) if given.model else None
    tiles = []
    for item in kept:
        tile = Image.new("RGB", (SIDE, SIDE + 14 * LINES + 4), "white")
        picture = picture_of(item, pipe)
        if picture is not None:
            tile.paste(fit(picture, SIDE, shape=Letterbox(), resample=Image.Resampling.NEAREST))
        words = textwrap.wrap(item.all_texts[0] if item.all_texts else "(no text)", SIDE // 6)[:LINES]
        ImageDraw.Draw(tile).text((2, SIDE + 2), "\n".join(words), "black", ImageFont.load_default(11))
        tiles.append(tile)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(tiles, columns=4, gap=8).save(given.out)


if __name__ == "__main__":
    run(main)
