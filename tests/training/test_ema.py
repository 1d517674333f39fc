"""The average follows its recursion, and swapping it in and out changes no bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdlm.training import Ema
from mmdlm.training.ema import Average


def test_the_decay_warms_up():
    ema = Ema(decay=0.9)
    assert ema.at(1) == pytest.approx(2 / 11)
    assert ema.at(50) == pytest.approx(51 / 60)
    assert ema.at(1000) == 0.9
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Ema(decay=1.0)


def test_the_average_follows_its_recursion():
    module, expected = nn.Linear(3, 3), {}
    average = Average(Ema(decay=0.5), module)
    expected = {name: value.detach().clone() for name, value in module.named_parameters()}
    for number in range(1, 20):
        with torch.no_grad():
            for value in module.parameters():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
        average.update(number)
        decay = min(0.5, (1 + number) / (10 + number))
        for name, value in module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    for name, value in expected.items():
        torch.testing.assert_close(average.shadow[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_swapping_is_exact_also_when_an_error_passes(dtype):
    module = nn.Linear(4, 4).to(dtype)
    average = Average(Ema(), module)
    with torch.no_grad():
        for value in module.parameters():
            value.mul_(1.37)
    average.update(1)
    own = {name: value.detach().clone() for name, value in module.named_parameters()}
    shadow = {name: value.clone() for name, value in average.shadow.items()}

    def inside() -> None:
        with average.swapped():
            for name, value in module.named_parameters():
                assert torch.equal(value, shadow[name].to(dtype))
                assert not torch.equal(value, own[name])
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    for name, value in module.named_parameters():
        assert torch.equal(value, own[name])
        assert torch.equal(average.shadow[name], shadow[name])


def test_the_average_of_narrow_weights_is_kept_wide():
    module = nn.Linear(4, 4).to(torch.bfloat16)
    assert Average(Ema(), module).shadow["weight"].dtype == torch.float32
