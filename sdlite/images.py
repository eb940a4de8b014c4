"""Pixels: the only place that knows the range. float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)
-> PIL -> file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdlite.errors import InputError
from sdlite.io import replacing

if TYPE_CHECKING:
    from PIL.Image import Image


def to_float(pixels: np.ndarray) -> np.ndarray:
    """(B, 3, H, W) float in [-1, 1] -> (B, H, W, 3) float in [0, 1], clipped.

    Raises:
        InputError: NaN or infinity, which would be black.
    """
    finite(pixels, "the pixels of the VAE decoder")
    return np.ascontiguousarray(np.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1))


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """(B, 3, H, W) float, clipped to [-1, 1] -> (B, H, W, 3) uint8, rounded as diffusers rounds (x
    255, half to even).
    """
    return np.round(to_float(pixels) * 255).astype(np.uint8)


def finite(array: np.ndarray, what: str) -> np.ndarray:
    """`array`, where all of it is numbers.

    Raises:
        InputError: NaN or infinity.
    """
    if not np.isfinite(array).all():
        raise InputError(
            f"{what} are not finite (NaN or infinity): the weights are damaged, or too large for"
            " their precision. Load the model with precision='fp32', or fetch it again."
        )
    return array


def to_pil(images: np.ndarray) -> list[Image]:
    """uint8 (B, H, W, 3) -> PIL images."""
    from PIL import Image

    return [Image.fromarray(x) for x in images]


def grid(images: Sequence[Image], columns: int | None = None) -> Image:
    """Images of one size side by side, in rows of `columns` (default: the nearest square)."""
    from PIL import Image

    columns = columns or int(np.ceil(len(images) ** 0.5))
    rows = -(-len(images) // columns)
    w, h = images[0].size
    out = Image.new("RGB", (w * columns, h * rows), "white")
    for i, image in enumerate(images):
        out.paste(image, (i % columns * w, i // columns * h))
    return out


def save(image: Image, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write beside and rename, with `metadata` in the file.

    PNG has it as text chunks, JPEG and WebP as JSON in EXIF's UserComment.

    Args:
        metadata: default: what the image's `info` holds of it, as a pipeline's images do.
    """
    path = Path(path)
    if metadata is None:
        metadata = {
            k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)
        }
    with replacing(path, lasting=False) as tmp:
        image.save(tmp, **_kept(path.suffix.lower(), metadata))


def _kept(ending: str, metadata: dict[str, str]) -> dict[str, Any]:
    """Pillow's arguments that keep `metadata` in a file of this ending."""
    if ending == ".png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for k, v in metadata.items():
            info.add_itxt(k, v)
        return {"pnginfo": info}
    if ending in (".jpg", ".jpeg", ".webp") and metadata:
        from PIL import Image
        from PIL.ExifTags import IFD, Base

        exif = Image.Exif()
        exif.get_ifd(IFD.Exif)[Base.UserComment] = b"ASCII\0\0\0" + json.dumps(metadata).encode()
        return {"exif": exif}
    return {}
