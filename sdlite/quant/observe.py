"""Streaming statistics of a tensor: memory does not grow with what was seen.

`Histogram` counts values in a symmetric range that doubles when a larger value comes, merging pairs
of bins: the result depends only on the values, not on their order, and two histograms can be added.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sdlite.errors import InputError
from sdlite.quant.summaries import SAMPLE

BINS = 4096
OBSERVERS = ("min-max", "percentile", "mse")


def spread(x: np.ndarray) -> np.ndarray:
    """At most `SAMPLE` of the values of `x`, evenly spread, as `summaries.values` takes them."""
    flat = x.reshape(-1)
    return flat[:: -(-flat.size // SAMPLE)]


class Histogram:
    """Counts, exact minimum and maximum, and the range at each sampling step."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.bound = 0.0  # bins cover [-bound, bound), a power of two
        self.counts = np.zeros(BINS, np.int64)
        self.steps: dict[int, tuple[float, float]] = {}

    def add(self, x: np.ndarray, step: int = 0, name: str = "") -> None:
        """Count the values of `x` (any shape, float).

        Raises:
            InputError: a value is not finite.
        """
        self.add_some(float(x.min()), float(x.max()), spread(x), step, name)

    def add_some(
        self, low: float, high: float, some: np.ndarray, step: int = 0, name: str = ""
    ) -> None:
        """Count the values `some` (n,) of a tensor whose least and largest are `low` and `high`.

        Raises:
            InputError: a value is not finite.
        """
        if not np.isfinite([low, high, some.sum(dtype=np.float64)]).all():
            raise InputError(
                f"activation {name or 'tensor'} is not finite at step {step}; the weights or the"
                " calibration data are at fault: check that the float pipeline makes an image"
                " from this prompt."
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        before = self.steps.get(step, (np.inf, -np.inf))
        self.steps[step] = (min(before[0], low), max(before[1], high))
        largest = max(abs(low), abs(high))
        if largest >= self.bound:
            self._grow(2.0 ** (np.floor(np.log2(largest)) + 1) if largest > 0 else 2.0**-30)
        index = ((some + self.bound) * (BINS / (2 * self.bound))).astype(np.int64)
        self.counts += np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)

    def _grow(self, bound: float) -> None:
        while self.bound and self.bound < bound:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts[:] = 0
            self.counts[BINS // 4 : 3 * BINS // 4] = merged
            self.bound *= 2
        self.bound = max(self.bound, bound)

    @property
    def centers(self) -> np.ndarray:
        """Middle of each bin, (BINS,)."""
        return (np.arange(BINS) + 0.5) * (2 * self.bound / BINS) - self.bound


@dataclass
class ChannelMax:
    """Largest absolute value per last-axis channel (Linear inputs), for SmoothQuant; also of the
    first token against the others.
    """

    values: np.ndarray | None = None
    first_token: float = 0.0
    other_tokens: float = 0.0
    shape: tuple[int, ...] = field(default=())

    def add(self, x: np.ndarray) -> None:
        """Look at the values of `x` (..., D)."""
        self.shape = x.shape
        if x.ndim < 2:
            return
        a = np.abs(x)
        self.add_channels(a.reshape(-1, x.shape[-1]).max(0))
        if x.ndim == 3:
            self.add_tokens(a.max((0, 2)))

    def add_shape(self, shape: np.ndarray) -> None:
        """Take the tensor's shape, int64."""
        self.shape = tuple(int(n) for n in shape)

    def add_channels(self, largest: np.ndarray) -> None:
        """Take the largest absolute value of each channel, (D,)."""
        self.values = largest if self.values is None else np.maximum(self.values, largest)

    def add_tokens(self, largest: np.ndarray) -> None:
        """Take the largest absolute value of each token, (L,)."""
        if len(largest) > 1:
            self.first_token = max(self.first_token, float(largest[0]))
            self.other_tokens = max(self.other_tokens, float(largest[1:].max()))


def quantization_error(h: Histogram, low: float, high: float, levels: int = 256) -> float:
    """Mean squared error of rounding to `levels` values between low and high, clipping outside,
    over the counted values.
    """
    scale = max(high - low, 1e-12) / (levels - 1)
    zero = np.round(-low / scale)
    x = h.centers
    q = np.clip(np.round(x / scale) + zero, 0, levels - 1)
    return float((h.counts * ((q - zero) * scale - x) ** 2).sum() / max(h.counts.sum(), 1))


def choose_range(
    h: Histogram, observer: str, percentile: float = 99.999, symmetric: bool = False
) -> tuple[float, float]:
    """The range that is quantized, zero included: `min-max`, `percentile` of the counts on each
    side, or least-`mse` clipping.

    Source of the search: NVIDIA's MSE calibrator (Wu et al. 2020, arXiv:2004.09602, section 5) on a
    histogram.
    """
    low, high = min(h.low, 0.0), max(h.high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    if observer == "min-max" or high == low:
        return low, high
    if observer == "percentile":
        total = np.cumsum(h.counts) / max(h.counts.sum(), 1)
        tail = (100 - percentile) / 100
        width = 2 * h.bound / BINS
        a = float(np.searchsorted(total, tail / 2)) * width - h.bound
        b = float(np.searchsorted(total, 1 - tail / 2) + 1) * width - h.bound
        a, b = max(low, min(a, 0.0)), min(high, max(b, 0.0))
        return (-max(-a, b), max(-a, b)) if symmetric else (a, b)
    if observer == "mse":
        shares = np.linspace(0.2, 1.0, 33)
        if symmetric:
            return min(
                ((low * r, high * r) for r in shares), key=lambda c: quantization_error(h, *c)
            )
        # one side at a time: SiLU's short negative side must not shrink with the long positive one
        for _ in range(2):
            high = min(
                (max(h.high, 0.0) * r for r in shares), key=lambda b: quantization_error(h, low, b)
            )
            low = min(
                (min(h.low, 0.0) * r for r in shares), key=lambda a: quantization_error(h, a, high)
            )
        return low, high
    raise InputError(f"observer={observer!r} is not known; choose one of {', '.join(OBSERVERS)}.")
