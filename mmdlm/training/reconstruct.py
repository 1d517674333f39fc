"""The objectives of image autoencoders, which train with the same loop. Know no token and no canvas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

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


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """`Reconstruction` from digits that pictures lend each other, so that every digit learns one meaning.

    Batches are (B, 2, ..., 2, 3, H, W): pictures of one scene that differ in factor k, and in nothing else,
    along the k-th of the axes of two. `factors` names for each digit the factor that it stands for; a number
    past the last factor means what all pictures of the scene have in common. Picture (i, j, ...) is rebuilt
    from digits of factor 0 of some picture (i, *, ...), digits of factor 1 of some (*, j, ...), and digits of
    what is common of any, all drawn evenly: what a digit says of another factor than its own is noise.
    """

    factors: tuple[int, ...]
    square: float = 1.0
    edge: float = 0.5

    def __call__(self, module: nn.Module, batch: Tensor, rng: torch.Generator) -> LossOutput:
        """The sum over pixel values as modality `pixels`."""
        pictures = batch.to(next(module.parameters()).device, non_blocking=True)
        if pictures.ndim < 5 or set(pictures.shape[1:-3]) != {2}:
            raise ValueError(f"wanted pictures (B, 2, ..., 2, 3, H, W), got {tuple(pictures.shape)}")
        images = pictures.flatten(0, -4)
        lend = partial(self._lend, num_factors=pictures.ndim - 4, rng=rng)
        loss = reconstruction_loss(images, module(images, lend).images, square=self.square, edge=self.edge)
        return LossOutput(sums={"pixels": loss * images.numel()}, counts=self.counts(batch, rng))

    def part(self, index: int, count: int, step: int) -> Exchange:
        """Itself: what is lent does not depend on the other micro-batches."""
        return self

    def counts(self, batch: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Pixel values of the batch."""
        return {"pixels": torch.tensor(batch.numel(), device=batch.device)}

    def _lend(self, vectors: Tensor, *, num_factors: int, rng: torch.Generator) -> Tensor:
        """(B * 2^F, h, w, D) -> the same, each digit from a picture that has its factor."""
        if len(self.factors) != vectors.shape[-1]:
            raise ValueError(f"{len(self.factors)} factors for vectors of {vectors.shape[-1]} channels")
        size = 2**num_factors
        own = torch.arange(len(vectors), device=vectors.device)
        scene, number = own // size * size, own % size
        lenders = {}
        for factor in dict.fromkeys(self.factors):
            kept = 2 ** (num_factors - 1 - factor) if factor < num_factors else 0  # first axis: highest bit
            other = torch.randint(size, (len(own),), generator=rng, device=rng.device).to(own.device)
            lenders[factor] = scene + ((other & ~kept) | (number & kept))
        lent = [vectors[lenders[factor], ..., digit] for digit, factor in enumerate(self.factors)]
        return torch.stack(lent, dim=-1)
