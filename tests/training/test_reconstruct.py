"""Autoencoders train with the same loop, and micro-batches change nothing for them either."""

from __future__ import annotations

import torch
from torch import nn

from mmdlm.training import AdamW, Reconstruction, Trainer, WarmupCosine
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
