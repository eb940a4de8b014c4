"""Images per second of a distillation step: our loop against the plain loop that runs everything in
every step; one run, same losses.

    python -m benchmarks.throughput --teacher runs/teacher/model \
        --latents runs/teacher/latents.safetensors

`plain` is the loop of the article that the project began from, made to run: pictures through the
VAE's encoder, captions through the text encoder, teacher, student, AdamW; float32, torch's default
attention. `cached` is `sdlite.distill.train.fit` with latents and text embeddings cached; `bf16`
adds bfloat16 and plain attention; `targets` adds the teacher's targets
(`sdlite.distill.teacher_cache`). All see the same student, the same draws in the same order and the
same loss (task + output), so their losses must agree: the row has them, and the run fails when they
do not. Variants are interleaved `--repeats` times; a figure is batch size / median step, the first
steps left out. What the caches cost once is a field of its own. One row goes to
benchmarks/results/throughput.jsonl."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "throughput.jsonl"
BAR = 2.0  # times the plain loop's images per second
VARIANTS = ("plain", "cached", "bf16", "targets")
TOLERANCE = {
    "cached": 0.01,
    "bf16": 0.05,
    "targets": 0.05,
}  # of the last steps' mean loss, relative to plain's


@dataclass
class Setup:
    """What all variants share. `pictures(batch)`: (B, 3, H, W) in [-1, 1] of a batch's samples."""

    teacher: Any
    text_encoder: Any
    vae: Any
    source: Any
    parts: dict[str, Any]
    student: Callable[[], Any]
    pictures: Callable[[dict[str, Any]], Any]
    scheduler: dict[str, Any]


def task_of(setup: Setup) -> Any:
    from sdlite.distill.tasks.base import Given
    from sdlite.distill.tasks.student import Output

    networks = (setup.student(), setup.teacher, setup.text_encoder)
    given = Given(*networks, setup.source, setup.parts, setup.scheduler)
    return Output(feature_weight=0.0, caption_dropout=0.0).task(given)


def timed(task: Any, begins: list[float]) -> Any:
    """`task` with the moment of each draw written into `begins`: a step lasts from one draw to the
    next.
    """
    draw = task.batch

    def batch(size: int, generator: Any) -> Any:
        begins.append(time.perf_counter())
        return draw(size, generator)

    task.batch = batch
    return task


def plain_loop(
    setup: Setup, pool: Any, steps: int, batch_size: int, lr: float
) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step."""
    import torch
    import torch.nn.functional as F

    from sdlite.distill.tasks.base import Forward
    from sdlite.distill.train import step_generator
    from sdlite.sampling import Schedule

    student, forward, c = (
        setup.student().train(),
        Forward(Schedule.from_config(setup.scheduler)),
        setup.vae.config,
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    begins, losses = [time.perf_counter()], []
    for step in range(steps):
        batch = pool.draw(batch_size, step_generator(0, step))
        pictures = setup.pictures(batch)
        with torch.no_grad():
            z = setup.vae.encode(pictures).latent_dist.mean
            z = (z - (getattr(c, "shift_factor", None) or 0.0)) * c.scaling_factor
            embeds = setup.text_encoder(batch["input_ids"])[0]
            x, target = forward(z, batch["noise"], batch["t"])
            wanted = setup.teacher(x, batch["t"], embeds).sample
        out = student(x, batch["t"], embeds).sample
        loss = F.mse_loss(out, target) + F.mse_loss(out, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        begins.append(time.perf_counter())
    return _differences(begins), losses


def our_loop(
    setup: Setup, variant: str, pool: Any, steps: int, batch_size: int, lr: float, scratch: Path
) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step of `fit`, EMA, clipping and statistics included."""
    from sdlite.distill.train import TrainConfig, fit

    task, begins, losses = task_of(setup), [], []
    task.batch = pool.draw
    if variant != "targets":  # the same draws, and the teacher answers in the step
        task.batch = lambda size, generator: {
            k: v for k, v in pool.draw(size, generator).items() if k != "wanted"
        }
    keep, task.save, task.sample = task.loss, lambda *_: None, lambda *_: None

    def loss(modules: Any, batch: Any, step: int) -> Any:
        terms = keep(modules, batch, step)
        losses.append(terms["loss"].item())
        return terms

    task.loss = loss
    config = TrainConfig(
        max_images=steps * batch_size,
        batch_size=batch_size,
        lr=lr,
        warmup_images=0,
        decay_from=1.0,
        sample_every=0,
        checkpoint_minutes=1e9,
        mixed_precision="no" if variant == "cached" else "bf16",
        plain_attention=variant != "cached",
    )
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        fit(timed(task, begins), config, out)
    return _differences(begins), losses


def _differences(moments: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(moments)]


