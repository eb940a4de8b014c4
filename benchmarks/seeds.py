"""How far apart are the images of one prompt with other seeds? One row for each prompt, in
benchmarks/results/seeds.jsonl.

    python -m benchmarks.seeds emoji

PSNR between every two of `--seeds` images of a prompt, and of as many prompts with one seed for
comparison. High means alike: 40 dB is the same image to the eye, two images of other things have
about 10.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.env import environment
from sdlite.metrics import psnr
from sdlite.pipeline import Pipeline

RESULTS = Path(__file__).parent / "results" / "seeds.jsonl"
PROMPTS = ("a house", "a cat", "a red apple on a blue background", "a rocket")


def apart(images: np.ndarray) -> dict[str, float]:
    """uint8 (B, H, W, 3) -> PSNR in dB between every two: mean, lowest, highest."""
    values = [
        min(psnr(a, b), 100.0) for a, b in itertools.combinations(images, 2)
    ]  # equal ones: 100 dB
    return {
        "psnr_mean": float(np.mean(values)),
        "psnr_lowest": min(values),
        "psnr_highest": max(values),
    }


def paint(pipe: Pipeline, prompts: list[str], seeds: list[int], **settings: Any) -> np.ndarray:
    return np.stack([np.asarray(x) for x in pipe(prompts, seed=seeds, **settings).images])


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("model", nargs="?", default="emoji")
    ap.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    ap.add_argument("--seeds", type=int, default=16)
    ap.add_argument("--backend", default="onnxruntime")
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    pipe = Pipeline.from_pretrained(args.model, backend=args.backend)
    seeds = list(range(args.seeds))
    shared = {
        "model": args.model,
        "precision": pipe.report.precision,
        "images": args.seeds,
        **environment(),
    }
    rows = [
        {"prompt": p, **apart(paint(pipe, [p] * len(seeds), seeds)), **shared} for p in args.prompts
    ]
    if len(args.prompts) > 1:
        rows.append(
            {
                "prompt": None,
                **apart(paint(pipe, args.prompts, [0] * len(args.prompts))),
                **shared,
                "images": len(args.prompts),
            }
        )
    with open(args.out, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        shown = repr(row["prompt"]) if row["prompt"] else "other prompts, one seed"
        print(
            f"{shown}: {row['psnr_mean']:.1f} dB between images ({row['psnr_lowest']:.1f} to"
            f" {row['psnr_highest']:.1f})"
        )


if __name__ == "__main__":
    main()
