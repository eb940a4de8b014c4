"""Ten thousand calls of mixed sizes: does memory stay flat? And what one large call needs and
leaves.

    python -m benchmarks.soak [--calls 10000] [--only openvino]

Rows go to benchmarks/results/soak.jsonl. `rss_mib` is the process's memory after so many calls;
`large` has it before a call of 1024 px, at its peak, after small calls that follow, and when the
pipeline is closed, and the seconds from `pipe.cancel()` to `Cancelled` in the decoder at 2048 px.
Sizes are drawn for each call, and one image or two; on OpenVINO, which compiles for a size, for
every fifty.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.env import environment

EMOJI = Path(__file__).parents[1] / "sdlite" / "models" / "emoji"
RESULTS = Path(__file__).parent / "results" / "soak.jsonl"
CALLS = {"onnxruntime": 1.0, "openvino": 1.0, "torch": 0.1}  # share of the calls
HELD = {"openvino": 50}  # calls that keep the size of the one before
SIDES = (64, 64, 64, 96, 128, 160)


def rss(peak: bool = False) -> int:
    """MiB of this process, now or at most."""
    name = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) >> 10


def seconds_to_cancel(pipe: Any) -> float:
    """From `cancel` in another thread to the error, in the decoder at 2048 px."""
    import numpy as np

    from sdlite.errors import Cancelled

    latents = np.zeros(
        (1, pipe.unet_config["in_channels"], 2048 // pipe.stride, 2048 // pipe.stride), np.float32
    )
    asked: list[float] = []
    timer = threading.Timer(1.0, lambda: (asked.append(time.perf_counter()), pipe.cancel()))
    timer.start()
    with contextlib.suppress(Cancelled):
        pipe.decode(latents)
        raise RuntimeError("the decoder was faster than the cancel")
    return time.perf_counter() - asked[0]


def large(pipe: Any, side: int = 1024) -> dict[str, Any]:
    """MiB around one call of `side` pixels."""

    def small() -> None:
        for i in range(4):
            pipe("pizza", seed=i, num_inference_steps=1)

    small()
    before = rss()
    pipe("pizza", seed=0, num_inference_steps=1, height=side, width=side)
    held = rss()
    small()
    return {"side_px": side, "before": before, "held": held, "peak": rss(peak=True), "after": rss()}


def compilations(count: int = 240) -> dict[int, int]:
    """MiB after so many compilations of the UNet on OpenVINO of which one graph is kept: what a
    soak of many shapes gains or loses is the graphs that are kept, not what compiling leaves.
    """
    import numpy as np

    from sdlite.artifact import Artifact
    from sdlite.backends.openvino_network import CompiledNetwork

    artifact = Artifact.open(EMOJI)
    config, text = artifact.config("unet"), artifact.config("text_encoder")
    shape = (1, text["max_position_embeddings"], config["cross_attention_dim"])
    graph = str(EMOJI / "unet" / "model.onnx")
    weights = [EMOJI / "unet" / "diffusion_pytorch_model.safetensors"]
    unet = CompiledNetwork(graph, "unet", "cpu", 1, "fp32", weights=weights, keep=1)
    seen = {}
    for i in range(1, count + 1):
        side = (8, 12, 16)[i % 3]  # never the size of the call before: each call compiles
        unet(
            sample=np.zeros((1, config["in_channels"], side, side), np.float32),
            timestep=np.array(5, np.float32),
            encoder_hidden_states=np.zeros(shape, np.float32),
        )
        if i % 20 == 0:
            seen[i] = rss()
    return seen


def soak(backend: str, count: int) -> dict[str, Any]:
    """`count` calls in this process."""
    import sdlite

    warnings.simplefilter("ignore")
    begin, rng, seen, shapes = time.perf_counter(), random.Random(0), {}, set()
    marks = {1, 10, *(round(count * i / 20) for i in range(1, 21))}
    with sdlite.Pipeline.from_pretrained("emoji", backend=backend, threads=1) as pipe:
        for i in range(1, count + 1):
            if i % HELD.get(backend, 1) == 0 or i == 1:
                shape = (rng.choice(SIDES), rng.choice(SIDES), rng.choice((1, 2)))
                shapes.add(shape)
            pipe(
                f"{i} apples",
                seed=i,
                num_inference_steps=1,
                height=shape[0],
                width=shape[1],
                num_images_per_prompt=shape[2],
            )
            if i in marks:
                seen[i] = rss()
        took = time.perf_counter() - begin
        around = large(pipe)
        if backend != "torch":
            around["seconds_to_cancel"] = seconds_to_cancel(pipe)
    around["closed"] = rss()
    return {
        "backend": backend,
        "calls": count,
        "shapes": len(shapes),
        "seconds": took,
        "rss_mib": seen,
        "large": around,
    }


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--calls", type=int, default=10_000, help="torch makes a tenth of them")
    ap.add_argument("--only", choices=[*CALLS], help="one backend")
    args = ap.parse_args()
    for backend, share in CALLS.items():
        if args.only not in (None, backend):
            continue
        row = measured(f"soak({backend!r}, {round(args.calls * share)})")
        if backend == "openvino":
            row["compilations"] = measured("compilations()")
        row |= environment()
        with open(RESULTS, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        print(json.dumps(row)[:600], flush=True)


def measured(call: str) -> dict[str, Any]:
    """The answer of a function of this module in a process of its own."""
    code = f"import json; from benchmarks import soak; print(json.dumps(soak.{call}))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


if __name__ == "__main__":
    main()
