"""Autoencoders train with the same loop, and micro-batches change nothing for them either."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdlm.training import AdamW, Exchange, Reconstruction, Trainer, WarmupCosine
from tokenizers_mm.autoencoder import Autoencoder, AutoencoderConfig, reconstruction_loss


def autoencoder() -> nn.Module:
    torch.manual_seed(0)
    return Autoencoder(
        AutoencoderConfig(channels=(8, 16), encoder_blocks=(1, 1), decoder_blocks=(1, 1), levels=(8, 8))
    )


def pictures() -> torch.Tensor:
    colour = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return colour.expand(8, 3, 16, 16).contiguous()


def test_it_is_the_autoencoders_own_loss_by_pixel_value():
    module, images = autoencoder(), pictures()
    losses = Reconstruction(square=2.0, edge=0.25)(module, images, torch.Generator())
    expected = reconstruction_loss(images, module(images).images, square=2.0, edge=0.25)
    assert int(losses.counts["pixels"]) == images.numel()
    torch.testing.assert_close(losses.sums["pixels"] / losses.counts["pixels"], expected)


def test_an_autoencoder_learns_flat_pictures(kit):
    module, images = autoencoder(), pictures()
    run = kit.run(
        module=module,
        objective=Reconstruction(),
        batches=kit.Rows(images, 4),
        accumulate=2,
        steps=40,
        ema=None,
        optimizer=AdamW(lr=1e-2, weight_decay=0.0),
        learning_rate=WarmupCosine(warmup=5),
    )
    before = (module(images).images - images).abs().mean()
    Trainer(run).fit()
    assert (module(images).images - images).abs().mean() < 0.5 * before


def test_two_micro_batches_are_one_batch_of_twice_the_size(kit):
    torch.manual_seed(4)
    images, ways = torch.rand(8, 3, 16, 16).double() * 2 - 1, []
    for name, size, parts in (("whole", 4, 1), ("parts", 2, 2)):
        run = kit.run(
            name,
            module=autoencoder().double(),
            objective=Reconstruction(),
            batches=kit.Rows(images, size),
            accumulate=parts,
            threads=parts,
            steps=3,
        )
        before = [value.detach().clone() for value in run.module.parameters()]
        ways.append(list(Trainer(run).fit().parameters()))
    for whole, part, start in zip(*ways, before, strict=True):
        assert not torch.equal(whole, start)
        torch.testing.assert_close(whole, part, rtol=1e-8, atol=1e-9)


class Lenders(nn.Module):
    """Its vectors tell which picture they come from; what reaches the decoder is kept."""

    def __init__(self, digits: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.digits = digits
        self.seen = torch.empty(0)

    def forward(self, images, exchange):
        number = torch.arange(len(images)).float()[:, None, None, None]
        self.seen = exchange(number.expand(len(images), 2, 2, self.digits))
        return type("Output", (), {"images": images * self.scale})


def test_digits_come_from_pictures_that_share_their_factor():
    module = Lenders(digits=4)
    batch = torch.zeros(50, 2, 2, 3, 8, 8)
    Exchange(factors=(0, 1, 1, 2))(module, batch, torch.Generator().manual_seed(0))
    number = torch.arange(200)
    lender = module.seen[:, 0, 0].long()
    assert torch.equal(module.seen, module.seen[:, :1, :1].expand_as(module.seen))
    assert torch.equal(lender // 4, (number // 4)[:, None].expand(200, 4))  # of the same scene
    first, second = lender % 4 // 2, lender % 2
    assert torch.equal(first[:, 0], number % 4 // 2)
    assert torch.equal(second[:, 1:3], (number % 2)[:, None].expand(200, 2))
    assert torch.equal(lender[:, 1], lender[:, 2])  # one lender a factor
    for free in (second[:, 0], first[:, 1], first[:, 3], second[:, 3]):
        assert 60 < free.sum() < 140


def test_exchange_is_reconstruction_where_all_pictures_of_a_scene_are_equal():
    module = autoencoder()
    images = pictures()
    batch = images[:, None, None].expand(8, 2, 2, 3, 16, 16)
    losses = Exchange(factors=(0, 2))(module, batch, torch.Generator())
    plain = Reconstruction()(module, images, torch.Generator())
    assert int(losses.counts["pixels"]) == batch.numel()
    torch.testing.assert_close(losses.sums["pixels"], 4 * plain.sums["pixels"])


def test_exchange_refuses_batches_and_digits_that_do_not_fit():
    with pytest.raises(ValueError, match="wanted pictures"):
        Exchange(factors=(0, 1))(autoencoder(), pictures(), torch.Generator())
    two = pictures()[:, None].repeat(1, 2, 1, 1, 1)
    with pytest.raises(ValueError, match="3 factors for vectors of 2 channels"):
        Exchange(factors=(0, 1, 2))(autoencoder(), two, torch.Generator())
