"""The CUDA kernels against the reference; without a CUDA device these tests fail."""

from __future__ import annotations

import pytest
import torch

from mmdlm.canvas import IMAGE, TEXT, Canvas, Part, Rows
from mmdlm.model import (
    AttentionMask,
    Predictor,
    Reference,
    Sdpa,
    Transformer,
    TransformerConfig,
    Xformers,
    attend,
)
from mmdlm.model.attention import Kernel

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
KERNELS = [Sdpa(), Xformers(), Xformers(packed=True)]


def masks(length: int) -> dict[str, AttentionMask | None]:
    index = torch.arange(length, device="cuda")
    full = torch.zeros_like(index)
    packed = torch.where(index < length // 3, 0, 1)
    padded = torch.where(index < length - 5, 0, -1)
    segment = torch.stack([full, packed, padded])
    block = (index // 4).expand(3, -1)
    prefix = (index >= length // 2).long().expand(3, -1)
    copy = torch.where(index % 2 == 0, 0, 1).to(torch.uint8).expand(3, -1)
    position = torch.stack([index, index], -1).expand(3, -1, -1)
    return {
        "none": None,
        "segments": AttentionMask(segment),
        "blocks": AttentionMask(segment, block),
        "prefix": AttentionMask(segment, prefix),
        "copies": AttentionMask(segment, block, copy, position),
    }


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", ["none", "segments", "blocks", "prefix", "copies"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [64, 77])
def test_kernels_equal_the_reference(kernel: Kernel, name: str, dtype: torch.dtype, length: int) -> None:
    rng = torch.Generator("cuda").manual_seed(0)
    mask = masks(length)[name]
    live = torch.ones(3, length, dtype=torch.bool, device="cuda") if mask is None else mask.segment >= 0
    shapes = [(3, length, 4, 32), (3, length, 2, 32), (3, length, 2, 32)]
    values = [torch.randn(shape, device="cuda", generator=rng).to(dtype) for shape in shapes]
    results = []
    for chosen in (Reference(), kernel):
        qkv = [value.double() if chosen == Reference() else value for value in values]
        qkv = [value.detach().requires_grad_() for value in qkv]
        out = attend(*qkv, mask, kernel=chosen)
        out[live].sin().sum().backward()
        results.append([out[live], *(value.grad for value in qkv)])
    for want, got in zip(*results, strict=True):
        assert want is not None
        assert got is not None
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), want, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_predictor_on_cuda_equals_the_cpu() -> None:
    """Bounded rows, invalid entries included, and a built mask give what exact rows on the CPU give."""
    config = TransformerConfig(
        vocab_size=38, text=(0, 10), image=(13, 37), mask=37, dim=64, depth=2, num_heads=2
    )
    torch.manual_seed(0)
    predictor = Predictor(Transformer(config))
    tokens = torch.cat([torch.randint(0, 10, (3, 6)), torch.randint(13, 37, (3, 9))], 1)
    modality = torch.tensor([TEXT] * 6 + [IMAGE] * 9, dtype=torch.uint8).expand(3, -1)
    index = torch.arange(15)
    position = torch.stack([index, index], -1).expand(3, -1, -1)
    fillable = torch.ones(3, 15, dtype=torch.bool)
    canvas = Canvas(tokens, modality, fillable, fillable & False, position, tokens * 0)
    canvas = canvas.hide(torch.rand(3, 15) < 0.5, 37).pad_to(20)

    def spread(part: Part, into: torch.Tensor) -> torch.Tensor:
        return part.rows.scatter(part.logits.logsumexp(-1), into)

    tables = []
    for device in ("cpu", "cuda"):
        moved = canvas.to(device)
        table = torch.zeros(3, 20, device=device)
        for part in predictor.to(device)(moved, Rows.of(moved.masked)):
            table = spread(part, table)
        tables.append(table.cpu())
    torch.testing.assert_close(tables[0], tables[1], atol=1e-3, rtol=1e-3)
