"""Block-causal and prefix-causal attention: every kernel, and the whole network, against loops over pairs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmdlm.canvas import PAD, TEXT, Canvas, Rows
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

# Of each row the documents packed in it, as (length, prompt); the rest of its 12 positions is padding.
ROWS = [[(12, 5)], [(7, 3)], [(6, 2), (5, 1)], [(1, 1), (3, 0), (7, 6)]]
LENGTH = 12
Rule = Callable[[int, int, int], bool]  # query, key, prompt, counted within the document -> seen

RULES: dict[str, tuple[Callable[[int, int], int], Rule]] = {
    # a document's block column at place i, given its prompt; what a query may see
    "causal": (lambda i, prompt: i, lambda q, k, prompt: k <= q),
    "blocks of 4": (lambda i, prompt: i // 4, lambda q, k, prompt: k < 4 * (q // 4) + 4),
    "one block": (lambda i, prompt: 0, lambda q, k, prompt: True),
    "prefix": (lambda i, prompt: int(i >= prompt), lambda q, k, prompt: k < prompt or q >= prompt),
    "prompt and blocks of 2": (
        lambda i, prompt: 0 if i < prompt else 1 + (i - prompt) // 2,
        lambda q, k, prompt: k < prompt or (q >= prompt and k < prompt + 2 * ((q - prompt) // 2) + 2),
    ),
}
KERNELS: list[Kernel] = [Reference(), Sdpa()]
every_rule = pytest.mark.parametrize("rule", RULES)


def mask_of(rule: str) -> AttentionMask:
    block, segment = torch.zeros(len(ROWS), LENGTH).long(), torch.full((len(ROWS), LENGTH), -1)
    for row, documents in enumerate(ROWS):
        start = 0
        for number, (length, prompt) in enumerate(documents):
            segment[row, start : start + length] = number
            block[row, start : start + length] = torch.tensor(
                [RULES[rule][0](i, prompt) for i in range(length)]
            )
            start += length
    return AttentionMask(segment, block)


def seen(rule: str) -> list[list[list[int]]]:
    """The keys that each query of each row sees, by loops over its document alone; padding sees itself."""
    rows = []
    for documents in ROWS:
        row, start = [], 0
        for length, prompt in documents:
            for query in range(length):
                keys = [key for key in range(length) if RULES[rule][1](query, key, prompt)]
                row.append([start + key for key in keys])
            start += length
        rows.append(row + [[i] for i in range(start, LENGTH)])
    return rows


def by_hand(q: Tensor, k: Tensor, v: Tensor, keys: list[list[list[int]]]) -> Tensor:
    """Attention of each query on its own keys, one at a time, in float64; one key head serves two."""
    out = torch.zeros_like(q, dtype=torch.float64)
    k, v = (x.double().repeat_interleave(2, dim=2) for x in (k, v))
    for row, queries in enumerate(keys):
        for query, visible in enumerate(queries):
            scores = torch.einsum("hd,khd->kh", q[row, query].double(), k[row, visible]) * q.shape[-1] ** -0.5
            out[row, query] = torch.einsum("kh,khd->hd", scores.softmax(dim=0), v[row, visible])
    return out


def queries(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (len(ROWS), LENGTH, 8, 8)
    q, k, v = (torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for _ in range(3))
    return q[:, :, :4], k[:, :, :2], v[:, :, :2]


@every_rule
def test_the_dense_mask_is_what_the_rule_says(rule: str) -> None:
    dense = mask_of(rule).dense()[:, 0]
    assert [[row.nonzero()[:, 0].tolist() for row in sample] for sample in dense] == seen(rule)


@every_rule
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_kernels_attend_where_the_rule_says(
    rule: str, kernel: Kernel, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v = queries(dtype)
    out = attend(q, k, v, mask_of(rule), kernel=kernel)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_hand(q, k, v, seen(rule)), atol=tolerance, rtol=tolerance)


@every_rule
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_gradients_go_where_the_rule_says(rule: str, kernel: Kernel) -> None:
    results = []
    for run in (
        lambda q, k, v: attend(q, k, v, mask_of(rule), kernel=kernel),
        lambda q, k, v: by_hand(q, k, v, seen(rule)),
    ):
        q, k, v = (x.requires_grad_() for x in queries(torch.float64))
        run(q, k, v).sin().sum().backward()
        results.append([q.grad, k.grad, v.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@every_rule
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_some_queries_alone_attend_as_they_do_among_all(rule: str, kernel: Kernel) -> None:
    """As a cache asks: some positions of each row, in any order; L stands for nothing."""
    q, k, v = queries(torch.float64)
    index = torch.tensor([[3, 11, 0], [6, 2, LENGTH], [7, 5, 6], [4, LENGTH, LENGTH]])
    where = index.clamp(max=LENGTH - 1)[:, :, None, None].expand(-1, -1, *q.shape[2:])
    mask, keys = mask_of(rule).at(index)
    out = attend(q.gather(1, where), k[:, :keys], v[:, :keys], mask, kernel=kernel)
    expected = by_hand(q, k, v, seen(rule)).gather(1, where)
    real = index < LENGTH
    torch.testing.assert_close(out[real], expected[real], atol=1e-12, rtol=0)
    assert bool(out.isfinite().all())


def test_keys_that_no_query_sees_are_left_out() -> None:
    mask = AttentionMask(torch.zeros(1, LENGTH, dtype=torch.long), (torch.arange(LENGTH) // 4)[None])
    assert mask.at(torch.tensor([[1, LENGTH]])) == (None, 4)  # one block, and all of it
    part, keys = mask.at(torch.tensor([[1, 5]]))
    assert keys == 8
    assert part is not None
    assert part.dense()[0, 0].tolist() == [[True] * 4 + [False] * 4, [True] * 8]


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_xformers_adds_to_the_scores_is_the_rule(rule: str, dtype: torch.dtype) -> None:
    """Its kernels run on CUDA only (tests/gpu); here, the formula that they compute from our bias."""
    mask = mask_of(rule)
    assert mask.runs() is None  # never packed as runs of segments, which know no blocks
    q, k, v = queries(torch.float64)
    wide = [x.repeat_interleave(2, dim=2) for x in (k, v)]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, wide[0]) * q.shape[-1] ** -0.5
    weights = (scores + mask.bias(dtype).double()).softmax(dim=-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, wide[1])
    torch.testing.assert_close(out, by_hand(q, k, v, seen(rule)), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="CUDA only"):
        attend(*queries(torch.float32), mask, kernel=Xformers(packed=True))


# the whole network


CONFIG = TransformerConfig(
    vocab_size=12, text=(0, 11), image=(0, 11), mask=11, dim=32, depth=3, num_heads=4, num_kv_heads=2
)


def network(kernel: Kernel | None) -> Predictor:
    """Three layers in float64, with lively weights: what one layer lets through reaches everywhere."""
    predictor = Predictor(Transformer(CONFIG, kernel=kernel)).double()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in predictor.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng, dtype=torch.float64) * 0.2)
    return predictor


def canvas_of(rule: str) -> Canvas:
    """The packed and padded rows of text, half of it holes, with positions of each document from 0."""
    mask = mask_of(rule)
    rng = torch.Generator().manual_seed(1)
    inside = mask.segment >= 0
    place = torch.zeros_like(mask.segment)
    for row, documents in enumerate(ROWS):
        own = [i for length, _ in documents for i in range(length)]
        place[row, : len(own)] = torch.tensor(own)
    tokens = torch.randint(0, 11, place.shape, generator=rng)
    holes = inside & (torch.rand(place.shape, generator=rng) < 0.5)
    modality = torch.where(inside, TEXT, PAD).to(torch.uint8)
    position = torch.stack([place, place], dim=2)
    canvas = Canvas(tokens, modality, inside, holes & False, position, mask.segment, block=mask.block)
    return canvas.hide(holes, CONFIG.mask)


def logits_of(predictor: Predictor, canvas: Canvas) -> Tensor:
    """(B, L, 11) at all positions, 0 at padding."""
    with torch.no_grad():
        (part,) = predictor(canvas, Rows.of(canvas.segment >= 0))
    return part.rows.scatter(part.logits[:, :11], torch.zeros(*canvas.shape, 11, dtype=torch.float64))


@every_rule
@pytest.mark.parametrize("kernel", [None, Reference()], ids=str)
def test_a_change_reaches_exactly_who_sees_it(rule: str, kernel: Kernel | None) -> None:
    """These rules are transitive, so three layers let through what one does: nothing comes from behind."""
    predictor, canvas = network(kernel), canvas_of(rule)
    before, keys = logits_of(predictor, canvas), seen(rule)
    for place in range(LENGTH):
        other = torch.where(canvas.masked[:, place], 5, (canvas.tokens[:, place] + 1) % 11)
        tokens, masked = canvas.tokens.clone(), canvas.masked.clone()
        tokens[:, place], masked[:, place] = other, False
        after = logits_of(predictor, canvas.replace(tokens=tokens, masked=masked))
        moved = (after - before).abs().amax(dim=2) > 1e-9
        reached = [[place in visible for visible in row] for row in keys]
        assert torch.equal(moved, torch.tensor(reached) & (canvas.segment >= 0))


@every_rule
def test_packed_and_padded_documents_say_what_they_say_alone(rule: str) -> None:
    predictor, canvas = network(None), canvas_of(rule)
    together = logits_of(predictor, canvas)
    for row, documents in enumerate(ROWS):
        start = 0
        for length, _ in documents:
            cut = slice(start, start + length)
            columns = {name: x[row : row + 1, cut] for name, x in vars(canvas).items() if x is not None}
            alone = logits_of(predictor, Canvas(**columns))
            torch.testing.assert_close(together[row : row + 1, cut], alone, atol=1e-10, rtol=0)
            start += length
