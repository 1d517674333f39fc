"""Write texts, or fill the holes of one: `python infer/text.py "a small"` or `... "a ___ red circle"`."""

from __future__ import annotations

from collections.abc import Sequence

from mmdlm.program import add_sampling, load, options, positive, run


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.add_argument("text", nargs="?", default="", help="beginning of the text, or a text with holes")
    parser.add_argument("--num", type=positive, default=4, help="texts (default: 4)")
    parser.add_argument("--hole", default="___", help="what stands for one missing token (default: ___)")
    add_sampling(parser)
    given = parser.parse_args(arguments)
    pipe = load(given)
    if given.hole in given.text:
        output = pipe.infill(
            [given.text] * given.num,
            hole=given.hole,
            steps=given.steps,
            seed=given.seed,
            progress=not given.quiet,
        )
    else:
        output = pipe.text(
            given.text, num_samples=given.num, steps=given.steps, seed=given.seed, progress=not given.quiet
        )
    for text in output.texts:
        print(text)


if __name__ == "__main__":
    run(main)
