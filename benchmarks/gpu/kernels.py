"""Where the time of a UNet's call goes on a GPU, by kind of kernel.

    python -m benchmarks.gpu.kernels [--models sd14 bk-tiny ssd-1b] [--size 512]

torch's profiler over five calls of the UNet in float16, guided (two rows), after two that are not
counted: what the device spent in matrix products, convolutions, attention, norms and the rest, and
how long it stood idle between kernels. Rows go to gpu_kernels.jsonl.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import common, images
from sdlite.spec import latent_size

MODELS = ("sd14", "bk-tiny", "ssd-1b")
CALLS = 5
KINDS = (  # words in a kernel's or an operator's name -> kind; the first that fits
    ("attention", ("flash", "fmha", "attention", "sdpa", "softmax")),
    ("convolution", ("conv", "cudnn", "implicit", "winograd", "nchw", "nhwc")),
    ("matrix product", ("gemm", "gemv", "cutlass", "addmm", "matmul", "linear", "nvjet")),
    ("norm", ("norm", "welford", "moments")),
    ("copy", ("copy", "memcpy", "memset", "cat", "transpose")),
)


def kind_of(name: str) -> str:
    low = name.lower()
    return next((kind for kind, words in KINDS if any(w in low for w in words)), "elementwise")


def measure(folder: Path, device: str, size: int) -> dict[str, Any]:
    with images.opened(folder, device, precision="fp16") as pipe:
        cond, _ = pipe.conditions([images.PROMPT] * 2, [], 1.0, size, size)
        side = [size // pipe.stride] * 2 if size else list(latent_size(pipe.unet_config))
        sample = np.random.default_rng(0).standard_normal((2, pipe.channels, *side))
        given = {"sample": sample.astype(np.float32), "timestep": np.array(500, np.float32), **cond}

        def call() -> None:
            pipe.networks.parts["unet"](**given)

        clocked = common.timed(call)
        own = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        begin = time.perf_counter()
        with profile(activities=own) as seen:
            for _ in range(CALLS):
                call()
            if device == "cuda":
                torch.cuda.synchronize()
        whole = time.perf_counter() - begin
    return {**clocked, **_shares(seen, device), "profiled_seconds": whole / CALLS}


def _shares(seen: Any, device: str) -> dict[str, Any]:
    """Milliseconds a call by kind, and the ten longest."""
    spent: Counter[str] = Counter()
    longest: Counter[str] = Counter()
    count = 0
    for event in seen.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device != (device == "cuda"):
            continue
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        spent[kind_of(event.key)] += own / 1000 / CALLS
        longest[event.key[:120]] += own / 1000 / CALLS
        count += event.count
    return {
        "milliseconds": dict(spent.most_common()),
        "kernels": count // CALLS,
        "longest": dict(longest.most_common(10)),
    }


def main() -> int:
    ap = common.arguments(__doc__ or "", "kernels")
    ap.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    ap.add_argument("--size", type=int, default=512, metavar="PX")
    args = ap.parse_args()
    budget, about = common.Budget(args.minutes), common.about(args.device)
    for model in args.models:
        if not budget.allows(model, 60):
            continue
        folder = common.folder(model, args.scratch)
        with common.freed():
            found = measure(folder, args.device, args.size)
        common.keep(args.out, {"model": model, "size_px": args.size, **found, **about})
    if budget.left_out:
        print("no time was left for:", "; ".join(budget.left_out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
