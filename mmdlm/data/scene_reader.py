"""The exact reader of pictures: pixels -> scene, or None. Knows sprites and the lattice, no caption, no law.

Analysis by synthesis. Every sprite at every place is a hypothesis; hypotheses are taken greedily by the
squared error they explain, and the picture of what was found, in the colours found, must then account for the
whole picture. What does not look like one of our scenes all over is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from mmdlm.data.scene import BACKGROUNDS, COLOURS, GAP, MOST, SHAPES, SIDE, SIZES, STEP, Object, Scene
from mmdlm.data.scene_picture import sprite_mask

# Everything is done at half the resolution and a little blurred: four times faster, and the blur and noise
# that a codec adds fade beside our own.
_GRID = SIDE // 2
_BLUR = 0.6  # standard deviation in grid points
# Object colours are at least 98 from one another and backgrounds 101 (Euclidean): 40 leaves no doubt which is
# meant, and a blur of 1 pixel, which pales thin shapes, takes up to 26 of it.
_COLOUR_TOLERANCE = 40.0
# A hypothesis that explains less than half of its own energy is no object, only an overlap with one.
_LEAST_EXPLAINED = 0.5
# Root mean square over a window of 8 x 8 pixels, so that one wrong tile of a tokenizer counts in full.
# Measured in units of these tolerances: degraded renders (blur 1 pixel, noise 8, colour cast 5; 27 dB) at
# most 0.82; shapes with a half missing at least 1.6, with a fragment of 4 x 4 pixels beside them 1.5, half a
# tile off the lattice 1.3.
_WINDOW = 4  # grid points
_OBJECT_TOLERANCE = 0.1  # inside a bounding box, as a share of the object's contrast with the background
_GROUND_TOLERANCE = 12.0  # outside, and the least inside
# Half way between two shapes a picture leans by 0.5 to either, or by at least 0.22 from a third between them.
# The degraded renders above lean by at most 0.21, since a blur makes a star rounder. The small cross and
# diamond are so near to one another that errors of a codec of ordinary size lean by up to 0.36; in absolute
# terms they stay below 0.33 (root of summed squared coverage), and the mean of those two shapes lies above.
_LEAN_TOLERANCE = 0.22
_WAY_TOLERANCE = 0.33
_CHUNK = 256  # pictures at a time: some 60 MB of workspace

_PALETTE = np.array(list(COLOURS.values()), np.float32)
_GROUNDS = np.array(list(BACKGROUNDS.values()), np.float32)
_COLOUR_NAMES, _GROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)


def read_image(pixels: np.ndarray, *, step: int = STEP) -> Scene | None:
    """The scene that a picture (64, 64, 3) uint8 shows, or None; see `read_images`."""
    return read_images(pixels[None], step=step)[0]


def read_images(pixels: np.ndarray, *, step: int = STEP) -> list[Scene | None]:
    """The scenes that pictures show; None for whatever is not, all over, a scene of ours.

    `pixels` is (N, 64, 64, 3) uint8; `step` the pixels of a lattice unit: objects anywhere else than on the
    lattice are not of our world. The N scenes have their objects from top to bottom and left to right, and
    name no relations. Raises ValueError for another shape or dtype.
    """
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"wanted (N, {SIDE}, {SIDE}, 3) uint8 pictures, got {pixels.shape} {pixels.dtype}")
    scenes: list[Scene | None] = []
    for start in range(0, len(pixels), _CHUNK):
        scenes += _fit(pixels[start : start + _CHUNK], step).scenes(step)
    return scenes


@dataclass(frozen=True)
class _Hypotheses:
    """Every sprite at every place: H = (places of small + places of large) x shapes, P points of the grid."""

    objects: tuple[tuple[str, str, int, int], ...]  # shape, size, row, column
    masks: np.ndarray  # (H, P) float32 coverage on the reader's grid
    boxes: np.ndarray  # (H, P) bool bounding box on the grid
    energy: np.ndarray  # (H,) float32 squared norm of the mask
    clash: np.ndarray  # (H, H) bool: closer than the gap


@cache
def _hypotheses(step: int) -> _Hypotheses:
    objects, masks, boxes, corners = [], [], [], []
    for size, side in SIZES.items():
        starts = range((SIDE - side) // step + 1)
        for row, column, shape in product(starts, starts, SHAPES):
            top, left = row * step, column * step
            inside = slice(top, top + side), slice(left, left + side)
            mask, box = np.zeros((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), bool)
            mask[inside], box[inside] = sprite_mask(shape, size), True
            objects.append((shape, size, row, column))
            masks.append(_look_at(mask[None, :, :, None])[0, :, 0])
            boxes.append(box[::2, ::2].reshape(-1))
            corners.append((top, left, side))
    top, left, side = np.array(corners).T
    down = np.maximum(top[None] - (top + side)[:, None], top[:, None] - (top + side)[None])
    across = np.maximum(left[None] - (left + side)[:, None], left[:, None] - (left + side)[None])
    flat = np.stack(masks)
    return _Hypotheses(
        tuple(objects), flat, np.stack(boxes), (flat * flat).sum(axis=1), np.maximum(down, across) < GAP
    )


@dataclass(frozen=True)
class _Fit:
    """What was found in N pictures and how well it accounts for them."""

    ground: np.ndarray  # (N,) long index of the nearest background
    found: np.ndarray  # (N, MOST) long hypothesis, -1 for none
    colour: np.ndarray  # (N, MOST) long index of the nearest object colour
    astray: np.ndarray  # (N,) float32 largest distance of a fitted colour from its name
    lean: (
        np.ndarray
    )  # (N,) float32 farthest way of an object towards another shape, in units of what is tolerated
    misfit: np.ndarray  # (N,) float32 largest local residual, in units of what is tolerated

    def scenes(self, step: int) -> list[Scene | None]:
        well = (self.astray <= _COLOUR_TOLERANCE) & (self.lean <= 1) & (self.misfit <= 1)
        well &= (self.found >= 0).any(axis=1)
        return [self._scene(number, step) if fine else None for number, fine in enumerate(well)]

    def _scene(self, number: int, step: int) -> Scene | None:
        objects = []
        for place, colour in zip(self.found[number], self.colour[number], strict=True):
            if place >= 0:
                shape, size, row, column = _hypotheses(step).objects[place]
                objects.append(Object(shape, _COLOUR_NAMES[colour], size, row, column))
        objects.sort(key=lambda thing: (thing.row, thing.column))
        scene = Scene(tuple(objects), _GROUND_NAMES[self.ground[number]], (), step)
        return scene if scene.description.is_lawful else None


def _fit(pixels: np.ndarray, step: int) -> _Fit:
    """Find, fit and compare: `pixels` (N, 64, 64, 3) uint8."""
    every = _hypotheses(step)
    flat = _look_at(pixels)
    found = _search(flat, _most_common_ground(flat), every)
    present = (found >= 0)[:, :, None]
    inside = np.any(every.boxes[found] & present, axis=1)  # (N, P)
    behind = _mean_colour(flat, np.logical_not(inside))
    contrast = flat - behind[:, None]
    masks = every.masks[found] * present  # (N, MOST, P)
    paint = masks @ contrast / every.energy[found][:, :, None]  # (N, MOST, 3) object colour minus background
    distance = np.linalg.norm((behind[:, None] + paint)[:, :, None] - _PALETTE, axis=3)  # (N, MOST, colours)
    ground = np.linalg.norm(behind[:, None] - _GROUNDS, axis=2)  # (N, backgrounds)
    astray = np.where(found >= 0, distance.min(axis=2), 0).max(axis=1)
    residual = contrast - masks.transpose(0, 2, 1) @ paint
    return _Fit(
        ground.argmin(axis=1),
        found,
        distance.argmin(axis=2),
        np.maximum(astray, ground.min(axis=1)),
        _lean(contrast, found, paint, every),
        _misfit(residual, every.boxes[found] & present, paint),
    )


def _most_common_ground(flat: np.ndarray) -> np.ndarray:
    """The colour of the background before anything is known of the objects: (N, 3).

    The mean of those points that are near the background which has most of them near: objects may cover
    nearly half of a picture and blur the rest, so a median would lean to them.
    """
    lengths = (flat * flat).sum(axis=2)[:, :, None]
    squares = lengths - 2 * (flat @ _GROUNDS.T) + (_GROUNDS * _GROUNDS).sum(axis=1)
    near = squares < _COLOUR_TOLERANCE**2  # (N, P, backgrounds)
    most = near.sum(axis=1).argmax(axis=1)
    return _mean_colour(flat, near[np.arange(len(flat)), :, most])


def _mean_colour(flat: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The mean over some of the points, 0 where there are none: (N, P, 3), (N, P) bool -> (N, 3)."""
    sums = (where[:, None].astype(np.float32) @ flat)[:, 0]
    return sums / np.maximum(where.sum(axis=1), 1)[:, None].astype(np.float32)


