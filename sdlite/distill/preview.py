"""Images of networks that are still in training, and the folder that they are saved as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdlite.distill.encoders import STATES, TextEncoders
from sdlite.families import MARK, LatentScale, own_index, unet_arguments, vae_stride
from sdlite.families.sd import guidance_embedding
from sdlite.files import TOKENIZER_FILES, Files
from sdlite.images import grid, save, to_pil, to_uint8
from sdlite.manifest import INDEX
from sdlite.sampling import Noise, Schedule, denoise, get_sampler, guided
from sdlite.spec import Arrays, latent_size

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, SchedulerMixin

# A pipeline's parts by name: networks "unet", "text_encoder" and "vae", a `ClipTokenizer`
# "tokenizer", and its folder, "tokenizer_folder". Several text encoders are one network
# (`TextEncoders`), which has its tokenizers and their folders itself.
Parts = dict[str, Any]
Config = dict[str, object]  # a scheduler_config.json
SHOWN = 16  # images of a sample grid
WIDE = 1024  # pixels: narrower grids are shown at twice their size
AT_ONCE = 2**22  # pixels that are made at once: 16 images of 512 px, 4 of 1024


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
    unet, scale = parts["unet"], samples.guidance_scale
    device, count = next(unet.parameters()).device, len(samples.prompts)
    if isinstance(parts["text_encoder"], TextEncoders):
        twice = guided(scale) and guidance_width(unet) is None
        size = image_size(unet, parts["vae"])
        cond, uncond = parts["text_encoder"].called(samples.prompts, scale, size, twice)
    else:
        cond, uncond = _of_one_encoder(parts, samples)
    noise = [Noise(samples.seed + i) for i in range(count)]
    shape = (unet.config.in_channels, *latent_size(unet.config))
    x = np.stack([n.normal(shape) for n in noise])
    solver = get_sampler(samples.sampler, schedule, samples.num_inference_steps)

    def network(**inputs: np.ndarray) -> np.ndarray:
        given = {k: torch.from_numpy(v).to(device) for k, v in inputs.items()}
        out: np.ndarray = unet(**unet_arguments(given)).sample.cpu().numpy()
        return out

    for latents in denoise(network, x, cond, noise, solver, uncond=uncond, guidance_scale=scale):
        x = latents
    return torch.from_numpy(x).to(device)


def _of_one_encoder(parts: Parts, samples: Samples) -> tuple[Arrays, Arrays | None]:
    """The conditions of the prompts and of "", which a UNet that is told its guidance needs not."""
    unet, count = parts["unet"], len(samples.prompts)
    ids = torch.from_numpy(parts["tokenizer"]([*samples.prompts, ""]))
    ids = ids.to(next(unet.parameters()).device)
    embeds = parts["text_encoder"](ids)[0].cpu().numpy()
    cond = {STATES: embeds[:-1]}
    if (width := guidance_width(unet)) is None:
        return cond, {STATES: np.repeat(embeds[-1:], count, axis=0)}
    row = guidance_embedding(samples.guidance_scale, width)
    return cond | {"timestep_cond": np.repeat(row, count, axis=0)}, None


def image_size(unet: nn.Module, vae: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of a UNet's images."""
    height, width = latent_size(unet.config)
    stride = vae_stride(vae.config)
    return height * stride, width * stride


@torch.no_grad()
def preview(parts: Parts, schedule: Schedule, samples: Samples) -> np.ndarray:
    """uint8 (B, H, W, 3): what `paint` makes, decoded."""
    height, width = image_size(parts["unet"], parts["vae"])
    few, made = max(1, AT_ONCE // (height * width)), list[np.ndarray]()
    for i in range(0, len(samples.prompts), few):
        some = replace(samples, prompts=samples.prompts[i : i + few], seed=samples.seed + i)
        latents = paint(parts, schedule, some)
        made.append(to_uint8(decode_scaled(parts["vae"], latents).cpu().numpy()))
    return np.concatenate(made)


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
    """Write a diffusers pipeline's folder (safetensors) with a DDIM scheduler: of class
    `StableDiffusionPipeline`, or the teacher's own where it has several text encoders.

    The tokenizers' files are the teacher's own, byte for byte: each version of transformers saves
    them differently.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    # the schedule that was trained on: DDIM's defaults and keys may be others than those of the
    # file's class
    noise = {k: v for k, v in vars(Schedule.from_config(scheduler)).items() if k != "settings"}
    ddim = DDIMScheduler.from_config({**scheduler, **noise})
    if isinstance(parts["text_encoder"], TextEncoders):
        _save_several(folder, parts, ddim)
        return
    pipe = StableDiffusionPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=None,
        unet=parts["unet"],
        scheduler=ddim,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe._optional_components = [*pipe._optional_components, "tokenizer"]  # no warning of it
    pipe.save_pretrained(folder, safe_serialization=True)
    _copy_tokenizer(Files.of(parts["tokenizer_folder"]), folder / "tokenizer")
    index = folder / INDEX
    about = json.loads(index.read_text(encoding="utf-8"))
    about["tokenizer"] = ["transformers", "CLIPTokenizer"]
    _write_index(index, about)


def _copy_tokenizer(own: Files, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in (n for n in TOKENIZER_FILES if own.has(n)):
        (folder / name).write_bytes(own.read(name))


def _write_index(path: Path, index: Mapping[str, object]) -> None:
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def _save_several(folder: Path, parts: Parts, scheduler: SchedulerMixin) -> None:
    """`save_pipeline` of a model of several text encoders: what its own model_index.json says, with
    the classes of the networks and the scheduler that are saved.
    """
    text: TextEncoders = parts["text_encoder"]
    saved = {"unet": parts["unet"], "vae": parts["vae"], **text.networks}
    for name, network in saved.items():
        network.save_pretrained(folder / name, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    for name, own in text.files.items():
        _copy_tokenizer(own, folder / name)
    classes = {name: type(network).__name__ for name, network in saved.items()}
    about = {k: v for k, v in own_index(text.index).items() if k != MARK}
    about |= {
        name: ["transformers" if name in text.networks else "diffusers", kind]
        for name, kind in {**classes, "scheduler": type(scheduler).__name__}.items()
    }
    _write_index(folder / INDEX, about)
