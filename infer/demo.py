"""The main job, `make demo`: draws, captions, dreams pairs, inpaints, judges it all, and writes one page."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmdlm.program import load, options, positive, run

if TYPE_CHECKING:
    from mmdlm import Pipeline
    from mmdlm.evaluate import Question
    from mmdlm.report import Page
    from mmdlm.sweep import Curves

FORWARDS = (8, 32)  # at which orders are compared


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for page, PNGs and GIFs")
    parser.add_argument("--kinds", default="one,two,three,groups", help="kinds of scene (default: all four)")
    parser.add_argument("--num", type=positive, default=25, help="scenes scored a kind (default: 25)")
    parser.add_argument(
        "--curves", type=Path, help="a curves.json to show (default: the model folder's, if any)"
    )
    given = parser.parse_args(arguments)
    began = time.perf_counter()
    pipe = load(given)
    from mmdlm.evaluate import Exam, take
    from mmdlm.figures import show_curves, show_joint
    from mmdlm.report import Page
    from mmdlm.sweep import joint_points, measure

    orders, curves = joint_points(pipe, FORWARDS), stored_curves(pipe, given.model, given.curves)
    given.out.mkdir(parents=True, exist_ok=True)
    exam = Exam(kinds=tuple(given.kinds.split(",")), num=given.num, seed=given.seed)
    questions = exam.questions()
    page = Page("mmdlm: one masked-diffusion model, four walks")
    page.paragraph(
        f"Model {given.model} ({pipe.fingerprint}), seed {given.seed}: the first samples, nothing chosen. "
        "Prompts and pictures are combinations held out from training. Green is right, red wrong, as judged "
        "by a reader that recovers the exact scene from pixels."
    )
    walks(pipe, questions[0], given.seed, given.out, page)
    each = max(1, 16 // len(exam.kinds))
    first = [q for kind in exam.kinds for q in [q for q in questions if q.kind == kind][:each]]
    show(pipe, first, given.seed, given.out, page)
    scores = take(pipe, exam)
    (given.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    tabulate(scores, page)
    show_joint(page, [measure(pipe, point, questions, seed=given.seed) for point in orders])
    if curves is not None:
        page.heading("Measured beforehand by infer/curves.py")
        show_curves(page, curves)
    line = ragged(pipe, questions, given.seed)
    page.heading("A sample does not depend on its batch")
    page.line(line)
    page.paragraph(f"Made in {time.perf_counter() - began:.0f} s by infer/demo.py.")
    page.save(given.out / "index.html")
    print(line)
    for path in sorted(given.out.glob("*.*")):
        print(path)


def walks(pipe: Pipeline, question: Question, seed: int, out: Path, page: Page) -> None:
    """Four animated walks of the same weights through the square of noise levels."""
    from mmdlm.evaluate import object_mask
    from mmdlm.report import save_gif, walk

    mask = object_mask(question.scene)
    frames = {
        "text-to-image": walk(
            list(pipe.stream_text_to_image(question.caption, seed=seed)),
            title="text-to-image",
            text=question.caption,
        ),
        "caption": walk(
            list(pipe.stream_caption(question.picture, seed=seed)), title="caption", image=question.picture
        ),
        "joint": walk(list(pipe.stream_joint(seed=seed)), title="joint"),
        "inpaint": walk(
            list(pipe.stream_inpaint(question.picture, mask, question.caption, seed=seed)),
            title="inpaint",
            text=question.caption,
        ),
    }
    page.heading("Four walks through the square of noise levels")
    for name, pictures in frames.items():
        path = out / f"walk-{name}.gif"
        save_gif(pictures, path)
        page.figure(path)


def show(pipe: Pipeline, questions: Sequence[Question], seed: int, out: Path, page: Page) -> None:
    """The first sixteen of each task, stamped right or wrong."""
    from mmdlm.data import agree, read_caption
    from mmdlm.evaluate import read_pictures
    from mmdlm.output import save_png
    from mmdlm.report import sheet, stamp

    captions, pictures = [q.caption for q in questions], [q.picture for q in questions]
    drawn = pipe.text_to_image(captions, seed=seed)
    dreamt = pipe.joint(num_samples=len(questions), seed=seed)
    told = pipe.caption(pictures, seed=seed)
    asked = pipe.answer(pictures, [q.question for q in questions], seed=seed)
    sections = (
        ("Pictures from prompts", drawn.images, captions, read_pictures(drawn.images)),
        ("Captions of pictures", pictures, told.texts, [q.scene for q in questions]),
        ("Pairs, both denoised together", dreamt.images, dreamt.texts, read_pictures(dreamt.images)),
    )
    stamped = []
    for title, images, words, scenes in sections:
        page.heading(title)
        for image, text, scene in zip(images, words, scenes, strict=True):
            right = agree(read_caption(text), scene)
            stamped.append(stamp(image, right))
            page.figure(stamped[-1], text, right=right)
    sheet([*stamped[: len(drawn.images)], *stamped[-len(dreamt.images) :]]).save(out / "samples.png")
    page.heading("Answers to questions")
    for q, text in zip(questions, asked.texts, strict=True):
        page.figure(stamp(q.picture, text == q.answer), f"{q.question} {text}", right=text == q.answer)
    for name, output in (("text_to_image", drawn), ("joint", dreamt)):
        for number, (image, record) in enumerate(zip(output.images, output.records, strict=True)):
            save_png(image, out / f"{name}-{number:02d}.png", record)


def tabulate(scores: dict, page: Page) -> None:
    """The exam as a table."""
    page.heading(
        f"Exam: {scores['exam']['num']} held-out scenes of each kind ({', '.join(scores['exam']['kinds'])})"
    )
    rows = []
    for task in ("text_to_image", "caption", "answer", "inpaint", "joint"):
        score = scores[task]
        share = score["agree" if task == "joint" else "exact"]
        rows.append((task, f"{share:.3f}", "[{:.3f}, {:.3f}]".format(*score["interval"]), str(score["num"])))
    page.table(("task", "exactly right", "95 % interval", "of"), rows)
    law = ", ".join(f"{name} {value:.3f}" for name, value in scores["joint"]["law"].items())
    page.paragraph(
        f"Pairs: {scores['joint']['distinct']} distinct captions; total variation from the data's law: {law}."
    )


def stored_curves(pipe: Pipeline, model: str, path: Path | None) -> Curves | None:
    """The curves at `path`, or in the model's folder; None where it has none. They must be of this model."""
    from mmdlm.io import resolve
    from mmdlm.pretrained import BUILT_IN
    from mmdlm.sweep import read_curves

    found = resolve(model, BUILT_IN) / "curves.json" if path is None else path
    if path is None and not found.exists():
        return None
    curves = read_curves(found)
    if curves.model != pipe.fingerprint:
        raise ValueError(f"{found} was measured on model {curves.model}, and this is {pipe.fingerprint}")
    return curves


