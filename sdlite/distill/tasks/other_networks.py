"""Students of the other two networks: a tiny VAE decoder and a text encoder of fewer layers. Both
leave the UNet as it is.

Recipe stages `tiny-decoder` and `text-encoder`; they come after the stages of the UNet. What they
save is a whole diffusers folder. Shape letters: B batch, C latent channels, h,w latent size, H,W
pixels, L tokens, D text width.
"""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdlite.distill.losses import multi_scale_loss, output_loss
from sdlite.distill.tasks.student import (
    V_ZERO_SNR,
    CachedEncoder,
    LatentSource,
    _Denoising,
    decode_scaled,
)
from sdlite.distill.train import Batch
from sdlite.errors import InputError
from sdlite.images import grid, save, to_pil


def tiny_vae(vae: Any, width: int = 64, blocks: int = 3) -> Any:
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


class TinyDecoder(nn.Module):
    """The half of an `AutoencoderTiny` that makes pictures: scaled latents (B, C, h, w) -> (B, 3,
    H, W) in [-1, 1].
    """

    def __init__(self, vae: Any):
        super().__init__()
        self.decoder = vae.decoder

    def enable_gradient_checkpointing(self) -> None:
        self.decoder.gradient_checkpointing = True
        self.decoder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(z)
        return out


class TinyDecoderTask(_Denoising):
    """Train a tiny decoder on the pictures that the teacher's decoder makes of the data's latents.

    The loss is L1 + `multi_scale_weight` x `losses.multi_scale_loss` of the pictures; TAESD adds
    LPIPS and a discriminator, which this does
    not: `perceptual` takes any function (wanted, made) -> scalar.

    Args:
        unet, text_encoder, parts: of the pipeline that is saved and sampled; parts["vae"] is the
            teacher's autoencoder.
        width, blocks: see `tiny_vae`.
        latent_noise: standard deviation of what is added to the latents, so that the decoder
            forgives small errors of the UNet.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        source: LatentSource,
        *,
        parts: dict[str, Any],
        preview: dict[str, Any],
        width: int = 64,
        blocks: int = 3,
        latent_noise: float = 0.0,
        multi_scale_weight: float = 1.0,
        perceptual: Any = None,
        perceptual_weight: float = 1.0,
        scheduler: dict[str, Any] = V_ZERO_SNR,
    ):
        super().__init__(
            source, scheduler, {**parts, "text_encoder": text_encoder, "unet": unet}, 0.0, preview
        )
        self.teacher = parts["vae"].eval().requires_grad_(False)
        self.latent_noise, self.multi_scale_weight = latent_noise, multi_scale_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.vae = tiny_vae(self.teacher, width, blocks)
        self.modules: dict[str, nn.Module] = {"decoder": TinyDecoder(self.vae)}
        self.frozen: dict[str, nn.Module] = {}

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        batch = self.source.draw(size, generator)
        batch["noise"] = torch.randn(batch["latents"].shape, generator=generator)
        return batch

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        z = batch["latents"]
        with torch.no_grad():
            wanted = decode_scaled(self.teacher, z)
        made = modules["decoder"](z + self.latent_noise * batch["noise"])
        terms = {"l1": (made - wanted).abs().mean(), "multi_scale": multi_scale_loss(made, wanted)}
        loss = terms["l1"] + self.multi_scale_weight * terms["multi_scale"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(wanted, made)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return {"loss": loss, **terms}

    def _with(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        vae = copy.deepcopy(self.vae).eval()
        vae.decoder.load_state_dict(modules["decoder"].decoder.state_dict())
        return {"vae": vae}

    def save(self, modules: dict[str, nn.Module], folder: Path) -> None:
        super().save(self._with(modules), folder)

    @torch.no_grad()
    def sample(self, modules: dict[str, nn.Module], path: Path) -> None:
        """Rows of the teacher's pictures of the same latents, then the tiny decoder's."""
        z = self.batch(8, torch.Generator().manual_seed(0))["latents"].to(
            next(modules["decoder"].parameters()).device
        )
        wanted = decode_scaled(self.teacher, z)
        both = torch.cat([wanted, modules["decoder"](z)]).clamp(-1, 1)
        picture = grid(
            to_pil(((both + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()), 8
        )
        if picture.width < 1024:
            picture = picture.resize(
                (picture.width * 2, picture.height * 2), Image.Resampling.NEAREST
            )
        save(picture, path)


def smaller_text_encoder(teacher: Any, layers: int) -> Any:
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

    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.text_encoder(input_ids)[0]
        return out


class TextEncoderTask(_Denoising):
    """Train a text encoder of fewer layers to say what the teacher's says, and to make the UNet
    predict the same.

    The first term is the MSE of the embeddings, divided by the teacher's mean square; the second
    the MSE of the UNet's outputs under both (Wang et al. 2025, arXiv:2503.19897: what counts is
    what the diffusion model sees, not the distance of embeddings).

    Args:
        unet: the one that will read the student, already distilled. text_encoder: the teacher's.
        layers: of the student.
        output_weight: of the second term; 0 does not run the UNet.
        timesteps: (N,) those that a few-step UNet knows; None is all of them.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        source: LatentSource,
        *,
        parts: dict[str, Any],
        preview: dict[str, Any],
        layers: int,
        output_weight: float = 1.0,
        caption_dropout: float = 0.1,
        timesteps: Tensor | None = None,
        scheduler: dict[str, Any] = V_ZERO_SNR,
    ):
        super().__init__(source, scheduler, {**parts, "unet": unet}, caption_dropout, preview)
        self.timesteps = timesteps
        self.unet, self.output_weight = unet.eval().requires_grad_(False), output_weight
        self.encode = CachedEncoder(text_encoder)
        self.modules: dict[str, nn.Module] = {
            "text": TextForward(smaller_text_encoder(text_encoder, layers).requires_grad_(True))
        }
        self.frozen: dict[str, nn.Module] = {"unet": self.unet} if output_weight else {}

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        out = super().batch(size, generator)
        if self.timesteps is not None:
            out["t"] = self.timesteps[
                torch.randint(0, len(self.timesteps), (size,), generator=generator)
            ]
        return out

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        wanted = self.encode(batch["input_ids"])
        made = modules["text"](batch["input_ids"])
        terms = {"embedding": F.mse_loss(made.float(), wanted) / wanted.pow(2).mean()}
        loss = terms["embedding"]
        if self.output_weight:
            x, _ = self.forward(batch["latents"], batch["noise"], batch["t"])
            with torch.no_grad():
                teacher = self.unet(x, batch["t"], wanted).sample
            terms["output"] = output_loss(self.unet(x, batch["t"], made).sample, teacher)
            loss = loss + self.output_weight * terms["output"]
        return {"loss": loss, **terms}

    def save(self, modules: dict[str, nn.Module], folder: Path) -> None:
        super().save({"text_encoder": modules["text"].text_encoder}, folder)

    def sample(self, modules: dict[str, nn.Module], path: Path) -> None:
        super().sample({"text_encoder": modules["text"].text_encoder}, path)
