"""One setting for text and one for image. Knows no policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, Canvas

T = TypeVar("T")


@dataclass(frozen=True)
class ByModality(Generic[T]):
    """One setting for text and one for image, wherever a policy takes a setting."""

    text: T
    image: T

    @staticmethod
    def of(value: T | ByModality[T]) -> ByModality[T]:
        """The same setting for both, or the two that were given."""
        return value if isinstance(value, ByModality) else ByModality(value, value)

    @property
    def both(self) -> tuple[T, T]:
        """Text's, image's."""
        return self.text, self.image


def by_modality(value: T | ByModality[T], canvas: Canvas, make: Callable[[T], Tensor]) -> Tensor:
    """(B, L): what `make` makes, (B, L) each, of text's setting at text and of image's elsewhere.

    It is called once where both settings are equal.
    """
    text, image = ByModality.of(value).both
    return make(text) if text == image else spread(ByModality(make(text), make(image)), canvas)


def spread(values: ByModality[Tensor], canvas: Canvas) -> Tensor:
    """(B, L) of the values (B, 1) or (B, L) of each modality: text's at text, image's elsewhere."""
    return torch.where(canvas.modality == IMAGE, values.image, values.text)
