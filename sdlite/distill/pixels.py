"""People's image files as 8-bit pixels: one way for every reader.

EXIF's orientation is applied. Deeper pixels are scaled by their whole range: 16 bits (I;16, I;16B)
by 65535, 12 bits in a TIFF by 4095; float pixels are accepted from 0 to 1. CMYK becomes RGB by
Pillow's formula. Color profiles (ICC) are not applied: numbers are taken as sRGB, as diffusers and
Hugging Face's datasets take them. Left out, with the reason: more than `MOST_PIXELS` pixels,
animations and several pages, 32-bit integers, floats of another range, no pixels, and whatever
Pillow cannot read to the end.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sdlite.errors import InputError, printable

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
# Pillow warns from here on; its own limit is twice that. With copies, 1.3 GB at most.
MOST_PIXELS = 2**30 // 12
_BITS, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274  # tags of TIFF and EXIF


def decode(raw: bytes) -> Image.Image:
    """The image that a file's bytes hold: RGB or RGBA, 8 bits, upright.

    Raises:
        InputError: it cannot be read, or is not accepted, see the module's text.
    """
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        _check(image)
        image.load()
        return plain(image)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(
            f"is no readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
        ) from None
    except Exception as e:  # Pillow raises a dozen kinds for damaged files
        first = printable((str(e).splitlines() or [""])[0], 200)
        raise InputError(f"cannot be read ({type(e).__name__}: {first})") from e


def _check(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"has {width}x{height} pixels")
    if width * height > MOST_PIXELS:
        raise InputError(f"has {width}x{height} pixels; accepted: {MOST_PIXELS:,} at most")
    if (
        getattr(image, "is_animated", False) and image.format != "MPO"
    ):  # a phone's JPEG with its second view
        raise InputError("is animated, or has several pages; accepted: one image")


def plain(image: Image.Image) -> Image.Image:
    """Any PIL image -> RGB or RGBA, 8 bits, upright; itself where it is that already.

    Raises:
        InputError: 32-bit integers, floats outside 0 to 1, or EXIF data that cannot be read.
    """
    most, inverted = 65535, False
    if tags := getattr(image, "tag_v2", None):
        bits = tags.get(_BITS, (16,))[0]
        most = 2**bits - 1 if 8 < bits <= 16 else most
        # white is 0; Pillow inverts 8 bits only
        inverted = tags.get(_PHOTOMETRIC) == 0 and image.mode[0] in "IF"
    image = _upright(image)
    if image.mode == "I":
        raise InputError("has 32-bit integers, whose range no file says; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = _gray(
            _of_integers(np.asarray(image), most), image.info.get("transparency"), image, inverted
        )
    elif image.mode == "F":
        image = _gray(_of_floats(np.asarray(image)), None, image, inverted)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        if exif := image.info.get("exif"):
            Image.Exif().load(exif)  # the image's own may hide that it is damaged
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception as e:
        raise InputError(
            f"has EXIF data that cannot be read ({type(e).__name__}), so how it is turned is not"
            " known"
        ) from e


def _of_integers(pixels: np.ndarray, most: int) -> np.ndarray:
    return ((pixels.astype(np.uint32) * 255 + most // 2) // most).clip(0, 255).astype(np.uint8)


def _of_floats(pixels: np.ndarray) -> np.ndarray:
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # NaN too
        raise InputError(f"has float pixels from {low:g} to {high:g}; accepted: 0 to 1")
    return (pixels * 255 + 0.5).astype(np.uint8)


def _gray(pixels: np.ndarray, clear: object, of: Image.Image, inverted: bool) -> Image.Image:
    """8-bit gray; where `of` (16 bits) has the value `clear` (a PNG's transparent one) it is
    transparent.
    """
    if inverted:
        pixels = 255 - pixels
    if not isinstance(clear, int):
        return Image.fromarray(pixels)
    alpha = np.where(np.asarray(of) == clear, 0, 255).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(pixels), Image.fromarray(alpha)])


def on_white(image: Image.Image) -> Image.Image:
    """Any PIL image -> RGB; what is transparent is white."""
    image = plain(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
