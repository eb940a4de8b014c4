"""Emoji pictures as cached latents, and the normalisation that is folded into the autoencoder."""

from __future__ import annotations

from pathlib import Path

import emoji
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlite.distill.train import Batch
from sdlite.tokenizer import ClipTokenizer


@torch.no_grad()
def encode_all(vae: AutoencoderKL, data: emoji.Emoji, batch: int = 128) -> Tensor:
    """Posterior means on every background: float32 (colours, N, C, h, w). On a GPU where there is
    one; `vae` comes back to where it was.
    """
    out, own = [], vae.device
    device = torch.device("cuda") if torch.cuda.is_available() else own
    vae.to(device)
    for colour in range(len(emoji.NAMES)):
        for start in range(0, len(data), batch):
            ids = torch.arange(start, min(start + batch, len(data)))
            x = data.composite(ids, torch.full((len(ids),), colour)).to(device)
            out.append(vae.encode(x).latent_dist.mean.to(own))
    vae.to(own)
    z = torch.cat(out)
    return z.view(len(emoji.NAMES), len(data), *z.shape[1:])


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """In place: afterwards the VAE encodes to (z - mean) / std per channel and decodes from it,
    with scaling_factor 1.

    The two 1x1 quant convolutions carry it, so diffusers' single `scaling_factor` stays true. mean,
    std: (C,).
    """
    c = len(mean)
    q, p = vae.quant_conv, vae.post_quant_conv
    q.weight[:c] /= std.view(-1, 1, 1, 1)
    q.bias[:c] = (q.bias[:c] - mean) / std
    q.bias[c:] -= 2 * std.log()
    p.bias += p.weight.squeeze(-1).squeeze(-1) @ mean
    p.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


class EmojiLatents:
    """The `LatentSource` of the emoji trainings: concept-weighted pictures, 10 backgrounds,
    captions as people write them.
    """

    def __init__(
        self, vae: AutoencoderKL, tokenizer: ClipTokenizer, data: emoji.Emoji, cache: Path
    ):
        if cache.exists():
            self.latents = load_file(cache)["latents"]
        else:
            self.latents = encode_all(vae, data)
            save_file({"latents": self.latents}, cache)
        self.data, self.tokenizer, self.weights = data, tokenizer, data.weights()
        self.empty_ids = torch.from_numpy(tokenizer([""]))[0]

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        ids = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        colours = torch.randint(0, len(emoji.NAMES), (size,), generator=generator)
        colours[torch.rand(size, generator=generator) < 0.2] = 0
        u = torch.rand(size, 4, generator=generator).tolist()
        prompts = [
            self.data.prompt(i, c, v)
            for i, c, v in zip(ids.tolist(), colours.tolist(), u, strict=True)
        ]
        return {
            "ids": ids,
            "colours": colours,
            "latents": self.latents[colours, ids],
            "input_ids": torch.from_numpy(self.tokenizer(prompts)),
        }
