"""What previews cost: the seconds of `pipe.stream(...)` against those of the same call.

    python -m benchmarks.preview [--models emoji bk-tiny] [--pairs 15]

The call, the call in a thread of its own, and the stream, which is in one too, take turns; each
must make the others' image bit by bit. The embedded student makes 25 steps at 64 px: its steps are
the shortest, so a preview's share is largest. `bk-tiny` is the shape of `benchmarks.shapes` at
256 px in 4 steps, on torch. `cost` is the median over the turns of stream / thread, less 1; the bar
is 2%. `thread_cost` is thread / call: torch's OpenMP has a team of workers for each thread that
calls it, and idle ones spin (with OMP_WAIT_POLICY=PASSIVE they do not). Rows go to preview.jsonl.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sdlite
from benchmarks import shapes
from benchmarks.env import environment
from sdlite.preview import Preview

RESULTS = Path(__file__).parent / "results" / "preview.jsonl"
BAR = 0.02
CASES: dict[str, dict[str, Any]] = {
    "emoji": {"num_inference_steps": 25, "height": 64, "width": 64},
    "bk-tiny": {"num_inference_steps": 4, "height": 256, "width": 256, "guidance_scale": 0.0},
}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    made = work()
    return time.perf_counter() - begin, made


def in_a_thread(work: Callable[[], Any]) -> Any:
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(work()))
    thread.start()
    thread.join()
    return made[0]


def streamed(pipe: sdlite.Pipeline, call: dict[str, Any]) -> tuple[int, Any]:
    """How many previews came, and the call's output."""
    seen, out = 0, None
    for what in pipe.stream("a red apple", **call):
        if isinstance(what, Preview):
            seen += 1
        else:
            out = what
    return seen, out


def measure(pipe: sdlite.Pipeline, call: dict[str, Any], pairs: int) -> dict[str, Any]:
    taken: dict[str, list[float]] = {"call": [], "thread": [], "stream": []}
    for i in range(pairs + 2):  # two that are not counted
        first, made = seconds(lambda: pipe("a red apple", **call))
        alone, same = seconds(lambda: in_a_thread(lambda: pipe("a red apple", **call)))
        shown, (seen, out) = seconds(lambda: streamed(pipe, call))
        if not np.array_equal(made.images, same.images):
            raise SystemExit("a thread made another image than the call")
        if seen != out.calls or not np.array_equal(made.images, out.images):
            raise SystemExit(f"{seen} previews, or another image than the call's")
        if i >= 2:
            for name, took in zip(taken, (first, alone, shown), strict=True):
                taken[name].append(took)
    call_s, thread_s, stream_s = (np.array(v) for v in taken.values())
    ratios = stream_s / thread_s - 1
    step = float(np.median(call_s)) / call["num_inference_steps"]
    return {
        "pairs": pairs,
        "cost": float(np.median(ratios)),
        "thread_cost": float(np.median(thread_s / call_s - 1)),
        "spread": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
        "step_seconds": step,
        "bar": BAR,
        "samples": taken,
    }


def main() -> int:
    ap = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ap.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    ap.add_argument("--pairs", type=int, default=15)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    over = 0
    for model in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            own = {"model": "emoji", "backend": "onnxruntime"}
            if model != "emoji":
                folder = shapes.write_sd_folder(model, Path(scratch) / model)
                own = {"model": str(folder), "backend": "torch"}
            call = {"seed": 1, "output_type": "np", **CASES[model]}
            with sdlite.Pipeline.from_pretrained(**own, threads=args.threads) as pipe:
                found = measure(pipe, call, args.pairs)
        row = {"model": model, "threads": args.threads, **CASES[model], **found, **environment()}
        with open(args.out, "a", encoding="utf-8") as f:
            f.write(json.dumps({**row, "command": "python -m benchmarks.preview"}) + "\n")
        print(model, f"{found['cost']:.2%}", found["spread"], f"{found['step_seconds']:.4f} s")
        over += found["cost"] > BAR
    return int(over > 0)


if __name__ == "__main__":
    raise SystemExit(main())
