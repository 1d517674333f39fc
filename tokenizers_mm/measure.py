"""How well an image tokenizer gives pictures back and how it uses its codes. Knows no particular one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.pixels import to_uint8

MAX_PSNR = 100.0  # dB; what equal pictures get, for a mean over pictures to exist


@dataclass(frozen=True, kw_only=True)
class Report:
    """Figures over held-out pictures."""

    psnr: float  # dB, mean over pictures
    ssim: float  # mean over pictures
    usage: float  # distinct codes seen / size
    perplexity: float  # exp of the entropy of the codes' frequencies, in 1..size
    num_images: int
    num_codes: int  # codes counted: pictures * h * w


@dataclass(frozen=True, eq=False)
class RoundTrip:
    """N pictures as they came back, and the codes on the way. All on the CPU."""

    images: np.ndarray  # (N, H, W, 3) uint8, decoded
    codes: Tensor  # (N, h, w) long
    psnr: Tensor  # (N,) float64 dB
    ssim: Tensor  # (N,) float64
    size: int  # number of codes that there are

    @cached_property
    def counts(self) -> Tensor:
        """(size,) how often each code occurs."""
        return code_counts(self.codes, self.size)

    def report(self) -> Report:
        """The figures over all pictures."""
        return Report(
            psnr=float(self.psnr.mean()),
            ssim=float(self.ssim.mean()),
            usage=int((self.counts > 0).sum()) / self.size,
            perplexity=perplexity(self.counts),
            num_images=len(self.images),
            num_codes=self.codes.numel(),
        )


def psnr(images: Tensor, output: Tensor) -> Tensor:
    """(B,) dB, at most 100: 10 log10(4 / mean squared error) for (B, 3, H, W) in [-1, 1] (data range 2)."""
    error = (images.double() - output.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4.0 / error.clamp(min=4.0 * 10 ** (-MAX_PSNR / 10)))


def ssim(images: Tensor, output: Tensor) -> Tensor:
    """(B,) structural similarity of (B, 3, H, W) in [-1, 1], mean over channels and windows.

    As Wang, Bovik, Sheikh and Simoncelli (2004) define it: an 11 x 11 Gaussian window of sigma 1.5, only
    windows wholly inside, K1 = 0.01, K2 = 0.03, data range 2, population variances. Raises ValueError for
    sides below 11 pixels.
    """
    channels = images.shape[1]
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"SSIM has a window of 11 x 11 pixels, got pictures of {tuple(images.shape[-2:])}")
    offsets = torch.arange(11, dtype=torch.float64, device=images.device) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, line.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
        return F.conv2d(x, line.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)

    a, b = images.double(), output.double()
    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a.square()
    variance_b = blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2)
    return (top / bottom).mean(dim=(1, 2, 3))


def code_counts(codes: Tensor, size: int) -> Tensor:
    """(size,) how often each code occurs in codes of any shape."""
    return torch.bincount(codes.flatten(), minlength=size)


def digit_counts(counts: Tensor, digits: Sequence[int]) -> list[Tensor]:
    """For each digit of a factorised code, (levels,): how often each level occurs.

    `counts` (size,) are of codes d0 + n0 * (d1 + n1 * (d2 + ...)). Raises ValueError where the sizes of the
    digits do not multiply to `size`.
    """
    if math.prod(digits) != len(counts):
        raise ValueError(f"digits {tuple(digits)} make {math.prod(digits)} codes, got {len(counts)} counts")
    grid = counts.reshape(tuple(reversed(digits)))
    return [
        grid.movedim(-1 - number, 0).reshape(levels, -1).sum(dim=1) for number, levels in enumerate(digits)
    ]


def entropy(counts: Tensor) -> float:
    """Bits: the entropy of the frequencies. Of few draws it comes out too small (a plug-in estimate)."""
    total = int(counts.sum())
    if total == 0:
        raise ValueError("the entropy of no codes at all is not defined")
    share = counts[counts > 0].double() / total
    return float((share * share.reciprocal().log2()).sum())


def perplexity(counts: Tensor) -> float:
    """2 ** entropy of the frequencies: so many equally frequent codes would be as hard to guess."""
    return 2.0 ** entropy(counts)


@torch.no_grad()
def round_trip(tokenizer: ImageTokenizer, images: Tensor, *, batch_size: int = 64) -> RoundTrip:
    """Encode and decode (N, 3, H, W) float in [-1, 1] in batches. Raises ValueError for no pictures."""
    if len(images) == 0:
        raise ValueError("wanted at least one picture to encode and decode, got none")
    outputs, codes, psnrs, ssims = [], [], [], []
    for batch in images.split(batch_size):
        codes.append(tokenizer.encode(batch))
        output = tokenizer.decode(codes[-1])
        outputs.append(to_uint8(output))
        psnrs.append(psnr(batch, output).cpu())
        ssims.append(ssim(batch, output).cpu())
    return RoundTrip(
        np.concatenate(outputs), torch.cat(codes).cpu(), torch.cat(psnrs), torch.cat(ssims), tokenizer.size
    )


def measure(tokenizer: ImageTokenizer, images: Tensor, *, batch_size: int = 64) -> Report:
    """The figures of `round_trip`."""
    return round_trip(tokenizer, images, batch_size=batch_size).report()
