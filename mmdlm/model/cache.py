"""What a network remembers of a canvas: keys, values and features of every position. Knows no sampler."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.model.mask import AttentionMask


class KeyValues:
    """Keys (rotated) and values of one layer, written in place; one place more than the canvas has."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(
        self, index: Tensor, keys: Tensor, values: Tensor, length: int, seen: int
    ) -> tuple[Tensor, Tensor]:
        """(B, seen, G, D) each: the first of `length`, after the ones at `index` (B, M) were exchanged."""
        if self.keys is None or self.values is None:
            shape = (keys.shape[0], length + 1, *keys.shape[2:])
            self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        where = index[:, :, None, None].expand_as(keys)
        self.keys.scatter_(1, where, keys)
        self.values.scatter_(1, where, values)
        return self.keys[:, :seen], self.values[:, :seen]


@dataclass
class Memory:
    """One generation's state of a network on one canvas, whose columns but tokens and holes stay.

    `features` are those of the last layer, `tokens` and `masked` what each position held when it was last
    computed; `known` says where it ever was. An index of L, one behind the last, stands for nothing.
    """

    table: Tensor  # (B, L, 1, D / 2) complex   the rotary turns
    extra: Tensor | None  # (B, L, dim)   what is added to the tokens' embeddings
    mask: AttentionMask | None
    layers: list[KeyValues]
    features: Tensor  # (B, L, dim)
    tokens: Tensor  # (B, L) long
    masked: Tensor  # (B, L) bool
    known: Tensor  # (B, L) bool
    notes: dict[str, Tensor] = field(default_factory=dict)  # what a cache writes down for itself

    @staticmethod
    def rows(column: Tensor, index: Tensor) -> Tensor:
        """(B, L, ...) -> (B, M, ...); what stands at the index of nothing means nothing."""
        index = index.clamp(max=column.shape[1] - 1)
        where = index.reshape(*index.shape, *([1] * (column.ndim - 2)))
        return column.gather(1, where.expand(*index.shape, *column.shape[2:]))

    def store(self, index: Tensor, features: Tensor, tokens: Tensor, masked: Tensor) -> None:
        """What was computed at `index` (B, M), and from what.

        Where `notes` has a "similarity" (B, L), the cosine to the features that stood there is put in it.
        """
        if "similarity" in self.notes:
            alike = F.cosine_similarity(features.float(), self.rows(self.features, index).float(), dim=2)
            self.notes["similarity"] = _written(self.notes["similarity"], index, alike)
        self.features = _written(self.features, index, features)
        self.tokens = _written(self.tokens, index, self.rows(tokens, index))
        self.masked = _written(self.masked, index, self.rows(masked, index))
        self.known = _written(self.known, index, torch.ones_like(index, dtype=torch.bool))


def _written(column: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """`column` (B, L, ...) with `values` (B, M, ...) at `index`."""
    spare = torch.cat([column, column[:, :1]], dim=1)
    where = index.reshape(*index.shape, *([1] * (column.ndim - 2))).expand_as(values)
    return spare.scatter_(1, where, values)[:, :-1]
