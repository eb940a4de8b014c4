"""The first draw and every later one: torch's CPU generator, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sdlite.errors import InputError

Array = np.ndarray
F32 = np.float32


class Draws(Protocol):
    """Standard normal numbers of one image, one draw after the other."""

    def normal(self, shape: Sequence[int]) -> Array:
        """float32 of `shape`."""
        ...


class Noise:
    """Standard normal draws equal to those of `torch.Generator("cpu").manual_seed(seed)` to 1e-5.

    So a seed means the same image here, in diffusers with a CPU generator, and on every backend and
    device. Source: pytorch, aten/src/ATen/: `core/MT19937RNGEngine.h`, and normal_fill of
    `native/cpu/DistributionTemplates.h`.
    """

    def __init__(self, seed: int):
        if not 0 <= seed < 2**64:
            raise InputError(f"seed={seed} is out of range; use 0 to 2**64 - 1.")
        self._bits = np.random.MT19937()
        state: Any = np.random.RandomState(seed % 2**32).get_state(legacy=False)
        self._bits.state = state

    def _uniform(self, n: int) -> Array:
        return (self._bits.random_raw(n) & 0xFFFFFF).astype(F32) * F32(2**-24)

    def normal(self, shape: Sequence[int]) -> Array:
        """float32 of `shape`, of 16 elements or more (torch draws smaller ones another way)."""
        n = int(np.prod(shape))
        if n < 16:
            raise InputError(f"shape {tuple(shape)} has {n} elements; at least 16 are needed.")
        out = _box_muller(self._uniform(n)[: n - n % 16])
        if n % 16:  # torch redraws the last sixteen
            tail = _box_muller(self._uniform(16))
            out = np.concatenate([out, np.zeros(n % 16, F32)])
            out[-16:] = tail
        return out.reshape(shape)


def _box_muller(u: Array) -> Array:
    u = u.reshape(-1, 2, 8)
    radius = np.sqrt(F32(-2) * np.log(F32(1) - u[:, :1]))
    theta = F32(2 * np.pi) * u[:, 1:]
    return np.concatenate([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)
