"""Draw pictures from prompts: `python infer/text_to_image.py "a small red circle on a white background"`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmdlm.program import add_guidance, add_sampling, load, options, positive, run


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.add_argument("prompt", nargs="+", help="what to draw, one picture each")
    parser.add_argument("--out", type=Path, default=Path("out/text_to_image"), help="folder for the PNGs")
    parser.add_argument("--num", type=positive, default=1, help="pictures a prompt (default: 1)")
    add_sampling(parser)
    add_guidance(parser)
    given = parser.parse_args(arguments)
    pipe = load(given)
    prompts = [prompt for prompt in given.prompt for _ in range(given.num)]
    output = pipe.text_to_image(
        prompts, steps=given.steps, guidance=given.guidance, seed=given.seed, progress=not given.quiet
    )
    for path, prompt in zip(output.save(given.out), prompts, strict=True):
        print(f"{path}\t{prompt}")


if __name__ == "__main__":
    run(main)
