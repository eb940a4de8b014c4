"""Pixels: the only place that knows the range. float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) -> PIL -> file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """(B, 3, H, W) float, clipped to [-1, 1] -> (B, H, W, 3) uint8, rounded as diffusers rounds (x 255, half to even)."""
    scaled = np.clip(pixels / 2 + 0.5, 0, 1) * 255
    return np.ascontiguousarray(np.round(scaled).astype(np.uint8).transpose(0, 2, 3, 1))


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


def save(image: Image, path: str | Path, metadata: dict[str, str]) -> None:
    """Write beside and rename; PNG keeps `metadata` as text chunks (other formats have no place for it)."""
    path = Path(path)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        if path.suffix.lower() == ".png":
            from PIL.PngImagePlugin import PngInfo

            info = PngInfo()
            for k, v in metadata.items():
                info.add_itxt(k, v)
            image.save(tmp, pnginfo=info)
        else:
            image.save(tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
