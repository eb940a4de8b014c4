"""Image files of every depth and kind become the pixels that a reference computes, or are left out
with the reason.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdlite.distill import pixels
from sdlite.errors import InputError

RAMP = np.array([[0, 1, 128, 129, 257, 1000], [4095, 32767, 32768, 40000, 65534, 65535]], np.uint16)


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def read(raw: bytes) -> np.ndarray:
    return np.asarray(pixels.decode(raw))


def eight_bit(values: np.ndarray, most: int = 65535) -> np.ndarray:
    """The reference: the nearest 8-bit level, as gray in three channels."""
    level = np.floor(values.astype(np.float64) / most * 255 + 0.5).astype(np.uint8)
    return np.repeat(level[..., None], 3, 2)


def tiff(
    values: np.ndarray, *, bits: int, kind: int = 1, order: str = "<", photometric: int = 1
) -> bytes:
    """A TIFF of one uncompressed strip, written by hand: `kind` 1 is unsigned, 2 signed, 3
    float.
    """
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(data),
        339: kind,
    }
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    rows = b"".join(struct.pack(order + "HHIHH", k, 3, 1, v, 0) for k, v in sorted(tags.items()))
    return head + data + struct.pack(order + "H", len(tags)) + rows + bytes(4)


@pytest.mark.parametrize(
    "raw",
    [
        stored(Image.fromarray(RAMP)),
        stored(Image.fromarray(RAMP), "TIFF"),
        tiff(RAMP, bits=16),
        tiff(RAMP, bits=16, order=">"),
    ],
    ids=["png", "tiff", "little endian", "big endian"],
)
def test_sixteen_bits_are_scaled_by_their_whole_range(raw):
    np.testing.assert_array_equal(read(raw), eight_bit(RAMP))


def test_white_may_be_zero_in_a_tiff():
    np.testing.assert_array_equal(read(tiff(RAMP, bits=16, photometric=0)), 255 - eight_bit(RAMP))


def test_a_transparent_level_of_sixteen_bits():
    out = pixels.decode(stored(Image.fromarray(RAMP), transparency=1000))
    assert out.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(out)[..., 3], np.where(RAMP == 1000, 0, 255))
    np.testing.assert_array_equal(np.asarray(pixels.on_white(out))[0, 5], [255, 255, 255])


def test_floats_from_0_to_1():
    values = np.array([[0, 0.1, 0.5, 0.999, 1]], np.float32)
    np.testing.assert_array_equal(
        read(stored(Image.fromarray(values), "TIFF")), eight_bit(values, 1)
    )


@pytest.mark.parametrize("values", [[0.0, 255.0], [-0.1, 1.0], [0.0, np.nan], [0.0, np.inf]])
def test_floats_of_another_range_are_left_out(values):
    with pytest.raises(InputError, match="accepted: 0 to 1"):
        read(stored(Image.fromarray(np.array([values], np.float32)), "TIFF"))


@pytest.mark.parametrize(
    "raw",
    [
        tiff(np.array([[0, 70000]], np.int32), bits=32, kind=2),
        tiff(np.array([[0, 9]], np.int16), bits=16, kind=2),
    ],
)
def test_integers_of_unknown_range_are_left_out(raw):
    with pytest.raises(InputError, match="32-bit integers"):
        read(raw)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    values = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: values,
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.transpose(1, 0, 2),
        6: values.transpose(1, 0, 2)[:, ::-1],
        7: values[::-1, ::-1].transpose(1, 0, 2),
        8: values.transpose(1, 0, 2)[::-1],
    }
    image = Image.fromarray(values)
    np.testing.assert_array_equal(read(stored(image, exif=exif)), turned[orientation])
    np.testing.assert_array_equal(
        np.asarray(pixels.decode(stored(image, "TIFF", exif=exif))), turned[orientation]
    )
    deep = Image.fromarray(RAMP)
    np.testing.assert_array_equal(
        read(stored(deep, exif=exif)).shape[:2], (6, 2) if orientation > 4 else (2, 6)
    )


def test_modes():
    red = Image.new("RGB", (2, 1), (200, 10, 30))
    np.testing.assert_array_equal(
        read(stored(red.convert("CMYK"), "TIFF")), np.asarray(red.convert("CMYK").convert("RGB"))
    )
    np.testing.assert_array_equal(read(stored(Image.new("1", (2, 1), 1))), np.full((1, 2, 3), 255))
    gray = Image.merge("LA", [Image.new("L", (2, 1), 90), Image.new("L", (2, 1), 51)])
    np.testing.assert_array_equal(read(stored(gray)), [[[90, 90, 90, 51]] * 2])
    np.testing.assert_array_equal(
        np.asarray(pixels.on_white(gray)), [[[222, 222, 222]] * 2]
    )  # 90 x 0.2 + 255 x 0.8
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(read(stored(palette)), [[[1, 2, 3], [40, 50, 60]]])
    np.testing.assert_array_equal(
        read(stored(palette, transparency=1)), [[[1, 2, 3, 255], [40, 50, 60, 0]]]
    )
    np.testing.assert_array_equal(
        read(stored(red, transparency=(200, 10, 30))), [[[200, 10, 30, 0]] * 2]
    )


def png(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("size", [(9460, 9460), (13500, 13500), (60000, 60000)])
def test_a_bomb_is_left_out_whatever_pillow_is_told(size, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=r"accepted: 89,478,485 at most|DecompressionBombError"):
        pixels.decode(png(*size))
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_left_out(kind):
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    with pytest.raises(InputError, match="is animated, or has several pages"):
        pixels.decode(stored(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_a_phones_second_view_is_no_animation():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    assert (
        pixels.decode(stored(frames[0], "MPO", save_all=True, append_images=frames[1:])).getpixel(
            (4, 4)
        )[0]
        > 250
    )


def test_damaged_and_foreign_files():
    jpeg = stored(Image.effect_noise((64, 64), 90), "JPEG")
    for raw in (
        jpeg[: len(jpeg) // 2],
        png(0, 4),
        png(4, 0),
        stored(Image.effect_noise((9, 9), 90))[:60],
    ):
        with pytest.raises(InputError, match=r"cannot be read|is no readable"):
            pixels.decode(raw)
    for raw in (
        b"",
        b"<html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ):  # Pillow would run ghostscript
        with pytest.raises(
            InputError, match="is no readable PNG, JPEG, WEBP, TIFF, BMP or GIF image"
        ):
            pixels.decode(raw)


def test_any_image_is_taken_and_is_left_as_it_was():
    image = Image.fromarray(RAMP)
    assert np.array_equal(np.asarray(pixels.on_white(image)), eight_bit(RAMP))
    assert np.array_equal(np.asarray(image), RAMP)
    assert ImageOps.exif_transpose(image).size == image.size


def test_damaged_exif_data_leaves_the_image_out_each_time():
    image = pixels.Image.new("RGB", (8, 8))
    with pytest.raises(InputError, match="has EXIF data that cannot be read"):
        pixels.decode(stored(image, "JPEG", exif=b"Exif\0\0MMi*\0\0\0\x08\0\0"))
    image.info["exif"] = b"MMi*\0\0\0\x08\0\0"
    for _ in range(2):
        with pytest.raises(InputError, match="has EXIF data that cannot be read"):
            pixels.on_white(image)
