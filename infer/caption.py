"""Say what is in pictures: `python infer/caption.py a.png b.jpg`."""

from __future__ import annotations

from collections.abc import Sequence

from mmdlm.program import add_guidance, add_sampling, load, open_images, options, run


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.add_argument(
        "image", nargs="+", help="picture file; other sizes are scaled and cropped to the model's"
    )
    add_sampling(parser)
    add_guidance(parser)
    given = parser.parse_args(arguments)
    images = open_images(given.image)
    output = load(given).caption(
        images, steps=given.steps, guidance=given.guidance, seed=given.seed, progress=not given.quiet
    )
    for path, text in zip(given.image, output.texts, strict=True):
        print(f"{path}\t{text}")


if __name__ == "__main__":
    run(main)
