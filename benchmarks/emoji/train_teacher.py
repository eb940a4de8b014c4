"""Train the emoji teacher: UNet2DConditionModel (31M) and CLIP text encoder (2.4M), v-prediction,
zero terminal SNR.

python benchmarks/emoji/train_teacher.py --vae runs/vae/model --text-encoder
runs/text/model/text_encoder --out runs/teacher [--resume]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import emoji
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from latents import EmojiLatents, encode_all, fold_normalisation
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sdlite.distill.preview import Samples
from sdlite.distill.tasks.student import TeacherTask
from sdlite.distill.train import TrainConfig, fit
from sdlite.tokenizer import ClipTokenizer

PREVIEW = [
    "red apple",
    "grinning face",
    "dog face",
    "pizza",
    "sunflower on a blue background",
    "rocket on a black background",
    "woman astronaut, dark skin tone",
    "man cook, light skin tone",
    "house with garden",
    "red heart",
    "red apple on a blue background",
    "tiger face",
    "thumbs up, medium skin tone",
    "birthday cake",
    "hamburger",
    "smiling face with sunglasses",
    "ghost",
    "octopus",
    "snowman",
    "airplane on a yellow background",
    "cat with tears of joy",
    "woman firefighter, medium-dark skin tone",
    "green book",
    "three o'clock",
]


def build_unet() -> UNet2DConditionModel:
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(96, 192, 256),
        layers_per_block=2,
        norm_num_groups=16,
        down_block_types=(plain, cross, cross),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=8,  # eight heads: diffusers' name for the number of heads
    )


def build_text_encoder(tokenizer: ClipTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=192,
            intermediate_size=768,
            projection_dim=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.max_length,
            bos_token_id=tokenizer.bos,
            eos_token_id=tokenizer.eos,
            pad_token_id=tokenizer.pad,
        )
    )


def normalised_vae(folder: Path, out: Path, data: emoji.Emoji, cache: Path) -> AutoencoderKL:
    """The trained autoencoder with its latents normalised per channel, and the latents; made once,
    next to the run.
    """
    if not (out / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(folder).eval()
        z = encode_all(vae, data)
        mean, std = z[:, ~data.heldout].mean((0, 1, 3, 4)), z[:, ~data.heldout].std((0, 1, 3, 4))
        fold_normalisation(vae, mean, std)
        save_file({"latents": (z - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)}, cache)
        vae.save_pretrained(out)
    return AutoencoderKL.from_pretrained(out).eval().requires_grad_(False)


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("--vae", type=Path, required=True, help="folder written by train_vae.py")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument(
        "--text-encoder",
        type=Path,
        help="start from this text encoder (train_text_encoder.py) instead of random weights",
    )
    ap.add_argument("--unet", type=Path, help="start from this UNet instead of random weights")
    ap.add_argument("--freeze-text-encoder", action="store_true", help="train the UNet alone")
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--max-minutes", type=float)
    ap.add_argument("--images", type=int, default=800_000)
    ap.add_argument(
        "--timestep-power", type=float, default=1.0, help="below 1 favours noisy timesteps"
    )
    ap.add_argument("--lr", type=float, default=4e-4)
    ap.add_argument(
        "--decay-from",
        type=float,
        default=0.5,
        help="share of the run after which the learning rate falls",
    )
    ap.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile: minutes at the start, then faster steps",
    )
    ap.add_argument("--batch-size", type=int, default=32)
    ap.add_argument(
        "--mixed-precision",
        default="no",
        choices=["no", "bf16"],
        help="bf16 pays where the CPU has AMX or AVX512-BF16",
    )
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)

    data, tokenizer = emoji.load(), ClipTokenizer.from_pretrained(emoji.TOKENIZER)
    cache = args.out / "latents.safetensors"
    vae = normalised_vae(args.vae, args.out / "vae", data, cache)
    source = EmojiLatents(vae, tokenizer, data, cache)
    unet = UNet2DConditionModel.from_pretrained(args.unet) if args.unet else build_unet()
    text_encoder = (
        CLIPTextModel.from_pretrained(args.text_encoder).float()
        if args.text_encoder
        else build_text_encoder(tokenizer)
    )
    parts = {"vae": vae, "tokenizer": tokenizer, "tokenizer_folder": emoji.TOKENIZER}
    task = TeacherTask(
        unet,
        text_encoder,
        source,
        parts=parts,
        samples=Samples(tuple(PREVIEW)),
        train_text_encoder=not args.freeze_text_encoder,
        timestep_power=args.timestep_power,
    )
    config = TrainConfig(
        max_images=args.images,
        batch_size=args.batch_size,
        lr=args.lr,
        warmup_images=10_000,
        decay_from=args.decay_from,
        sample_every=2_000,
        checkpoint_minutes=8,
        compile=args.compile,
        mixed_precision=args.mixed_precision,
        plain_attention=args.mixed_precision != "no" and not torch.cuda.is_available(),
    )
    fit(task, config, args.out, resume=args.resume, max_minutes=args.max_minutes)


if __name__ == "__main__":
    main()
