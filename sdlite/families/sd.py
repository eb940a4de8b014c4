"""Stable Diffusion 1.x and 2.x and their students: one CLIP text encoder, a UNet that reads its
hidden states, a VAE of either kind. With `time_cond_proj_dim` (LCM) the guidance goes into the
UNet instead of a second call.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sdlite.families import snippets
from sdlite.families.base import Call, Conditions, Config, Configs, Encoders, Family
from sdlite.families.configs import inpaints, latent_channels
from sdlite.spec import Tensor

# Components of a pipeline that change nothing in its images, or that we have our own of.
UNUSED = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")
# Keys of a UNet's config that mean an input which this family does not have.
UNFED = {
    "addition_embed_type": "further embeddings (SDXL: pooled text and sizes)",
    "class_embed_type": "a class embedding",
    "num_class_embeds": "a class or noise level",
    "encoder_hid_dim_type": "image embeddings",
    "encoder_hid_dim": "projected embeddings",
}


class StableDiffusion(Family):
    """See the module docstring."""

    name = "sd"
    networks: Mapping[str, tuple[str, ...]] = {
        "text_encoder": ("CLIPTextModel",),
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL", "AutoencoderTiny"),
    }

    def refusal(self, index: Config, configs: Configs) -> str:
        return self.unknown_parts(index) or _unfed_inputs(
            *(configs(p) for p in ("unet", "vae", "text_encoder"))
        )

    def unknown_parts(self, index: Config) -> str:
        """Why the components that model_index.json names are not those that we run; "" where they
        are.
        """
        named = components(index)
        if missing := [p for p in self.networks if p not in named]:
            more = sorted(named - set(self.networks) - set(UNUSED) - {*self.tokenizers.values()})
            return f"it has no {missing[0]}" + (f", but {', '.join(more)}" if more else "")
        if more := sorted(named - set(self.networks) - set(UNUSED) - {*self.tokenizers.values()}):
            return f"it also has {', '.join(more)}"
        for part, accepted in self.networks.items():
            if (kind := str(index[part][-1])) not in accepted:
                return f"its {part} is of class {kind}"
        return ""

    def unet_inputs(self, unet: Config) -> tuple[Tensor, ...]:
        width = unet.get("time_cond_proj_dim")
        if width is None:
            return ()
        return (Tensor("timestep_cond", ("B", str(width)), "float32", "guidance, embedded"),)

    def guides_itself(self, unet: Config) -> bool:
        return unet.get("time_cond_proj_dim") is not None

    def spreads(self, index: Config) -> bool:
        return "LatentConsistency" in str(index.get("_class_name"))

    def defaults(self, index: Config) -> tuple[int, float]:
        if "LatentConsistency" in str(index.get("_class_name")):
            return 4, 8.5
        return super().defaults(index)

    def snippet(self, index: Config, unet: Config) -> str:
        width = unet.get("time_cond_proj_dim")
        if width is None:
            return super().snippet(index, unet)
        return snippets.ENCODE + snippets.EMBEDDED % int(width)

    def conditions(self, encoders: Encoders, call: Call) -> tuple[Conditions, Conditions | None]:
        cond, uncond = super().conditions(encoders, call)
        self.add_guidance(encoders, call, cond)
        return cond, uncond

    @staticmethod
    def add_guidance(encoders: Encoders, call: Call, cond: Conditions) -> None:
        """Add the guidance's embedding to the conditions of a UNet that takes one."""
        width = encoders.unet_config.get("time_cond_proj_dim")
        if width is not None:
            row = guidance_embedding(call.guidance_scale, width)
            cond["timestep_cond"] = np.repeat(row, len(call.prompts), axis=0)


def guidance_embedding(guidance_scale: float, width: int) -> np.ndarray:
    """float32 (1, `width`): sines and cosines of guidance_scale - 1.

    Source: diffusers 0.39 `LatentConsistencyModelPipeline.get_guidance_scale_embedding`, after
    Luo et al. 2023, arXiv:2310.04378.
    """
    half = width // 2
    step = np.log(np.float32(10000.0), dtype=np.float32) / np.float32(half - 1)
    powers = np.arange(half, dtype=np.float32) * -step
    frequencies = np.exp(powers.astype(np.float64)).astype(np.float32)  # nearer to torch's
    angles = np.float32(1000 * (guidance_scale - 1)) * frequencies[None]
    out = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(out, ((0, 0), (0, width % 2)))


def components(index: Config) -> set[str]:
    """The components that a pipeline has, as model_index.json names them."""
    return {k for k, v in index.items() if isinstance(v, list) and any(v) and k[0] != "_"}


def _unfed_inputs(unet: Config, vae: Config, text: Config) -> str:
    """Why the UNet cannot be called with latents, timestep and text alone; "" where it can."""
    if why := unfed(unet) or misfit(unet, vae):
        return why
    wide, width = unet.get("cross_attention_dim"), text.get("hidden_size")
    if isinstance(wide, int) and isinstance(width, int) and wide != width:
        return f"its UNet reads text of width {wide}, its text encoder gives {width}"
    return ""


def unfed(unet: Config, *fed: str) -> str:
    """The first input that the UNet wants and that we do not have; `fed`: keys of its config that
    we do have an input for.
    """
    for key, what in UNFED.items():
        if key not in fed and unet.get(key) is not None:
            return f"its UNet wants {what} ({key}={unet[key]!r})"
    return ""


def misfit(unet: Config, vae: Config) -> str:
    """Why a UNet's latents are not the VAE's; "" where they are."""
    takes, gives = unet.get("in_channels", 4), latent_channels(vae)
    if takes != gives and not inpaints(unet, vae):
        return f"its UNet takes {takes} channels, the latents have {gives}"
    if (out := unet.get("out_channels", 4)) != gives:
        return f"its UNet gives {out} channels, the latents have {gives}"
    if (rgb := vae.get("out_channels", 3)) != 3:
        return f"its VAE gives {rgb} channels instead of 3"
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        return "its VAE scales each channel of the latents by itself (latents_mean, latents_std)"
    return ""
