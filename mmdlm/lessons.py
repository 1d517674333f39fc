"""What the built-in model is taught, lesson by lesson: scenes become rows. Knows no optimizer and no step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, Canvas
from mmdlm.data import Scene, Scenes, around, hole, read_caption
from mmdlm.diffusion import Diagonal, Edges, Mixture, Raised, Square
from mmdlm.evaluate import world
from mmdlm.pipeline import Pipeline
from tokenizers_mm import TextTokenizer, to_tensor

__all__ = ["LESSONS", "Lesson", "Rows", "course", "directions", "favoured"]

GIVEN = Edges(text=0.1, image=0.9, hide=0.05)
ALONE = Edges(text=1.0, image=0.0, hide=1.0)  # a caption of nothing: how a joint sample begins
# where things go is decided first
PLACED = Raised(Edges(text=0.0, image=1.0, hide=0.0), floor=0.8, only=IMAGE)
LAWS = Mixture(((0.15, Square()), (0.05, Diagonal()), (0.25, GIVEN), (0.3, PLACED), (0.25, ALONE)))
PLACING = Mixture(((0.1, Square()), (0.2, GIVEN), (0.7, PLACED)))
SPOKEN = Mixture(((1.0, ALONE),))


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A stage of the transformer: what it sees, and how noisy.

    Whose direction a caption tells is a parity: neither word, nor subject, nor place tells anything alone,
    and the full mixture did not teach it in 19,000 updates. With the subject already drawn, the word alone
    tells where the other object goes: some 900 updates; whose direction it is then takes some 800. The same
    of captions: with nothing else in the loss than directions, all else in sight, they are read off pictures
    within 250 updates; beside pictures in the loss they were not in 400, nor in the 24,000 before. From
    nothing, after the lesson on words, 280 updates of it are not enough: from 350 on the loss falls, and at
    1,050 it is at two thirds. Meanwhile all else is lost, and is back within 200 updates of the next lesson,
    which keeps what was learned.
    """

    share: float  # of the updates, in proportion
    mixture: tuple[float, float, float, float] = (1.0, 3.0, 3.0, 3.0)  # of one, two, three objects, groups
    rows: tuple[int, int, int, int] = (2, 4, 4, 6)  # parts of a batch, see `Rows`
    laws: Mixture = LAWS
    around: float = 1 / 3  # of the holes, how many are all around some of the objects
    told: bool = False  # ... and around those that the caption names first
    image: float = 4.0  # weight of the loss of pictures; that of texts is 4
    asked: float = 0.0  # of the captions of given pictures, how many have no holes but their directions
    begun: float = 0.0  # of the other captions that are open, how many have a beginning that is given


LESSONS = {
    "words": Lesson(share=0.34),
    "relations": Lesson(share=0.15, mixture=(0, 1, 0, 0), rows=(2, 30, 0, 0), asked=1.0),
    "captions": Lesson(share=0.1, mixture=(1, 3, 4, 2), rows=(4, 14, 8, 6), asked=0.4, begun=0.3, image=2.0),
    "directions": Lesson(
        share=0.09, mixture=(0, 1, 0, 0), rows=(1, 1, 28, 2), laws=PLACING, around=1.0, told=True
    ),
    "subjects": Lesson(share=0.09, mixture=(0.2, 3, 1, 0.3), rows=(1, 4, 18, 9), laws=PLACING, around=0.6),
    "sentences": Lesson(share=0.04, mixture=(1, 3, 4, 3), rows=(0, 0, 0, 1), laws=SPOKEN, begun=0.7),
    "all": Lesson(share=0.19, mixture=(1, 2.5, 9, 3), rows=(2, 4, 3, 7), asked=0.15, begun=0.5, image=3.0),
}


def course(lessons: Sequence[str], kinds: tuple[str, ...]) -> dict[str, Lesson]:
    """The lessons on these kinds of scene; those that have none of them are left out."""
    if unknown := sorted(set(lessons) - set(LESSONS)):
        raise ValueError(f"no lessons {', '.join(unknown)}: there are {', '.join(LESSONS)}")
    wanted, plan = world(kinds).mixture, {}
    for name in lessons:
        mixture = tuple(weight * share for weight, share in zip(wanted, LESSONS[name].mixture, strict=True))
        if any(mixture):
            plan[name] = replace(LESSONS[name], mixture=mixture)
    return plan


