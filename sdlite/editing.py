"""Image to image and inpainting: what a call edits, where it starts, and what stays as it was.

Both are the same stages with another start: the image's latents with the noise of a later timestep.
Where there is a mask, the image's own latents take the place of what is not painted after each
step, and its own pixels in the end, bit by bit.

Source: diffusers 0.39, StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline. As there,
each image's generator draws the posterior first and then the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from sdlite import arguments, image_input
from sdlite.errors import InputError
from sdlite.sampling import Consistency, Draws, Sampler

if TYPE_CHECKING:
    from PIL.Image import Image

STRENGTH, REPAINTED = 0.8, 1.0  # of a call that does not say, without and with a mask

# (pixels float32 (B, 3, H, W) in [-1, 1], generators) -> latents (B, C, h, w) of the UNet's scale
Encode = Callable[[np.ndarray, Sequence[Draws]], np.ndarray]
Array = np.ndarray


@dataclass(frozen=True)
class Start:
    """Where the sampling loop starts.

    Attributes:
        latents: (B, C, h, w). noised: they are x at the solver's first call; else the first draw.
        after, beside: of `sampling.denoise`.
    """

    latents: Array
    noised: bool = False
    after: Callable[[int, Array], Array] | None = None
    beside: Array | None = None


@dataclass(frozen=True)
class Edit:
    """What a call edits.

    Attributes:
        images: RGB, one for each image of the call. mask: mode "L", 255 is painted; None: all.
        strength: 0 to 1, the share of the steps that is made.
        pad: pixels around the mask that are worked on alone; None: the whole image.
        whole: images and mask before `fitted` cropped or scaled them.
    """

    images: list[Image]
    mask: Image | None
    strength: float
    pad: int | None = None
    whole: tuple[list[Image], Image] | None = field(default=None, compare=False)
    box: image_input.Box | None = None

    @classmethod
    def of(
        cls, image: object, mask: object, strength: object, pad: object, count: int
    ) -> Edit | None:
        """A call's keywords; None where it edits nothing.

        Raises:
            InputError, ShapeError: one of them is not accepted, or has no image to go with.
        """
        if image is None:
            given = {"mask_image": mask, "strength": strength, "padding_mask_crop": pad}
            if lone := [k for k, v in given.items() if v is not None]:
                raise InputError(f"{lone[0]} is given without image; give the image to edit.")
            return None
        images = image_input.images("image", image, count)
        if pad is not None and mask is None:
            raise InputError("padding_mask_crop is given without mask_image; give the mask too.")
        if strength is None:
            strength = STRENGTH if mask is None else REPAINTED
        return cls(
            images,
            None if mask is None else image_input.mask("mask_image", mask, images[0].size),
            arguments.number("strength", strength, 0, 1),
            arguments.optional(arguments.integer, "padding_mask_crop", pad, 0),
        )

    def own_size(self, multiple: int) -> tuple[int, int] | None:
        """(height, width) that the call has where it does not say: the image's own, rounded down;
        None: the model's, where a part of the image is worked on.
        """
        if self.pad is not None:
            return None
        width, height = (max(n // multiple * multiple, multiple) for n in self.images[0].size)
        return height, width

    def fitted(self, height: int, width: int) -> Edit:
        """Of this size, cropped to the mask first where `pad` says so."""
        images, mask, box = self.images, self.mask, None
        if mask is not None and self.pad is not None:
            box = image_input.crop_region(mask, height, width, self.pad)
            images, mask = [i.crop(box) for i in images], mask.crop(box)
        images = [image_input.covering(i, height, width) for i in images]
        if mask is not None:
            covered = np.asarray(image_input.covering(mask, height, width)) >= 128
            if not covered.any():
                raise InputError(
                    f"mask_image is empty at {height}x{width}: what is white is too thin for that"
                    " size, or lies outside what is kept of the image. Paint more of it, or pass"
                    " padding_mask_crop."
                )
            mask = image_input.from_array(np.where(covered, np.uint8(255), np.uint8(0)))
        whole = None if self.mask is None else (self.images, self.mask)
        return replace(self, images=images, mask=mask, whole=whole, box=box)

    def schedule(self, solver: Sampler, spreads: bool) -> None:
        """Have the solver begin where the strength says.

        Args:
            spreads: see `Family.spreads`.

        Raises:
            InputError: the strength makes not one step, and is not 0.
        """
        if spreads and self.strength > 0 and isinstance(solver, Consistency):
            solver.spread_over(self.strength)
            return
        first = solver.first_call(self.strength)
        if first == len(solver) and self.strength > 0:
            raise InputError(
                f"strength={self.strength:g} of {solver.n} steps is not one step; accepted: 0,"
                f" which gives the image back, or at least {1 / solver.n:.3g}; or raise"
                " num_inference_steps."
            )
        solver.begin_at(first)

    def start(
        self,
        encode: Encode,
        solver: Sampler,
        noise: Sequence[Draws],
        drawn: Callable[[], Array],
        posterior: bool,
    ) -> Start:
        """Latents to start with.

        Args:
            drawn: the unit normal latents (B, C, h, w) of a call without an image.
            posterior: `encode` draws. diffusers then encodes the masked image too, for UNets that
                read it, and draws for every other: so that samplers that draw again draw the same.
        """
        if self.mask is None and self.strength == 1:
            return Start(drawn())
        x0 = encode(image_input.pixels(self.images), noise)
        first = drawn()
        after = None if self.mask is None else self._keeping(x0, first, solver)
        for one in noise if posterior and self.mask is not None else ():
            one.normal(x0.shape[1:])
        return replace(self._begun(solver, x0, first), after=after)

    def start_beside(
        self, encode: Encode, solver: Sampler, noise: Sequence[Draws], drawn: Callable[[], Array]
    ) -> Start:
        """Latents to start with, for an inpainting UNet: it is given the mask and the image without
        what the mask covers in every call, and nothing is blended. The arguments are `start`'s; the
        image is encoded where a part of it is left in the noise, before the draw, as there.
        """
        pixels, painted = image_input.pixels(self.images), np.asarray(self.mask) >= 128
        x0 = np.empty(0) if self.strength == 1 else encode(pixels, noise)
        first = drawn()
        rest = encode(np.where(painted, np.float32(0), pixels), noise)
        mask = np.broadcast_to(self._latent_mask(rest), (len(rest), 1, *rest.shape[2:]))
        beside = np.concatenate([mask, rest], axis=1)
        return replace(self._begun(solver, x0, first), beside=beside)

    def _begun(self, solver: Sampler, x0: Array, first: Array) -> Start:
        """At the solver's first call: the draw alone where all steps are made, else the image's
        latents with it.
        """
        if self.strength == 1:
            return Start(first)
        if solver.begin == len(solver):
            return Start(x0, noised=True)
        return Start(solver.add_noise(solver.begin, x0, first), noised=True)

    def _latent_mask(self, latents: Array) -> Array:
        """float32 (1, 1, h, w), 1 where it is painted: every stride-th pixel, as diffusers'."""
        stride = self.images[0].size[0] // latents.shape[3]
        painted = np.asarray(self.mask)[::stride, ::stride] >= 128
        return painted[None, None].astype(np.float32)

    def _keeping(self, x0: Array, noise: Array, solver: Sampler) -> Callable[[int, Array], Array]:
        """What is not painted has the image's own latents after each step."""
        mask = self._latent_mask(x0)

        def after(call: int, x: Array) -> Array:
            kept = x0 if call == len(solver) else solver.add_noise(call, x0, noise)
            out: Array = (1 - mask) * kept + mask * x
            return out

        return after

    def finished(self, made: Array) -> Array:
        """Made images with the kept pixels of the ones that were given.

        Args:
            made: (B, H, W, 3), uint8 or float in [0, 1].

        Returns:
            The same; of the size that was given, where a part of it was worked on.
        """
        if self.mask is None:
            return made
        images, mask = (self.images, self.mask) if self.box is None else self.whole or ([], None)
        own = np.stack([np.asarray(i) for i in images])
        if made.dtype != np.uint8:
            own = own.astype(made.dtype) / made.dtype.type(255)
        if self.box is not None:
            made = self._placed(made, own)
        return np.where((np.asarray(mask) >= 128)[None, ..., None], made, own)

    def _placed(self, made: Array, own: Array) -> Array:
        """Made parts, scaled to the box that they are of, in the whole images."""
        left, top, right, bottom = self.box or (0, 0, 0, 0)
        out = own.copy()
        for canvas, part in zip(out, made, strict=True):
            exact = part if part.dtype == np.uint8 else np.round(part * 255).astype(np.uint8)
            scaled = image_input.scaled(image_input.from_array(exact), right - left, bottom - top)
            placed = np.asarray(scaled)
            canvas[top:bottom, left:right] = (
                placed if canvas.dtype == np.uint8 else placed / np.float32(255)
            )
        return out
