"""What `--fuse-schedule` saves: the UNet's calls of whole pictures, as one graph and as three, in
turn. One row each run.

    python -m benchmarks.fused emoji
    python -m benchmarks.fused shape:bk-tiny --steps 4 --pictures 3

Every picture has a new prompt, so the three graphs pay for each prompt once; timesteps are paid for
in the first picture alone, which is a field of its own. Rows go to benchmarks/results/fused.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.env import environment
from benchmarks.export import sized
from benchmarks.run import model_folder

RESULTS = Path(__file__).parent / "results" / "fused.jsonl"
PROFILES = ("onnx-fixed", "onnx-fused")


def picture(
    unet: Callable[..., np.ndarray],
    inputs: dict[str, np.ndarray],
    times: list[np.ndarray],
    prompts: list[np.ndarray],
) -> float:
    """Seconds of the UNet's calls for one picture: every timestep, every prompt (two with
    guidance).
    """
    begin = time.perf_counter()
    for t in times:
        for embeds in prompts:
            unet(**{**inputs, "timestep": t, "encoder_hidden_states": embeds})
    return time.perf_counter() - begin


def measure(
    folder: Path, steps: int, guidance: float, pictures: int, threads: int, size_px: int | None
) -> dict[str, Any]:
    from sdlite.exporters import profile, targets
    from sdlite.exporters.export import export
    from sdlite.exporters.rewrites.fixed_shapes import input_shapes

    with tempfile.TemporaryDirectory() as tmp:
        unets, size = {}, {}
        for name in PROFILES:
            out = Path(tmp) / name
            target_of = name if size_px is None else sized(name, size_px, Path(tmp))
            report = export(folder, out, target=target_of, num_inference_steps=1, threads=threads)
            files = [out / f for f in report["files"] if f.startswith("unet/")]
            size[name] = sum(f.stat().st_size for f in files)
            unets[name] = targets.of(profile.load(name)).run("unet", files, threads)
        shapes = input_shapes(Path(tmp) / "onnx-fixed" / "unet" / "model.onnx")
        rng = np.random.default_rng(0)
        draw = lambda name: rng.standard_normal([int(d) for d in shapes[name]]).astype(np.float32)  # noqa: E731
        inputs, times = (
            {"sample": draw("sample")},
            [np.array(t, np.float32) for t in np.linspace(999, 1, steps)],
        )
        samples: dict[str, list[float]] = {n: [] for n in PROFILES}
        worst = 0.0
        for i in range(pictures + 1):
            prompts = [draw("encoder_hidden_states") for _ in range(1 if guidance <= 1 else 2)]
            for name in PROFILES[:: 1 if i % 2 else -1]:
                samples[name].append(picture(unets[name], inputs, times, prompts))
            given = {**inputs, "timestep": times[0], "encoder_hidden_states": prompts[0]}
            a, b = (unets[n](**given) for n in PROFILES)
            worst = max(worst, float(np.abs(a - b).max()))
    later = {n: float(np.median(s[1:])) for n, s in samples.items()}
    return {
        "first_seconds": {n: s[0] for n, s in samples.items()},
        "samples_seconds": {n: s[1:] for n, s in samples.items()},
        "median_seconds": later,
        "saved": 1 - later["onnx-fused"] / later["onnx-fixed"],
        "largest_difference": worst,
        "bytes": size,
    }


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("model", nargs="?", default="emoji", help="embedded name, folder or shape:NAME")
    ap.add_argument("--steps", type=int, default=25)
    ap.add_argument(
        "--guidance", type=float, default=2.0, help="1 is one call a step, anything else two"
    )
    ap.add_argument("--pictures", type=int, default=20, help="after the first")
    ap.add_argument("--size", type=int, help="pixels; default: the model's own")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sdlite-bench")
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    folder = model_folder(Case(args.model, "sdlite-ort", args.steps, args.size or 512), args.cache)
    row = {
        "model": args.model,
        "size_px": args.size,
        "steps": args.steps,
        "guidance": args.guidance,
        "threads": args.threads,
    }
    row |= measure(folder, args.steps, args.guidance, args.pictures, args.threads, args.size)
    row |= {**environment(), "command": "python -m benchmarks.fused " + " ".join(sys.argv[1:])}
    with open(args.out, "a") as f:
        f.write(json.dumps(row) + "\n")
    print(
        ", ".join(f"{n} {s:.3f} s" for n, s in row["median_seconds"].items()),
        f"a picture's UNet; saved {row['saved']:.1%}",
    )


if __name__ == "__main__":
    main()