def directions(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The ids of "left", "right", "above" and "below": one word of a caption on which most of it hangs."""
    return tuple(tokenizer.encode(word)[0] for word in ("left", "right", "above", "below"))


def favoured(pipe: Pipeline, source: Scenes, factor: float, *, count: int = 1000) -> Tensor:
    """(V,) float32: `factor` for what little tells most and is drowned by the rest, 1 for all other ids.

    These are the directions and all codes but those of mere background, the commonest codes of `count`
    pictures.
    """
    codes = pipe.image_tokenizer.encode(to_tensor(source.images(range(count)))).flatten(1)
    plain = codes.mode(dim=1).values.unique()
    vocab = pipe.layout.vocab
    factors = torch.ones(vocab.size)
    factors[vocab.image] = factor
    factors[plain + vocab.image.start] = 1.0
    factors[list(directions(pipe.text_tokenizer))] = factor
    return factors


class Rows:
    """Numbers of scenes become rows.

    A lesson's `rows` are parts of four sorts: a question; the picture given, so that captions are learnt
    apart, some of them with holes at their directions only; the caption given and a hole in the picture, so
    that it is learnt what words look like and where they go; pairs. Of some captions of the second and the
    last sort the beginning is given.
    """

    def __init__(self, pipe: Pipeline, source: Scenes, lesson: Lesson) -> None:
        self.pipe = pipe
        self.source = source
        self.lesson = lesson
        self.directions = directions(pipe.text_tokenizer)
        self.ends = [sum(lesson.rows[: number + 1]) / sum(lesson.rows) for number in range(3)]

    def __call__(self, indices: list[int], rng: np.random.Generator) -> Canvas:
        """The canvas of these scenes."""
        encode, layout, source = self.pipe.text_tokenizer.encode, self.pipe.layout, self.source
        scenes = [source.scene(index) for index in indices]
        codes = self.pipe.image_tokenizer.encode(to_tensor([source.image(scene) for scene in scenes]))
        said = [source.caption(scene, index) for scene, index in zip(scenes, indices, strict=True)]
        captions = [encode(caption) for caption in said]
        ask, tell, draw = (round(len(scenes) * end) for end in self.ends)
        asked = [source.question(s, index) for s, index in zip(scenes[:ask], indices[:ask], strict=True)]
        holes = [self._hole(*pair, rng) for pair in zip(scenes[tell:draw], said[tell:draw], strict=True)]
        inside = np.array(holes, dtype=bool).reshape(-1, *layout.grid)
        told = self._holes_of(captions[ask:tell], rng, asked=self.lesson.asked)
        paired = self._holes_of(captions[draw:], rng, asked=0.0)
        return Canvas.concat(
            [
                layout.questions(codes[:ask], [encode(q) for q, _ in asked], [encode(a) for _, a in asked]),
                layout.captionings(codes[ask:tell], captions[ask:tell], holes=told),
                layout.inpaintings(codes[tell:draw], torch.from_numpy(inside), captions[tell:draw]),
                layout.pairs(captions[draw:], codes[draw:], holes=paired),
            ]
        )

    def _holes_of(self, captions: list[list[int]], rng: np.random.Generator, *, asked: float) -> Tensor:
        """(B, caption) bool: of each caption all, what comes behind a beginning, or its directions alone."""
        room = self.pipe.layout.caption
        places, opened = np.arange(room), np.ones((len(captions), room), dtype=bool)
        for row, caption in enumerate(captions):
            told = np.isin(np.pad(caption, (0, room - len(caption)), constant_values=-1), self.directions)
            if rng.random() < asked and told.any():
                opened[row] = told
            elif rng.random() < self.lesson.begun:
                opened[row] = places >= rng.integers(len(caption) + 1)
        return torch.from_numpy(opened)

    def _hole(self, scene: Scene, said: str, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < self.lesson.around:
            return around(scene, rng, told=read_caption(said) if self.lesson.told else None)
        return hole(scene, rng)
