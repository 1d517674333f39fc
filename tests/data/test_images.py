"""Whatever a file holds, decoding gives the picture a person would see, or one clear error."""

from __future__ import annotations

import pickle
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdlm.data.images import CentreCrop, ImageError, Letterbox, Skip, Stop, decode, fit, to_array, to_rgb

NASTY = Path(__file__).parent / "nasty"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes | Path, **options) -> np.ndarray:
    return to_array(decode(data, **options)).astype(int)


def picture(width: int = 6, height: int = 4) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


def test_rgb_is_untouched_from_path_bytes_and_file(tmp_path):
    data = encoded(picture(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png", str(tmp_path / "a.png"), BytesIO(data)):
        image = decode(source)
        assert image.mode == "RGB"
        assert np.array_equal(to_array(image), np.asarray(picture()))


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_tags_are_applied(tag, kind):
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:8, :8] = (255, 0, 0)
    upright[:8, 8:] = (0, 0, 255)
    # what a camera stores so that the tag makes it upright: the inverse of the tag's transform
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(turns[tag](upright)))
    exif = Image.Exif()
    exif[0x0112] = tag
    got = pixels(encoded(stored, kind, exif=exif, quality=95))
    assert got.shape == upright.shape
    assert np.abs(got[2:6, 2:6] - (255, 0, 0)).max() < 40
    assert np.abs(got[2:6, 10:14] - (0, 0, 255)).max() < 40


def test_alpha_is_composited_on_the_stated_colour():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)])
    assert pixels(encoded(image, "PNG")).tolist() == [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]
    green = pixels(encoded(image, "PNG"), background=(0, 200, 0))
    assert green[0, 1].tolist() == [0, 200, 0]
    assert green[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["LA", "P", "L", "1", "RGB"])
def test_every_kind_of_transparency_is_composited(mode):
    options = {}
    if mode == "LA":
        image = Image.new("LA", (2, 1), (7, 0))
    elif mode == "P":
        image = Image.new("P", (2, 1), 1)
        image.putpalette([9, 9, 9, 80, 90, 100])
        options["transparency"] = bytes([255, 0])
    else:
        image = Image.new(mode, (2, 1), 0)
        options["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    assert pixels(encoded(image, "PNG", **options), background=(1, 2, 3))[0, 0].tolist() == [1, 2, 3]


def test_palette_grey_bilevel_and_cmyk_become_rgb():
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([9, 9, 9, 80, 90, 100])
    assert pixels(encoded(palette, "PNG"))[0, 0].tolist() == [80, 90, 100]
    assert pixels(encoded(Image.new("L", (1, 1), 77), "PNG"))[0, 0].tolist() == [77, 77, 77]
    assert pixels(encoded(Image.new("1", (1, 1), 1), "PNG"))[0, 0].tolist() == [255, 255, 255]
    red = pixels(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[4, 4]
    assert red[0] > 200
    assert red[1:].max() < 60


def test_sixteen_bits_are_rescaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF", "JPEG2000", "PPM"):
        got = pixels(encoded(Image.fromarray(ramp), kind))
        assert np.abs(got[..., 0].reshape(-1) - np.arange(256)).max() <= 1, kind
    twelve = pixels(encoded(Image.fromarray(ramp // 16), "TIFF"))  # 12 bits in a 16-bit file
    assert np.abs(twelve[..., 0].reshape(-1) - np.arange(256)).max() <= 1


def test_sixteen_bit_transparent_colour_is_composited():
    grey = np.array([[1000, 60000]], np.uint16)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in grey)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0))
    tail = chunk(b"tRNS", struct.pack(">H", 1000)) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert pixels(b"\x89PNG\r\n\x1a\n" + head + tail, background=(9, 8, 7)).tolist() == [
        [[9, 8, 7], [233, 233, 233]]
    ]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (-3.0, 900.0)])
def test_floats_are_rescaled(low, high):
    ramp = np.linspace(low, high, 256, dtype=np.float32).reshape(16, 16)
    got = pixels(encoded(Image.fromarray(ramp), "TIFF"))[..., 0].reshape(-1)
    assert np.abs(got - np.arange(256)).max() <= 1


def test_a_dim_float_picture_in_the_unit_range_stays_dim():
    assert pixels(encoded(Image.fromarray(np.full((2, 2), 0.2, np.float32)), "TIFF")).max() == 51


