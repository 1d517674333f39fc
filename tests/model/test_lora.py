"""A low-rank update starts as the network itself, trains alone, and folds into the weights beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdlm.model import (
    LoraLinear,
    Transformer,
    TransformerConfig,
    add_lora,
    freeze,
    load_lora,
    lora_layers,
    merge_lora,
    save_lora,
    unfreeze,
)

CONFIG = TransformerConfig(
    vocab_size=20, text=(0, 8), image=(8, 19), mask=19, dim=16, depth=2, num_heads=2, bias=True
)


class Net(nn.Module):
    """Two blocks' worth of layers under the names that our own blocks use."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Transformer(CONFIG).blocks)

    def forward(self, x):
        for block in self.blocks:
            x = x + block.mlp(block.mlp_norm(x)) + block.attention.out(block.attention.qkv(x)[..., :16])
        return x


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data() -> torch.Tensor:
    return torch.randn(3, 5, 16, generator=seeded())


def shaken(module: nn.Module) -> nn.Module:
    """The updates as after some training: B is no longer 0."""
    with torch.no_grad():
        for layer in lora_layers(module).values():
            layer.lora_b.normal_(0.0, 0.3, generator=seeded(2))
    return module


def test_it_starts_as_the_network_and_only_the_updates_are_trained():
    module, x = Net(), data()
    before = module(x)
    names = add_lora(module, rank=3, alpha=6.0, generator=seeded())
    assert names == [
        f"blocks.{number}.{layer}"
        for number in (0, 1)
        for layer in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    ]
    assert torch.equal(module(x), before)
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert trained == {f"{name}.{part}" for name in names for part in ("lora_a", "lora_b")}
    module(x).square().sum().backward()
    layer = module.get_submodule("blocks.1.mlp.down")
    assert isinstance(layer, LoraLinear)
    assert layer.lora_b.grad is not None
    assert layer.lora_b.grad.abs().max() > 0
    assert layer.weight.grad is None
    assert float(layer.lora_a.detach().std()) == pytest.approx(layer.in_features**-0.5, rel=0.4)


def test_an_update_is_alpha_over_rank_times_b_a():
    linear = nn.Linear(6, 4, dtype=torch.float64)
    layer = LoraLinear(linear, rank=2, alpha=5.0, generator=seeded())
    with torch.no_grad():
        layer.lora_b.normal_(generator=seeded(3))
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = x @ (linear.weight + 2.5 * layer.lora_b @ layer.lora_a).T + linear.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_merging_computes_the_same_under_the_names_of_the_plain_network():
    module, x = Net(), data()
    plain = {name: value.clone() for name, value in module.state_dict().items()}
    add_lora(module, rank=3, generator=seeded())
    updated = shaken(module)(x)
    assert (updated - Net()(x)).abs().max() > 0.1
    names = merge_lora(module)
    torch.testing.assert_close(module(x), updated, rtol=1e-6, atol=1e-5)
    merged = module.state_dict()
    assert list(merged) == list(plain)
    changed = {name for name, value in merged.items() if not torch.equal(value, plain[name])}
    assert changed == {f"{name}.weight" for name in names}
    assert all(type(layer) is not LoraLinear for layer in module.modules())
    with pytest.raises(ValueError, match="no low-rank updates to merge"):
        merge_lora(module)


def test_merging_is_exact_in_float64_to_one_part_in_a_million():
    module, x = Net().double(), data().double()
    add_lora(module, rank=2, generator=seeded())
    updated = shaken(module)(x)
    merge_lora(module)
    assert (module(x) - updated).abs().max() < 1e-6


def test_updates_alone_are_saved_and_loaded(tmp_path):
    module, x = Net(), data()
    add_lora(module, rank=2, alpha=3.0, targets=("blocks.0.*.qkv", "down"), generator=seeded())
    assert list(lora_layers(module)) == ["blocks.0.attention.qkv", "blocks.0.mlp.down", "blocks.1.mlp.down"]
    save_lora(shaken(module), tmp_path / "updates.safetensors")
    other = Net()
    assert load_lora(other, tmp_path / "updates.safetensors") == list(lora_layers(module))
    assert torch.equal(other(x), module(x))
    small = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no plain linear layer of this module"):
        load_lora(small, tmp_path / "updates.safetensors")
    assert all(value.requires_grad for value in small.parameters())
    (tmp_path / "torn").write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match="can be read"):
        load_lora(Net(), tmp_path / "torn")


def test_what_cannot_be_updated_is_named():
    with pytest.raises(ValueError, match=r"no linear layer is called 'qvk'; they are .*qkv"):
        add_lora(Net(), rank=1, targets=("qvk",))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        add_lora(Net(), rank=0)
    module = Net()
    add_lora(module, rank=1)
    with pytest.raises(ValueError, match="already"):
        add_lora(module, rank=1)
    tied = nn.ModuleDict({"table": nn.Embedding(4, 4), "head": nn.Linear(4, 4)})
    tied["head"].weight = tied["table"].weight
    with pytest.raises(ValueError, match="tied"):
        add_lora(tied, rank=1, targets=("head",))


def test_parameters_are_frozen_and_unfrozen_by_name():
    module = Net()
    assert len(freeze(module)) == len(list(module.parameters()))
    norms = unfreeze(module, "*_norm.weight", "blocks.0.mlp.*")
    assert norms == [name for name, value in module.named_parameters() if value.requires_grad]
    assert "blocks.1.mlp_norm.weight" in norms
    assert "blocks.0.mlp.down.bias" in norms
    assert "blocks.1.mlp.down.bias" not in norms
    with pytest.raises(ValueError, match=r"no parameter is called 'nrom'"):
        freeze(module, "nrom")
