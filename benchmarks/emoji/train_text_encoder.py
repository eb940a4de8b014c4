"""Pretrain the CLIP text encoder before the teacher: predict a picture's latent from its caption
alone.

The pooled output (end-of-text) goes through a small head to the clean latent, which is the
teacher's own task at the last timestep of a zero-terminal-SNR schedule. It costs 2.4M parameters a
step instead of 33M, and the UNet then starts from captions that already tell objects, skin tones
and backgrounds apart.

python benchmarks/emoji/train_text_encoder.py --vae runs/vae/model --out runs/text [--resume]
[--max-minutes 6]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import emoji
import torch
import torch.nn.functional as F
from latents import EmojiLatents
from PIL import Image
from torch import Tensor, nn
from train_teacher import PREVIEW, build_text_encoder, normalised_vae
from transformers import CLIPTextModel

from sdlite.distill.train import Batch, Task, TrainConfig, fit
from sdlite.images import to_uint8
from sdlite.tokenizer import ClipTokenizer


class CaptionToLatent(nn.Module):
    """(B, L) token ids -> (B, C, h, w) latents."""

    def __init__(self, text_encoder: CLIPTextModel, shape: tuple[int, ...]):
        super().__init__()
        self.text_encoder, self.shape = text_encoder, shape
        width = text_encoder.config.hidden_size
        self.head = nn.Sequential(
            nn.Linear(width, 1024), nn.GELU(), nn.Linear(1024, int(torch.Size(shape).numel()))
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        # causal attention: what follows the end-of-text token cannot change the pooled output, so
        # it is cut off
        end = int((input_ids == self.text_encoder.config.eos_token_id).int().argmax(1).max()) + 1
        return self.head(self.text_encoder(input_ids[:, :end]).pooler_output).view(-1, *self.shape)


class TextTask(Task):
    def __init__(
        self,
        network: CaptionToLatent,
        source: EmojiLatents,
        vae: nn.Module,
        tokenizer: ClipTokenizer,
    ):
        self.modules: dict[str, nn.Module] = {"text": network}
        self.source, self.vae, self.tokenizer = source, vae, tokenizer

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        return self.source.draw(size, generator)

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(modules["text"](batch["input_ids"]), batch["latents"])}

    def save(self, modules: dict[str, nn.Module], folder: Path) -> None:
        modules["text"].text_encoder.save_pretrained(folder / "text_encoder")

    @torch.no_grad()
    def sample(self, modules: dict[str, nn.Module], path: Path) -> None:
        """The mean picture that each preview prompt stands for, as far as the text encoder can
        tell; and retrieval among all pictures.
        """
        z = modules["text"](torch.from_numpy(self.tokenizer(PREVIEW)))
        pixels = to_uint8(self.vae.decode(z).sample.numpy())
        grid = (
            torch.from_numpy(pixels)
            .view(3, 8, *pixels.shape[1:])
            .permute(0, 2, 1, 3, 4)
            .reshape(3 * 64, 8 * 64, 3)
        )
        Image.fromarray(grid.numpy()).resize((1024, 384), Image.Resampling.NEAREST).save(path)
        data = self.source.data
        ids = torch.nonzero(~data.heldout).flatten()[::8]
        captions = torch.from_numpy(self.tokenizer([data.captions[i] for i in ids.tolist()]))
        gallery = self.source.latents[0].flatten(1)
        nearest = torch.cdist(modules["text"](captions).flatten(1), gallery).argmin(1)
        print(
            f"{path.name}: {float((nearest == ids).float().mean()):.1%} of {len(ids)} captions are"
            " nearest to their own picture"
        )


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("--vae", type=Path, required=True, help="folder written by train_vae.py")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--init", type=Path, help="go on from this text encoder")
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--max-minutes", type=float)
    ap.add_argument("--images", type=int, default=200_000)
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    data, tokenizer = emoji.load(), ClipTokenizer.from_pretrained(emoji.TOKENIZER)
    cache = args.out / "latents.safetensors"
    vae = normalised_vae(args.vae, args.out / "vae", data, cache)
    source = EmojiLatents(vae, tokenizer, data, cache)
    text_encoder = (
        CLIPTextModel.from_pretrained(args.init) if args.init else build_text_encoder(tokenizer)
    )
    task = TextTask(
        CaptionToLatent(text_encoder, tuple(source.latents.shape[2:])), source, vae, tokenizer
    )
    config = TrainConfig(
        max_images=args.images,
        batch_size=64,
        lr=1e-3,
        warmup_images=5_000,
        decay_from=0.4,
        sample_every=500,
    )
    fit(task, config, args.out, resume=args.resume, max_minutes=args.max_minutes)


if __name__ == "__main__":
    main()
