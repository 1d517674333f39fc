"""The tasks as canvases: which runs are given and which are holes. Knows no model, noise or tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmdlm.canvas.canvas import Canvas
from mmdlm.canvas.layout import Fill, Frame, Run
from tokenizers_mm.vocab import Vocab

Ids = Sequence[int]


@dataclass(frozen=True)
class Passage:
    """A text of a document: its ids, and behind them `end` as often as `ends` says (0: it was cut off)."""

    ids: Ids
    ends: int = 1


@dataclass(frozen=True)
class Gap:
    """What is not known of a document: a text of `room` positions, `end` included; or, without, a picture."""

    room: int | None = None


# Of a document; a tensor is the codes of a picture, (h, w) long, counted from 0.
Piece = Passage | Tensor | Gap


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How this model's rows are laid out: the room of each text run (`end` included) and the code grid.

    A text run holds its ids, one `end`, and further `end`s up to its capacity; they are learnt like any
    token, so that a generated text brings its length. Reading a text stops at the first `end`.

    A document is texts and pictures in any order and number; its texts are as long as they are.
    """

    vocab: Vocab
    grid: tuple[int, int]
    caption: int
    question: int
    answer: int

    # the shapes of rows: spans are numbered from the left

    @cached_property
    def pair_frame(self) -> Frame:
        """[begin_caption] caption (span 0) [begin_image] image (span 1) [end_image]."""
        return Frame((self._text("begin_caption", self.caption), self._image))

    @cached_property
    def question_frame(self) -> Frame:
        """[begin_image] image (0) [end_image] [begin_question] question (1) [begin_answer] answer (2)."""
        question = self._text("begin_question", self.question)
        return Frame((self._image, question, self._text("begin_answer", self.answer)))

    def document_frame(self, pieces: Sequence[Piece]) -> Frame:
        """[begin_text] text for a text, [begin_image] image [end_image] for a picture: span n is piece n.

        Raises ValueError for no piece, or one without a position.
        """
        runs = [
            self._image if size is None else self._text("begin_text", size) for size in map(_size, pieces)
        ]
        if not runs or not all(run.size for run in runs):
            raise ValueError("a document wants pieces, each with a position or more")
        return Frame(tuple(runs))

    # whole canvases, for training: what may be noised is open

    def pairs(self, captions: Sequence[Ids], codes: Tensor, *, holes: Tensor | None = None) -> Canvas:
        """Captions and pictures, all open; `codes` (B, h, w) long count from 0, as image tokenizers do.

        With `holes` (B, caption) bool the captions are open only inside them.
        """
        text = self._open_texts(captions, holes)
        return self._canvas(self.pair_frame, text, self._open(self._codes(codes)))

    def questions(self, codes: Tensor | None, questions: Sequence[Ids], answers: Sequence[Ids]) -> Canvas:
        """Pictures and questions given, the answers open; without `codes` the rows have no picture."""
        return self._asked(codes, questions, self._open(self._texts(answers, self.answer)))

    def captionings(self, codes: Tensor, captions: Sequence[Ids], *, holes: Tensor | None = None) -> Canvas:
        """Pictures given, the captions open; with `holes` (B, caption) bool, only inside them."""
        return self._canvas(self.pair_frame, self._open_texts(captions, holes), Fill(self._codes(codes)))

    def inpaintings(self, codes: Tensor, holes: Tensor, captions: Sequence[Ids]) -> Canvas:
        """Captions and pictures given, the pictures open inside `holes` (B, h, w) bool."""
        image = Fill(self._codes(codes), open=holes.flatten(1))
        return self._canvas(self.pair_frame, Fill(self._texts(captions, self.caption)), image)

    def documents(self, documents: Sequence[Sequence[Passage | Tensor]]) -> Canvas:
        """Documents, all open, padded to the longest. See `document_frame`."""
        rows = [
            self._canvas(self.document_frame(pieces), *(self._open(self._piece(piece)) for piece in pieces))
            for pieces in documents
        ]
        return Canvas.concat(rows)

    # canvases with holes, for generation

    def text_to_image(self, captions: Sequence[Ids]) -> Canvas:
        """Captions given, the images all holes."""
        return self._canvas(
            self.pair_frame, Fill(self._texts(captions, self.caption)), self._hole_image(len(captions))
        )

    def captioning(self, codes: Tensor) -> Canvas:
        """Images given, the captions all holes."""
        hole = self._hole_text([()] * len(codes), self.caption)
        return self._canvas(self.pair_frame, hole, Fill(self._codes(codes)))

    def answering(self, codes: Tensor | None, questions: Sequence[Ids]) -> Canvas:
        """Images and questions given, the answers all holes; without `codes` the rows have no image."""
        return self._asked(codes, questions, self._hole_text([()] * len(questions), self.answer))

    def joint(self, prefixes: Sequence[Ids]) -> Canvas:
        """A beginning of each caption given (perhaps empty), the rest of it and the image all holes."""
        return self._canvas(
            self.pair_frame, self._hole_text(prefixes, self.caption), self._hole_image(len(prefixes))
        )

    def writing(self, prefixes: Sequence[Ids]) -> Canvas:
        """A beginning of each text given (perhaps empty), the rest holes; the image unknown, and left so."""
        text = self._hole_text(prefixes, self.caption)
        return self._canvas(self.pair_frame, text, self._unknown_image(len(prefixes)))

    def infilling(self, captions: Sequence[Sequence[int | None]], codes: Tensor | None) -> Canvas:
        """Captions with holes, written None, each the place of one token; the images given or unknown."""
        ids = self._texts([[0 if i is None else i for i in caption] for caption in captions], self.caption)
        holes = torch.zeros_like(ids, dtype=torch.bool)
        for row, caption in enumerate(captions):
            holes[row, [place for place, i in enumerate(caption) if i is None]] = True
        image = self._unknown_image(len(captions)) if codes is None else Fill(self._codes(codes))
        return self._canvas(self.pair_frame, Fill(ids, holes), image)

    def inpainting(self, codes: Tensor, holes: Tensor, captions: Sequence[Ids]) -> Canvas:
        """Captions given, the images given but for `holes` (B, h, w) bool."""
        image = Fill(self._codes(codes), holes.flatten(1))
        return self._canvas(self.pair_frame, Fill(self._texts(captions, self.caption)), image)

    def completing(self, documents: Sequence[Sequence[Piece]]) -> Canvas:
        """Documents given but for their gaps, which are all holes; padded to the longest."""
        rows = []
        for pieces in documents:
            fills = [
                self._hole(_size(piece)) if isinstance(piece, Gap) else Fill(self._piece(piece))
                for piece in pieces
            ]
            rows.append(self._canvas(self.document_frame(pieces), *fills))
        return Canvas.concat(rows)

    # reading back

    def read_texts(self, frame: Frame, canvas: Canvas, span: int) -> list[list[int]]:
        """The ids of a text run of each row, cut at the first `end`."""
        return [self._until_end(row) for row in frame.read(canvas, span).tolist()]

    def read_codes(self, frame: Frame, canvas: Canvas, span: int) -> Tensor:
        """The image codes of each row, (B, h, w) long, counted from 0."""
        return frame.read(canvas, span) - self.vocab.image.start

    # building blocks

    @cached_property
    def _image(self) -> Run:
        before, after = self.vocab.specials["begin_image"], self.vocab.specials["end_image"]
        return Run(grid=self.grid, before=(before,), after=(after,))

    def _text(self, begin: str, length: int) -> Run:
        return Run(length=length, before=(self.vocab.specials[begin],))

    def _canvas(self, frame: Frame, *fills: Fill) -> Canvas:
        return frame.canvas(fills, mask=self.vocab.mask)

    def _asked(self, codes: Tensor | None, questions: Sequence[Ids], answer: Fill) -> Canvas:
        question = Fill(self._texts(questions, self.question))
        if codes is None:
            return self._canvas(Frame(self.question_frame.runs[1:]), question, answer)
        return self._canvas(self.question_frame, Fill(self._codes(codes)), question, answer)

    def _open(self, ids: Tensor) -> Fill:
        return Fill(ids, open=torch.ones_like(ids, dtype=torch.bool))

    def _texts(self, texts: Sequence[Ids], capacity: int) -> Tensor:
        """Ids with `end`s behind, (B, capacity)."""
        rows = []
        for text in texts:
            if len(text) >= capacity:
                raise ValueError(
                    f"a text of {len(text)} tokens and its end do not fit {capacity} places: {list(text)[:8]}"
                )
            self._check_ids(text)
            rows.append([*text, *([self.vocab.specials["end"]] * (capacity - len(text)))])
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), capacity)

    def _open_texts(self, captions: Sequence[Ids], holes: Tensor | None) -> Fill:
        ids = self._texts(captions, self.caption)
        return self._open(ids) if holes is None else Fill(ids, open=holes)

    def _hole_text(self, prefixes: Sequence[Ids], capacity: int) -> Fill:
        ids = self._texts(prefixes, capacity)
        given = torch.tensor([len(prefix) for prefix in prefixes], dtype=torch.long)
        return Fill(ids, torch.arange(capacity) >= given[:, None])

    def _codes(self, codes: Tensor) -> Tensor:
        """Tokenizer codes (B, h, w) -> vocabulary ids (B, h * w)."""
        if codes.dim() != 3 or tuple(codes.shape[1:]) != tuple(self.grid):
            raise ValueError(
                f"image codes must be (B, {self.grid[0]}, {self.grid[1]}), got {tuple(codes.shape)}"
            )
        return codes.flatten(1) + self.vocab.image.start

    def _check_ids(self, text: Ids) -> None:
        if any(not 0 <= i < self.vocab.num_text for i in text):
            raise ValueError(f"a text holds ids outside 0..{self.vocab.num_text - 1}: {list(text)}")

    def _piece(self, piece: Passage | Tensor) -> Tensor:
        """The ids of a piece of a document, (1, n)."""
        if isinstance(piece, Tensor):
            return self._codes(piece[None])
        self._check_ids(piece.ids)
        return torch.tensor([[*piece.ids, *([self.vocab.specials["end"]] * piece.ends)]])

    def _hole(self, size: int | None, batch: int = 1) -> Fill:
        """Nothing but holes: `size` of a text, or None for an image."""
        size = self.grid[0] * self.grid[1] if size is None else size
        return Fill(torch.zeros(batch, size, dtype=torch.long), torch.ones(batch, size, dtype=torch.bool))

    def _hole_image(self, batch: int) -> Fill:
        return self._hole(None, batch)

    def _unknown_image(self, batch: int) -> Fill:
        """What text alone is trained and generated beside: an image whose noise level stays at 1."""
        hole = self._hole_image(batch)
        assert hole.holes is not None
        return Fill(hole.ids, hole.holes, open=torch.zeros_like(hole.holes))

    def _until_end(self, ids: list[int]) -> list[int]:
        end = self.vocab.specials["end"]
        return ids[: ids.index(end)] if end in ids else ids


def _size(piece: Piece) -> int | None:
    """Positions of a text; None for a picture, which has those of the grid."""
    if isinstance(piece, Gap):
        return piece.room
    return None if isinstance(piece, Tensor) else len(piece.ids) + piece.ends
