"""Decode a large picture in overlapping tiles: memory of one tile, whatever the picture's size.

Same grid, overlap and linear blend as diffusers' `AutoencoderKL.tiled_decode`, so the two agree to rounding. Each tile is decoded alone, and its
norm layers see the tile alone: pictures differ slightly from those decoded at once, which is why it is an option.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdlite.errors import InputError


@dataclass(frozen=True)
class Tiling:
    """`size_px`: side of a tile, pixels. `overlap`: share of a tile that its neighbour has too, 0 up to (not with) 1."""

    size_px: int
    overlap: float = 0.25

    def check(self, stride: int) -> None:
        if self.size_px < stride or self.size_px % stride:
            low = max(self.size_px // stride * stride, stride)
            raise InputError(
                f"tile size_px={self.size_px} is not a positive multiple of {stride} (VAE stride); use {low} or {low + stride}."
            )
        if not 0 <= self.overlap < 1 or int(self.size_px // stride * (1 - self.overlap)) < 1:
            raise InputError(f"tile overlap={self.overlap}; accepted: 0 up to (not with) 1, and at least one latent of a tile is its own.")

    def __str__(self) -> str:
        return f"VAE decoder in tiles of {self.size_px} px, {self.overlap:.0%} overlap, blended, where a picture is larger than a tile"


def decode(network: Callable[[np.ndarray], np.ndarray], latents: np.ndarray, tiling: Tiling, stride: int) -> np.ndarray:
    """Latents (B, C, h, w) -> pixels (B, 3, H, W), by a network that does the same; latents of one tile or less are one call.

    Two rows of tiles are held at a time.
    """
    side = tiling.size_px // stride
    if max(latents.shape[2:]) <= side:
        return network(latents)
    step, blend = int(side * (1 - tiling.overlap)), int(tiling.size_px * tiling.overlap)
    keep = tiling.size_px - blend
    above: list[np.ndarray] = []
    out = []
    for top in range(0, latents.shape[2], step):
        row: list[np.ndarray] = []
        for left in range(0, latents.shape[3], step):
            piece = np.ascontiguousarray(latents[:, :, top : top + side, left : left + side])
            tile = np.array(network(piece), np.float32)  # a copy: it is blended in place
            if above:
                _blend(above[len(row)], tile, blend, axis=2)
            if row:
                _blend(row[-1], tile, blend, axis=3)
            row.append(tile)
        out.append(np.concatenate([t[:, :, :keep, :keep] for t in row], axis=3))
        above = row
    return np.concatenate(out, axis=2)


def _blend(before: np.ndarray, tile: np.ndarray, extent: int, axis: int) -> None:
    """In place: the first `extent` lines of `tile` fade in over the last ones of `before`."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if not extent:
        return
    weight = (np.arange(extent, dtype=np.float32) / np.float32(extent)).reshape(-1, *[1] * (3 - axis))
    lines = [slice(None)] * 4
    lines[axis] = slice(extent)
    end = [slice(None)] * 4
    end[axis] = slice(before.shape[axis] - extent, None)
    tile[tuple(lines)] = before[tuple(end)] * (1 - weight) + tile[tuple(lines)] * weight
