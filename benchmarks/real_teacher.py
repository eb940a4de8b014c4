"""Can this machine distil a real teacher? The real command on an SD-1.4-shaped folder with random
weights: seconds a step, peak memory.

    python -m benchmarks.real_teacher                      # 860M teacher, bk-tiny (323M), 512 px,
                                                           20 steps, bf16, gradient checkpointing
    # real weights: the same, with a folder that is there:
    python -m benchmarks.real_teacher --teacher my-sd14

It writes a recipe, pictures and the teacher's folder (4.3 GB) into a scratch folder, runs `sdlite
distill` in a process of its own, and reads its `stats.jsonl`. The peak is that process' largest
resident set, from loading to the last picture, VAE encoding included. One row goes to
benchmarks/results/real_teacher.jsonl. Random weights take the same time and memory as real ones;
the pictures mean nothing.

A real run is the same command with real data, and then the evaluation:

    sdlite distill doctor recipe.toml --teacher stable-diffusion-v1-4 --data "laion/*.tar"
    sdlite distill recipe.toml --teacher stable-diffusion-v1-4 --data "laion/*.tar" --out run
    python -m benchmarks.coco generate run/artefact --captions captions_val2014.json --out coco-run
    python -m benchmarks.coco score coco-run --real val2014
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "real_teacher.jsonl"
BAR_GB = 20.0


@dataclass(frozen=True)
class How:
    """What of a training changes its speed and memory, and not what is learned.

    Attributes:
        plain_attention: what CPUs want in bfloat16; on a GPU torch's fused kernel is faster.
        sharded: by FSDP, as `accelerate launch --use_fsdp` does, in one process.
    """

    gradient_checkpointing: bool = True
    plain_attention: bool = True
    compile: bool = False
    sharded: bool = False


CPU = How()


def recipe_text(
    student: str, steps: int, batch_size: int, micro: int | None, precision: str, how: How = CPU
) -> str:
    """`student`: a preset's name, or lines of the [student] table."""
    lines = [
        'name = "real-teacher"',
        "[student]",
        student if "=" in student else f'preset = "{student}"',
        "[train]",
    ]
    lines += [
        f"batch_size = {batch_size}",
        f'mixed_precision = "{precision}"',
        f"plain_attention = {str(how.plain_attention).lower()}",
        f"gradient_checkpointing = {str(how.gradient_checkpointing).lower()}",
        f"compile = {str(how.compile).lower()}",
    ]
    lines += [
        "sample_every = 0",
        "log_every = 1",
        "checkpoint_minutes = 1000.0",
        "warmup_images = 1",
        "lr = 5e-5",
    ]
    lines += [f"micro_batch_size = {micro}"] if micro else []
    lines += [
        "[[stage]]",
        'kind = "output"',
        f"images = {steps * batch_size}",
        "feature_weight = 0.1",
    ]
    lines += ["[preview]", 'prompts = ["a fox"]', "num_inference_steps = 1"]
    return "\n".join(lines) + "\n"


def write_pictures(folder: Path, count: int, px: int) -> Path:
    """Noise of low frequency with captions: data of the right shape."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((px, px), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def measure(
    teacher: Path,
    scratch: Path,
    *,
    student: str,
    steps: int,
    batch_size: int,
    micro: int | None,
    precision: str,
    pictures: int,
    px: int,
    threads: int,
    how: How = CPU,
    most_seconds: float = 1e6,
) -> dict[str, Any]:
    """Run the command and read what it left. After `most_seconds` it is ended.

    Raises:
        SystemExit: it failed; the last lines of what it said.
    """
    text = recipe_text(student, steps, batch_size, micro, precision, how)
    (scratch / "recipe.toml").write_text(text)
    data, out = write_pictures(scratch / "pictures", pictures, px), scratch / "run"
    command = [
        sys.executable,
        "-m",
        "sdlite.cli",
        "distill",
        str(scratch / "recipe.toml"),
        "--teacher",
        str(teacher),
        "--data",
        str(data),
        "--out",
        str(out),
        "--no-export",
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if how.sharded:
        environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    begin = time.perf_counter()
    with open(scratch / "log.txt", "w") as log:
        child = subprocess.Popen(command, stderr=log, env=environ)
        timer = threading.Timer(most_seconds, child.kill)
        timer.start()
        _, status, usage = os.wait4(child.pid, 0)
        late = not timer.is_alive()
        timer.cancel()
    if late:
        raise SystemExit(f"sdlite distill was ended after {most_seconds:.0f} s")
    if status:
        raise SystemExit(
            "sdlite distill failed:\n"
            + "\n".join((scratch / "log.txt").read_text().splitlines()[-12:])
        )
    rows = [
        json.loads(line) for line in (out / "0-output" / "stats.jsonl").read_text().splitlines()
    ]
    step_seconds = [batch_size / r["images_per_second"] for r in rows]
    return {
        "benchmark": "real_teacher",
        "student": student,
        "steps": len(rows),
        "batch_size": batch_size,
        "micro_batch_size": micro,
        "px": px,
        "mixed_precision": precision,
        **asdict(how),
        "seconds_per_step": float(np.median(step_seconds)),
        "step_seconds": step_seconds,
        "loss": [r["loss"] for r in rows],
        "peak_gb": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9,
        "gpu_peak_mib": rows[-1].get("gpu_peak_mib"),
        "bar_gb": BAR_GB,
        "whole_seconds": time.perf_counter() - begin,
        "student_parameters": _parameters(out / "0-output" / "model" / "unet"),
        "teacher_parameters": _parameters(teacher / "unet"),
    }


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as f:
            total += sum(int(np.prod(f.get_slice(k).get_shape())) for k in list(f.keys()))
    return total


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument(
        "--teacher",
        type=Path,
        help="diffusers folder; default: SD-1.4's shape with random weights, made for the run",
    )
    ap.add_argument("--student", default="bk-tiny", help="preset of sdlite.distill.students")
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--batch-size", type=int, default=2)
    ap.add_argument("--micro-batch-size", type=int, default=1, help="gradient accumulation")
    ap.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16", "fp16"))
    ap.add_argument("--pictures", type=int, default=4)
    ap.add_argument("--px", type=int, default=512)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    from benchmarks.env import environment

    with tempfile.TemporaryDirectory(prefix="sdlite-real-teacher-", dir=args.scratch) as scratch:
        teacher = args.teacher
        if teacher is None:
            teacher = Path(scratch) / "sd14"
            subprocess.run(
                [sys.executable, "-m", "benchmarks.shapes", "sd14", str(teacher)], check=True
            )
        row = measure(
            teacher,
            Path(scratch),
            student=args.student,
            steps=args.steps,
            batch_size=args.batch_size,
            micro=args.micro_batch_size,
            precision=args.mixed_precision,
            pictures=args.pictures,
            px=args.px,
            threads=args.threads,
        )
    row |= {
        "teacher": "SD-1.4's shape, random weights" if args.teacher is None else args.teacher.name,
        "threads": args.threads,
        "command": "python -m benchmarks.real_teacher " + " ".join(sys.argv[1:]),
        **environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as f:
        f.write(json.dumps(row) + "\n")
    held = row["peak_gb"] < BAR_GB
    print(
        f"{row['steps']} steps, {row['seconds_per_step']:.2f} s each, peak {row['peak_gb']:.2f} GB;"
        f" bar {BAR_GB:g} GB: {'held' if held else 'not held'}"
    )
    return int(not held)


if __name__ == "__main__":
    raise SystemExit(main())
