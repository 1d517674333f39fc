"""Every generating method of a pipeline, asked in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from mmdlm import Pipeline
from mmdlm.output import Output

HOLES = ["a ___ red circle on a ___ background", "___ large star", "two green ___"]
# Every generating method, asked for the samples `which` of three.
ASK: dict[str, Callable[..., Output]] = {
    "text_to_image": lambda pipe, kit, which, **o: pipe.text_to_image([kit.prompts[i] for i in which], **o),
    "caption": lambda pipe, kit, which, **o: pipe.caption([kit.pictures[i] for i in which], **o),
    "answer": lambda pipe, kit, which, **o: pipe.answer(
        [kit.pictures[i] for i in which], [kit.questions[i] for i in which], **o
    ),
    "joint": lambda pipe, kit, which, **o: pipe.joint([("", "a small", "two")[i] for i in which], **o),
    "text": lambda pipe, kit, which, **o: pipe.text([("", "a small", "two")[i] for i in which], **o),
    "infill": lambda pipe, kit, which, **o: pipe.infill(
        [HOLES[i] for i in which], [kit.pictures[i] for i in which], **o
    ),
    "inpaint": lambda pipe, kit, which, **o: pipe.inpaint(
        [kit.pictures[i] for i in which],
        [kit.masks[i] for i in which],
        [kit.prompts[i] for i in which],
        **o,
    ),
}
DRAWS, WRITES = ("text_to_image", "joint", "inpaint"), ("caption", "answer", "joint", "text", "infill")
ALL = (0, 1, 2)


def ask(task: str, pipe: Pipeline, kit, which: Sequence[int] = ALL, **options) -> Output:
    return ASK[task](pipe, kit, which, **{"progress": False, "seed": 5, **options})


def pixels(images: Sequence[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def results(output: Output) -> list[tuple]:
    """What each sample is, in a form that can be compared."""
    columns = [column for column in (output.texts, pixels(output.images)) if column]
    return list(zip(*columns, strict=True))


def shown(name: str, kit) -> tuple:
    """What a stream is asked for."""
    return {
        "text_to_image": (kit.prompts[0],),
        "caption": (kit.pictures[0],),
        "joint": (),
        "inpaint": (kit.pictures[0], kit.masks[0], kit.prompts[0]),
        "answer": (kit.pictures[0], kit.questions[0]),
        "text": ("a small",),
        "infill": ("a" + " ___" * 8 + " circle", kit.pictures[0]),
    }[name]


def stream(name: str, pipe: Pipeline, kit, **options):
    return getattr(pipe, f"stream_{name}")(*shown(name, kit), seed=5, **options)


def patches(mask: Image.Image) -> np.ndarray:
    """(4, 4) bool: the 16 x 16 patches that hold a pixel that is not 0."""
    where = np.asarray(mask.convert("L")) > 0
    return where.reshape(4, 16, 4, 16).any(axis=(1, 3))
