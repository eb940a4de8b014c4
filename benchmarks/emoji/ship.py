"""Turn a trained diffusers folder into the artefact that is shipped: weights rounded to float16,
ONNX graphs, manifest.

python benchmarks/emoji/ship.py --model runs/student/model --out sdlite/models/emoji
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from sdlite.converter import convert
from sdlite.quant import read_prompts
from sdlite.quant.options import KEEP_FLOAT

# Measured by identity@1, which falls with noise that PSNR hardly sees: the decoder's last two
# stages, the text encoder's worst layers, the UNet's last stage.
EXTRA = {
    "vae_decoder": (r"decoder\.up_blocks\.[23]\.",),
    "text_encoder": (r"layers\.[13]\.mlp\.fc2$",),
    "unet": (r"^up_blocks\.2\.",),
}
PROMPTS = Path(__file__).parents[2] / "export" / "calibration" / "emoji.txt"


def halve(folder: Path) -> None:
    """In place: every floating-point tensor of the folder's safetensors to float16; buffers that
    networks rebuild are dropped.
    """
    for path in folder.rglob("*.safetensors"):
        tensors = {k: v.half() for k, v in load_file(path).items() if v.is_floating_point()}
        save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("--model", type=Path, required=True, help="diffusers folder of a training")
    ap.add_argument(
        "--vae", type=Path, help="vae folder to take instead of the model's (train_decoder.py)"
    )
    ap.add_argument("--out", type=Path, required=True, help="artefact folder; replaced")
    ap.add_argument("--name", default="emoji")
    ap.add_argument("--steps", type=int, default=25)
    ap.add_argument("--guidance", type=float, default=3.0)
    ap.add_argument(
        "--recipe",
        default="task + output + feature distillation (benchmarks/emoji/train_student.py)",
        help="what the manifest says",
    )
    ap.add_argument(
        "--images", type=int, help="training images the student has seen, for the manifest"
    )
    args = ap.parse_args()

    student = {
        "architecture": "UNet2DConditionModel, BK-Base blocks at half width of the emoji teacher",
        "teacher": "emoji teacher, 31.1M UNet (benchmarks/emoji/train_teacher.py)",
        "recipe": args.recipe,
        "training_images": args.images,
        "data": (
            "Noto Emoji 64 px, CLDR names and tags; 5% of skin-tone pictures held out"
            " (benchmarks/emoji)"
        ),
        "licence": "Apache-2.0",
    }
    with tempfile.TemporaryDirectory() as tmp:
        plain, art = Path(tmp) / "plain", Path(tmp) / "artefact"
        shutil.copytree(args.model, plain)
        if args.vae:
            shutil.rmtree(plain / "vae")
            shutil.copytree(args.vae, plain / "vae")
        halve(plain)
        convert(
            plain,
            art,
            name=args.name,
            student=student,
            calibration_prompts=read_prompts(PROMPTS),
            keep_float={p: (*KEEP_FLOAT.get(p, ()), *more) for p, more in EXTRA.items()},
            sampler={
                "name": "ddim",
                "num_inference_steps": args.steps,
                "guidance_scale": args.guidance,
            },
        )
        shutil.rmtree(args.out, ignore_errors=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(art, args.out)
    total = sum(
        f["bytes"] for f in json.loads((args.out / "sdlite.json").read_text())["files"].values()
    )
    print(f"{args.out}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
