"""Which position sees which, read off the columns of a canvas; knows no attention kernel and no network."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import torch
from torch import Tensor

from mmdlm.canvas import NOISY, PLAIN, SHADOW, Canvas

T = TypeVar("T")


class AttentionMask:
    """Visibility between the positions of each row, shared by all layers of a forward.

    A position sees its own segment; then the block rule, `block[key] <= block[query]`; then the copies: a
    PLAIN key is seen by PLAIN rows, by NOISY rows of later blocks only, and by SHADOW rows except at their
    own position; a NOISY or SHADOW key is seen by rows of the same copy and block only. Padding (segment -1)
    is seen by nobody. Every position sees itself whatever the rules say, padding too, so that no row of
    scores is empty and none becomes NaN.
    """

    def __init__(
        self,
        segment: Tensor,
        block: Tensor | None = None,
        copy: Tensor | None = None,
        position: Tensor | None = None,
    ) -> None:
        """(B, L) each, `position` (B, L, 2), as in a `Canvas`; `copy` needs `position`, or ValueError."""
        if copy is not None and position is None:
            raise ValueError(
                "a mask with copies needs the positions: a SHADOW row must not see its own position"
            )
        self.segment = segment
        self.block = block
        self.copy = copy
        self.position = position
        self.queries: Tensor | None = None  # (B, M) long: the queries, where they are not all positions
        self._whole: AttentionMask | None = None
        self._forms: dict[Hashable, object] = {}

    @staticmethod
    def of(canvas: Canvas) -> AttentionMask | None:
        """The mask of a canvas; None where everything sees everything.

        That is found out on the CPU only: on an accelerator it would cost a host sync and a branch on data,
        so there the mask is always built.
        """
        if canvas.device.type == "cpu" and canvas.block is None and canvas.copy is None:
            segment = canvas.segment
            if bool(((segment == segment[:, :1]) & (segment >= 0)).all()):
                return None
        return AttentionMask(canvas.segment, canvas.block, canvas.copy, canvas.position)

    def at(self, index: Tensor) -> tuple[AttentionMask | None, int]:
        """The same mask for the queries at `index` (B, M) alone, and n, how many keys (the first) it is for.

        Its dense form is (B, 1, M, n); None where all of them are seen. An index of L stands for nothing. On
        the CPU n is up to the last key that is seen, elsewhere, where a look would be a host sync, L.
        """
        length = self.shape[1]
        mask = AttentionMask(self.segment, self.block, self.copy, self.position)
        mask.queries = index.clamp(max=length - 1)
        mask._whole = self
        if index.device.type != "cpu":
            return mask, length
        nothing = (index == length)[:, None, :, None]
        last = (mask.dense() & ~nothing).any(dim=2) * torch.arange(1, length + 1)
        keys = max(1, int(last.max()))
        dense = mask._forms["dense"] = (mask.dense() | nothing)[..., :keys]
        return None if bool(dense.all()) else mask, keys

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.segment.shape[0], self.segment.shape[1]

    def dense(self) -> Tensor:
        """(B, 1, L, L) bool, True where the query (third axis) sees the key (last axis)."""
        return self.form("dense", AttentionMask._dense)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, L, L) of `dtype`, 0 where seen and -inf elsewhere.

        It is a slice out of rows whose length is a multiple of 8. Memory-efficient kernels read the bias in
        aligned vectors and refuse other strides.
        """
        return self.form(("bias", dtype), lambda mask: mask._bias(dtype))

    def runs(self) -> tuple[int, ...] | None:
        """Lengths of the runs of equal segment over the rows laid end to end (they sum to B * L), or None.

        None where runs do not tell the whole story: blocks, copies, or a segment in two pieces. Padding is a
        run of its own, which sees itself and nothing else. On an accelerator this is one host sync, once per
        mask.
        """
        return self.form("runs", AttentionMask._runs)

    def form(self, key: Hashable, make: Callable[[AttentionMask], T]) -> T:
        """Some derived form of the mask, made at the first call and kept (a kernel's own, say)."""
        if key not in self._forms:
            self._forms[key] = make(self)
        return cast(T, self._forms[key])

    def _dense(self) -> Tensor:
        if self._whole is not None and self.queries is not None:
            whole = self._whole.dense()
            return whole.gather(2, self.queries[:, None, :, None].expand(-1, -1, -1, whole.shape[3]))
        segment = self.segment
        seen = (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, None, :]
        if self.block is not None:
            seen = seen & (self.block[:, None, :] <= self.block[:, :, None])
        if self.copy is not None:
            seen = seen & self._copies(self.copy)
        alone = torch.eye(segment.shape[1], dtype=torch.bool, device=segment.device)
        return (seen | alone)[:, None]

    def _copies(self, copy: Tensor) -> Tensor:
        assert self.position is not None
        block = torch.zeros_like(self.segment) if self.block is None else self.block
        query, key = copy[:, :, None], copy[:, None, :]
        earlier = block[:, None, :] < block[:, :, None]
        same_block = block[:, None, :] == block[:, :, None]
        elsewhere = (self.position[:, :, None] != self.position[:, None, :]).any(-1)
        plain_key = (query == PLAIN) | ((query == NOISY) & earlier) | ((query == SHADOW) & elsewhere)
        return torch.where(key == PLAIN, plain_key, (query == key) & same_block)

    def _bias(self, dtype: torch.dtype) -> Tensor:
        dense = self.dense()
        batch, _, queries, length = dense.shape
        rows = torch.zeros(batch, 1, queries, -(-length // 8) * 8, dtype=dtype, device=dense.device)
        return rows[..., :length].masked_fill_(~dense, float("-inf"))

    def _runs(self) -> tuple[int, ...] | None:
        if self.block is not None or self.copy is not None or self.queries is not None:
            return None
        segment = self.segment.cpu()  # the one sync
        begins = torch.ones_like(segment, dtype=torch.bool)
        begins[:, 1:] = segment[:, 1:] != segment[:, :-1]
        where = begins.reshape(-1).nonzero().squeeze(1)
        document = segment.reshape(-1)[where]
        pairs = torch.stack([where // segment.shape[1], document], dim=1)[document >= 0]
        ends = torch.cat([where[1:], where.new_tensor([segment.numel()])])
        twice = len(pairs.unique(dim=0)) < len(pairs)
        return None if twice else tuple((ends - where).tolist())