def ragged(pipe: Pipeline, questions: Sequence[Question], seed: int) -> str:
    """Sample 3 of sixteen rows of different tasks, lengths and steps, against the same sample alone."""
    import torch

    from mmdlm.canvas import Canvas
    from mmdlm.sampling import Unmask, denoise

    layout, encode = pipe.layout, pipe.text_tokenizer.encode
    longer = replace(
        layout, caption=layout.caption + 7
    )  # rows of another length, so that the others are padded
    codes = pipe.encode_images([q.picture for q in questions[:4]])
    canvases = [
        *(layout.text_to_image([encode(q.caption)]) for q in questions[:8]),
        *(layout.captioning(codes[i : i + 1]) for i in range(len(codes))),
        *(longer.joint([[]]) for _ in range(4)),
    ]
    steps = torch.tensor([6 + number % 5 for number in range(len(canvases))])
    batch, mask, number = Canvas.concat(canvases), layout.vocab.mask, 3

    def fill(canvas: Canvas, count: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        sampler = {"policy": Unmask(), "seeds": seed, "mask": mask}
        *_, state = denoise(pipe.transformer, canvas.to(pipe.device), steps=count, samples=samples, **sampler)
        return state.canvas.tokens

    together = fill(batch, steps, torch.arange(len(canvases)))[number]
    alone = fill(canvases[number], steps[number], torch.tensor([number]))[0]
    said = "equal" if torch.equal(together[: len(alone)], alone) else "DIFFER"
    return f"sample {number} of a ragged batch of {len(canvases)} == alone: tokens {said}"


if __name__ == "__main__":
    run(main)
