"""The layers of one transformer block; knows no canvas, no vocabulary and no mask rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mmdlm.model.attention import Kernel, attend
from mmdlm.model.mask import AttentionMask
from mmdlm.model.rotary import rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. arXiv:1910.07467."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix. arXiv:2002.05202."""

    def __init__(self, dim: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        if both.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.down(cast(Tensor, Gated.apply(both)))
        gate, up = both.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Gated(Function):
    """silu(gate) * up of both side by side (..., 2 H) -> (..., H), keeping nothing but them for the gradient.

    Autograd would keep silu(gate) too, a ninth of what a block keeps, and build the gradient from two halves.
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        (grad,) = grad_outputs
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        to_gate, to_up = result.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return result


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries and keys normalised on wish.

    arXiv:2305.13245, arXiv:2010.04245.
    """

    def __init__(
        self, dim: int, heads: tuple[int, int], *, eps: float | None, qkv_bias: bool, bias: bool
    ) -> None:
        """`heads`: query heads and key/value heads; `eps` of the query and key norms, None without them."""
        super().__init__()
        self.num_heads, self.num_kv_heads = heads
        self.head_dim = dim // self.num_heads
        self.qkv = nn.Linear(dim, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.q_norm = None if eps is None else RMSNorm(self.head_dim, eps)
        self.k_norm = None if eps is None else RMSNorm(self.head_dim, eps)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: AttentionMask | None,
        *,
        kernel: Kernel | None,
        cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """`cache` takes the keys and values of x and gives those that are attended to."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, -1, self.head_dim)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            k, v = cache(k, v)
        return self.out(attend(q, k, v, mask, kernel=kernel).reshape(batch, length, -1))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, attention: Attention, mlp: SwiGLU, *, dim: int, eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(dim, eps)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: AttentionMask | None,
        *,
        kernel: Kernel | None,
        cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, mask, kernel=kernel, cache=cache)
        return x + self.mlp(self.mlp_norm(x))
