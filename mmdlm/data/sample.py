"""The record that a data source gives; knows no source and no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class SampleError(ValueError):
    """A sample cannot be had: `name` says which (a file, a row of it), `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (self.name, self.reason)  # across processes, whole


@dataclass(frozen=True, eq=False)
class Sample:
    """One item of a data set: a picture, texts that describe it, perhaps a question; or texts alone.

    Or a document: `pieces`, texts and pictures in the order in which they stand, and none of the others.
    """

    name: str  # what its source calls it, fit for messages
    image: np.ndarray | None = None  # (H, W, 3) uint8 RGB
    texts: tuple[str, ...] = ()  # equally good descriptions, or the text itself
    question: str | None = None
    answer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # whatever else the source knows
    pieces: tuple[str | np.ndarray, ...] = ()  # texts, and pictures as `image` is one

    def __post_init__(self) -> None:
        for image in self.all_images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"{self.name}: an image is (H, W, 3) uint8, got {image.shape} {image.dtype}")
        if isinstance(self.texts, str):
            raise ValueError(f"{self.name}: texts is a tuple of strings, got the string {self.texts!r}")
        others = self.image, self.texts or None, self.question, self.answer
        if self.pieces and any(other is not None for other in others):
            raise ValueError(f"{self.name}: a document has pieces and no image, texts, question or answer")

    @property
    def all_images(self) -> tuple[np.ndarray, ...]:
        """The picture, or those of the document in their order."""
        if self.image is not None:
            return (self.image,)
        return tuple(piece for piece in self.pieces if isinstance(piece, np.ndarray))

    @property
    def all_texts(self) -> tuple[str, ...]:
        """The texts, or those of the document in their order."""
        return self.texts or tuple(piece for piece in self.pieces if isinstance(piece, str))
