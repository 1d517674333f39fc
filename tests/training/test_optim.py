"""Learning rates take the stated values; norms, biases and embeddings do not decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmdlm.training import WSD, AdamW, BFloat16Autocast, Constant, Float32, WarmupCosine


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


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        AdamW().build(nn.GELU())


def test_autocast_makes_products_in_bfloat16_and_float32_leaves_them():
    weight = torch.ones(2, 2)
    with BFloat16Autocast().context(torch.device("cpu")):
        assert (weight @ weight).dtype == torch.bfloat16
    with Float32().context(torch.device("cpu")):
        assert (weight @ weight).dtype == torch.float32
