"""Distil the emoji student from the teacher: BK-Base's blocks at half width (5.4M), task + output +
feature losses.

python benchmarks/emoji/train_student.py --teacher runs/teacher/model --latents
runs/teacher/latents.safetensors --out runs/student
"""

from __future__ import annotations

import argparse
from pathlib import Path

import emoji
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from latents import EmojiLatents
from train_teacher import PREVIEW
from transformers import CLIPTextModel

from sdlite.distill.preview import Samples
from sdlite.distill.students import PRESETS, build
from sdlite.distill.tasks.base import V_ZERO_SNR, Given
from sdlite.distill.tasks.student import Output
from sdlite.distill.train import TrainConfig, fit
from sdlite.tokenizer import ClipTokenizer


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument(
        "--teacher", type=Path, required=True, help="diffusers folder written by train_teacher.py"
    )
    ap.add_argument(
        "--latents", type=Path, required=True, help="latent cache of that run; made when missing"
    )
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument(
        "--init",
        type=Path,
        help="go on from this student's unet folder instead of slicing the teacher",
    )
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--max-minutes", type=float)
    ap.add_argument("--images", type=int, default=400_000)
    ap.add_argument("--output-weight", type=float, default=1.0)
    ap.add_argument(
        "--feature-weight",
        type=float,
        default=0.1,
        help="both 0: the task's loss alone, which does not run the teacher",
    )
    ap.add_argument(
        "--timestep-power", type=float, default=1.0, help="below 1 favours noisy timesteps"
    )
    ap.add_argument("--lr", type=float, default=1e-3)
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

    data, tokenizer = emoji.load(), ClipTokenizer.from_pretrained(emoji.TOKENIZER)
    vae = AutoencoderKL.from_pretrained(args.teacher / "vae").eval().requires_grad_(False)
    teacher = UNet2DConditionModel.from_pretrained(args.teacher / "unet").eval()
    text_encoder = CLIPTextModel.from_pretrained(args.teacher / "text_encoder").float().eval()
    student = (
        UNet2DConditionModel.from_pretrained(args.init)
        if args.init
        else build(teacher, PRESETS["half"])
    )
    parts = {"vae": vae, "tokenizer": tokenizer, "tokenizer_folder": emoji.TOKENIZER}
    source = EmojiLatents(vae, tokenizer, data, args.latents)
    samples = Samples(tuple(PREVIEW))
    given = Given(student, teacher, text_encoder, source, parts, V_ZERO_SNR, samples)
    task = Output(
        output_weight=args.output_weight,
        feature_weight=args.feature_weight,
        timestep_power=args.timestep_power,
    ).task(given)
    config = TrainConfig(
        max_images=args.images,
        batch_size=args.batch_size,
        lr=args.lr,
        warmup_images=min(5_000, args.images // 10),
        decay_from=0.4,
        sample_every=2_000,
        compile=args.compile,
        mixed_precision=args.mixed_precision,
        plain_attention=args.mixed_precision != "no" and not torch.cuda.is_available(),
    )
    fit(task, config, args.out, resume=args.resume, max_minutes=args.max_minutes)


if __name__ == "__main__":
    main()
