"""Turn an imagefolder into codes once: `python train/encode_images.py DATA --out codes --model MODEL`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mmdlm.program import load, options, run


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.add_argument("data", type=Path, help="folder of pictures with metadata.jsonl or metadata.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--columns", default="text", help="columns with texts (default: text)")
    parser.add_argument(
        "--skip", action="store_true", help="leave out pictures that cannot be read, and say which"
    )
    given = parser.parse_args(arguments)
    pipe = load(given)
    from PIL import Image
    from tqdm import tqdm

    from mmdlm.data import Columns, Encoded, ImageFolder, InOrder, Skip, Stop, write_encoded

    on_error = Skip() if given.skip else Stop()
    columns = Columns(texts=tuple(given.columns.split(",")))
    source = ImageFolder(given.data, columns=columns, order=InOrder(), on_error=on_error)
    pairs = []
    for sample in tqdm(source, total=len(source), desc="encode"):
        assert sample.image is not None
        codes = pipe.encode_images(Image.fromarray(sample.image))[0].cpu().numpy()
        pairs.append(Encoded(sample.name, codes, sample.texts))
    write_encoded(given.out, pairs)
    print(f"{given.out}: {len(pairs)} pairs")
    if isinstance(on_error, Skip) and on_error.count:
        print(f"left out {on_error.count}: {on_error.failures}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
