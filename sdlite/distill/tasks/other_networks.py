"""The stages `tiny-decoder` and `text-encoder`: a tiny VAE decoder and a text encoder of fewer
layers. Both leave the UNet as it is.

They come after the stages of the UNet. What they save is a whole diffusers folder. Shape letters:
B batch, C latent channels, h,w latent size, H,W pixels, L tokens, D text width.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdlite.distill.encoders import STATES, CachedEncoder, TextEncoders
from sdlite.distill.losses import multi_scale_loss, output_loss
from sdlite.distill.preview import decode_scaled, save_grid
from sdlite.distill.students import parameters
from sdlite.distill.tasks.base import (
    Denoising,
    Given,
    Share,
    StageKind,
    Steps,
    Weight,
    carried,
    predict,
)
from sdlite.distill.train import Batch, Modules
from sdlite.errors import InputError
from sdlite.settings import At, settings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny
    from transformers import CLIPTextModel


def tiny_vae(vae: AutoencoderKL, width: int = 64, blocks: int = 3) -> AutoencoderTiny:
    """An untrained `AutoencoderTiny` for the latents of `vae`, as the UNet sees them: TAESD's
    decoder (convolutions and ReLU only).

    TAESD's convention of scale: it decodes scaled latents as they are, so its own `scaling_factor`
    is 1 and it has no shift; its first layer is 3 tanh(z / 3). diffusers and `Pipeline.decode` read
    both from config.json, so nobody who loads it needs to know.

    Args:
        width, blocks: channels, and residual blocks of each resolution but the last; 64 and 3 are
            TAESD's own, 1,222,531 parameters.

    Returns:
        Its encoder is as small as the class allows and is not trained: text-to-image does not run
        it, image-to-image must not.

    Raises:
        InputError: width or blocks is below 1.

    Source: madebyollin/taesd, in diffusers' class.
    """
    from diffusers import AutoencoderTiny

    if width < 1 or blocks < 1:
        raise InputError(
            f"tiny decoder: width={width}, blocks={blocks}; accepted: at least 1 each (TAESD: 64"
            " and 3)."
        )
    stages = len(vae.config.block_out_channels)
    return AutoencoderTiny(
        latent_channels=vae.config.latent_channels,
        scaling_factor=1.0,
        encoder_block_out_channels=(8,) * stages,
        num_encoder_blocks=(1,) * stages,
        decoder_block_out_channels=(width,) * stages,
        num_decoder_blocks=(*(blocks,) * (stages - 1), 1),
    )


class Decoder(nn.Module):
    """The half of an `AutoencoderTiny` that makes images: scaled latents (B, C, h, w) -> (B, 3,
    H, W) in [-1, 1].
    """

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        self.decoder = vae.decoder

    def enable_gradient_checkpointing(self) -> None:
        self.decoder.gradient_checkpointing = True
        self.decoder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(z)
        return out


@settings
@dataclass(frozen=True)
class TinyDecoder(StageKind):
    """Train a tiny decoder on the images that the teacher's decoder makes of the data's latents.

    The loss is L1 + `multi_scale_weight` x `losses.multi_scale_loss` of the images; TAESD adds
    LPIPS and a discriminator, which this does not.

    Attributes:
        width, blocks: see `tiny_vae`.
        latent_noise: standard deviation of what is added to the latents, so that the decoder
            forgives small errors of the UNet.
    """

    name = "tiny-decoder"
    makes = "vae"

    width: Annotated[int, At(1, 4096)] = 64
    blocks: Annotated[int, At(1, 64)] = 3
    latent_noise: Annotated[float, At(0, 100)] = 0.0
    multi_scale_weight: Weight = 1.0

    def made_size(self, text_encoder: CLIPTextModel | TextEncoders, vae: AutoencoderKL) -> str:
        tiny = tiny_vae(vae, self.width, self.blocks)
        return (
            f"decoder {parameters(tiny.decoder):,} parameters of the teacher's"
            f" {parameters(vae.decoder):,}"
        )

    def task(self, given: Given) -> TinyDecoderTask:
        return TinyDecoderTask(given, self)


@contextmanager
def _no_overflow(device: torch.device) -> Iterator[None]:
    """What runs inside is not lowered to float16, in which SDXL's decoder overflows."""
    low = torch.is_autocast_enabled(device.type)
    low = low and torch.get_autocast_dtype(device.type) == torch.float16
    with torch.autocast(device.type, enabled=False) if low else nullcontext():
        yield


