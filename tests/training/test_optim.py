"""Learning rates take the stated values; norms, biases and embeddings do not decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmdlm.training import WSD, AdamW, BFloat16Autocast, Constant, Float32, Muon, WarmupCosine
from mmdlm.training.optim import orthogonalise


def test_warmup_cosine_rises_in_a_line_and_falls_in_half_a_cosine():
    course = WarmupCosine(warmup=4, floor=0.2)
    assert [course.scale(step, 12) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert course.scale(4, 12) == 1.0
    assert course.scale(8, 12) == pytest.approx(0.2 + 0.8 * 0.5)
    assert course.scale(10, 12) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert course.scale(12, 12) == pytest.approx(0.2)
    assert course.scale(50, 12) == pytest.approx(0.2)


def test_wsd_stays_at_the_peak_and_decays_in_a_line_at_the_end():
    course = WSD(warmup=2, decay=4, floor=0.0)
    assert [course.scale(step, 10) for step in range(11)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert WSD(warmup=1, decay=2, floor=0.5).scale(9, 10) == 0.75
    assert WSD().scale(9, 10) == 1.0


def test_wsd_decays_by_one_minus_the_root():
    course = WSD(decay=4, floor=0.2, power=0.5)
    assert [course.scale(step, 10) for step in (0, 5, 6)] == [1, 1, 1]
    shares = [course.scale(step, 10) for step in (7, 8, 9, 10, 11)]
    assert shares == pytest.approx([0.2 + 0.8 * (1 - (n / 4) ** 0.5) for n in (1, 2, 3, 4, 4)])
    with pytest.raises(ValueError, match="power"):
        WSD(power=0.0)


def test_constant_and_no_warmup():
    assert [Constant(warmup=2).scale(step, 9) for step in range(4)] == [0.5, 1, 1, 1]
    assert Constant().scale(0, 9) == WarmupCosine().scale(0, 9) == 1.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Conv2d(2, 2, 3)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.table.weight
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def test_matrices_decay_and_nothing_else_does():
    module = Tied()
    optimizer = AdamW(weight_decay=0.3).build(module)
    decay = {
        id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]
    }
    names = {name: decay[id(value)] for name, value in module.named_parameters() if id(value) in decay}
    assert {name for name, value in names.items() if value == 0.3} == {"mix.weight"}
    assert {name for name, value in names.items() if value == 0} == {
        "table.weight",
        "norm.weight",
        "norm.bias",
        "mix.bias",
        "head.bias",
    }


def test_adamw_is_fused_on_a_cpu_and_equal_to_the_plain_one():
    module, twin = (nn.Linear(7, 5) for _ in range(2))
    twin.load_state_dict(module.state_dict())
    ours = AdamW(lr=0.05, weight_decay=0.0).build(module)
    assert all(group["fused"] for group in ours.param_groups)
    theirs = torch.optim.AdamW(
        twin.parameters(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.0, fused=False, foreach=False
    )
    for number in range(5):
        data = torch.randn(3, 7, generator=torch.Generator().manual_seed(number))
        for model, optimizer in ((module, ours), (twin, theirs)):
            optimizer.zero_grad()
            model(data).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(module.weight, twin.weight)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        AdamW().build(nn.GELU())


def test_autocast_makes_products_in_bfloat16_and_float32_leaves_them():
    weight = torch.ones(2, 2)
    with BFloat16Autocast().context(torch.device("cpu")):
        assert (weight @ weight).dtype == torch.bfloat16
    with Float32().context(torch.device("cpu")):
        assert (weight @ weight).dtype == torch.float32


def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales():
    matrices = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for given in (matrices, matrices.mT):
        left, _, right = torch.linalg.svd(given, full_matrices=False)
        for one, u, v in zip(orthogonalise(given), left, right, strict=True):
            inside = u.T @ one @ v.T  # diagonal where the directions are the same
            assert (inside - inside.diag().diag()).abs().max() < 1e-3
            assert inside.diag().min() > 0.6
            assert inside.diag().max() < 1.25


@pytest.mark.parametrize("shape", [(5, 5), (5, 40), (40, 5)])
def test_orthogonalising_is_the_newton_schulz_iteration(shape):
    """Against the textbook form, which multiplies the whole matrix each time."""
    given = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    x = given.double() / given.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        inner = x @ x.mT
        x = 3.4445 * x + (-4.7750 * inner + 2.0315 * inner @ inner) @ x
    torch.testing.assert_close(orthogonalise(given).double(), x, rtol=1e-3, atol=1e-3)


def test_muon_moves_linear_layers_by_orthogonal_steps_and_the_rest_by_adamw():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6, bias=True), nn.LayerNorm(6), nn.Linear(6, 4, bias=False))
    twin = nn.Sequential(nn.Linear(4, 6, bias=True), nn.LayerNorm(6), nn.Linear(6, 4, bias=False))
    twin.load_state_dict(module.state_dict())
    rest = AdamW(lr=1e-2, weight_decay=0.3)
    ours = Muon(lr=0.1, weight_decay=0.5, rest=rest).build(module)
    theirs = rest.build(twin)
    data = torch.randn(5, 4)
    for model in (module, twin):
        model(data).square().mean().backward()
    gradient = module[0].weight.grad.clone()
    before = module[0].weight.detach().clone()
    ours.step()
    theirs.step()
    for name in ("0.bias", "1.weight", "1.bias"):
        torch.testing.assert_close(module.get_parameter(name), twin.get_parameter(name))
    # first step: the momentum is the gradient itself up to a factor, which the iteration takes away
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * orthogonalise(gradient[None])[0]
    torch.testing.assert_close(module[0].weight, expected, atol=1e-5, rtol=1e-4)


def test_muon_leaves_tables_to_adamw_and_wants_a_linear_layer():
    groups = {id(p): "momentum" in g for g in Muon().build(Hidden()).param_groups for p in g["params"]}
    assert sum(groups.values()) == 1
    with pytest.raises(ValueError, match=r"no trainable `nn.Linear`|no trainable nn.Linear"):
        Muon().build(nn.Embedding(3, 2))


class Hidden(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
