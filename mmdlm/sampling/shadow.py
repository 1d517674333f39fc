"""A written token seen by the model as if it were a hole, in the same forward. Knows no policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, overload

import torch
from torch import Tensor

from mmdlm.canvas import PLAIN, SHADOW, Canvas, Denoiser, Part, Predict, Rows
from mmdlm.sampling.caching import Cached, padded
from mmdlm.sampling.guidance import Guided

T = TypeVar("T")


class Shadowed:
    """A denoiser that answers at written positions from their shadows: what it would write there.

    A shadow is a hole at the same place behind the row that sees all of the row but the token there, and no
    other shadow; nobody sees it (WINO, arXiv:2507.18578). So one layer says exactly what it would say of the
    row with a hole there, and deeper ones nearly: what they know of the others has seen the token. It costs a
    position for every written one that is asked. Not around guidance, caches and shifted heads.
    """

    def __init__(self, denoiser: Denoiser, *, mask: int) -> None:
        if isinstance(denoiser, Cached | Guided) or getattr(denoiser, "shift", False):
            raise ValueError("shadows stand next to a model that predicts in place: Guided(Shadowed(model))")
        self.denoiser = denoiser
        self.mask = mask

    def begin(self, canvas: Canvas) -> Predict:
        """Raises ValueError where positions do not all see each other, for blocks and copies are taken."""
        if canvas.block is not None or canvas.copy is not None:
            raise ValueError("shadows want a canvas without `block` and `copy`: they use both themselves")
        return _ShadowedPredict(self.denoiser.begin(canvas), self.mask)


class _ShadowedPredict:
    def __init__(self, predict: Predict, mask: int) -> None:
        self._predict, self._mask = predict, mask

    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: None = None) -> list[Part]: ...
    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T]) -> list[T]: ...
    def __call__(
        self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T] | None = None
    ) -> list[Part] | list[T]:
        written = rows.scatter(rows.valid, torch.zeros_like(canvas.masked)) & ~canvas.masked
        index = padded(written)
        if index is None:
            parts = self._predict(canvas, rows)
        else:
            length = canvas.shape[1]
            own = torch.arange(length, device=canvas.device).expand(canvas.shape)
            home = torch.cat([own, index], dim=1)
            behind = torch.arange(length, home.shape[1], device=canvas.device).expand_as(index)
            place = torch.cat([own, own[:, :1]], dim=1).scatter(1, index, behind)[:, :-1]
            parts = self._predict(self._shown(canvas, index), rows.moved(place, home.shape[1]))
            parts = [Part(part.rows.moved(home, length), part.ids, part.logits) for part in parts]
        return parts if reduce is None else [reduce(part) for part in parts]

    def _shown(self, canvas: Canvas, index: Tensor) -> Canvas:
        """The canvas with the shadows of the positions at `index` (B, M) behind it, L for none."""
        real, at = index < canvas.shape[1], index.clamp(max=canvas.shape[1] - 1)
        sample = torch.arange(index.shape[0], device=canvas.device).unsqueeze(1)
        number = 1 + torch.arange(index.shape[1], device=canvas.device).expand_as(index)
        plain, hole = torch.zeros_like(canvas.tokens), torch.ones_like(real)

        def behind(column: Tensor, values: Tensor | None = None) -> Tensor:
            values = column[sample, at] if values is None else values
            return torch.cat([column, values.to(column.dtype)], dim=1)

        return Canvas(
            tokens=behind(canvas.tokens, torch.full_like(index, self._mask)),
            modality=behind(canvas.modality),
            fillable=behind(canvas.fillable, ~hole),
            masked=behind(canvas.masked, hole),
            position=behind(canvas.position),
            segment=behind(canvas.segment, torch.where(real, canvas.segment[sample, at], -1)),
            span=None if canvas.span is None else behind(canvas.span),
            block=behind(plain, number),  # one of its own keeps each shadow from the others
            copy=behind(plain + PLAIN, torch.full_like(index, SHADOW)).to(torch.uint8),
            soft=None if canvas.soft is None else behind(canvas.soft),
        )
