"""The network: token ids to features, features to logits over a slice of ids. Knows no noise and no loss."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdlm.canvas import IMAGE, Canvas
from mmdlm.model.attention import Kernel
from mmdlm.model.cache import KeyValues, Memory
from mmdlm.model.layers import Attention, Block, RMSNorm, SwiGLU
from mmdlm.model.mask import AttentionMask
from mmdlm.model.rotary import rotary_table


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of a network, in plain JSON values.

    `text` and `image` are id ranges (first, one past the last): what may stand at a position of that
    modality; families with one softmax over everything give the same range twice.
    """

    vocab_size: int
    text: tuple[int, int]
    image: tuple[int, int]
    mask: int  # the id whose embedding stands at masked positions
    dim: int = 192
    depth: int = 6
    num_heads: int = 6
    num_kv_heads: int | None = None  # None: num_heads
    hidden: int | None = None  # width of the SwiGLU; None: 8/3 dim, up to a multiple of 64
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    qk_norm: bool = True
    qkv_bias: bool = False
    bias: bool = False  # of the other linear layers in a block
    tied: bool = False  # head = embedding
    modality_embedding: bool = True  # a learned vector per modality, added to the token's
    digits: tuple[int, ...] | None = (
        None  # image code = mixed-radix number of these digits, first digit fastest
    )
    grid: tuple[int, int] | None = None  # learned vectors for so many rows and columns of an image, added

    def __post_init__(self) -> None:
        kv = self.kv_heads
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"dim {self.dim} over {self.num_heads} heads: the head dimension must be a whole even number"
            )
        if kv < 1 or self.num_heads % kv:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads, got {kv}")
        for name, (first, last) in (("text", self.text), ("image", self.image)):
            if not 0 <= first <= last <= self.vocab_size:
                raise ValueError(
                    f"{name} ids {first}..{last} do not fit a vocabulary of {self.vocab_size} ids"
                )
        if not 0 <= self.mask < self.vocab_size:
            raise ValueError(f"mask id {self.mask} does not fit a vocabulary of {self.vocab_size} ids")
        if self.digits is not None and prod(self.digits) != self.image[1] - self.image[0]:
            raise ValueError(
                f"digits {self.digits} make {prod(self.digits)} codes, got an image range of {self.image}"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_dim(self) -> int:
        return -(-8 * self.dim // (3 * 64)) * 64 if self.hidden is None else self.hidden


class TokenTable(nn.Module):
    """One row of `dim` numbers per id; an image code's row is its own plus one row for each of its digits."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.image = config.image
        self.digits = config.digits
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        sizes = () if config.digits is None else config.digits
        self.digit_tables = nn.ParameterList(nn.Parameter(torch.empty(size, config.dim)) for size in sizes)

    def rows(self, ids: slice | None = None) -> Tensor:
        """The rows of `ids` (None: all), (n, dim), differentiable."""
        first, last = (0, self.weight.shape[0]) if ids is None else (ids.start, ids.stop)
        if not self.digits or last <= self.image[0] or self.image[1] <= first:
            return self.weight[first:last]
        codes = self.code_rows()
        low, high = max(first, self.image[0]), min(last, self.image[1])
        codes = codes[low - self.image[0] : high - self.image[0]] + self.weight[low:high]
        return torch.cat([self.weight[first:low], codes, self.weight[high:last]])

    def code_rows(self) -> Tensor:
        """Sum of its digits' rows for every code, (codes, dim); code = d0 + n0 * (d1 + n1 * (d2 + ...))."""
        total = self.digit_tables[0]
        for table in list(self.digit_tables)[1:]:
            total = (table[:, None] + total[None]).flatten(0, 1)
        return total


class GridTable(nn.Module):
    """One vector per row and one per column of an image: where a position lies in its own image.

    Rotary positions only tell how far apart two positions are, and holes are otherwise all alike.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(grid[0], dim))
        self.columns = nn.Parameter(torch.empty(grid[1], dim))

    def forward(self, canvas: Canvas) -> Tensor:
        """(B, L, dim), 0 outside images. Raises IndexError (on a CPU) for an image larger than the grid."""
        if canvas.span is None:
            raise ValueError("a grid tells the images of a row apart by their spans, this canvas has none")
        inside = canvas.modality == IMAGE
        span = torch.where(inside, canvas.span, -1)[..., None].expand_as(canvas.position) + 1
        batch, length = canvas.shape
        corner = canvas.position.new_full((batch, length + 1, 2), torch.iinfo(torch.long).max)
        corner = corner.scatter_reduce(1, span, canvas.position, "amin")
        place = torch.where(inside[..., None], canvas.position - corner.gather(1, span), 0)
        x = F.embedding(place[..., 0], self.rows) + F.embedding(place[..., 1], self.columns)
        return torch.where(inside[..., None], x, 0.0)


class Transformer(nn.Module):
    """A bidirectional pre-norm transformer over the tokens of a canvas."""

    def __init__(self, config: TransformerConfig, *, kernel: Kernel | None = None) -> None:
        """`kernel` of the attention; None lets the device choose."""
        super().__init__()
        self.config = config
        self.kernel = kernel
        self.recompute = 0  # see `checkpoint_blocks`
        self.compiled = False
        self.embedding = TokenTable(config)
        self.modality = nn.Parameter(torch.empty(3, config.dim)) if config.modality_embedding else None
        self.places = None if config.grid is None else GridTable(config.grid, config.dim)
        self.blocks = nn.ModuleList(build_block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else TokenTable(config)
        initialise(self)

    def features(self, canvas: Canvas) -> Tensor:
        """The residual stream after the last block, (B, L, dim), not normalised yet.

        A masked position enters as the mask id: its own id is never read.
        """
        x = F.embedding(self._ids(canvas), self.embedding.rows())
        extra = self._extra(canvas)
        x = x if extra is None else x + extra
        if canvas.soft is not None:
            x = x + canvas.soft.to(x.dtype)
        mask, table = AttentionMask.of(canvas), self._table(canvas, x.dtype)
        if self.compiled and mask is not None:
            mask.dense()  # made here once, not in the code of the first block
        training = torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            if training and self.recompute and number % self.recompute == 0:
                x = checkpoint(
                    block, x, table, mask, kernel=self.kernel, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, table, mask, kernel=self.kernel)
        return x

    def checkpoint_blocks(self, every: int = 1) -> None:
        """From now on the gradient computes the first of `every` blocks again, from what went in; 0: none.

        All blocks cost a third more arithmetic, and keep one residual stream each in place of all that
        happens inside. Values and gradients stay what they are. Raises ValueError below 0.
        """
        if every < 0:
            raise ValueError(f"every must be at least 0 (no block), got {every}")
        self.recompute = every

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` of every block by itself, with its `options`; names and weights stay.

        Blocks of one shape share one compilation, which takes seconds where a whole network takes minutes.
        Attention then takes its mask as booleans, where it would go run by run on a CPU.
        """
        self.compiled = True
        for block in self.blocks:
            block.compile(**options)

    def remember(self, canvas: Canvas) -> Memory:
        """An empty memory for generations on `canvas`, for `features_at`."""
        dim, dtype = self.config.dim, self.embedding.weight.dtype
        return Memory(
            table=self._table(canvas, dtype),
            extra=self._extra(canvas),
            mask=AttentionMask.of(canvas),
            layers=[KeyValues() for _ in self.blocks],
            features=torch.zeros(*canvas.shape, dim, dtype=dtype, device=canvas.device),
            tokens=torch.zeros_like(canvas.tokens),
            masked=torch.zeros_like(canvas.masked),
            known=torch.zeros_like(canvas.masked),
        )

    def features_at(self, canvas: Canvas, index: Tensor, memory: Memory) -> None:
        """Computes the features at `index` (B, M) long and leaves them, with keys and values, in `memory`.

        Other positions are seen through the keys and values that they left there. L is an index of nothing.
        """
        if canvas.soft is not None:
            raise ValueError("what is added to embeddings changes at every step and is not remembered")
        x = F.embedding(memory.rows(self._ids(canvas), index), self.embedding.rows())
        x = x if memory.extra is None else x + memory.rows(memory.extra, index)
        table = memory.rows(memory.table, index)
        length = canvas.shape[1]
        mask, seen = (None, length) if memory.mask is None else memory.mask.at(index)
        for block, layer in zip(self.blocks, memory.layers, strict=True):
            x = block(
                x,
                table,
                mask,
                kernel=self.kernel,
                cache=lambda k, v, layer=layer: layer.update(index, k, v, length, seen),
            )
        memory.store(index, x, canvas.tokens, canvas.masked)

    def _ids(self, canvas: Canvas) -> Tensor:
        return torch.where(canvas.masked, self.config.mask, canvas.tokens)

    def _extra(self, canvas: Canvas) -> Tensor | None:
        """(B, L, dim): what is added to embeddings and depends on no token."""
        extra = None if self.modality is None else F.embedding(canvas.modality.long(), self.modality)
        if self.places is None:
            return extra
        places = self.places(canvas)
        return places if extra is None else extra + places

    def _table(self, canvas: Canvas, dtype: torch.dtype) -> Tensor:
        config = self.config
        return rotary_table(
            canvas.position, config.dim // config.num_heads, base=config.rope_base, dtype=dtype
        )

    def logits(self, features: Tensor, ids: slice) -> Tensor:
        """Scores of `ids` at some features: (M, dim) -> (M, len(ids)), float32 or better."""
        table = self.embedding if self.head is None else self.head
        scores = project(self.norm(features), table.rows(ids))
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, D) times the transpose of `weight` (V, D).

    For a few rows and many columns a CPU is 1.1 to 1.9 times as fast the other way round, on whole vectors.
    """
    few = 4 <= x.shape[0] <= 64 and weight.shape[0] >= 4096
    if not few or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight)
    whole = F.pad(x, (0, 0, 0, -x.shape[0] % 16))
    return torch.mm(weight, whole.t())[:, : x.shape[0]].t().contiguous()


def build_block(config: TransformerConfig) -> Block:
    """One block of the shape that `config` says."""
    eps = config.norm_eps if config.qk_norm else None
    heads = (config.num_heads, config.kv_heads)
    attention = Attention(config.dim, heads, eps=eps, qkv_bias=config.qkv_bias, bias=config.bias)
    return Block(
        attention,
        SwiGLU(config.dim, config.hidden_dim, bias=config.bias),
        dim=config.dim,
        eps=config.norm_eps,
    )


@torch.no_grad()
def initialise(network: Transformer, generator: torch.Generator | None = None) -> None:
    """Draws all weights anew: the one place that says how a network starts.

    Linear layers N(0, 1 / fan_in), those that write to the residual stream divided by sqrt(2 depth);
    embeddings and head N(0, 0.02^2) (a code's own row beside its digits' rows a tenth of that); norms 1,
    biases 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, TokenTable):
            for table in (module.weight, *module.digit_tables):
                table.normal_(0.0, 0.02, generator=generator)
            if module.digits:
                module.weight[module.image[0] : module.image[1]].mul_(0.1)
    for block in network.blocks:
        assert isinstance(block, Block)
        block.attention.out.weight.div_((2 * network.config.depth) ** 0.5)
        block.mlp.down.weight.div_((2 * network.config.depth) ** 0.5)
    if network.modality is not None:
        network.modality.normal_(0.0, 0.02, generator=generator)
    if network.places is not None:
        network.places.rows.normal_(0.0, 0.02, generator=generator)
        network.places.columns.normal_(0.0, 0.02, generator=generator)