def _search(flat: np.ndarray, behind: np.ndarray, every: _Hypotheses) -> np.ndarray:
    """The hypotheses found in each picture, best first: (N, MOST) long, -1 for none."""
    # one large matrix product does all the looking: how each hypothesis correlates with each channel
    contrast = (flat - behind[:, None]).transpose(0, 2, 1)
    overlap = (contrast.reshape(-1, _GRID * _GRID) @ every.masks.T).reshape(len(flat), 3, -1)
    paints = _PALETTE - behind[:, None]  # (N, colours, 3)
    full = (paints * paints).sum(axis=2)[:, :, None] * every.energy  # (N, colours, H) of a perfect fit
    explained = 2 * (paints @ overlap) - full
    explained = np.where(explained >= _LEAST_EXPLAINED * full, explained, -np.inf).max(axis=1)  # (N, H)
    found = np.full((len(behind), MOST), -1)
    for turn in range(MOST):
        best = explained.argmax(axis=1)
        some = np.isfinite(explained[np.arange(len(best)), best])
        found[some, turn] = best[some]
        explained[every.clash[best]] = -np.inf
    return found


def _lean(contrast: np.ndarray, found: np.ndarray, paint: np.ndarray, every: _Hypotheses) -> np.ndarray:
    """How far an object is on the straight way from its shape to another in its place; the farthest: (N,).

    In units of the larger of two tolerances, one relative to the length of the way and one absolute.
    """
    strength = np.maximum((paint * paint).sum(axis=2), 1)  # (N, MOST)
    cover = (contrast @ paint.transpose(0, 2, 1)).transpose(0, 2, 1) / strength[:, :, None]  # (N, MOST, P)
    own = every.masks[found]
    astray = cover - own
    first = found // len(SHAPES) * len(SHAPES)  # (N, MOST) the first shape in the same place
    farthest = np.zeros(found.shape, np.float32)
    for shape in range(len(SHAPES)):
        way = every.masks[first + shape] - own
        length = np.linalg.norm(way, axis=2)
        tolerated = np.maximum(length * _LEAN_TOLERANCE, _WAY_TOLERANCE)
        gone = (astray * way).sum(axis=2) / np.maximum(length, 1e-3)  # 0 towards itself
        farthest = np.maximum(farthest, gone / tolerated)
    return np.where(found >= 0, farthest, 0).max(axis=1)


