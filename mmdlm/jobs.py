"""What is asked becomes a canvas with holes, and the filled canvas an answer. Knows no model, no sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmdlm.canvas import Canvas, Frame
from mmdlm.codec import Codec

__all__ = [
    "TASKS",
    "Job",
    "answer",
    "caption",
    "draw",
    "infill",
    "inpaint",
    "joint",
    "listed",
    "pictures",
    "repeated",
    "write",
]

TASKS = ("text_to_image", "caption", "answer", "joint", "text", "infill", "inpaint")
Picture = Image.Image


@dataclass(frozen=True, kw_only=True)
class Job:
    """A generation ready to run: the canvas with its holes, and where the results stand."""

    task: str
    canvas: Canvas
    frame: Frame
    prompts: Sequence[str]
    text: int | None = None  # the span whose text is a result
    image: int | None = None  # the span whose image is a result

    def read(self, codec: Codec, canvas: Canvas) -> tuple[list[str], list[Picture]]:
        """Texts and pictures of the result spans of `canvas`, filled or still being filled."""
        canvas = canvas.to("cpu")
        texts: list[str] = []
        images: list[Picture] = []
        if self.text is not None:
            place = self.frame.places[self.text]
            rows = zip(canvas.tokens[:, place].tolist(), canvas.masked[:, place].tolist(), strict=True)
            texts = [codec.read(ids, holes) for ids, holes in rows]
        if self.image is not None:
            holes = canvas.masked[:, self.frame.places[self.image]].unflatten(1, codec.layout.grid)
            images = codec.decode(codec.layout.read_codes(self.frame, canvas, self.image), holes)
        return texts, images


def draw(codec: Codec, prompts: str | Sequence[str]) -> Job:
    """Pictures from prompts."""
    asked = listed(prompts)
    canvas = codec.layout.text_to_image(codec.ids(asked, codec.layout.caption))
    return Job(task="text_to_image", canvas=canvas, frame=codec.layout.pair_frame, prompts=asked, image=1)


def caption(codec: Codec, images: Picture | Sequence[Picture]) -> Job:
    """Captions of pictures."""
    shown = pictures(images)
    canvas = codec.layout.captioning(codec.encode(codec.pixels(shown)))
    return Job(
        task="caption", canvas=canvas, frame=codec.layout.pair_frame, prompts=[""] * len(shown), text=0
    )


def answer(codec: Codec, images: Picture | Sequence[Picture], questions: str | Sequence[str]) -> Job:
    """Answers about pictures; one question is asked of all of them."""
    shown, asked = pictures(images), listed(questions)
    if len(asked) == 1:
        asked = asked * len(shown)
    if len(asked) != len(shown):
        raise ValueError(
            f"{len(shown)} pictures and {len(asked)} questions; wanted one question for each, or one"
        )
    canvas = codec.layout.answering(
        codec.encode(codec.pixels(shown)), codec.ids(asked, codec.layout.question)
    )
    return Job(task="answer", canvas=canvas, frame=codec.layout.question_frame, prompts=asked, text=2)


def joint(codec: Codec, prefixes: str | Sequence[str] | None, num_samples: int) -> Job:
    """Pairs of caption and picture."""
    begun = repeated(prefixes, num_samples)
    canvas = codec.layout.joint(codec.ids(begun, codec.layout.caption))
    return Job(task="joint", canvas=canvas, frame=codec.layout.pair_frame, prompts=begun, text=0, image=1)


def write(codec: Codec, prefixes: str | Sequence[str] | None, num_samples: int) -> Job:
    """Texts without a picture."""
    begun = repeated(prefixes, num_samples)
    canvas = codec.layout.writing(codec.ids(begun, codec.layout.caption))
    return Job(task="text", canvas=canvas, frame=codec.layout.pair_frame, prompts=begun, text=0)


def infill(
    codec: Codec, texts: str | Sequence[str], images: Picture | Sequence[Picture] | None, hole: str
) -> Job:
    """Texts with holes."""
    if not hole:
        raise ValueError("the spelling of a hole must not be empty")
    begun = listed(texts)
    codes = None if images is None else codec.encode(codec.pixels(pictures(images)))
    if codes is not None and len(codes) != len(begun):
        raise ValueError(f"{len(begun)} texts and {len(codes)} pictures; wanted one picture for each text")
    canvas = codec.layout.infilling([codec.ids_with_holes(text, hole) for text in begun], codes)
    return Job(task="infill", canvas=canvas, frame=codec.layout.pair_frame, prompts=begun, text=0)


def inpaint(
    codec: Codec,
    images: Picture | Sequence[Picture],
    masks: Picture | Sequence[Picture],
    prompts: str | Sequence[str],
) -> Job:
    """Pictures whose masked part is open; blanked before encoding, for an encoder looks around a patch."""
    shown, covers, asked = pictures(images), pictures(masks), listed(prompts)
    if not len(shown) == len(covers) == len(asked):
        raise ValueError(
            f"{len(shown)} pictures, {len(covers)} masks and {len(asked)} prompts; wanted one of each"
        )
    for number, (picture, cover) in enumerate(zip(shown, covers, strict=True)):
        if picture.size != cover.size:
            raise ValueError(
                f"mask {number} is {cover.size} pixels, its picture {picture.size}; wanted the same"
            )
    covered = codec.covered(covers)
    codes = codec.encode(codec.pixels(shown).masked_fill(covered[:, None], 0.0))
    canvas = codec.layout.inpainting(codes, codec.touched(covered), codec.ids(asked, codec.layout.caption))
    return Job(task="inpaint", canvas=canvas, frame=codec.layout.pair_frame, prompts=asked, image=1)


def listed(value: str | Sequence[str]) -> list[str]:
    """One text or several, as a list. Raises ValueError for none, and for what is no text."""
    values = [value] if isinstance(value, str) else list(value)
    if not values:
        raise ValueError("got no text, wanted at least one")
    for each in values:
        if not isinstance(each, str):
            raise ValueError(f"wanted texts, got an object of {type(each).__name__}")
    return values


def pictures(value: Picture | Sequence[Picture]) -> list[Picture]:
    """One picture or several, as a list. Raises ValueError for none, and for what is no PIL image."""
    one = isinstance(value, (Picture, str, Path))
    values = [value] if one else list(value)
    if not values:
        raise ValueError("got no picture, wanted at least one")
    for each in values:
        if not isinstance(each, Picture):
            name = type(each).__name__
            raise ValueError(f"wanted PIL images, got {name}; mmdlm.data.decode reads a picture from a file")
    return values


def repeated(prefixes: str | Sequence[str] | None, num_samples: int) -> list[str]:
    """Each prefix `num_samples` times; None is one empty prefix."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    return [prefix for prefix in listed("" if prefixes is None else prefixes) for _ in range(num_samples)]