class TinyDecoderTask(Denoising):
    """The task of the stage `tiny-decoder`; `given.parts["vae"]` is the teacher's autoencoder."""

    def __init__(self, given: Given, options: TinyDecoder):
        parts = {"text_encoder": given.text_encoder, "unet": given.student, **given.parts}
        super().__init__(given.source, given.scheduler, parts, given.samples)
        self.teacher = parts["vae"].eval().requires_grad_(False)
        self.options, self.vae = options, tiny_vae(self.teacher, options.width, options.blocks)
        self.modules = {"decoder": Decoder(self.vae)}

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        batch = self.source.draw(size, generator)
        batch["noise"] = torch.randn(batch["latents"].shape, generator=generator)
        return batch

    def loss(self, modules: Modules, batch: Batch, step: int) -> dict[str, Tensor]:
        z = batch["latents"]
        with torch.no_grad(), _no_overflow(z.device):
            wanted = decode_scaled(self.teacher, z)
        made = modules["decoder"](z + self.options.latent_noise * batch["noise"])
        terms = {"l1": (made - wanted).abs().mean(), "multi_scale": multi_scale_loss(made, wanted)}
        loss = terms["l1"] + self.options.multi_scale_weight * terms["multi_scale"]
        return {"loss": loss, **terms}

    def _with(self, modules: Modules) -> Modules:
        vae = copy.deepcopy(self.vae).eval()
        vae.decoder.load_state_dict(modules["decoder"].decoder.state_dict())
        return {"vae": vae}

    def save(self, modules: Modules, folder: Path) -> None:
        super().save(self._with(modules), folder)

    @torch.no_grad()
    def sample(self, modules: Modules, path: Path) -> None:
        """Rows of the teacher's images of the same latents, then the tiny decoder's."""
        z = self.batch(8, torch.Generator().manual_seed(0))["latents"].to(
            next(modules["decoder"].parameters()).device
        )
        wanted = decode_scaled(self.teacher, z)
        both = torch.cat([wanted, modules["decoder"](z)]).clamp(-1, 1)
        save_grid(((both + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy(), path)


def smaller_text_encoder(teacher: CLIPTextModel, layers: int) -> CLIPTextModel:
    """A `CLIPTextModel` of `layers` layers: evenly spaced ones of the teacher's, with its first and
    last (1: its last), and all other weights.

    Raises:
        InputError: layers is not between 1 and the teacher's.
    """
    total = teacher.config.num_hidden_layers
    if not 1 <= layers <= total:
        raise InputError(
            f"layers={layers}; the teacher's text encoder has {total}, so choose 1 to {total}."
        )
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    student = type(teacher)(config)
    kept = (
        [round(i * (total - 1) / (layers - 1)) for i in range(layers)]
        if layers > 1
        else [total - 1]
    )
    weights = teacher.state_dict()

    def source(name: str) -> str:
        return re.sub(r"(?<=encoder\.layers\.)\d+", lambda m: str(kept[int(m[0])]), name)

    student.load_state_dict({k: weights[source(k)] for k in student.state_dict()})
    return student


class TextForward(nn.Module):
    """The student's last hidden state (B, L, D)."""

    def __init__(self, text_encoder: CLIPTextModel):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.text_encoder(input_ids)[0]
        return out


@settings
@dataclass(frozen=True)
class TextEncoder(StageKind):
    """Train a text encoder of fewer layers to say what the teacher's says, and to make the UNet
    predict the same.

    The first term is the MSE of the embeddings, divided by the teacher's mean square; the second
    the MSE of the UNet's outputs under both (Wang et al. 2025, arXiv:2503.19897: what counts is
    what the diffusion model sees, not the distance of embeddings).

    Attributes:
        layers: how many of the teacher's text encoder stay.
        output_weight: of the second term; 0 does not run the UNet.
        caption_dropout: share of the captions that are left empty, so that guidance works.
    """

    name = "text-encoder"
    makes = "text_encoder"

    layers: Steps
    output_weight: Weight = 1.0
    caption_dropout: Share = 0.1

    def made_size(
        self, text_encoder: CLIPTextModel | TextEncoders, vae: AutoencoderKL
    ) -> str | None:
        if isinstance(text_encoder, TextEncoders):
            return None
        made = smaller_text_encoder(text_encoder, self.layers)
        return (
            f"text encoder {parameters(made):,} parameters of the teacher's"
            f" {parameters(text_encoder):,}"
        )

    def of_several(self, names: Collection[str]) -> str | None:
        return (
            f"makes one text encoder of fewer layers, but this teacher has {len(names)}"
            f" ({', '.join(names)}), which its UNet reads side by side; leave the stage out"
        )

    def task(self, given: Given) -> TextEncoderTask:
        return TextEncoderTask(given, self)


class TextEncoderTask(Denoising):
    """The task of the stage `text-encoder`; `given.student` is the distilled UNet that will read
    the text encoder, at `given.timesteps`.
    """

    def __init__(self, given: Given, options: TextEncoder):
        parts = {**given.parts, "unet": given.student}
        super().__init__(
            given.source, given.scheduler, parts, given.samples, options.caption_dropout
        )
        self.options, self.timesteps = options, given.timesteps
        self.unet = given.student.eval().requires_grad_(False)
        self.tell(self.unet)
        if isinstance(given.text_encoder, TextEncoders):
            raise InputError(
                f"{options.name} {options.of_several([*given.text_encoder.networks])}."
            )
        self.encode = CachedEncoder(given.text_encoder)
        fewer = smaller_text_encoder(given.text_encoder, options.layers)
        self.modules = {"text": TextForward(fewer.requires_grad_(True))}
        self.frozen = {"unet": self.unet} if options.output_weight else {}

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        out = super().batch(size, generator)
        if self.timesteps is not None:
            out["t"] = self.timesteps[
                torch.randint(0, len(self.timesteps), (size,), generator=generator)
            ]
        return out

    def loss(self, modules: Modules, batch: Batch, step: int) -> dict[str, Tensor]:
        wanted = self.encode(batch["input_ids"])
        made = modules["text"](batch["input_ids"])
        terms = {"embedding": F.mse_loss(made.float(), wanted) / wanted.pow(2).mean()}
        loss = terms["embedding"]
        if self.options.output_weight:
            x, _ = self.forward(batch["latents"], batch["noise"], batch["t"])
            with torch.no_grad():
                teacher = predict(self.unet, x, batch["t"], {STATES: wanted, **carried(batch)})
            out = predict(self.unet, x, batch["t"], {STATES: made, **carried(batch)})
            terms["output"] = output_loss(out, teacher)
            loss = loss + self.options.output_weight * terms["output"]
        return {"loss": loss, **terms}

    def save(self, modules: Modules, folder: Path) -> None:
        super().save({"text_encoder": modules["text"].text_encoder}, folder)

    def sample(self, modules: Modules, path: Path) -> None:
        super().sample({"text_encoder": modules["text"].text_encoder}, path)
