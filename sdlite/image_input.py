"""Images and masks that an edit starts from: whatever people have -> arrays of one size.

Rules. A file, PIL image or array becomes 8-bit RGB: turned as its EXIF says, 16 bits scaled to 8,
transparent pixels over white, CMYK and palettes as Pillow converts them. It is scaled until it
covers the size that is asked for, and its middle is kept; where none is it keeps its own size, each
side rounded down to the multiple of the model. Scaling is Lanczos, as in diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdlite.errors import InputError, ShapeError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

ACCEPTED = (
    "a PIL image, a path, uint8 (H, W, 3) or float (H, W, 3) from 0 to 1; or one for each prompt"
)
MOST_PIXELS = 1 << 28  # of a file: 16,384 x 16,384
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def images(name: str, given: object, count: int) -> list[Image]:
    """RGB images, `count` of them: one given is each of them.

    Args:
        name: of the argument, for errors.
        given: see `ACCEPTED`.

    Raises:
        InputError: not images, another number of them, or a file that cannot be read.
    """
    several = isinstance(given, (list, tuple)) or (
        isinstance(given, np.ndarray) and given.ndim == 4
    )
    every: list[object] = list(given) if several else [given]  # type: ignore[call-overload]
    if len(every) not in (1, count):
        raise InputError(f"{len(every)} {name}s for {count} images; give one, or one for each.")
    made = [_rgb(_opened(name, x)) for x in every]
    if len({m.size for m in made}) > 1:
        sizes = ", ".join(f"{w}x{h}" for w, h in dict.fromkeys(m.size for m in made))
        raise ShapeError(f"{name} has images of several sizes ({sizes}); give one size a call.")
    return made * (count if len(made) == 1 else 1)


def mask(name: str, given: object, size: tuple[int, int]) -> Image:
    """A mask in mode "L", 255 where the image is painted anew: white from half on.

    Args:
        size: (width, height) of the image that it is for.

    Raises:
        ShapeError: another size. InputError: not a mask, or one that paints nothing.
    """
    array = np.asarray(given) if isinstance(given, np.ndarray) else None
    if array is not None and array.ndim == 2:
        given = np.repeat(array[..., None], 3, axis=2)
    found = _opened(name, given)
    grey = np.asarray(_rgb(found).convert("L"))
    if found.size != size:
        raise ShapeError(
            f"{name} is {found.size[0]}x{found.size[1]} pixels, the image {size[0]}x{size[1]};"
            " give a mask of the image's size."
        )
    painted = grey >= 128
    if not painted.any():
        raise InputError(
            f"{name} is empty: nothing is white, so nothing would be painted. White is painted"
            " anew, black is kept; sdlite.image_input.alpha_mask makes one of transparency."
        )
    return from_array(np.where(painted, np.uint8(255), np.uint8(0)))


def alpha_mask(image: Image | str | Path) -> Image:
    """The mask of an image's transparency, as OpenAI's images API has it: transparent pixels are
    painted anew.

    Args:
        image: a PIL image or a path, turned as its EXIF says.

    Raises:
        InputError: it has no transparency, or is a file that cannot be read.
    """
    from PIL import ImageOps

    opened = ImageOps.exif_transpose(_opened("image", image))
    if "transparency" in opened.info:
        opened = opened.convert("RGBA")
    if "A" not in opened.getbands():
        where = f"{image} is" if isinstance(image, (str, Path)) else "the image is"
        raise InputError(
            f"{where} in mode {opened.mode!r}, without transparency; give one in RGBA, or a mask of"
            " its own in black and white."
        )
    return from_array(np.uint8(255) - np.asarray(opened.getchannel("A")))


def extended(
    image: Image, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image, Image]:
    """A larger canvas and the mask that has its new border painted: an image grows outward.

    The border is filled with the edge's pixels, mirrored, for the first guess.

    Args:
        left, top, right, bottom: pixels of the new border.
    """
    border = (left, top, right, bottom)
    if any(type(n) is not int or n < 0 for n in border) or not any(border):
        raise InputError(
            f"border {border}; accepted: whole numbers from 0 up, one of them above 0."
        )
    pixels = np.asarray(_rgb(image))
    sides = ((top, bottom), (left, right))
    canvas = np.pad(pixels, (*sides, (0, 0)), mode="symmetric")
    painted = np.pad(np.zeros(pixels.shape[:2], np.uint8), sides, constant_values=255)
    return from_array(canvas), from_array(painted)


def covering(image: Image, height: int, width: int) -> Image:
    """Scaled until it covers the size, its middle kept."""
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    wide, high = (
        max(a, round(b * scale)) for a, b in zip((width, height), image.size, strict=True)
    )
    resized = scaled(image, wide, high)
    left, top = (wide - width) // 2, (high - height) // 2
    return resized.crop((left, top, left + width, top + height))


def example(height: int, width: int) -> tuple[Image, Image]:
    """An image of that size in pixels and a mask of its right half, for models that must have them
    where nobody gives any: soft colors, a bright disk across the mask's edge, and fine stripes.
    """
    y, x = np.mgrid[0:height, 0:width] / np.float32(max(height, width))
    colors = np.stack([x, y, 1 - (x + y) / 2], axis=-1)
    tall, wide = height / max(height, width), width / max(height, width)
    colors[(x - wide / 2) ** 2 + (y - tall / 2) ** 2 < min(tall, wide) ** 2 / 16] = (1, 0.9, 0.2)
    low = y > tall * 3 / 4
    colors[low] = (np.sin(x * 200)[..., None][low] + 1) / 2
    painted = np.zeros((height, width), np.uint8)
    painted[:, width // 2 :] = 255
    return from_array((colors * 255).astype(np.uint8)), from_array(painted)


def crop_region(painted: Image, height: int, width: int, pad: int) -> Box:
    """The box around what a mask paints, `pad` pixels wider, then grown to the shape of height x
    width where the image has room.

    Source: diffusers 0.39 `VaeImageProcessor.get_crop_region`.
    """
    rows, columns = (np.flatnonzero(np.asarray(painted).any(axis=a)) for a in (1, 0))
    full_width, full_height = painted.size
    left, right = max(columns[0] - pad, 0), min(columns[-1] + 1 + pad, full_width)
    top, bottom = max(rows[0] - pad, 0), min(rows[-1] + 1 + pad, full_height)
    if (right - left) / (bottom - top) > width / height:
        top, bottom = _grown(top, bottom, int((right - left) / (width / height)), full_height)
    else:
        left, right = _grown(left, right, int((bottom - top) * (width / height)), full_width)
    return int(left), int(top), int(right), int(bottom)


def _grown(low: int, high: int, wanted: int, most: int) -> tuple[int, int]:
    """A range of `wanted` in 0 to `most` around another one."""
    more = wanted - (high - low)
    low -= more // 2
    high += more - more // 2
    if high > most:
        low, high = low - (high - most), most
    if low < 0:
        low, high = 0, high - low
    return low, min(high, most)


def pixels(every: Sequence[Image]) -> np.ndarray:
    """RGB images of one size -> float32 (B, 3, H, W) in [-1, 1]."""
    array = np.stack([np.asarray(x) for x in every]).astype(np.float32)
    return np.ascontiguousarray((array / 255.0 * 2.0 - 1.0).transpose(0, 3, 1, 2))


def _opened(name: str, given: object) -> Image:
    from PIL import Image as Pil

    if isinstance(given, Pil.Image):
        return given
    if isinstance(given, (str, Path)):
        return _read(name, Path(given))
    if isinstance(given, np.ndarray):
        return from_array(_checked(name, given))
    if hasattr(given, "numpy"):
        raise InputError(
            f"{name} is a {type(given).__name__}; give its numbers as an array (H, W, 3), such as"
            f" {name}.permute(1, 2, 0).numpy()."
        )
    raise InputError(f"{name}={printable(repr(given), 80)}; accepted: {ACCEPTED}.")


def _read(name: str, path: Path) -> Image:
    from PIL import Image as Pil

    try:
        with Pil.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(
                    f"{name} {path} has {image.width}x{image.height} pixels; accepted: up to"
                    f" {MOST_PIXELS} in all. Scale it down."
                )
            image.load()
            return image.copy()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} {path} does not exist; give a file of an image.") from None
    except (OSError, ValueError, SyntaxError, Pil.DecompressionBombError) as e:
        raise InputError(
            f"{name} {path} cannot be read as an image ({printable(str(e), 200)}); give a PNG,"
            " JPEG or WebP file."
        ) from e


def _checked(name: str, array: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3)."""
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ShapeError(f"{name} is an array {array.shape}; accepted: {ACCEPTED}.")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise InputError(f"{name} is {array.dtype}; accepted: {ACCEPTED}.")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinity; accepted: {ACCEPTED}.")
    if array.min() < 0 or array.max() > 1:
        raise InputError(
            f"{name} is from {array.min():g} to {array.max():g}; accepted: {ACCEPTED}."
        )
    return np.round(array * 255).astype(np.uint8)


def _rgb(image: Image) -> Image:
    """8-bit RGB, by the module's rules."""
    from PIL import Image as Pil
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = from_array(_narrowed(image))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = Pil.new("RGBA", image.size, "white")
        image = Pil.alpha_composite(over, image.convert("RGBA"))
    return image.convert("RGB")


def _narrowed(image: Any) -> np.ndarray:
    """Grey of more than 8 bits as uint8: 16 bits scaled, wider numbers only where they fit."""
    values = np.asarray(image).astype(np.float64)
    most = 255.0 if image.mode == "F" and values.max(initial=0) <= 255 else 65535.0
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > most:
        raise InputError(
            f"an image in mode {image.mode!r} has values outside 0 to {most:g}; save it with 8 or"
            " 16 bits."
        )
    return np.round(values / most * 255).astype(np.uint8)


def scaled(image: Image, width: int, height: int) -> Image:
    """An image of another size."""
    from PIL import Image as Pil

    return image.resize((width, height), Pil.Resampling.LANCZOS)


def from_array(array: np.ndarray) -> Image:
    """uint8 (H, W) or (H, W, 3) -> PIL image."""
    from PIL import Image as Pil

    return Pil.fromarray(np.ascontiguousarray(array))
