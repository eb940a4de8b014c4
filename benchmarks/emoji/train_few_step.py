"""Few-step stages of the emoji student: guidance, then progressive halvings, then an adversarial
touch; each starts where the last ended.

python benchmarks/emoji/train_few_step.py guidance --student runs/student/model --teacher
runs/teacher/model --guidance 2 --out runs/guided python benchmarks/emoji/train_few_step.py
progressive --student runs/guided/model --steps 8 --out runs/p8     # its teacher is the student
python benchmarks/emoji/train_few_step.py adversarial --student runs/p4/model --teacher
runs/teacher/model --steps 4 --out runs/adv
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
from sdlite.distill.tasks.base import V_ZERO_SNR, Given, StageKind
from sdlite.distill.tasks.few_step import Adversarial, Guidance, Progressive
from sdlite.distill.train import TrainConfig, fit
from sdlite.tokenizer import ClipTokenizer


def kind(args: argparse.Namespace) -> StageKind:
    """The stage with the options of the command line."""
    if args.kind == "guidance":
        return Guidance(args.guidance)
    if args.kind == "progressive":
        return Progressive((args.steps,), guidance_scale=args.guidance)
    return Adversarial(args.steps, args.weight, guidance_scale=args.guidance)


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("kind", choices=("guidance", "progressive", "adversarial"))
    ap.add_argument("--student", type=Path, required=True, help="diffusers folder to start from")
    ap.add_argument(
        "--teacher",
        type=Path,
        help="diffusers folder whose UNet teaches; default: the student as it is at the start",
    )
    ap.add_argument("--latents", type=Path, required=True, help="latent cache of the teacher's run")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--guidance", type=float, default=1.0, help="scale of the teacher's guidance")
    ap.add_argument(
        "--steps",
        type=int,
        default=4,
        help="sampling steps of the student (progressive, adversarial)",
    )
    ap.add_argument("--weight", type=float, default=0.05, help="of the adversarial term")
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--max-minutes", type=float)
    ap.add_argument("--images", type=int, default=100_000)
    ap.add_argument(
        "--timestep-power",
        type=float,
        default=1.0,
        help="guidance: below 1 favours noisy timesteps",
    )
    ap.add_argument("--lr", type=float, default=3e-4)
    ap.add_argument("--batch-size", type=int, default=64)
    ap.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    data, tokenizer = emoji.load(), ClipTokenizer.from_pretrained(emoji.TOKENIZER)
    vae = AutoencoderKL.from_pretrained(args.student / "vae").eval().requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(args.student / "text_encoder").float().eval()
    student = UNet2DConditionModel.from_pretrained(args.student / "unet")
    teacher = UNet2DConditionModel.from_pretrained((args.teacher or args.student) / "unet")
    source = EmojiLatents(vae, tokenizer, data, args.latents)
    parts = {"vae": vae, "tokenizer": tokenizer, "tokenizer_folder": emoji.TOKENIZER}
    samples = Samples(tuple(PREVIEW))
    given = Given(student, teacher, text_encoder, source, parts, V_ZERO_SNR, samples)
    task = kind(args).task(given)
    if args.kind == "guidance":
        task.timestep_power = args.timestep_power
    bf16 = args.mixed_precision == "bf16"
    config = TrainConfig(
        max_images=args.images,
        batch_size=args.batch_size,
        lr=args.lr,
        warmup_images=2_000,
        decay_from=0.2,
        sample_every=0,
        mixed_precision=args.mixed_precision,
        plain_attention=bf16 and not torch.cuda.is_available(),
    )
    fit(task, config, args.out, resume=args.resume, max_minutes=args.max_minutes)


if __name__ == "__main__":
    main()
