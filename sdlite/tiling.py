"""Decode or encode a large image in overlapping tiles: memory of one tile, whatever its size.

As diffusers' `AutoencoderKL.tiled_decode` and `tiled_encode`: overlap and linear blend; but all
tiles of an image have one size, spread evenly, where diffusers leaves narrow rests at the right and
the bottom.
Engines that compile for a shape compile once, and no tile sees only a strip. Each tile is worked on
alone, and its norm layers see the tile alone: images differ slightly from those made at once, which
is why it is an option.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdlite import running
from sdlite.errors import InputError


@dataclass(frozen=True)
class Tiling:
    """`size_px`: side of a tile, pixels, at most. `overlap`: share of a tile that its neighbor has
    too, at least, 0 up to (not with) 1.
    """

    size_px: int
    overlap: float = 0.25

    def check(self, stride: int) -> None:
        """Whether the tiles fit a VAE of `stride` pixels per latent.

        Raises:
            InputError: not a multiple of the stride, or an overlap outside 0 to 1.
        """
        if self.size_px < stride or self.size_px % stride:
            low = max(self.size_px // stride * stride, stride)
            raise InputError(
                f"tile size_px={self.size_px} is not a positive multiple of {stride} (VAE stride);"
                f" use {low} or {low + stride}."
            )
        if not 0 <= self.overlap < 1 or int(self.size_px // stride * (1 - self.overlap)) < 1:
            raise InputError(
                f"tile overlap={self.overlap}; accepted: 0 up to (not with) 1, and at least one"
                " latent of a tile is its own."
            )

    def __str__(self) -> str:
        return (
            f"VAE in tiles of at most {self.size_px} px, {self.overlap:.0%} overlap,"
            " blended, where an image is larger than a tile"
        )


def grid(length: int, most: int, overlap: float) -> tuple[int, list[int]]:
    """Side and starts of the fewest tiles of `most` or less that cover `length`, each sharing
    `overlap` of itself or more with the next.
    """
    if length <= most:
        return length, [0]
    count = math.ceil((length - overlap * most) / (most * (1 - overlap)) - 1e-9)
    side = next(
        s for s in range(1, most + 1) if count * s - (count - 1) * int(overlap * s) >= length
    )
    return side, [round(i * (length - side) / (count - 1)) for i in range(count)]


def decode(
    network: Callable[[np.ndarray], np.ndarray], latents: np.ndarray, tiling: Tiling, stride: int
) -> np.ndarray:
    """Latents (B, C, h, w) -> pixels (B, 3, H, W), by a network that does the same; latents of one
    tile or less are one call.

    One row of tiles is held at a time, beside the image.
    """
    return _pieces(network, latents, tiling.size_px // stride, tiling.overlap, 1, stride)


def encode(
    network: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, tiling: Tiling, stride: int
) -> np.ndarray:
    """Pixels (B, 3, H, W) -> latents, or their parameters, (B, C, h, w): as `decode`."""
    return _pieces(network, pixels, tiling.size_px // stride, tiling.overlap, stride, 1)


def _pieces(
    network: Callable[[np.ndarray], np.ndarray],
    given: np.ndarray,
    most: int,
    overlap: float,
    taken: int,
    made: int,
) -> np.ndarray:
    """A network's answer, of tiles of `most` latents: one latent is `taken` numbers of each side of
    `given`, and `made` of the answer.
    """
    tall, wide = (n // taken for n in given.shape[2:])
    if max(tall, wide) <= most:
        return network(given)
    (height, tops), (width, lefts) = (grid(n, most, overlap) for n in (tall, wide))
    out = _Canvas(tall * made, axis=2)
    for top in tops:
        lines = given[:, :, top * taken : (top + height) * taken]
        row = _Canvas(wide * made, axis=3)
        for left in lefts:
            running.check()
            tile = lines[..., left * taken : (left + width) * taken]
            row.add(network(np.ascontiguousarray(tile)), left * made)
        out.add(row.pixels, top * made)
    return out.pixels


class _Canvas:
    """Pieces side by side along `axis`; where a piece lies over what is there, it fades in."""

    def __init__(self, length: int, axis: int):
        self.length, self.axis, self.end = length, axis, 0
        self.pixels = np.empty(0, np.float32)

    def add(self, piece: np.ndarray, start: int) -> None:
        if self.end == 0:
            shape = list(piece.shape)
            shape[self.axis] = self.length
            self.pixels = np.empty(shape, np.float32)
        target, given = np.moveaxis(self.pixels, self.axis, -1), np.moveaxis(piece, self.axis, -1)
        shared, stop = self.end - start, start + given.shape[-1]
        if shared > 0:
            weight = np.arange(shared, dtype=np.float32) / np.float32(shared)
            target[..., start : self.end] += (
                given[..., :shared] - target[..., start : self.end]
            ) * weight
        target[..., self.end : stop] = given[..., shared:]
        self.end = stop
