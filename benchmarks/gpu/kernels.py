"""Where the time of a UNet's call goes on a GPU, by kind of kernel; how near the libraries' own
kernels are to what the GPU can do.

    python -m benchmarks.gpu.kernels [--models sd14 bk-tiny ssd-1b] [--size 512]

torch's profiler over five calls of the UNet in float16, guided (two rows), after two that are not
counted: what the device spent in matrix products, convolutions, attention, norms and the rest, and
how long it stood idle between kernels. Before that, one row of single operations at SD-1.4's
shapes: `floor` is the time that their arithmetic at the rate of a large matrix product, or their
bytes (each read and written once) at the rate of a large copy, would take, whichever is longer;
`share` is floor / seconds. An own kernel could pay where it is low and the time matters. Rows go
to gpu_kernels.jsonl.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import common, images
from sdlite.spec import latent_size

MODELS = ("sd14", "bk-tiny", "ssd-1b")
CALLS = 5
LAUNCHES = 20  # of an operation in a timed call: one alone is mostly launching
KINDS = (  # words in a kernel's or an operator's name -> kind; the first that fits
    ("attention", ("flash", "fmha", "attention", "sdpa", "softmax")),
    ("convolution", ("conv", "cudnn", "implicit", "winograd", "nchw", "nhwc")),
    ("matrix product", ("gemm", "gemv", "cutlass", "addmm", "matmul", "linear", "nvjet")),
    ("norm", ("norm", "welford", "moments")),
    ("copy", ("copy", "memcpy", "memset", "cat", "transpose")),
)


Op = tuple[Callable[[], Any], float, float]  # the call, its operations, its bytes


def narrow(device: str) -> torch.dtype:
    """Of the operations: CPUs are slow in float16."""
    return torch.float16 if device == "cuda" else torch.float32


def ceilings(device: str) -> dict[str, float]:
    """What this GPU reaches: float16 operations a second in a product of two large matrices, bytes
    a second, read and written, in a large copy.
    """
    n, size = (8192, 1 << 30) if device == "cuda" else (256, 1 << 20)
    a, b = (torch.randn(n, n, device=device, dtype=narrow(device)) for _ in "ab")
    x = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    seconds = [_each(call) for call in (lambda: torch.mm(a, b), lambda: y.copy_(x))]
    return {"operations": 2.0 * n**3 / seconds[0], "bytes": 2.0 * size / seconds[1]}


def _each(call: Callable[[], Any]) -> float:
    """Median seconds of one of `LAUNCHES` calls behind each other."""
    seconds: float = common.timed(lambda: [call() for _ in range(LAUNCHES)])["seconds"]
    return seconds / LAUNCHES


def operations(device: str, rows: int) -> dict[str, Op]:
    """Name -> an operation of SD-1.4's UNet at 512 px in float16, on so many rows."""
    half = {"device": device, "dtype": narrow(device)}
    px = 64 if device == "cuda" else 8  # side of the latents
    out: dict[str, Op] = {}
    for heads, size in ((8, 40), (10, 64)):  # SD-1.4's, and SDXL's
        q, k, v = (torch.randn(rows, heads, px * px, size, **half) for _ in range(3))
        count, moved = 4.0 * rows * heads * px**4 * size, 4.0 * q.nbytes
        call = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
        out[f"attention, head size {size}"] = (call, count, moved)
    scores = torch.randn(rows * 8, px * px, px * px, **half)
    out["softmax"] = (lambda: scores.softmax(-1), 0.0, 2.0 * scores.nbytes)
    x = torch.randn(rows, 320, px, px, **half)
    w, b = torch.ones(320, **half), torch.zeros(320, **half)
    out["group norm and SiLU"] = (lambda: F.silu(F.group_norm(x, 32, w, b)), 0.0, 2.0 * x.nbytes)
    kernel = torch.randn(320, 320, 3, 3, **half)
    count = 2.0 * rows * px * px * 320 * 320 * 9
    moved = 2.0 * x.nbytes + kernel.nbytes
    out["convolution, 3 by 3"] = (lambda: F.conv2d(x, kernel, padding=1), count, moved)
    return out


@torch.no_grad()
def near_the_limit(device: str) -> dict[str, Any]:
    """{"rows", "ceilings", "operations": name -> {"seconds", "floor", "share"}}."""
    rows = 16 if device == "cuda" else 1
    top, found = ceilings(device), {}
    for name, (call, count, moved) in operations(device, rows).items():
        floor, seconds = max(count / top["operations"], moved / top["bytes"]), _each(call)
        found[name] = {"seconds": seconds, "floor": floor, "share": floor / seconds}
    return {"rows": rows, "ceilings": top, "operations": found}


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
    with common.freed():
        common.keep(args.out, {**near_the_limit(args.device), **about})
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
