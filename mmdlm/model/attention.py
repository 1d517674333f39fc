"""Attention behind one signature, and the only file that names its kernels; knows no canvas and no network.

Shapes: B rows, L positions, H query heads, G key/value heads (H a multiple of G), D dimensions of a head.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.model.mask import AttentionMask


class Kernel(Protocol):
    """softmax(q k' / sqrt(D)) v over the keys that the mask lets through (None: all of them)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        """q (B, L, H, D), k and v (B, L, G, D) -> (B, L, H, D), in q's dtype."""
        ...


@dataclass(frozen=True)
class Reference:
    """The formula written out, softmax in float32 or better: slow, exact, differentiable, runs anywhere."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(exact), k.to(exact)) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.dense(), float("-inf"))
        weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
        weights = weights / weights.sum(-1, keepdim=True)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v.to(exact)).to(q.dtype)


@dataclass(frozen=True)
class Sdpa:
    """`torch.nn.functional.scaled_dot_product_attention`: fused on CPU and CUDA, with or without a mask.

    `packed`: on a CPU, rows whose mask is nothing but runs of segments (packed documents, padding) are
    attended to run by run where that is less work: nothing is spent across documents nor on padding, and no
    mask of L x L is made. Elsewhere, and where there are blocks or copies, the mask goes in as booleans.
    """

    packed: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        # compiled code would be made anew for every batch's lengths
        if mask is not None and self.packed and q.device.type == "cpu" and not torch.compiler.is_compiling():
            pieces = mask.form("pieces", _pieces)
            if pieces is not None:
                return _by_pieces(q, k, v, pieces)
        seen = None if mask is None else mask.dense()
        return _sdpa(q, k, v, seen)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


@dataclass(frozen=True)
class _Pieces:
    """The rows laid end to end, cut into the runs of the mask."""

    sizes: list[int]
    alone: list[bool]  # padding: each of its positions sees itself only


# What a call for one piece costs beside its pairs of query and key, in pairs: measured on two cores, with
# heads of 32, forward and backward. So many short rows with little padding go the other way.
_CALL = 1024


def _pieces(mask: AttentionMask) -> _Pieces | None:
    """None where runs are not the whole mask, or would take longer than it."""
    sizes = mask.runs()
    if sizes is None:
        return None
    starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    alone = (mask.segment.reshape(-1)[starts] < 0).tolist()
    pairs = sum(0 if padding else size**2 + _CALL for size, padding in zip(sizes, alone, strict=True))
    batch, length = mask.shape
    return _Pieces(list(sizes), alone) if pairs < batch * length**2 else None


def _by_pieces(q: Tensor, k: Tensor, v: Tensor, pieces: _Pieces) -> Tensor:
    flat = [x.flatten(0, 1)[None].split(pieces.sizes, dim=1) for x in (q, k, v)]
    out = [v if alone else _sdpa(q, k, v) for q, k, v, alone in zip(*flat, pieces.alone, strict=True)]
    return torch.cat(out, dim=1).view(q.shape)


@dataclass(frozen=True)
class Xformers:
    """xformers' `memory_efficient_attention`; CUDA only, in float32 and the 16-bit types.

    `packed`: rows whose mask is nothing but runs of segments (packed documents, padding) go through as a
    block-diagonal mask on one long row, which skips what is not seen; the run lengths must come to the host,
    one sync a forward. Without it, or where there are blocks or copies, the mask goes in as a dense bias and
    nothing syncs.
    """

    packed: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
        if q.device.type != "cuda":
            raise ValueError(
                f"the xformers kernel runs on CUDA only, as all of xformers' operators do; got tensors on"
                f" {q.device}; use Sdpa() or leave the kernel to default_kernel"
            )
        if q.dtype == torch.float64:
            raise ValueError("the xformers kernel computes in float32 and 16 bits, got float64; use Sdpa()")
        import xformers.ops as ops

        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        if mask is None:
            return ops.memory_efficient_attention(q, k, v)
        if self.packed and mask.runs() is not None:
            batch, length, heads, dim = q.shape
            flat = (1, batch * length, heads, dim)
            diagonal = mask.form(("diagonal", q.device), lambda made: block_diagonal(made, q.device))
            out = ops.memory_efficient_attention(
                q.reshape(flat), k.reshape(flat), v.reshape(flat), attn_bias=diagonal
            )
            return out.reshape(batch, length, heads, dim)
        bias = mask.bias(q.dtype).expand(-1, q.shape[2], -1, -1)
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, *, kernel: Kernel | None = None
) -> Tensor:
    """Attention of q (B, L, H, D) on k, v (B, L, G, D), G dividing H -> (B, L, H, D).

    Without a `kernel` the device chooses, see `default_kernel`.
    """
    if kernel is None:
        kernel = default_kernel(q)
    return kernel(q, k, v, mask)


def default_kernel(q: Tensor) -> Kernel:
    """xformers where installed and able to take q (CUDA, not float64, D a multiple of 8), SDPA elsewhere."""
    if (
        q.device.type == "cuda"
        and q.dtype != torch.float64
        and q.shape[-1] % 8 == 0
        and _xformers_installed()
    ):
        return Xformers()
    return Sdpa()


def block_diagonal(mask: AttentionMask, device: torch.device | str):
    """The runs of `mask` as xformers' `BlockDiagonalMask` on `device`, over the rows laid end to end."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    runs = mask.runs()
    if runs is None:
        raise ValueError("a mask with blocks, copies or a segment in two pieces is not block-diagonal")
    return BlockDiagonalMask.from_seqlens(list(runs), device=torch.device(device))


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, G, D) -> (B, L, num_heads, D): each head serves num_heads / G neighbouring query heads."""
    if x.shape[2] == num_heads:
        return x
    return x.repeat_interleave(num_heads // x.shape[2], dim=2)


@cache
def _xformers_installed() -> bool:
    return importlib.util.find_spec("xformers") is not None
