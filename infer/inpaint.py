"""Draw the masked part of a picture anew: `python infer/inpaint.py a.png mask.png "a red circle"`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmdlm.program import add_guidance, add_sampling, load, open_images, options, run


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.add_argument("image", help="picture file")
    parser.add_argument("mask", help="picture of the same size; everything that is not black is drawn anew")
    parser.add_argument("prompt", help="what the whole picture shall show")
    parser.add_argument("--out", type=Path, default=Path("out/inpaint"), help="folder for the PNG")
    add_sampling(parser)
    add_guidance(parser)
    given = parser.parse_args(arguments)
    image, mask = open_images([given.image, given.mask])
    output = load(given).inpaint(
        image,
        mask,
        given.prompt,
        steps=given.steps,
        guidance=given.guidance,
        seed=given.seed,
        progress=not given.quiet,
    )
    print(output.save(given.out)[0])


if __name__ == "__main__":
    run(main)
