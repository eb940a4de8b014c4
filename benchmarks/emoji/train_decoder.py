"""Tune the autoencoder's decoder to the latents that a student really makes; encoder and latents
stay as they are.

A quarter of the inputs are the pictures' own latents; the others are what the student makes of a
noised latent, with the caption's real picture as the target: the guided guess of one step at a
random timestep, or, with `--steps N`, the rest of its N-step sampling from a random one of its
steps. The decoder learns to draw sharply from latents that are slightly wrong, which is all it ever
gets from a small UNet.

python benchmarks/emoji/train_decoder.py --model runs/student/model --latents
runs/teacher/latents.safetensors --out runs/decoder
"""

from __future__ import annotations

import argparse
from pathlib import Path

import emoji
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from features import LiteFeatures
from latents import EmojiLatents
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdlite.distill.encoders import CachedEncoder
from sdlite.distill.tasks.base import V_ZERO_SNR
from sdlite.distill.tasks.few_step import Solver, trailing_timesteps
from sdlite.distill.train import Batch, Task, TrainConfig, fit
from sdlite.images import to_uint8
from sdlite.sampling import Schedule
from sdlite.tokenizer import ClipTokenizer


class Decoder(nn.Module):
    """The half of an AutoencoderKL that makes pictures: (B, C, h, w) latents -> (B, 3, H, W)."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(z))
        return out


class DecoderTask(Task):
    def __init__(
        self,
        model: Path,
        source: EmojiLatents,
        guidance_scale: float,
        *,
        vae: Path | None = None,
        steps: int | None = None,
        clean: float = 0.25,
        feature_weight: float = 0.5,
    ):
        self.source, self.guidance_scale, self.clean, self.feature_weight = (
            source,
            guidance_scale,
            clean,
            feature_weight,
        )
        self.points = (
            None if steps is None else trailing_timesteps(steps, V_ZERO_SNR["num_train_timesteps"])
        )
        self.vae = AutoencoderKL.from_pretrained(vae or model / "vae").requires_grad_(False)
        self.unet = (
            UNet2DConditionModel.from_pretrained(model / "unet").eval().requires_grad_(False)
        )
        self.encode = CachedEncoder(CLIPTextModel.from_pretrained(model / "text_encoder").float())
        self.solver, self.features = Solver(Schedule.from_config(V_ZERO_SNR)), LiteFeatures()
        decoder = Decoder(self.vae).requires_grad_(True)
        self.modules: dict[str, nn.Module] = {"decoder": decoder}

    def to(self, device: torch.device) -> None:
        for network in (self.vae, self.unet, self.encode, self.features):
            network.to(device)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        batch = self.source.draw(size, generator)
        batch["x"] = self.source.data.composite(batch["ids"], batch["colours"])
        batch["t"] = torch.randint(100, 1000, (size,), generator=generator)
        if self.points is not None:
            batch["start"] = torch.randint(0, len(self.points) - 1, (size,), generator=generator)
        batch["noise"] = torch.randn(batch["latents"].shape, generator=generator)
        return batch

    @torch.no_grad()
    def guess(self, batch: Batch) -> Tensor:
        """The first `clean` share of the batch as it is, the rest as the student makes it: float32
        (B, C, h, w).
        """
        z, n = batch["latents"], round(self.clean * len(batch["latents"]))
        rest = {k: batch[k][n:] for k in ("latents", "noise", "input_ids", "t")}
        made = (
            self.one_step(**rest)
            if self.points is None
            else self.sampled(**rest, start=batch["start"][n:])
        )
        return torch.cat([z[:n], made]).float()

    def output(self, x: Tensor, t: Tensor, input_ids: Tensor) -> Tensor:
        if self.guidance_scale <= 1:
            out: Tensor = self.unet(x, t, self.encode(input_ids)).sample
            return out
        empty = self.source.empty_ids.to(input_ids.device).expand(len(t), -1)
        embeds = self.encode(torch.cat([input_ids, empty]))
        v, v_uncond = self.unet(torch.cat([x, x]), torch.cat([t, t]), embeds).sample.chunk(2)
        return v_uncond + self.guidance_scale * (v - v_uncond)

    def one_step(self, latents: Tensor, noise: Tensor, input_ids: Tensor, t: Tensor) -> Tensor:
        x, _ = self.solver(latents, noise, t)
        return self.solver.x0_noise(self.output(x, t, input_ids), x, t)[0]

    def sampled(
        self, latents: Tensor, noise: Tensor, input_ids: Tensor, t: Tensor, start: Tensor
    ) -> Tensor:
        """DDIM from step `start` of each sample to the end."""
        assert self.points is not None
        points = self.points.to(start.device)
        x, _ = self.solver(latents, noise, points[start])
        for i in range(len(points) - 1):
            at, to = (points[i + k].expand(len(x)) for k in (0, 1))
            on = (start <= i).view(-1, 1, 1, 1)
            x = torch.where(on, self.solver.ddim(self.output(x, at, input_ids), x, at, to), x)
        return x

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        x, y = batch["x"], modules["decoder"](self.guess(batch)).float()
        terms = {
            "l1": (x - y).abs().mean(),
            "mse": F.mse_loss(y, x),
            "feature": self.features.distance(x, y, px=128),
        }
        return {
            "loss": terms["l1"] + terms["mse"] + self.feature_weight * terms["feature"],
            **terms,
        }

    def save(self, modules: dict[str, nn.Module], folder: Path) -> None:
        self._with(modules).save_pretrained(folder / "vae")

    def _with(self, modules: dict[str, nn.Module]) -> AutoencoderKL:
        self.vae.decoder.load_state_dict(modules["decoder"].decoder.state_dict())
        self.vae.post_quant_conv.load_state_dict(modules["decoder"].post_quant_conv.state_dict())
        return self.vae

    @torch.no_grad()
    def sample(self, modules: dict[str, nn.Module], path: Path) -> None:
        """Rows of real pictures, and of what the decoder makes of the student's guesses."""
        device = next(modules["decoder"].parameters()).device
        batch = self.batch(32, torch.Generator().manual_seed(0))
        batch = {k: v.to(device) for k, v in batch.items()}
        y = torch.from_numpy(to_uint8(modules["decoder"](self.guess(batch)).cpu().numpy()))
        x = torch.from_numpy(to_uint8(batch["x"].cpu().numpy()))
        rows = [
            t[i : i + 16].permute(1, 0, 2, 3).reshape(64, 16 * 64, 3)
            for i in (0, 16)
            for t in (x, y)
        ]
        Image.fromarray(torch.cat(rows).numpy()).save(path)


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument(
        "--model",
        type=Path,
        required=True,
        help="diffusers folder of the student; its vae is where training starts",
    )
    ap.add_argument("--latents", type=Path, required=True, help="latent cache of the teacher's run")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--vae", type=Path, help="vae folder to go on from instead of the model's")
    ap.add_argument("--guidance", type=float, default=2.0)
    ap.add_argument(
        "--steps",
        type=int,
        help="tune to the latents of a sampler of so many steps; default: to one-step guesses",
    )
    ap.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    ap.add_argument("--images", type=int, default=20_000)
    ap.add_argument("--batch-size", type=int, default=16)
    ap.add_argument("--lr", type=float, default=5e-4)
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--max-minutes", type=float)
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    data, tokenizer = emoji.load(), ClipTokenizer.from_pretrained(emoji.TOKENIZER)
    source = EmojiLatents(
        AutoencoderKL.from_pretrained(args.model / "vae").eval(), tokenizer, data, args.latents
    )
    config = TrainConfig(
        max_images=args.images,
        batch_size=args.batch_size,
        lr=args.lr,
        warmup_images=1_000,
        decay_from=0.3,
        ema_decay=0.998,
        sample_every=500,
        mixed_precision=args.mixed_precision,
        plain_attention=args.mixed_precision != "no" and not torch.cuda.is_available(),
    )
    fit(
        DecoderTask(args.model, source, args.guidance, vae=args.vae, steps=args.steps),
        config,
        args.out,
        resume=args.resume,
        max_minutes=args.max_minutes,
    )


if __name__ == "__main__":
    main()
