"""The denoiser: logits at some rows of a canvas, over the ids that may stand there. Knows no sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdlm.canvas import IMAGE, TEXT, Canvas, Part, Predict, Rows
from mmdlm.model.cache import Memory
from mmdlm.model.transformer import Transformer, TransformerConfig

T = TypeVar("T")

PIECE = 2**24  # logits: 64 MiB in float32


class Predictor(nn.Module):
    """A network as a `Denoiser`: the module that is compiled, sharded, averaged and saved.

    It keeps no state between calls. Rows are split by their modality into one part for text and one for
    image, each over its own ids, so that ids of the other modality have probability exactly 0; where both
    ranges are equal there is one part for both. Rows at padding are dropped.
    """

    def __init__(
        self,
        network: Transformer,
        text: slice | None = None,
        image: slice | None = None,
        mask: int | None = None,
        *,
        shift: bool = False,
        illegal: tuple[int, ...] = (),
    ) -> None:
        """`text`, `image`, `mask`: the ids, None as the network's configuration says.

        `shift`: the logits for position i are read at i - 1 of the same segment (heads of autoregressive
        descent); the first position of a segment reads itself. `illegal`: ids that are never emitted, beside
        the mask.
        """
        super().__init__()
        config = network.config
        if mask is not None and mask != config.mask:
            raise ValueError(f"mask id {mask} differs from the network's, {config.mask}")
        self.network = network
        self.text = slice(*config.text) if text is None else text
        self.image = slice(*config.image) if image is None else image
        self.shift = shift
        self.illegal = tuple(sorted({config.mask, *illegal}))
        ranges = {TEXT: self.text, IMAGE: self.image}
        if self.text == self.image:
            self._ranges = [((TEXT, IMAGE), self.text)]
        else:
            self._ranges = [((modality,), ids) for modality, ids in ranges.items()]

    @property
    def config(self) -> TransformerConfig:
        """The network's shape."""
        return self.network.config

    @property
    def mask(self) -> int:
        """The mask id."""
        return self.network.config.mask

    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self.parameters())

    def begin(self, canvas: Canvas) -> Predict:
        """The predictor itself: it keeps nothing between the steps of a generation."""
        return self

    @overload
    def __call__(
        self, canvas: Canvas, rows: Rows, *, reduce: None = None, chunk: int | None = None
    ) -> list[Part]: ...
    @overload
    def __call__(
        self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T], chunk: int | None = None
    ) -> list[T]: ...
    def __call__(
        self,
        canvas: Canvas,
        rows: Rows,
        *,
        reduce: Callable[[Part], T] | None = None,
        chunk: int | None = None,
    ) -> list[Part] | list[T]:
        return super().__call__(canvas, rows, reduce=reduce, chunk=chunk)

    def forward(
        self,
        canvas: Canvas,
        rows: Rows,
        *,
        reduce: Callable[[Part], T] | None = None,
        chunk: int | None = None,
    ) -> list[Part] | list[T]:
        """Logits (float32 or better) at `rows`, one `Part` a vocabulary range.

        With `reduce`, its results instead, over even pieces of at most `chunk` rows, by default of 2^24
        logits, whose logits live only while they are reduced: memory does not grow with rows times ids. In
        training the last pieces, together no more than one full piece, keep them for the gradient, and the
        others' are computed again, so `reduce` must give the same result twice. On the CPU a range without
        rows gives nothing, and a row of the canvas that nothing is asked of costs nothing.
        """
        asked = self.asked(canvas, rows)
        if not asked:
            return []
        return self._answers(self._features(canvas, rows), asked, reduce, chunk)

    def remember(self, canvas: Canvas) -> Memory:
        """An empty memory of the network, for generations on `canvas`."""
        return self.network.remember(canvas)

    def recall(
        self,
        canvas: Canvas,
        rows: Rows,
        memory: Memory,
        index: Tensor | None,
        *,
        reduce: Callable[[Part], T] | None = None,
        chunk: int | None = None,
    ) -> list[Part] | list[T]:
        """As `forward`, from the features in `memory`; those at `index` (B, M) long, if any, made anew."""
        asked = self.asked(canvas, rows)
        if not asked:
            return []
        if index is not None:
            self.network.features_at(canvas, index, memory)
        features = memory.features
        if self.shift:
            features = shift_right(features, canvas.segment)
        return self._answers(features, asked, reduce, chunk)

    def _answers(
        self,
        features: Tensor,
        asked: list[tuple[Rows, slice]],
        reduce: Callable[[Part], T] | None,
        chunk: int | None,
    ) -> list[Part] | list[T]:
        if reduce is None:
            return [self._part(features, part_rows, ids) for part_rows, ids in asked]
        pieces = [piece for rows_of, ids in asked for piece in _pieces(rows_of, ids, chunk)]
        again = _first_kept(pieces) if torch.is_grad_enabled() else 0
        results: list[T] = []
        for number, piece in enumerate(pieces):
            compute = self._reduced_again if number < again else self._reduced
            results.append(compute(features, piece.rows, piece.ids, reduce))
        return results

    def _features(self, canvas: Canvas, rows: Rows) -> Tensor:
        """(B, L, D); on the CPU 0 in the rows of the canvas that nothing is asked of."""
        asked = rows.samples(canvas.shape[1])
        if asked is None or len(asked) == canvas.shape[0]:
            return self._shifted(canvas)
        features = self._shifted(canvas.select(asked))
        return features.new_zeros(canvas.shape[0], *features.shape[1:]).index_copy(0, asked, features)

    def _shifted(self, canvas: Canvas) -> Tensor:
        features = self.network.features(canvas)
        return shift_right(features, canvas.segment) if self.shift else features

    def asked(self, canvas: Canvas, rows: Rows) -> list[tuple[Rows, slice]]:
        """`rows` by vocabulary range, with the ids of each; on the CPU only ranges that have rows."""
        asked: list[tuple[Rows, slice]] = []
        for modalities, ids in self._ranges:
            keep = canvas.modality == modalities[0]
            for other in modalities[1:]:
                keep = keep | (canvas.modality == other)
            part_rows = rows.where(keep)
            if part_rows.index.shape[0] > 0:
                asked.append((part_rows, ids))
        return asked

    def _reduced(self, features: Tensor, rows: Rows, ids: slice, reduce: Callable[[Part], T]) -> T:
        return reduce(self._part(features, rows, ids))

    def _reduced_again(self, features: Tensor, rows: Rows, ids: slice, reduce: Callable[[Part], T]) -> T:
        """As `_reduced`, but the gradient computes the logits anew instead of keeping them."""
        result = checkpoint(
            self._reduced, features, rows, ids, reduce, use_reentrant=False, preserve_rng_state=False
        )
        return cast(T, result)

    def _part(self, features: Tensor, rows: Rows, ids: slice) -> Part:
        logits = self.network.logits(rows.gather(features), ids)
        banned = [number - ids.start for number in self.illegal if ids.start <= number < ids.stop]
        if banned:
            columns = torch.tensor(banned, device=logits.device)
            logits = logits.index_fill_(1, columns, float("-inf"))  # the product needs no second one of them
        return Part(rows, ids, logits)


