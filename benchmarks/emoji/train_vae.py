"""Train the emoji autoencoder: AutoencoderKL, f=8, 8 latent channels; L1 + MSE + EfficientNet-Lite0
features + KL.

python benchmarks/emoji/train_vae.py --out runs/vae [--resume] [--max-minutes 60]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import emoji
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from features import LiteFeatures
from PIL import Image
from torch import Tensor, nn

from sdlite.distill.train import Batch, Task, TrainConfig, fit


class Wrapped(nn.Module):
    """Encode, sample, decode in one forward, as DDP wants it."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.vae.encode(x).latent_dist
        z = q.mean + q.std * noise
        return self.vae.decode(z).sample, q.mean, q.logvar


class AutoencoderTask(Task):
    def __init__(
        self,
        data: emoji.Emoji,
        init: Path | None = None,
        feature_weight: float = 0.3,
        kl_weight: float = 1e-4,
    ):
        self.data, self.weights = data, data.weights()
        self.feature_weight, self.kl_weight = feature_weight, kl_weight
        self.features = LiteFeatures()
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            sample_size=64,
            norm_num_groups=8,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 64, 128),
            mid_block_add_attention=False,
            scaling_factor=1.0,
        )
        if init is not None:
            vae = AutoencoderKL.from_pretrained(init)
        self.modules: dict[str, nn.Module] = {"vae": Wrapped(vae)}

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        ids = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        colours = torch.randint(0, len(emoji.NAMES), (size,), generator=generator)
        x = self.data.composite(ids, colours)
        flip = torch.rand(size, generator=generator) < 0.5
        x[flip] = x[flip].flip(-1)
        return {"ids": ids, "x": x, "noise": torch.randn(size, 8, 8, 8, generator=generator)}

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        x = batch["x"]
        y, mean, logvar = modules["vae"](x, batch["noise"])
        l1, mse = (x - y).abs().mean(), F.mse_loss(y, x)
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        loss = l1 + mse + self.kl_weight * kl
        terms = {"l1": l1, "mse": mse, "kl": kl}
        if step % 2 == 0:
            terms["feature"] = self.features.distance(x, y)
            loss = loss + self.feature_weight * terms["feature"]
        return {"loss": loss, **terms}

    def save(self, modules: dict[str, nn.Module], folder: Path) -> None:
        modules["vae"].vae.save_pretrained(folder)

    @torch.no_grad()
    def sample(self, modules: dict[str, nn.Module], path: Path) -> None:
        ids = torch.arange(0, len(self.data), len(self.data) // 24)[:24]
        x = self.data.composite(ids, torch.arange(24) % len(emoji.NAMES))
        vae = modules["vae"].vae
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        tiles = ((torch.cat([x, y], 2) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        rows = [torch.cat(list(tiles[r : r + 12]), 1) for r in (0, 12)]
        Image.fromarray(torch.cat(rows, 0).numpy()).resize(
            (12 * 128, 512), Image.Resampling.NEAREST
        ).save(path)


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--max-minutes", type=float)
    ap.add_argument(
        "--init", type=Path, help="go on from this AutoencoderKL folder with a new schedule"
    )
    ap.add_argument("--batch-size", type=int, default=32)
    ap.add_argument("--lr", type=float, default=1e-3)
    ap.add_argument("--images", type=int, default=56_000)
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = TrainConfig(
        max_images=args.images,
        batch_size=args.batch_size,
        lr=args.lr,
        warmup_images=200 * args.batch_size,
        decay_from=0.3,
        ema_decay=0.998,
        sample_every=500 * 32 // args.batch_size,
    )
    fit(
        AutoencoderTask(emoji.load(), args.init),
        config,
        args.out,
        resume=args.resume,
        max_minutes=args.max_minutes,
    )


if __name__ == "__main__":
    main()