def test_constant_deep_pictures_and_32_bit_integers():
    assert pixels(encoded(Image.fromarray(np.zeros((2, 2), np.uint16)), "PNG")).max() == 0
    assert pixels(encoded(Image.fromarray(np.full((2, 2), -5.0, np.float32)), "TIFF")).max() <= 255
    wide = np.array([[-(2**31), 0, 2**31 - 1]], np.int32)
    assert pixels(encoded(Image.fromarray(wide), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (5, 5), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(
            frames[0],
            kind,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if kind == "WEBP" else {}),
        )
        assert np.abs(pixels(data)[2, 2] - (250, 0, 0)).max() < 8, kind


def broken() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    png, jpeg = encoded(noise, "PNG"), encoded(noise, "JPEG")
    nan = encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    return {
        "truncated.png": png[: len(png) // 2],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header.png": png[:20],
        "garbage.png": b"these are no pixels" * 9,
        "empty.jpg": b"",
        "bomb.png": bomb(),
        "nan.tif": nan,
        "program.eps": eps,
    }


@pytest.mark.parametrize("name", sorted(broken()))
def test_what_is_broken_is_one_error_that_names_the_file(name, tmp_path):
    (tmp_path / name).write_bytes(broken()[name])
    with pytest.raises(ImageError, match=name) as caught:
        decode(tmp_path / name)
    assert isinstance(caught.value, ValueError)
    assert caught.value.name == str(tmp_path / name)
    assert caught.value.reason
    with pytest.raises(ImageError, match="<bytes>"):
        decode(broken()[name])
    with pytest.raises(ImageError, match="row 7"):
        decode(broken()[name], name="row 7")


def test_no_file_is_handed_to_another_program():
    with pytest.raises(
        ImageError, match="of a format that is not read here"
    ):  # not: no Ghostscript was found
        decode(broken()["program.eps"])


def test_what_is_no_file_is_the_same_error(tmp_path):
    for path in (tmp_path / "absent.png", tmp_path, tmp_path / "nul\0.png"):
        with pytest.raises(ImageError):
            decode(path)
    with pytest.raises(ImageError, match=r"absent\.png: no such file"):
        decode(tmp_path / "absent.png")


def test_a_picture_at_hand_is_made_rgb_as_a_file_is():
    clear = Image.new("RGBA", (2, 3), (0, 0, 0, 0))
    clear.getexif()[0x0112] = 6
    got = to_rgb(clear, background=(1, 2, 3))
    assert (got.mode, got.size, got.getpixel((0, 0))) == ("RGB", (3, 2), (1, 2, 3))
    assert clear.mode == "RGBA"
    assert to_rgb(Image.fromarray(np.full((1, 1), 32768, np.uint16))).getpixel((0, 0)) == (128, 128, 128)
    same = picture()
    assert to_rgb(same) is not same
    assert np.array_equal(to_array(to_rgb(same)), to_array(same))


def test_the_number_of_pixels_is_bounded_by_the_argument_alone():
    limit = Image.MAX_IMAGE_PIXELS
    data = encoded(picture(10, 10), "PNG")
    assert decode(data, max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="10 x 10 is more than max_pixels = 99"):
        decode(data, max_pixels=99)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_warnings_neither_show_nor_lose_a_picture():
    palette = Image.new("P", (1, 1), 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # five entries are announced, none is there
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        decode(encoded(palette, "PNG", transparency=b"\x80"))
        decode(encoded(picture(), "JPEG", exif=exif))
        assert warnings.filters == before


@pytest.mark.parametrize(
    ("name", "size", "low", "high"),
    [
        ("16bit.cropped.tif", (64, 64), 60, 190),  # 18,000 to 44,000 of 65,535; clipping makes it all white
        ("hopper_orientation_6.jpg", (128, 128), 0, 255),
        ("rgb_trns.png", (64, 64), 0, 255),
        ("dispose_prev_first_frame.gif", (100, 50), 0, 255),
    ],
)
def test_samples_that_must_load(name, size, low, high):
    image = decode(NASTY / name)
    array = to_array(image)
    assert image.size == size
    assert low <= array.min() < array.max() <= high
    assert array.std() > 3


def test_the_sample_turned_by_its_tag_stands_upright():
    face = to_array(decode(NASTY / "hopper_orientation_6.jpg")).astype(int)
    # flag to the left of her: red and blue stripes there; dark uniform below, not on a side
    assert face[110:, 40:100].mean() < face[:20, 70:128].mean()
    assert face[110:, 40:100].mean() < 70


@pytest.mark.parametrize(
    "name",
    [
        "decompression_bomb.gif",
        "apng__chunk_no_fctl.png",
        "unimplemented_pixel_format.dds",
        "png_decompression_dos.png",
    ],
)
def test_samples_that_must_fail(name):
    with pytest.raises(ImageError, match=name):
        decode(NASTY / name)


def test_centre_crop_takes_the_middle_square():
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 255, 0), (10, 0, 30, 20))
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        assert (to_array(fit(image, 20)) == (0, 255, 0)).all()
        for size in (5, 64):  # the filter sees a little of what lies beside
            rim = 1 + size // 16
            assert (to_array(fit(image, size))[rim:-rim, rim:-rim] == (0, 255, 0)).all()


def test_letterbox_keeps_everything():
    tall = Image.new("RGB", (20, 40), (255, 0, 0))
    got = to_array(fit(tall, 16, shape=Letterbox((0, 0, 9))))
    assert (got[:, 4:12] == (255, 0, 0)).all()
    assert (got[:, :4] == (0, 0, 9)).all()
    assert (got[:, 12:] == (0, 0, 9)).all()
    assert fit(Image.new("RGB", (1, 1000)), 8, shape=Letterbox()).size == (8, 8)


def test_shrinking_is_antialiased():
    board = Image.fromarray(np.kron(np.indices((64, 64)).sum(0) % 2, np.ones((1, 1))).astype(np.uint8) * 255)
    assert np.abs(to_array(fit(board.convert("RGB"), 8)).astype(int) - 127).max() < 16


def test_fit_and_to_array_take_rgb_only():
    with pytest.raises(ValueError, match="mode 'L'"):
        fit(Image.new("L", (4, 4)), 2)
    with pytest.raises(ValueError, match="mode 'RGBA'"):
        to_array(Image.new("RGBA", (4, 4)))
    with pytest.raises(ValueError, match="at least 1"):
        fit(picture(), 0, shape=CentreCrop())


def test_policies_and_the_error_across_processes():
    error = ImageError("a.png", "is broken")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.name, again.reason, str(again)) == (
        ImageError,
        "a.png",
        "is broken",
        "a.png: is broken",
    )
    with pytest.raises(ImageError):
        Stop()(error)
    skip = Skip()
    skip(error)
    skip(error)
    skip(ImageError("b.png", "is too"))
    assert (skip.count, skip.names, skip.failures["b.png"]) == (2, ("a.png", "b.png"), "is too")
