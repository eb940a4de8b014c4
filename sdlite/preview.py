"""What an image will be, while it is sampled: the clean latents that the network predicts, painted
by a linear map from latents to colors, one pixel a latent.

The map is a few numbers that are fitted to the decoder: at conversion, which keeps it in the
manifest, or at the first preview of a model without one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdlite import arguments, images, running

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdlite.pipeline import PipelineOutput

SIDE = 16  # latents of a side that the map is fitted on
CELLS = (1, 2, 4, 8, 16)  # patches of one latent a side: from one color to noise
Array = np.ndarray


@dataclass(frozen=True)
class Preview:
    """After step `step` (from 1) of `steps`: a small image for each image of the call."""

    step: int
    steps: int
    images: list[Image]


def fitted(
    decode: Callable[[Array], Array], channels: int, side: tuple[int, int] = (SIDE, SIDE)
) -> Array:
    """The map, float32 (channels + 1, 3), by least squares over decoded random latents.

    Args:
        decode: latents (B, C, h, w) of the UNet's scale -> pixels (B, 3, H, W) in [-1, 1].
        side: height and width of the latents that it takes.
    """
    draws = np.random.default_rng(0)
    z = np.stack([_patches(draws, channels, side, n) for n in CELLS])
    pixels = np.concatenate([decode(one[None]) for one in z])
    stride = pixels.shape[2] // side[0]
    shape = (len(z), 3, side[0], stride, side[1], stride)
    wanted = pixels.reshape(shape).mean((3, 5)).transpose(0, 2, 3, 1).reshape(-1, 3)
    known = _with_one(z).reshape(-1, channels + 1)
    colors: Array = np.linalg.lstsq(known, wanted, rcond=None)[0].astype(np.float32)
    return colors


def _patches(draws: np.random.Generator, channels: int, side: tuple[int, int], cells: int) -> Array:
    """Unit normal latents (C, h, w), equal in patches."""
    high, wide = side
    rows, columns = (np.arange(n) * min(cells, n) // n for n in (high, wide))
    field = draws.standard_normal((channels, cells, cells))
    return field[:, rows][:, :, columns].astype(np.float32)


def _with_one(latents: Array) -> Array:
    """(B, C, h, w) -> (B, h, w, C + 1)."""
    z = latents.transpose(0, 2, 3, 1)
    out: Array = np.concatenate([z, np.ones_like(z[..., :1])], axis=-1)
    return out


def painted(latents: Array, colors: Array) -> Array:
    """latents (B, C, h, w) and a map -> uint8 (B, h, w, 3)."""
    pixels = np.clip((_with_one(latents) @ colors + 1) / 2, 0, 1)
    out: Array = np.round(pixels * 255).astype(np.uint8)
    return out


@dataclass(frozen=True)
class _Seen:
    """What a preview is made of; the thread that takes it paints it, while the next step runs."""

    step: int
    steps: int
    latents: Array
    colors: Array

    def painted(self) -> Preview:
        return Preview(self.step, self.steps, images.to_pil(painted(self.latents, self.colors)))


def watching(callback: object, call: running.Call) -> Callable[[int, Array], None] | None:
    """What of a call's callback sees predictions; None where it is no `Watch`."""
    if not isinstance(callback, Watch):
        return None
    callback.call = call
    return callback.predicted


class Watch:
    """A call's callback that also sees predictions, and hands previews to another thread. It stops
    the call when nobody takes them any longer.
    """

    def __init__(self, colors: Callable[[], Array], callback: Any = None):
        """`colors`: gives the map. `callback`: the caller's own, of `Pipeline.__call__`."""
        self.colors = colors
        self.callback = arguments.optional(arguments.function, "callback", callback)
        self.call: running.Call | None = None
        self._ready: queue.Queue[_Seen | PipelineOutput | BaseException] = queue.Queue(1)
        self._left = threading.Event()
        self._predicted: Array | None = None

    def predicted(self, call: int, latents: Array) -> None:
        """The clean latents (B, C, h, w) that the network sees at a call."""
        self._predicted = latents

    def __call__(self, step: int, steps: int, latents: Array) -> object:
        if self._predicted is not None:
            self._hand(_Seen(step, steps, self._predicted, self.colors()))
        if self._left.is_set():
            return False
        return None if self.callback is None else self.callback(step, steps, latents)

    def _hand(self, what: _Seen | PipelineOutput | BaseException) -> None:
        while not self._left.is_set():
            try:
                self._ready.put(what, timeout=running.PIECE)
            except queue.Full:
                continue
            return

    def run(self, work: Callable[[], PipelineOutput]) -> Iterator[Preview | PipelineOutput]:
        """Previews of `work`, made in a thread of its own, and what it returns.

        Raises:
            What it raises.
        """

        def body() -> None:
            try:
                self._hand(work())
            except BaseException as e:
                self._hand(e)

        thread = threading.Thread(target=body, name="sdlite-stream", daemon=True)
        thread.start()
        try:
            while True:
                what = self._ready.get()
                if isinstance(what, BaseException):
                    raise what
                yield what.painted() if isinstance(what, _Seen) else what
                if not isinstance(what, _Seen):
                    return
        finally:
            self._left.set()
            if self.call is not None:
                self.call.cancelled = True
            thread.join()
