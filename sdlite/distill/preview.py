"""Images of networks that are still in training, and the folder that they are saved as."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdlite.families import LatentScale
from sdlite.families.sd import guidance_embedding
from sdlite.files import TOKENIZER_FILES, Files
from sdlite.images import grid, save, to_pil, to_uint8
from sdlite.sampling import Noise, Schedule, denoise, get_sampler
from sdlite.spec import latent_size

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

# A pipeline's parts by name: networks "unet", "text_encoder" and "vae", a `ClipTokenizer`
# "tokenizer", and its folder, "tokenizer_folder".
Parts = dict[str, Any]
Config = dict[str, object]  # a scheduler_config.json
SHOWN = 16  # images of a sample grid
WIDE = 1024  # pixels: narrower grids are shown at twice their size


@dataclass(frozen=True)
class Samples:
    """Prompts, and how their images are made. Prompt i gets seed + i."""

    prompts: tuple[str, ...] = ()
    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    seed: int = 0
    sampler: str = "ddim"


USUAL = Samples()


def guidance_width(unet: nn.Module) -> int | None:
    """Width of the guidance embedding that a UNet is told (LCM); None where it is told none."""
    config = getattr(unet, "config", None)  # networks of tests and of other packages have none
    width: int | None = getattr(config, "time_cond_proj_dim", None)
    return width


@torch.no_grad()
def paint(parts: Parts, schedule: Schedule, samples: Samples) -> Tensor:
    """Scaled latents (B, C, h, w) that torch networks make for B prompts. A UNet that is told its
    guidance makes them in one row each.
    """
    unet, text_encoder, tokenizer = parts["unet"], parts["text_encoder"], parts["tokenizer"]
    device, count = next(unet.parameters()).device, len(samples.prompts)
    ids = torch.from_numpy(tokenizer([*samples.prompts, ""])).to(device)
    embeds = text_encoder(ids)[0].cpu().numpy()
    scale = samples.guidance_scale
    cond = {"encoder_hidden_states": embeds[:-1]}
    uncond: np.ndarray | None = np.repeat(embeds[-1:], count, axis=0)
    if (width := guidance_width(unet)) is not None:
        cond["timestep_cond"] = np.repeat(guidance_embedding(scale, width), count, axis=0)
        uncond = None
    noise = [Noise(samples.seed + i) for i in range(count)]
    size = (unet.config.in_channels, *latent_size(unet.config))
    x = np.stack([n.normal(size) for n in noise])
    solver = get_sampler(samples.sampler, schedule, samples.num_inference_steps)

    def network(**inputs: np.ndarray) -> np.ndarray:
        given = {k: torch.from_numpy(v).to(device) for k, v in inputs.items()}
        out: np.ndarray = unet(**given).sample.cpu().numpy()
        return out

    for latents in denoise(network, x, cond, noise, solver, uncond=uncond, guidance_scale=scale):
        x = latents
    return torch.from_numpy(x).to(device)


@torch.no_grad()
def preview(parts: Parts, schedule: Schedule, samples: Samples) -> np.ndarray:
    """uint8 (B, H, W, 3): what `paint` makes, decoded."""
    latents = paint(parts, schedule, samples)
    return to_uint8(decode_scaled(parts["vae"], latents).cpu().numpy())


def decode_scaled(vae: AutoencoderKL | AutoencoderTiny, z: Tensor) -> Tensor:
    """Latents (B, C, h, w) scaled as the UNet sees them -> pixels (B, 3, H, W), about -1 to 1, by
    any of diffusers' autoencoders.
    """
    out: Tensor = vae.decode(LatentScale.of(vae.config).to_decoder(z)).sample
    return out


def save_grid(images: np.ndarray, path: Path) -> None:
    """Write uint8 images (B, H, W, 3) as one PNG, eight in a row."""
    image = grid(to_pil(images), min(8, len(images)))
    if image.width < WIDE:
        image = image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)
    save(image, path)


def save_pipeline(folder: Path, parts: Parts, scheduler: Config) -> None:
    """Write a diffusers `StableDiffusionPipeline` folder (safetensors) with a DDIM scheduler.

    The tokenizer's files are the teacher's own, byte for byte: each version of transformers saves
    them differently.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    # the schedule that was trained on: DDIM's defaults and keys may be others than those of the
    # file's class
    noise = {k: v for k, v in vars(Schedule.from_config(scheduler)).items() if k != "settings"}
    pipe = StableDiffusionPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=None,
        unet=parts["unet"],
        scheduler=DDIMScheduler.from_config({**scheduler, **noise}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe._optional_components = [*pipe._optional_components, "tokenizer"]  # no warning of it
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "tokenizer").mkdir(exist_ok=True)
    own = Files.of(parts["tokenizer_folder"])
    for name in (n for n in TOKENIZER_FILES if own.has(n)):
        (folder / "tokenizer" / name).write_bytes(own.read(name))
    index = folder / "model_index.json"
    about = json.loads(index.read_text(encoding="utf-8"))
    about["tokenizer"] = ["transformers", "CLIPTokenizer"]
    index.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
