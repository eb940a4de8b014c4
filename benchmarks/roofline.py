"""What this CPU can do at most, and what each network asks of it: the limit that every speed row is
held against.

    python -m benchmarks.roofline [--threads 2] [--seconds 2] [--out \
        benchmarks/results/roofline.jsonl]

Peaks: operations per second (a multiply and an add are two) of large matrix products and 3x3
    convolutions in float32 and bfloat16 (torch, which is oneDNN) and int8 (OpenVINO, u8 activations
    and s8 weights with float32 results), the best of all samples. Demand: operations of each
    network by torch's flop counter on tensors without memory. The report divides: a row's limit is
    convolution operations over the convolution peak plus matrix operations over the matrix peak,
    both of the row's arithmetic; norms, softmax and memory traffic are not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.env import environment
from benchmarks.shapes import SHAPES, build_text_encoder, build_unet, build_vae

RESULTS = Path(__file__).parent / "results" / "roofline.jsonl"
DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Product:
    """A matrix product (rows, inner) x (inner, columns)."""

    rows: int
    inner: int
    columns: int
    op: str = "matmul"

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution of `channels` to `channels` on a `side` x `side` picture, padded."""

    channels: int
    side: int
    op: str = "conv"

    @property
    def operations(self) -> int:
        return 2 * 9 * self.channels**2 * self.side**2


WORK: tuple[Product | Convolution, ...] = (
    Product(1024, 1024, 1024),
    Product(2048, 2048, 2048),
    Product(4096, 1280, 1280),
    Convolution(320, 64),
    Convolution(640, 32),
    Convolution(512, 64),
    Convolution(256, 128),
)


def torch_call(work: Product | Convolution, dtype: str) -> Callable[[], Any]:
    import torch

    kind = getattr(torch, dtype)
    if isinstance(work, Product):
        a, b = (
            torch.randn(work.rows, work.inner).to(kind),
            torch.randn(work.inner, work.columns).to(kind),
        )
        return lambda: a @ b
    conv = (
        torch.nn.Conv2d(work.channels, work.channels, 3, padding=1)
        .to(kind)
        .to(memory_format=torch.channels_last)
        .requires_grad_(False)
    )
    x = (
        torch.randn(1, work.channels, work.side, work.side)
        .to(kind)
        .to(memory_format=torch.channels_last)
    )
    return lambda: conv(x)


def openvino_call(work: Product | Convolution, threads: int) -> Callable[[], Any]:
    """The layer between FakeQuantize nodes, which OpenVINO turns into its int8 kernel."""
    import openvino as ov
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    product = isinstance(work, Product)
    shape = [work.rows, work.inner] if product else [1, work.channels, work.side, work.side]
    weight = rng.standard_normal(
        (work.columns, work.inner) if product else (work.channels, work.channels, 3, 3)
    ).astype(np.float32)
    x = ops.parameter(shape, np.float32)
    a = ops.fake_quantize(x, *(np.float32(v) for v in (-2, 2, -2, 2)), levels=256)
    w = ops.fake_quantize(
        ops.constant(weight), *(np.float32(v) for v in (-4, 4, -4, 4)), levels=255
    )
    y = (
        ops.matmul(a, w, False, True)
        if product
        else ops.convolution(a, w, [1, 1], [1, 1], [1, 1], [1, 1])
    )
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = ov.Core().compile_model(ov.Model([y], [x]), "CPU", options)
    kinds = {
        str(n.get_rt_info()["runtimePrecision"].astype(str))
        for n in compiled.get_runtime_model().get_ops()
    }
    if not kinds & {"u8", "i8"}:
        raise RuntimeError(f"openvino runs this layer in {sorted(kinds)}, not in int8")
    request, data = (
        compiled.create_infer_request(),
        {0: rng.standard_normal(shape).astype(np.float32)},
    )
    return lambda: request.infer(data, share_inputs=True, share_outputs=True)


def sample(call: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call after two for warmth, for about `seconds`, at least three."""
    call(), call()
    out: list[float] = []
    begin = time.perf_counter()
    while len(out) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        out.append(time.perf_counter() - start)
    return out


def peak(work: Product | Convolution, dtype: str, threads: int, seconds: float) -> dict[str, Any]:
    call = openvino_call(work, threads) if dtype == "int8" else torch_call(work, dtype)
    samples = sample(call, seconds)
    return {
        "kind": "peak",
        "op": work.op,
        "dtype": dtype,
        "threads": threads,
        "work": {k: v for k, v in vars(work).items() if k != "op"},
        "gops": work.operations / min(samples) / 1e9,
        "median_gops": work.operations / float(np.median(samples)) / 1e9,
        "samples_seconds": samples,
    }


def demand(shape: str, size_px: int) -> list[dict[str, Any]]:
    """Operations of one call (batch 1) of each network of a shape: {part, conv, matmul}; attention
    counts as matmul.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    side = size_px // 8
    sliced = (SHAPES[shape].preset or "") in (
        "w0.62",
        "extreme-120m",
    )  # slicing reads the teacher's weights
    unet = build_unet(shape).to("meta").eval() if sliced else None
    with torch.device("meta"):
        unet = unet or build_unet(shape).eval()
        vae, text = build_vae(shape).eval(), build_text_encoder(shape).eval()
        latents, embeds = (
            torch.empty(1, 4, side, side),
            torch.empty(1, 77, unet.config.cross_attention_dim),
        )
        calls = {
            "text_encoder": lambda: text(torch.zeros(1, 77, dtype=torch.int64)),
            "unet": lambda: unet(latents, torch.tensor(500.0), embeds),
            "vae_decoder": lambda: vae.decode(latents),
        }
        out = []
        for part, call in calls.items():
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                call()
            counts = counter.get_flop_counts()["Global"]
            conv = sum(v for k, v in counts.items() if "convolution" in str(k))
            row = {
                "kind": "demand",
                "shape": shape,
                "size_px": size_px,
                "part": part,
                "conv": conv,
                "matmul": sum(counts.values()) - conv,
            }
            out.append(row)
    return out


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("--threads", type=int, nargs="+", default=[2])
    ap.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    ap.add_argument(
        "--demand-only", action="store_true", help="no measuring: operations of the networks"
    )
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    about = {**environment(), "command": "python -m benchmarks.roofline " + " ".join(sys.argv[1:])}
    sizes = [(s, 512) for s, v in SHAPES.items() if not v.mini] + [
        ("bk-tiny", px) for px in (256, 768, 1024)
    ]
    rows = [d for s, px in sizes for d in demand(s, px)]
    if not args.demand_only:
        import torch

        for threads in args.threads:
            torch.set_num_threads(threads)
            with torch.no_grad():
                for dtype in DTYPES:
                    for work in WORK:
                        try:
                            rows.append(peak(work, dtype, threads, args.seconds))
                            print(f"{dtype} {work}: {rows[-1]['gops']:.0f} GOPS", flush=True)
                        except (RuntimeError, ModuleNotFoundError) as e:
                            rows.append(
                                {
                                    "kind": "peak",
                                    "op": work.op,
                                    "dtype": dtype,
                                    "threads": threads,
                                    "error": str(e).splitlines()[0][:300],
                                }
                            )
                            print(f"{dtype} {work} failed: {rows[-1]['error']}")
    with open(args.out, "a") as f:
        f.writelines(json.dumps({**r, **about}) + "\n" for r in rows)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
