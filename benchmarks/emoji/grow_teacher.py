"""Start the teacher from the half-width network: grown to the teacher's 31M parameters, it computes
the same pictures.

python benchmarks/emoji/grow_teacher.py --student runs/student/model --out runs/grown python
benchmarks/emoji/train_teacher.py --unet runs/grown/unet --text-encoder
runs/student/model/text_encoder ... --out runs/teacher
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import UNet2DConditionModel
from grow import grow
from train_teacher import build_unet


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument(
        "--student", type=Path, required=True, help="diffusers folder written by train_student.py"
    )
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    small = UNet2DConditionModel.from_pretrained(args.student / "unet")
    large = grow(small, dict(build_unet().config), one_layer=True)
    large.save_pretrained(args.out / "unet")
    count = [sum(p.numel() for p in n.parameters()) for n in (small, large)]
    print(f"{args.out / 'unet'}: {count[0]:,} parameters grown to {count[1]:,}")


if __name__ == "__main__":
    main()
