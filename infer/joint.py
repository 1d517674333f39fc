"""Dream pairs of caption and picture, both denoised at once: `python infer/joint.py --num 4`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmdlm.program import add_guidance, add_sampling, load, options, positive, run


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.add_argument(
        "prefix", nargs="*", help="beginning of a caption (default: none, everything is dreamt)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/joint"), help="folder for the PNGs")
    parser.add_argument("--num", type=positive, default=4, help="pairs, for each prefix (default: 4)")
    add_sampling(parser)
    add_guidance(parser)
    given = parser.parse_args(arguments)
    output = load(given).joint(
        given.prefix or None,
        num_samples=given.num,
        steps=given.steps,
        guidance=given.guidance,
        seed=given.seed,
        progress=not given.quiet,
    )
    for path, text in zip(output.save(given.out), output.texts, strict=True):
        print(f"{path}\t{text}")


if __name__ == "__main__":
    run(main)