def _misfit(residual: np.ndarray, boxes: np.ndarray, paint: np.ndarray) -> np.ndarray:
    """Largest local residual of each picture, in units of what is tolerated there: (N,) float32."""
    strength = np.sqrt((paint * paint).mean(axis=2))  # (N, MOST) a channel
    tolerance = np.where(boxes, strength[:, :, None] * _OBJECT_TOLERANCE, 0).sum(axis=1)  # boxes are disjoint
    tolerance = np.maximum(tolerance, _GROUND_TOLERANCE)
    power = (residual * residual).mean(axis=2) / (tolerance * tolerance)
    return np.sqrt(_window_mean(power.reshape(-1, _GRID, _GRID)).max(axis=(1, 2)))


def _look_at(maps: np.ndarray) -> np.ndarray:
    """Pictures as the reader sees them, halved and blurred: (N, 64, 64, C) -> (N, P, C) float32."""
    lens = _lens()
    across = np.tensordot(maps.astype(np.float32), lens, axes=(2, 1))  # (N, 64, C, grid)
    both = np.tensordot(across, lens, axes=(1, 1))  # (N, C, grid, grid), column before row
    return both.transpose(0, 3, 2, 1).reshape(len(maps), _GRID * _GRID, -1)


@cache
def _lens() -> np.ndarray:
    """Mean of two neighbours, then a Gaussian over those: (grid, 64), rows sum to one."""
    halves = np.kron(np.eye(_GRID), np.full((1, 2), 0.5))
    ticks = np.arange(_GRID)
    weights = np.exp(-((ticks[:, None] - ticks[None]) ** 2) / (2 * _BLUR**2))
    return (weights / weights.sum(axis=1, keepdims=True) @ halves).astype(np.float32)


def _window_mean(power: np.ndarray) -> np.ndarray:
    """Mean over every full `_WINDOW` x `_WINDOW` window of (N, grid, grid)."""
    sums = np.pad(power.cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
    size = _WINDOW
    total = sums[:, size:, size:] - sums[:, :-size, size:] - sums[:, size:, :-size] + sums[:, :-size, :-size]
    return np.maximum(total, 0) / size**2
