"""Control images: what a call gives a ControlNet, and what that adds to the UNet in each step.

Source: diffusers 0.39, StableDiffusionControlNetPipeline, its Img2Img and Inpaint variants, and
`ControlNetModel.forward`. As there, a control image has the call's size by scaling alone; beside
an edit it goes the way of the edited image, so that both stay one above the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sdlite import arguments, image_input
from sdlite.errors import InputError, ShapeError
from sdlite.families import CONTROLS, taken_by_unet
from sdlite.spec import Arrays

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdlite.editing import Edit

SCALE, EDITED, INPAINTED = 1.0, 0.8, 0.5  # of a call that does not say
# what a ControlNet is given of what the UNet is
SHARED = ("sample", "timestep", "encoder_hidden_states")


@dataclass(frozen=True)
class ControlImage:
    """A call's control images and what they weigh.

    Attributes:
        images: RGB, one for each image of the call.
        scale: what the ControlNet's answers are multiplied by; default 1, beside an image 0.8, with
            a mask 0.5.
        start, end: shares of the steps, 0 to 1, between which they are added.
        guess: guess mode: deeper feature maps weigh more, and the negative prompt's have none.
    """

    images: list[Image]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    @classmethod
    def of(cls, given: Mapping[str, object], edit: Edit | None, count: int) -> ControlImage | None:
        """A call's keywords (`families.CONTROLS`), with the defaults of diffusers' pipeline of the
        same edit; None where it has no control image.

        Raises:
            InputError, ShapeError: one of them is not accepted, or has no image to go with.
        """
        own = {k: v for k, v in given.items() if k in CONTROLS and v is not None}
        image = own.pop("control_image", None)
        if image is None:
            if own:
                raise InputError(f"{min(own)} is given without control_image; give that image.")
            return None
        default = SCALE if edit is None else EDITED if edit.mask is None else INPAINTED
        scale = arguments.number(CONTROLS[1], own.get(CONTROLS[1], default), 0)
        start, end = (
            arguments.number(k, own.get(k, x), 0, 1)
            for k, x in zip(CONTROLS[2:4], (0, 1), strict=True)
        )
        if start >= end:
            raise InputError(
                f"control_guidance_start={start:g} is not before control_guidance_end={end:g};"
                " accepted: 0 to 1, the first one less."
            )
        guess = arguments.truth("guess_mode", own.get("guess_mode", False))
        images = image_input.images("control_image", image, count)
        return cls(images, scale, start, end, guess)

    def own_size(self, multiple: int) -> tuple[int, int]:
        """(height, width) that the call has where nothing else says: its own, rounded down."""
        width, height = (max(n // multiple * multiple, multiple) for n in self.images[0].size)
        return height, width

    def fitted(self, height: int, width: int, edit: Edit | None) -> ControlImage:
        """Of this size: scaled, or beside an edit cropped and scaled as its image is.

        Raises:
            ShapeError: a part of the edited image is worked on, and this one has another size.
        """
        if edit is None:
            return replace(self, images=[self._scaled(i, height, width) for i in self.images])
        images = self.images
        if edit.box is not None and edit.whole is not None:
            size = edit.whole[1].size
            if images[0].size != size:
                raise ShapeError(
                    f"control_image is {images[0].width}x{images[0].height} pixels, image"
                    f" {size[0]}x{size[1]}; with padding_mask_crop give both of one size."
                )
            images = [i.crop(edit.box) for i in images]
        return replace(self, images=[image_input.covering(i, height, width) for i in images])

    @staticmethod
    def _scaled(image: Image, height: int, width: int) -> Image:
        same = image.size == (width, height)
        return image if same else image_input.scaled(image, width, height)

    @property
    def pixels(self) -> np.ndarray:
        """float32 (B, 3, H, W) in [0, 1]."""
        array = np.stack([np.asarray(i) for i in self.images]).astype(np.float32) / 255.0
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))

    def said(self) -> dict[str, str]:
        """What files keep of it."""
        out = {"controlnet_conditioning_scale": f"{self.scale:g}"}
        if (self.start, self.end) != (0.0, 1.0):
            out["control_guidance"] = f"{self.start:g} to {self.end:g}"
        return {**out, **({"guess_mode": "true"} if self.guess else {})}

    def adding(
        self, network: Callable[..., Arrays], channels: int, calls: int
    ) -> Callable[[Arrays], Arrays | None]:
        """A function of the UNet's inputs of each call in turn that gives its further ones; None
        where nothing is added.

        Args:
            network: the ControlNet.
            channels: of the latents that it is given, the first ones of the UNet's.
            calls: how many calls of the UNet make an image.
        """
        pixels, at = self.pixels, iter(range(calls))

        def add(inputs: Arrays) -> Arrays | None:
            i = next(at)
            if i / calls < self.start or (i + 1) / calls > self.end or self.scale == 0:
                return None
            given = {k: inputs[k] for k in SHARED}
            given["sample"] = given["sample"][:, :channels]
            twice = len(given["sample"]) > len(pixels)
            if twice and self.guess:
                given = {k: v[len(pixels) :] if v.ndim else v for k, v in given.items()}
            rows = len(given["sample"]) // len(pixels)
            out = network(**given, controlnet_cond=np.concatenate([pixels] * rows))
            made = [x * s for x, s in zip(out.values(), self._scales(len(out)), strict=True)]
            if twice and self.guess:
                made = [np.concatenate([np.zeros_like(x), x]) for x in made]
            return dict(zip(map(taken_by_unet, out), made, strict=True))

        return add

    def _scales(self, count: int) -> Sequence[np.float32]:
        """What each answer is multiplied by, the middle's last."""
        scale = np.float32(self.scale)
        if not self.guess:
            return [scale] * count
        return [np.float32(x) * scale for x in np.logspace(-1, 0, count)]
