"""Pictures and uint8 arrays become the tokenizers' floats, and back. Knows no tokenizer and reads no file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(images: np.ndarray | Sequence[np.ndarray] | Sequence[Image.Image]) -> Tensor:
    """uint8 (H, W, 3) arrays or RGB pictures of one size to (B, 3, H, W) float32 in [-1, 1].

    Raises ValueError for another type, mode or shape: colours are a matter of whoever read the file.
    """
    arrays = [as_array(image) for image in images]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) != 1:
        raise ValueError(
            f"wants one or more pictures of one size, got {len(arrays)} pictures of shapes {shapes}"
        )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) float in [-1, 1], clipped, to uint8 (B, H, W, 3), rounded: the inverse of `to_tensor`."""
    levels = images.detach().float().add(1.0).mul(127.5).clamp(0, 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) float in [-1, 1] to RGB pictures."""
    return [Image.fromarray(array) for array in to_uint8(images)]


def as_array(image: np.ndarray | Image.Image) -> np.ndarray:
    """One picture as (H, W, 3) uint8."""
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(f"wants RGB pictures, got mode {image.mode!r}")
        return np.array(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"wants uint8 arrays (H, W, 3), got {image.dtype} of shape {image.shape}")
    return image
