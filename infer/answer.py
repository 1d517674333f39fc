"""Answer a question about a picture: `python infer/answer.py a.png "which colour is the small circle?"`."""

from __future__ import annotations

from collections.abc import Sequence

from mmdlm.program import add_guidance, add_sampling, load, open_images, options, run


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.add_argument("image", help="picture file")
    parser.add_argument("question", nargs="+", help="one question each")
    add_sampling(parser)
    add_guidance(parser)
    given = parser.parse_args(arguments)
    images = open_images([given.image]) * len(given.question)
    output = load(given).answer(
        images,
        given.question,
        steps=given.steps,
        guidance=given.guidance,
        seed=given.seed,
        progress=not given.quiet,
    )
    for question, text in zip(given.question, output.texts, strict=True):
        print(f"{question}\t{text}")


if __name__ == "__main__":
    run(main)
