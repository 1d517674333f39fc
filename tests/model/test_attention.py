"""Attention kernels against the written-out formula, and xformers' masks against ours, all on the CPU."""

from __future__ import annotations

import pytest
import torch

from mmdlm.canvas import NOISY, PLAIN, SHADOW
from mmdlm.model import AttentionMask, Reference, Sdpa, Xformers, attend, default_kernel
from mmdlm.model.attention import block_diagonal

SEGMENT = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [0] * 7, [4, 4, 5, 5, 5, 6, -1]])
BLOCK = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 1, 2, 2, 3], [0, 0, 0, 1, 1, 0, 0]])
INDEX = torch.arange(7).expand(3, 7)
POSITION = torch.stack([INDEX, INDEX], dim=-1)
COPY = torch.tensor([[PLAIN, NOISY, PLAIN, PLAIN, NOISY, PLAIN, PLAIN]] * 2 + [[SHADOW, PLAIN] * 3 + [PLAIN]])
MASKS = {
    "none": None,
    "segments": AttentionMask(SEGMENT),
    "blocks": AttentionMask(SEGMENT, BLOCK),
    "copies": AttentionMask(SEGMENT, BLOCK, COPY.to(torch.uint8), POSITION),
}


def queries(kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, 7, 4, 8), (3, 7, kv_heads, 8), (3, 7, kv_heads, 8)]
    return [
        torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]


def columns(*sizes: int, length: int = 120) -> list[int]:
    """One row of documents of these sizes, and padding behind them."""
    made = [number for number, size in enumerate(sizes) for _ in range(size)]
    return made + [-1] * (length - len(made))


def test_documents_of_a_row_are_attended_to_one_by_one_on_a_cpu(monkeypatch) -> None:
    segment = torch.tensor([columns(50, 1, 30), columns(120), columns(20, 60, 40)])
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 120, heads, 8, generator=rng, dtype=torch.float64) for heads in (4, 2, 2)]
    results = []
    for kernel in (Reference(), Sdpa(packed=False), Sdpa()):
        mask = AttentionMask(segment)
        if kernel == Sdpa():
            monkeypatch.setattr(AttentionMask, "dense", lambda self: pytest.fail("a mask of L x L"))
        qkv = [x.clone().requires_grad_() for x in inputs]
        out = attend(*qkv, mask, kernel=kernel)
        out.sin().sum().backward()
        results.append([out, *(x.grad for x in qkv)])
    for ours, dense, theirs in zip(results[2], results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        torch.testing.assert_close(dense, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(
            torch.tensor([[0] * 9 + [-1]] * 20)
        ),  # calls for twenty short rows cost more than they save
        AttentionMask(torch.tensor([columns(60, 60)]), torch.arange(120)[None] // 8),
        AttentionMask(torch.tensor([columns(40, 40)[:60] + [0] * 60])),
    ],
    ids=["short", "blocks", "two pieces"],
)
def test_other_masks_go_in_as_booleans(mask: AttentionMask, monkeypatch) -> None:
    dense, asked = mask.dense(), []
    monkeypatch.setattr(mask, "dense", lambda: asked.append(1) or dense)
    q, k, v = (torch.randn(*mask.shape, 2, 8, dtype=torch.float64) for _ in range(3))
    out = attend(q, k, v, mask, kernel=Sdpa())
    assert asked
    torch.testing.assert_close(out, attend(q, k, v, mask, kernel=Reference()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sdpa_equals_the_reference_forward_and_backward(name: str, kv_heads: int) -> None:
    results = []
    for kernel in (Reference(), Sdpa()):
        qkv = queries(kv_heads)
        out = attend(*qkv, MASKS[name], kernel=kernel)
        out.sin().sum().backward()
        results.append([out, *(x.grad for x in qkv)])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_grouped_queries_use_neighbouring_heads() -> None:
    q, k, v = queries(2)
    whole = attend(q, k, v, None, kernel=Reference())
    for head in range(4):
        group = slice(head // 2, head // 2 + 1)
        alone = attend(q[:, :, head : head + 1], k[:, :, group], v[:, :, group], None, kernel=Reference())
        torch.testing.assert_close(whole[:, :, head : head + 1], alone)


def test_the_reference_is_a_mean_of_the_visible_values() -> None:
    q, k, v = queries(4)
    mask = MASKS["segments"]
    out = attend(torch.zeros_like(q), k, v, mask, kernel=Reference())
    torch.testing.assert_close(out[0, 4], v[0, 3:5].mean(0))
    torch.testing.assert_close(out[0, 6], v[0, 6])


def test_half_precision_comes_back_in_half_precision() -> None:
    q, k, v = queries(2, torch.bfloat16)
    exact = attend(q.double(), k.double(), v.double(), None, kernel=Reference())
    for kernel in (Reference(), Sdpa()):
        out = attend(q, k, v, None, kernel=kernel)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=0)


def test_xformers_by_name_on_a_cpu_says_why_not() -> None:
    q, k, v = queries(4, torch.float32)
    with pytest.raises(ValueError, match=r"CUDA only.*cpu"):
        attend(q, k, v, None, kernel=Xformers())
    assert default_kernel(q) == Sdpa()


def test_xformers_block_diagonal_mask_is_our_mask() -> None:
    pytest.importorskip("xformers")
    mask = MASKS["segments"]
    assert mask is not None
    assert mask.runs() == (3, 2, 2, 7, 2, 3, 1, 1)
    theirs = block_diagonal(mask, "cpu").materialize((1, 1, 21, 21))[0, 0] == 0
    live = SEGMENT.reshape(-1) >= 0
    ours = torch.block_diag(*mask.dense()[:, 0].float()).bool()
    assert torch.equal(ours[live], theirs[live])


def test_xformers_takes_our_bias_as_it_lies() -> None:
    for name in ("segments", "blocks", "copies"):
        mask = MASKS[name]
        assert mask is not None
        bias = mask.bias(torch.bfloat16)
        assert bias.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
        assert torch.equal(bias == 0, mask.dense())
        assert bool((bias[~mask.dense()] == float("-inf")).all())


def test_only_plain_runs_of_segments_are_block_diagonal() -> None:
    assert AttentionMask(SEGMENT, BLOCK).runs() is None
    assert AttentionMask(torch.tensor([[0, 1, 0]])).runs() is None
    assert AttentionMask(torch.tensor([[0, 0, 0], [0, -1, -1]])).runs() == (3, 1, 2)
    with pytest.raises(ValueError, match="not block-diagonal"):
        block_diagonal(AttentionMask(SEGMENT, BLOCK), "cpu")
