"""The network: configuration, initialisation, factorised codes, sizes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mmdlm.canvas import Canvas, Fill, Frame, Run
from mmdlm.model import Transformer, TransformerConfig, initialise
from mmdlm.model.layers import Gated
from mmdlm.model.transformer import GridTable, TokenTable

SMALL = TransformerConfig(vocab_size=40, text=(0, 10), image=(15, 39), mask=39, dim=16, depth=2, num_heads=2)


def test_config_is_plain_values() -> None:
    config = dataclasses.replace(SMALL, digits=(2, 3, 4), grid=(2, 3))
    assert hash(config) == hash(dataclasses.replace(SMALL, digits=(2, 3, 4), grid=(2, 3)))
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in ("text", "image", "digits", "grid"):
        values[name] = tuple(values[name])
    assert TransformerConfig(**values) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "heads"),
        ({"num_heads": 16}, "even"),
        ({"num_kv_heads": 3}, "multiple"),
        ({"text": (0, 41)}, "text ids"),
        ({"mask": 40}, "mask id"),
        ({"digits": (5, 5)}, "25 codes"),
    ],
)
def test_impossible_shapes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_codes_row_is_the_sum_over_its_digits() -> None:
    table = TokenTable(dataclasses.replace(SMALL, digits=(2, 3, 4)))
    with torch.no_grad():
        for weight in table.parameters():
            weight.normal_()
    d0, d1, d2 = table.digit_tables
    rows = table.rows()
    for code in range(24):
        parts = (d0[code % 2], d1[code // 2 % 3], d2[code // 6])
        torch.testing.assert_close(rows[15 + code], table.weight[15 + code] + sum(parts))
    torch.testing.assert_close(rows[:15], table.weight[:15])
    torch.testing.assert_close(rows[39:], table.weight[39:])
    for first, last in ((0, 40), (15, 39), (0, 10), (3, 20), (20, 25), (38, 40), (39, 40)):
        assert torch.equal(table.rows(slice(first, last)), rows[first:last])


def test_logits_are_the_head_on_the_normalised_features() -> None:
    for config in (SMALL, dataclasses.replace(SMALL, tied=True, digits=(2, 3, 4))):
        network = Transformer(config).double()
        features = torch.randn(5, 16, dtype=torch.float64)
        table = network.embedding if network.head is None else network.head
        scaled = features / (features.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        torch.testing.assert_close(network.logits(features, slice(15, 39)), scaled @ table.rows()[15:39].T)


def test_half_precision_features_give_single_precision_logits() -> None:
    network = Transformer(SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network.logits(torch.randn(5, 16), slice(0, 10)).dtype == torch.float32


def test_options_add_and_remove_what_they_say() -> None:
    def names(**change) -> set[str]:
        return set(Transformer(dataclasses.replace(SMALL, **change)).state_dict())

    plain = names()
    assert plain - names(tied=True) == {"head.weight"}
    assert plain - names(modality_embedding=False) == {"modality"}
    assert all("q_norm" in name or "k_norm" in name for name in plain - names(qk_norm=False))
    assert len(plain - names(qk_norm=False)) == 4
    assert {name.split(".", 2)[2] for name in names(qkv_bias=True) - plain} == {"attention.qkv.bias"}
    added = {name.split(".", 2)[2] for name in names(bias=True) - plain}
    assert added == {"attention.out.bias", "mlp.gate_up.bias", "mlp.down.bias"}


def test_initialise_is_repeatable_and_leaves_the_global_stream_alone() -> None:
    network = Transformer(SMALL)
    state = torch.get_rng_state()
    runs = []
    for _ in range(2):
        initialise(network, torch.Generator().manual_seed(3))
        runs.append({name: value.clone() for name, value in network.state_dict().items()})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert all(bool(value.isfinite().all()) for value in runs[0].values())


def test_grouped_queries_shrink_the_projection() -> None:
    network = Transformer(dataclasses.replace(SMALL, num_heads=4, num_kv_heads=2))
    assert network.state_dict()["blocks.0.attention.qkv.weight"].shape == (4 * 4 + 2 * 2 * 4, 16)


def two_images() -> Canvas:
    """A row of a text of 2, an image of 2 x 3, a structure token and an image of 2 x 2; and 3 pads."""
    runs = (Run(length=2), Run(grid=(2, 3), after=(12,)), Run(grid=(2, 2)))
    fills = [Fill(torch.full((1, run.size), 15 if run.grid else 3)) for run in runs]
    canvas = Frame(runs).canvas(fills, mask=39)
    return canvas.pad_to(canvas.shape[1] + 3)


def test_a_grid_adds_the_row_and_column_that_a_position_has_in_its_own_image() -> None:
    table = GridTable((2, 3), 1)
    with torch.no_grad():
        table.rows.copy_(torch.tensor([[10.0], [20.0]]))
        table.columns.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
    first, second = [11.0, 12, 13, 21, 22, 23], [11.0, 12, 21, 22]
    assert table(two_images())[0, :, 0].tolist() == [0, 0, *first, 0, *second, 0, 0, 0]


def test_a_grid_of_zeros_changes_nothing_and_one_too_small_is_an_error() -> None:
    plain = Transformer(SMALL).double()
    network = Transformer(dataclasses.replace(SMALL, grid=(2, 3))).double()
    assert network.places is not None
    missing = network.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["places.rows", "places.columns"]
    with torch.no_grad():
        network.places.rows.zero_()
        network.places.columns.zero_()
    assert torch.equal(network.features(two_images()), plain.features(two_images()))
    with pytest.raises(IndexError):
        Transformer(dataclasses.replace(SMALL, grid=(2, 2))).features(two_images())
    with pytest.raises(ValueError, match="spans"):
        network.features(two_images().replace(span=None))


def some_rows() -> Canvas:
    runs = (Run(length=5), Run(grid=(3, 3)))
    fills = [Fill(torch.arange(2 * run.size).reshape(2, -1) % 9 + 15 * n) for n, run in enumerate(runs)]
    return Frame(runs).canvas(fills, mask=39).pad_to(17)


def gradients(network: Transformer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    network.zero_grad()
    features = network.features(some_rows())
    features.square().sum().backward()
    return features.detach(), [
        weight.grad.clone() for weight in network.parameters() if weight.grad is not None
    ]


@pytest.mark.parametrize(("every", "kept"), [(0, 3), (1, 0), (2, 1)])
def test_checkpointed_blocks_change_nothing_and_keep_less(every: int, kept: int) -> None:
    network = Transformer(dataclasses.replace(SMALL, depth=3))
    features, expected = gradients(network)
    network.checkpoint_blocks(every)
    held: list[int] = []
    inside = [block.mlp.gate_up.register_forward_hook(lambda *_: held.append(1)) for block in network.blocks]
    again, found = gradients(network)
    assert torch.equal(again, features)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(held) == 3 + 3 - kept, "what is not kept runs twice"
    held.clear()
    with torch.no_grad():
        network.features(some_rows())
    assert len(held) == 3
    for hook in inside:
        hook.remove()
    with pytest.raises(ValueError, match="every must be at least 0"):
        network.checkpoint_blocks(-1)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_are_the_same_blocks_without_a_break(checkpointed: bool) -> None:
    network = Transformer(SMALL)
    names, (features, expected) = list(network.state_dict()), gradients(network)
    torch._dynamo.reset()
    counter = CompileCounter()
    network.compile_blocks(backend=counter, fullgraph=True)
    network.checkpoint_blocks(int(checkpointed))
    again, found = gradients(network)
    torch.testing.assert_close(again, features)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert list(network.state_dict()) == names
    assert counter.frame_count >= 1
    first = counter.frame_count
    gradients(network)
    assert counter.frame_count == first, "another canvas of the shape compiles nothing"


def test_the_gated_product_has_the_gradient_of_the_formula() -> None:
    both = torch.randn(5, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both.requires_grad_()
    assert torch.autograd.gradcheck(Gated.apply, (both,))
    gate, up = both.detach().chunk(2, dim=-1)
    assert torch.equal(Gated.apply(both), torch.nn.functional.silu(gate) * up)
