"""Pillow and uint8 to the floats of the tokenizers, and back."""

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizers_mm import to_pil, to_tensor, to_uint8


def test_every_level_comes_back():
    array = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    images = to_tensor(array)
    assert images.shape == (1, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1
    assert (to_uint8(images) == array).all()


def test_rows_columns_and_channels_keep_their_places():
    array = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    pictures = [Image.fromarray(one) for one in array]
    images = to_tensor(pictures)
    assert torch.equal(images, to_tensor(array))
    assert images[1, 2, 3, 4].item() == pytest.approx(array[1, 3, 4, 2] / 127.5 - 1)
    assert [picture.tobytes() for picture in to_pil(images)] == [picture.tobytes() for picture in pictures]


def test_values_beyond_the_range_are_clipped():
    assert to_uint8(torch.tensor([-7.0, 0.0, 7.0]).view(1, 3, 1, 1)).tolist() == [[[[0, 128, 255]]]]


@pytest.mark.parametrize(
    "images",
    [
        [],
        [Image.new("L", (4, 4))],
        [np.zeros((4, 4, 3), np.float32)],
        [np.zeros((4, 4), np.uint8)],
        [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)],
    ],
)
def test_others_are_refused(images):
    with pytest.raises(ValueError, match="wants"):
        to_tensor(images)
