"""The objective of image autoencoders, which train with the same loop. Knows no token and no canvas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdlm.diffusion.loss import LossOutput
from tokenizers_mm.autoencoder import reconstruction_loss


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How far the output is from the input, per pixel value; batches are (B, 3, H, W) in [-1, 1].

    The module answers with an object whose `images` are the reconstruction: `tokenizers_mm.Autoencoder`. See
    `tokenizers_mm.autoencoder.reconstruction_loss` for `square` and `edge`. It draws no random number.
    """

    square: float = 1.0
    edge: float = 0.5

    def __call__(self, module: nn.Module, batch: Tensor, rng: torch.Generator) -> LossOutput:
        """The sum over pixel values as modality `pixels`."""
        images = batch.to(next(module.parameters()).device, non_blocking=True)
        loss = reconstruction_loss(images, module(images).images, square=self.square, edge=self.edge)
        return LossOutput(sums={"pixels": loss * images.numel()}, counts=self.counts(images, rng))

    def part(self, index: int, count: int, step: int) -> Reconstruction:
        """Itself: there is no noise to divide."""
        return self

    def counts(self, batch: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """B * 3 * H * W."""
        return {"pixels": torch.tensor(batch.numel(), device=batch.device)}