def compare(
    setup: Setup,
    *,
    steps: int,
    batch_size: int,
    repeats: int,
    pool_size: int,
    warmup: int,
    lr: float,
    scratch: Path,
) -> dict[str, Any]:
    """The row without its environment.

    Raises:
        SystemExit: losses differ by more than `TOLERANCE`: the variants did not do the same work.
    """
    import numpy as np

    from sdlite.distill.teacher_cache import cache_targets

    begin = time.perf_counter()
    pool = cache_targets(task_of(setup), pool_size, scratch / "targets.safetensors")
    cache_seconds = time.perf_counter() - begin
    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}
    losses: dict[str, list[float]] = {}
    for _ in range(repeats):
        for v in VARIANTS:
            if v == "plain":
                took, losses[v] = plain_loop(setup, pool, steps, batch_size, lr)
            else:
                took, losses[v] = our_loop(setup, v, pool, steps, batch_size, lr, scratch)
            seconds[v] += took[warmup:]
    rate = {v: batch_size / float(np.median(s)) for v, s in seconds.items()}
    tail = {v: float(np.mean(x[-max(1, steps // 2) :])) for v, x in losses.items()}
    for v, allowed in TOLERANCE.items():
        for what, mine, theirs in (
            ("first", losses[v][0], losses["plain"][0]),
            ("last", tail[v], tail["plain"]),
        ):
            if abs(mine - theirs) > allowed * abs(theirs):
                raise SystemExit(
                    f"{v}: the {what} loss is {mine:.5g}, plain's {theirs:.5g}; more than"
                    f" {allowed:.0%} apart, so not the same work."
                )
    return {
        "benchmark": "throughput",
        "batch_size": batch_size,
        "steps": steps,
        "repeats": repeats,
        "warmup_steps": warmup,
        "pool": pool_size,
        "images_per_second": rate,
        "ratio": {v: r / rate["plain"] for v, r in rate.items()},
        "bar": BAR,
        "step_seconds": seconds,
        "losses": losses,
        "targets_cache_seconds": cache_seconds,
        "teacher_parameters": sum(p.numel() for p in setup.teacher.parameters()),
        "student_parameters": sum(p.numel() for p in setup.student().parameters()),
    }


def emoji_setup(teacher: Path, latents: Path) -> Setup:
    sys.path.insert(0, str(HERE / "emoji"))
    import emoji
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from latents import EmojiLatents
    from transformers import CLIPTextModel

    from sdlite.distill.students import PRESETS, build
    from sdlite.distill.tasks.base import V_ZERO_SNR
    from sdlite.tokenizer import ClipTokenizer

    data, tokenizer = emoji.load(), ClipTokenizer.from_pretrained(emoji.TOKENIZER)
    vae = AutoencoderKL.from_pretrained(teacher / "vae").eval().requires_grad_(False)
    master = UNet2DConditionModel.from_pretrained(teacher / "unet").eval().requires_grad_(False)

    def student() -> Any:
        torch.manual_seed(0)
        return build(master, PRESETS["half"]).requires_grad_(True)

    return Setup(
        master,
        CLIPTextModel.from_pretrained(teacher / "text_encoder").eval().requires_grad_(False),
        vae,
        EmojiLatents(vae, tokenizer, data, latents),
        {"vae": vae, "tokenizer": tokenizer},
        student,
        lambda batch: data.composite(batch["ids"], batch["colours"]),
        V_ZERO_SNR,
    )


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument(
        "--teacher", type=Path, required=True, help="diffusers folder of the emoji teacher"
    )
    ap.add_argument("--latents", type=Path, required=True, help="latent cache of its training")
    ap.add_argument("--batch-size", type=int, default=32)
    ap.add_argument("--steps", type=int, default=30, help="of each variant and repeat")
    ap.add_argument(
        "--warmup", type=int, default=3, help="first steps of each repeat that are not counted"
    )
    ap.add_argument("--repeats", type=int, default=3)
    ap.add_argument("--pool", type=int, default=2048, help="draws with cached targets")
    ap.add_argument("--lr", type=float, default=1e-4)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    import torch

    from benchmarks.env import environment

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="sdlite-throughput-") as scratch:
        row = compare(
            emoji_setup(args.teacher, args.latents),
            steps=args.steps,
            batch_size=args.batch_size,
            repeats=args.repeats,
            pool_size=args.pool,
            warmup=args.warmup,
            lr=args.lr,
            scratch=Path(scratch),
        )
    row |= {
        "threads": args.threads,
        "command": "python -m benchmarks.throughput " + " ".join(sys.argv[1:]),
        **environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as f:
        f.write(json.dumps(row) + "\n")
    for v in VARIANTS:
        print(
            f"{v:<8} {row['images_per_second'][v]:8.1f} images/s  {row['ratio'][v]:5.2f}x  loss"
            f" {row['losses'][v][-1]:.4f}"
        )
    best = max(row["ratio"].values())
    print(f"bar {BAR:g}x: {'held' if best >= BAR else 'not held'} ({best:.2f}x)")
    return int(best < BAR)


if __name__ == "__main__":
    raise SystemExit(main())
