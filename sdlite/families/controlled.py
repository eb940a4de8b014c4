"""Stable Diffusion with a ControlNet: one more network, which reads latents and a control image and
gives what is added to the UNet's feature maps. Without a control image that is zeros.

Source: diffusers 0.39 `ControlNetModel`, `UNet2DConditionModel.forward`. A UNet without a middle
block (BK-SDM) is given the middle's residual too, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdlite.families import snippets
from sdlite.families.base import CONTROLS, DOWN, Config, Configs
from sdlite.families.configs import vae_stride
from sdlite.families.sd import StableDiffusion, components, unfed
from sdlite.spec import SPECS, Arrays, IOSpec, Tensor, side_of

MIDDLE, GIVEN_MIDDLE = "mid_block_additional_residual", "mid_block_res_sample"
ENOUGH = "give a ControlNet that was made for this UNet"


class ControlledStableDiffusion(StableDiffusion):
    """See the module docstring."""

    name = "sd-controlnet"
    networks: Mapping[str, tuple[str, ...]] = {
        **StableDiffusion.networks,
        "controlnet": ("ControlNetModel",),
    }
    optional = (*StableDiffusion.optional, "controlnet")
    controls = CONTROLS

    def refusal(self, index: Config, configs: Configs) -> str:
        if {"controlnet", "text_encoder_2"} <= components(index):
            return "its ControlNet is SDXL's, and only those of Stable Diffusion 1.x and 2.x run"
        return super().refusal(index, configs) or misfit(
            *(configs(p) for p in ("unet", "controlnet", "vae"))
        )

    def unet_inputs(self, unet: Config) -> tuple[Tensor, ...]:
        down = residuals(unet)
        given = [
            Tensor(f"{DOWN}{i}", s, "float32", "of a ControlNet, or 0") for i, s in enumerate(down)
        ]
        middle = replace(given[-1], name=MIDDLE)
        return (*super().unet_inputs(unet), *given, middle)

    def uncontrolled(self, unet: Config, sample: np.ndarray) -> Arrays:
        sides = dict(zip("BChw", sample.shape, strict=True))
        own = self.unet_inputs(unet)[len(super().unet_inputs(unet)) :]
        return {t.name: np.zeros([side_of(s, sides) for s in t.shape], np.float32) for t in own}

    def snippet(self, index: Config, unet: Config) -> str:
        maps = [(int(c), int(h.partition("/")[2] or 1)) for _, c, h, _ in residuals(unet)]
        return super().snippet(index, unet) + snippets.UNCONTROLLED % [*maps, maps[-1]]

    def spec(self, part: str, configs: Configs) -> IOSpec:
        if part != "controlnet":
            return super().spec(part, configs)
        unet = SPECS["unet"]
        image = Tensor("controlnet_cond", ("B", "3", "H", "W"), "float32", "pixels, 0 to 1")
        down = residuals(configs("unet"))
        made = [
            Tensor(f"down_block_res_samples.{i}", s, "float32", "added to the UNet's way down")
            for i, s in enumerate(down)
        ]
        middle = replace(made[-1], name=GIVEN_MIDDLE, range="added to its middle")
        return IOSpec(part, part, (*unet.inputs, image), (*made, middle))


def taken_by_unet(name: str) -> str:
    """A ControlNet's output -> the UNet's input that it is."""
    place, _, number = name.partition(".")
    return f"{DOWN}{number}" if number else MIDDLE if place == GIVEN_MIDDLE else name


def residuals(config: Config) -> list[tuple[str, ...]]:
    """Shapes of the feature maps on the way down of a UNet or ControlNet, in diffusers' order: the
    first convolution's, then of each block its layers' and its downsampler's.
    """
    widths = list(config.get("block_out_channels") or (320, 640, 1280, 1280))
    layers = config.get("layers_per_block", 2)
    each = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    out, at = [(widths[0], 0)], 0
    for i, (width, count) in enumerate(zip(widths, each, strict=False)):
        out += [(width, at)] * count
        if i < len(widths) - 1:
            at += 1
            out.append((width, at))
    return [("B", str(w), *(f"{s}/{2**a}" if a else s for s in "hw")) for w, a in out]


def misfit(unet: Config, controlnet: Config, vae: Config) -> str:
    """Why a ControlNet does not fit a UNet and its autoencoder; "" where it does."""
    if why := unfed(controlnet).replace("UNet", "ControlNet"):
        return why
    if controlnet.get("global_pool_conditions"):
        return "its ControlNet gives means of its feature maps (global_pool_conditions=true)"
    if (image := controlnet.get("conditioning_channels", 3)) != 3:
        return f"its ControlNet reads control images of {image} channels instead of 3"
    wants, gives = residuals(unet), residuals(controlnet)
    if len(wants) != len(gives):
        return (
            f"its UNet has {len(wants)} feature maps on its way down{_blocks(unet)}, its ControlNet"
            f" gives {len(gives)}{_blocks(controlnet)}; {ENOUGH}"
        )
    for i, (want, give) in enumerate(zip(wants, gives, strict=True)):
        if want != give:
            return (
                f"feature map {i} of its UNet's way down has {_words(want)}, its ControlNet gives"
                f" {_words(give)}; {ENOUGH}"
            )
    texts = [c.get("cross_attention_dim", 1280) for c in (unet, controlnet)]
    if texts[0] != texts[1]:
        return f"its UNet reads text of width {texts[0]}, its ControlNet {texts[1]}; {ENOUGH}"
    latents = [controlnet.get("in_channels", 4), vae.get("latent_channels", 4)]
    if latents[0] != latents[1]:
        return f"its ControlNet takes {latents[0]} channels, the latents have {latents[1]}"
    scale = 2 ** (len(controlnet.get("conditioning_embedding_out_channels") or (0,) * 4) - 1)
    if scale != (stride := vae_stride(vae)):
        return f"its ControlNet scales images down {scale} times, its VAE {stride} times"
    return ""


def _blocks(config: Config) -> str:
    """How many blocks and layers a network has, in brackets."""
    blocks = len(config.get("block_out_channels") or (0,) * 4)
    return f" ({blocks} blocks, layers_per_block={config.get('layers_per_block', 2)})"


def _words(shape: Sequence[str]) -> str:
    return f"{shape[1]} channels of {' x '.join(shape[2:])}"