@dataclass(frozen=True)
class _Piece:
    rows: Rows
    ids: slice
    share: float  # of the largest piece that there may be


def _pieces(rows: Rows, ids: slice, chunk: int | None) -> list[_Piece]:
    most = max(1, PIECE // max(1, ids.stop - ids.start)) if chunk is None else chunk
    size = -(-rows.index.shape[0] // -(-rows.index.shape[0] // most))
    return [_Piece(piece, ids, piece.index.shape[0] / most) for piece in rows.chunks(size)]


def _first_kept(pieces: list[_Piece]) -> int:
    """The first of the last pieces that are together no more than one full piece.

    The gradient takes the last first, when it holds nothing else: it is no cheaper in memory to compute these
    again than to keep them.
    """
    first, share = len(pieces) - 1, pieces[-1].share
    while first and (share := share + pieces[first - 1].share) <= 1.0:
        first -= 1
    return first


def shift_right(features: Tensor, segment: Tensor) -> Tensor:
    """(B, L, D): at i what stood at i - 1, if that is of the same segment, else what stood at i."""
    before = torch.cat([features[:, :1], features[:, :-1]], dim=1)
    same = torch.cat(
        [torch.zeros_like(segment[:, :1], dtype=torch.bool), segment[:, 1:] == segment[:, :-1]], dim=1
    )
    return torch.where(same[..., None], before, features)
