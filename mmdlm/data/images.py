"""Safe decoding of pictures to RGB, and their fitting to a square; knows no data set and no tensor."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps

from mmdlm.data.sample import SampleError

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

# Decoding EPS hands the file to Ghostscript, an interpreter; a file never makes us run its code.
_REFUSED = {"EPS"}
_DEEP = (
    "I;16",
    "I;16L",
    "I;16B",
    "I;16N",
    "I",
    "F",
)  # Pillow's modes of more than 8 bits; its convert() clips them
# Filters of `warnings` are global to the process: only one thread at a time may exchange them.
_QUIET = threading.Lock()


class ImageError(SampleError):
    """A picture cannot be had: `name` is the file, `reason` says why."""


def decode(
    source: Path | str | bytes | BinaryIO,
    *,
    background: Colour = WHITE,
    max_pixels: int = 64 * 2**20,
    name: str | None = None,
) -> Image.Image:
    """Decode a picture to mode RGB, 8 bits a channel, the right way up.

    Orientation tags are applied, an alpha channel or transparent colour is composited on `background`, an
    animation gives its first frame, more than 8 bits are rescaled and not clipped: 16 bits by 65535, a
    picture that never reaches a sixteenth of that by the power of two it fits in (12 bits in a 16-bit file),
    floats in [0, 1] by 1, anything else from its least to its greatest value. Colour profiles are not
    applied.

    `name` is what an error calls the picture; default: the path, or what kind of object it was. Raises
    ImageError for whatever is wrong: no such file, truncated, no picture, more than `max_pixels` (Pillow's
    own limit of 179 million stands besides), formats that would start another program.
    """
    if name is None:
        name = str(source) if isinstance(source, (Path, str)) else f"<{type(source).__name__}>"
    file = BytesIO(source) if isinstance(source, bytes) else source
    try:
        # malformed metadata warns, which under -W error would lose the picture
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_formats()) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height}"
                    raise ImageError(name, f"{size} is more than max_pixels = {max_pixels} pixels")
                image.load()
                return to_rgb(image, background=background)
    except ImageError as error:
        raise ImageError(name, error.reason) from None
    except FileNotFoundError:
        raise ImageError(name, "no such file") from None
    except Image.UnidentifiedImageError:  # its message repeats the path
        raise ImageError(name, "not a picture, or of a format that is not read here") from None
    # a third of what broken files raise is no OSError: SyntaxError, NotImplementedError, ...
    except Exception as error:
        raise ImageError(name, f"cannot be decoded ({type(error).__name__}: {error})") from error


def to_rgb(image: Image.Image, *, background: Colour = WHITE) -> Image.Image:
    """What `decode` does after decoding, for a picture at hand: a new one of mode RGB, the right way up.

    Raises ImageError for values that are not numbers, and ValueError for modes that Pillow cannot convert.
    """
    return _on(background, _shallow(ImageOps.exif_transpose(image)))


class Shape(Protocol):
    """How a picture of any shape becomes a square."""

    def __call__(self, image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image: ...


@dataclass(frozen=True)
class CentreCrop:
    """The largest centred square; what lies beside it is lost."""

    def __call__(self, image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return image.resize((size, size), resample, box=(left, top, left + side, top + side))


@dataclass(frozen=True)
class Letterbox:
    """The whole picture, centred on a square of colour `background`."""

    background: Colour = WHITE

    def __call__(self, image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        square = Image.new("RGB", (size, size), self.background)
        square.paste(image.resize((width, height), resample), ((size - width) // 2, (size - height) // 2))
        return square


def fit(
    image: Image.Image,
    size: int,
    *,
    shape: Shape = CentreCrop(),
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Resize an RGB picture to `size` x `size` pixels, antialiased; `shape` says how it becomes a square.

    Pixel art is enlarged better with `Image.Resampling.NEAREST`. Raises ValueError for a size below 1 or
    another mode.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if image.mode != "RGB":
        raise ValueError(f"fit takes an RGB picture (decode gives one), got mode {image.mode!r}")
    return shape(image, size, resample)


def to_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, a copy that may be written to. Raises ValueError unless the picture is RGB."""
    if image.mode != "RGB":
        raise ValueError(f"to_array takes an RGB picture (decode gives one), got mode {image.mode!r}")
    return np.array(image)


class OnError(Protocol):
    """What a run does about a sample that cannot be had."""

    def __call__(self, error: SampleError) -> None: ...


@dataclass(frozen=True)
class Stop:
    """The run ends with the error."""

    def __call__(self, error: SampleError) -> None:
        raise error


class Skip:
    """The run goes on without the sample; `failures` maps its name to the reason, each name once."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}

    def __call__(self, error: SampleError) -> None:
        self.failures[error.name] = error.reason

    @property
    def count(self) -> int:
        return len(self.failures)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.failures)

    def __repr__(self) -> str:
        return f"Skip(count={self.count})"


def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in _REFUSED]


def _on(background: Colour, image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")


def _shallow(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel; the modes it does not know are left to Pillow."""
    if image.mode not in _DEEP:
        return image
    values = np.asarray(image).astype(np.float64)  # (H, W)
    if not np.isfinite(values).all():
        raise ImageError("<image>", "holds values that are not numbers")
    low, high = _range(values, image.mode)
    grey = Image.fromarray(np.rint((values - low) * (255 / (high - low))).astype(np.uint8))
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _range(values: np.ndarray, mode: str) -> tuple[float, float]:
    """What becomes 0 and what becomes 255."""
    least, greatest = float(values.min()), float(values.max())
    if mode == "F":
        if least >= 0 and greatest <= 1:
            return 0.0, 1.0
        return (least, greatest) if greatest > least else (0.0, max(greatest, 1.0))
    if least < 0:
        return (least, max(greatest, least + 1))
    if 4096 <= greatest <= 65535:
        return 0.0, 65535.0
    return 0.0, max(1.0, 2.0 ** int(greatest).bit_length() - 1)
