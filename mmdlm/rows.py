"""Samples of every kind become rows: pairs, questions, texts, documents. Knows no model and no source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdlm.canvas import Canvas, Gap, Passage
from mmdlm.codec import Codec
from mmdlm.data import Encoded, Sample, SampleError

__all__ = ["Collator"]


@dataclass(frozen=True)
class Collator:
    """A function for the `collate` of `Batches`: row n is item n, padded; in `Packed`, many in a row.

    What an item holds says what its row is, so that a `Mixture` of sources is one of tasks:

    - a picture and texts: a pair (`Layout.pairs`), with one of the texts;
    - a question and an answer, with a picture or without: `Layout.questions`, only the answer open;
    - texts alone, a picture alone, pieces: a document (`Layout.documents`) of one of the texts, of the
      picture, of all the pieces.

    Where the model is one of text alone, a text is a row as `Pipeline.text` begins it (`Layout.pairs`); one
    with pictures learns from texts alone as documents, which `Pipeline.text` does not begin.

    One text is drawn, evenly; a question beside texts is drawn among them. Every text and every picture is a
    span of its own. Pictures that are no codes yet go through the image tokenizer, a batch at once.

    A text is generated in a room that is wider than it, with `end`s behind, so a model must have seen that.
    Texts that are no document have the room of the layout in a share `whole` of the rows; in the others, and
    in documents, they are as long as they are, one `end` included, and of documents up to `tail` longer.
    The laws over noise levels hold for documents as for pairs: `Edges` has one of all their spans live.
    """

    codec: Codec
    length: int | None = None  # most positions of a document; None: as many as it has
    whole: float = 1.0  # less leaves out `end`s, which cost as much as words and teach little
    tail: int = 0  # drawn evenly for each text of a document
    truncate: bool = False  # what is too long is cut instead of refused

    def __post_init__(self) -> None:
        if self.tail < 0 or (self.length is not None and self.length < 1):
            raise ValueError(f"wanted length >= 1 and tail >= 0, got {self.length} and {self.tail}")
        if not 0 <= self.whole <= 1:
            raise ValueError(f"whole is a share from 0 to 1, got {self.whole}")

    def __call__(self, items: Sequence[Sample | Encoded], rng: np.random.Generator) -> Canvas:
        """The rows, open as they are trained.

        To truncate is: a text of a pair or question is cut to its room, `end` behind it; of a document the
        last pieces are left out, and a text among them, where it is cut, has no `end`.

        Raises SampleError, naming the item, for a text or document that is too long, a text that cannot be
        encoded, codes of another grid, or outside the model's, a picture where there is no image tokenizer, a
        question without an answer, and an item of nothing.
        """
        held = [item.all_images if isinstance(item, Sample) else item.all_codes for item in items]
        pictures = [(item.name, one) for item, some in zip(items, held, strict=True) for one in some]
        made = self._codes(pictures)
        grids = [[next(made) for _ in some] for some in held]
        rows = [self._row(item, codes, rng) for item, codes in zip(items, grids, strict=True)]
        kinds: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
        for number, row in enumerate(rows):
            kinds.setdefault(row.kind, []).append(number)
        canvases = [self._canvas([rows[number] for number in numbers]) for numbers in kinds.values()]
        if len(canvases) == 1:
            return canvases[0]
        order = torch.tensor([number for numbers in kinds.values() for number in numbers])
        return Canvas.concat(canvases).select(order.argsort())

    def completing(self, documents: Sequence[Sequence[str | np.ndarray | Gap]]) -> Canvas:
        """Documents given but for their gaps, which a sampler fills; see `Layout.completing`.

        Texts, pictures (H, W, 3) uint8 or codes (h, w), and gaps. Raises SampleError as a call does, for
        "document N".
        """
        named = [(f"document {number}", pieces) for number, pieces in enumerate(documents)]
        made = self._codes(
            [(name, one) for name, some in named for one in some if isinstance(one, np.ndarray)]
        )
        whole: list[list[Passage | Tensor | Gap]] = []
        for name, pieces in named:
            whole.append([])
            for piece in pieces:
                if isinstance(piece, str):
                    whole[-1].append(Passage(self._ids(name, piece)))
                else:
                    whole[-1].append(piece if isinstance(piece, Gap) else next(made))
        return self.codec.layout.completing(whole)

    def _row(self, item: Sample | Encoded, codes: list[Tensor], rng: np.random.Generator) -> _Row:
        name, layout = item.name, self.codec.layout
        if item.pieces:
            grids = iter(codes)
            pieces = [piece if isinstance(piece, str) else next(grids) for piece in item.pieces]
            return _Row(pieces=self._document(name, pieces, rng))
        said = _drawn(item, rng)
        picture = codes[0] if codes else None
        if len(said) == 1 and not layout.vocab.num_codes:
            picture = torch.zeros(0, 0, dtype=torch.long)  # as a row of text alone has it
        if not said or (len(said) == 1 and picture is None):
            return _Row(pieces=self._document(name, [*said, *codes], rng))
        rooms = (layout.caption,) if len(said) == 1 else (layout.question, layout.answer)
        texts = tuple(self._ids(name, text, room) for text, room in zip(said, rooms, strict=True))
        if self.whole < 1 and rng.random() >= self.whole:
            rooms = tuple(len(ids) + 1 for ids in texts)
        return _Row(texts, rooms, picture)

    def _canvas(self, rows: Sequence[_Row]) -> Canvas:
        """Rows of one kind."""
        layout, codes = self.codec.layout, [row.codes for row in rows if row.codes is not None]
        texts = list(zip(*(row.texts for row in rows), strict=True))
        match rows[0].rooms:
            case (caption,):
                return replace(layout, caption=caption).pairs(texts[0], torch.stack(codes))
            case (question, answer):
                layout = replace(layout, question=question, answer=answer)
                return layout.questions(torch.stack(codes) if codes else None, texts[0], texts[1])
            case _:
                return layout.documents([row.pieces for row in rows])

    def _document(
        self, name: str, pieces: Sequence[str | Tensor], rng: np.random.Generator
    ) -> list[Passage | Tensor]:
        whole = [Passage(self._ids(name, one)) if isinstance(one, str) else one for one in pieces]
        if not whole:
            raise SampleError(name, "has neither a picture nor a text")
        sizes = [self.codec.layout.document_frame([piece]).length for piece in whole]
        spare = self.tail * len(whole) if self.length is None else self.length - sum(sizes)
        if spare >= 0:
            for number, piece in enumerate(whole if self.tail else ()):
                if isinstance(piece, Passage):
                    more = min(spare, int(rng.integers(self.tail + 1)))
                    whole[number], spare = replace(piece, ends=1 + more), spare - more
            return whole
        if not self.truncate:
            raise SampleError(name, f"a document of {sum(sizes)} positions, a row has {self.length}")
        fit, left = 0, sum(sizes) + spare
        while sizes[fit] <= left:
            left -= sizes[fit]
            fit += 1
        kept, over = whole[:fit], whole[fit]
        if isinstance(over, Passage) and left > 1:
            kept.append(Passage(over.ids[: left - 1], ends=0))
        if not kept:
            raise SampleError(name, f"not a piece of it fits {self.length} positions")
        return kept

    def _ids(self, name: str, text: str, room: int | None = None) -> list[int]:
        """The ids of a text, which with its end is to fit `room` positions."""
        try:
            ids = self.codec.text_tokenizer.encode(text)
        except ValueError as error:
            raise SampleError(name, str(error)) from error
        if room is not None and len(ids) >= room:
            if not self.truncate or room < 2:
                shown = text if len(text) <= 80 else f"{text[:80]}..."
                raise SampleError(name, f"{shown!r} is {len(ids)} tokens long, there is room for {room - 1}")
            return ids[: room - 1]
        return ids

    def _codes(self, pictures: Sequence[tuple[str, np.ndarray]]) -> Iterator[Tensor]:
        """The codes (h, w) long of pictures (H, W, 3) or codes of named items."""
        layout, images = self.codec.layout, [(name, image) for name, image in pictures if image.ndim == 3]
        made: Iterator[Tensor] = iter(())
        if images:
            if self.codec.image_tokenizer is None:
                raise SampleError(images[0][0], "has a picture, and no image tokenizer makes codes of it")
            made = iter(self.codec.encode(self.codec.pixels([Image.fromarray(image) for _, image in images])))
        for name, picture in pictures:
            if picture.ndim == 3:
                yield next(made)
                continue
            if picture.shape != layout.grid:
                raise SampleError(name, f"codes of shape {picture.shape}, this model has {layout.grid}")
            if picture.size and not 0 <= picture.min() <= picture.max() < layout.vocab.num_codes:
                most = layout.vocab.num_codes - 1
                raise SampleError(
                    name, f"codes from {picture.min()} to {picture.max()}, this model has 0 to {most}"
                )
            yield torch.from_numpy(picture).long()


@dataclass(frozen=True)
class _Row:
    """What a row is made of."""

    texts: tuple[list[int], ...] = ()  # of a pair one, of a question two
    rooms: tuple[int, ...] = ()  # positions of each
    codes: Tensor | None = None
    pieces: Sequence[Passage | Tensor] = ()  # of a document, which has no other text or codes

    @property
    def kind(self) -> tuple[bool, tuple[int, ...]]:
        """The same for rows that have the same runs; all documents are alike."""
        return self.codes is None, self.rooms


def _drawn(item: Sample | Encoded, rng: np.random.Generator) -> tuple[str, ...]:
    """One of the texts of an item, or its question and answer; nothing where it has none."""
    choices: list[tuple[str, ...]] = [(text,) for text in item.texts]
    if (item.question is None) != (item.answer is None):
        raise SampleError(item.name, f"question {item.question!r} and answer {item.answer!r}: one is missing")
    if item.question is not None and item.answer is not None:
        choices.append((item.question, item.answer))
    return choices[int(rng.integers(len(choices)))] if choices else ()
