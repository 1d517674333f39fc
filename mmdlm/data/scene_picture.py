"""Scenes become pixels: anti-aliased sprites and their compositing. Knows no caption and no reader."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from mmdlm.data.scene import BACKGROUNDS, COLOURS, SHAPES, SIDE, SIZES, Look, Scene

_SUPERSAMPLES = 8  # a side of a pixel
_INSET = 1.0  # pixels between a sprite and its bounding box, so that no sprite ends at a tile's edge
_STAR = (1.04, 0.46, 0.08)  # outer radius, inner radius, shift downwards that centres it in its box
_ARM = 0.36  # half the width of the cross's arms


def draw(scene: Scene) -> np.ndarray:
    """The picture of a scene: (64, 64, 3) uint8."""
    picture = _ground(scene.background).copy()
    for index, thing in enumerate(scene.objects):
        top, left, bottom, right = scene.box(index)
        picture[top:bottom, left:right] = _sprite(thing.look, scene.background)
    return picture


def draw_batch(scenes: Sequence[Scene]) -> np.ndarray:
    """The pictures of some scenes: (N, 64, 64, 3) uint8."""
    pictures = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    for number, scene in enumerate(scenes):
        pictures[number] = draw(scene)
    return pictures


@cache
def sprite_mask(shape: str, size: str) -> np.ndarray:
    """How much of each pixel of its box a shape covers: (side, side) float32 in [0, 1], read-only."""
    side = SIZES[size]
    ticks = (np.arange(side * _SUPERSAMPLES) + 0.5) / _SUPERSAMPLES - side / 2
    ticks = ticks / (side / 2 - _INSET)
    inside = _inside(shape, ticks[None, :], ticks[:, None])
    blocks = inside.reshape(side, _SUPERSAMPLES, side, _SUPERSAMPLES)
    mask = blocks.mean(axis=(1, 3), dtype=np.float64).astype(np.float32)
    mask.flags.writeable = False
    return mask


@cache
def _ground(background: str) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), BACKGROUNDS[background], np.uint8)


@cache
def _sprite(look: Look, background: str) -> np.ndarray:
    behind = np.array(BACKGROUNDS[background], np.float32)
    paint = np.array(COLOURS[look.colour], np.float32)
    mask = sprite_mask(look.shape, look.size)[:, :, None]
    return np.rint(behind + mask * (paint - behind)).astype(np.uint8)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the square [-1, 1] x [-1, 1] (y downwards) belong to a shape."""
    across, down = np.abs(x), np.abs(y)
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return (across <= 1) & (down <= 1)
    if shape == "diamond":
        return across + down <= 1
    if shape == "triangle":
        return (down <= 1) & (across <= (1 + y) / 2)
    if shape == "cross":
        return (np.minimum(across, down) <= _ARM) & (np.maximum(across, down) <= 1)
    if shape == "star":
        return _in_star(x, y)
    raise ValueError(f"no such shape: got {shape!r}, wanted one of {SHAPES}")


def _in_star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The five-pointed star with a tip upwards: inside is what lies below the edge of its half sector."""
    outer, inner, shift = _STAR
    y = y - shift
    angle = np.arctan2(x, -y)  # 0 at the upper tip
    folded = np.abs(np.mod(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)  # 0 at a tip, pi / 5 at a notch
    radius = np.hypot(x, y)
    along, aside = radius * np.cos(folded), radius * np.sin(folded)
    notch_along, notch_aside = inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)
    # on the inner side of the straight edge from the tip (outer, 0) to the notch
    return (along - outer) * notch_aside - aside * (notch_along - outer) <= 0
