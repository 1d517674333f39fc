"""What a tokenizer of pictures is. Knows no particular one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ImageTokenizer(Protocol):
    """Pictures to grids of codes, and back. Any class with these members will do."""

    @property
    def size(self) -> int:
        """Number of codes."""
        ...

    @property
    def downsample(self) -> int:
        """Pixels a side of the patch that one code stands for."""
        ...

    @property
    def digits(self) -> tuple[int, ...] | None:
        """Sizes of the digits of a factorised code, first digit fastest; None when a code has no digits."""
        ...

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of codes of such a picture. Raises ValueError when its sides cannot be divided."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1] to codes (B, h, w) long. Raises ValueError for other shapes."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """(B, h, w) long to (B, 3, H, W) float32, clipped to [-1, 1]."""
        ...


def grid_of(height: int, width: int, downsample: int) -> tuple[int, int]:
    """Rows and columns of codes. Raises ValueError when a side is not a positive multiple of `downsample`."""
    if height < downsample or width < downsample or height % downsample or width % downsample:
        raise ValueError(
            f"this image tokenizer takes pictures whose sides are multiples of {downsample} pixels, "
            f"got {width} x {height} (width x height)"
        )
    return height // downsample, width // downsample


def check_images(images: Tensor) -> None:
    """Raises ValueError unless images are (B, 3, H, W) and floating."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be (B, 3, H, W) floating in [-1, 1], got {tuple(images.shape)} of {images.dtype}; "
            "tokenizers_mm.pixels converts PIL images and uint8 arrays"
        )


def check_codes(codes: Tensor, size: int) -> None:
    """Raises ValueError unless codes are (B, h, w) integers in [0, size). Reads them: one host sync."""
    if codes.ndim != 3 or codes.is_floating_point():
        raise ValueError(f"codes must be (B, h, w) integers, got {tuple(codes.shape)} of {codes.dtype}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= size):
        raise ValueError(f"codes must lie in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}")
