"""Threads that share a pipeline: is each image, bit by bit, the one that its call gives alone?

    python -m benchmarks.threads [--calls 10000] [--only torch]

For every backend the embedded student's calls are made one after the other by one pipeline, then by
2, 8 and 32 threads on another, whose first calls they are (so that networks are compiled by many at
once). Calls differ in prompt, seed, size, steps, sampler, guidance and number of images. Rows go to
benchmarks/results/threads.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.env import environment

RESULTS = Path(__file__).parent / "results" / "threads.jsonl"
THREADS = (2, 8, 32)
PROMPTS = (
    "a red apple on a blue background",
    "a green frog",
    "pizza",
    "a yellow taxi",
    "ghost",
    "a fox",
    "a purple heart",
    "sushi",
)
SAMPLERS = ("ddim", "euler", "dpm++2m", "euler-ancestral", "lcm", "unipc")
SIZES = (
    (64, 64),
    (96, 64),
    (64, 96),
)  # with 1 or 2 rows: 6 shapes, and OpenVINO keeps 8 compiled graphs


@dataclass(frozen=True)
class Case:
    """A pipeline: how its folder comes from the embedded student, and what it is loaded with.
    `fixed`: of one size and one image.
    """

    name: str
    make: Callable[[Path], Any] | None
    load: dict[str, Any]
    fixed: bool = False


def _export(target: str) -> Callable[[Path], Any]:
    def make(out: Path) -> Any:
        import sdlite

        return sdlite.export(
            "emoji", out, target=target, prompts=[PROMPTS[0]], num_inference_steps=1, threads=1
        )

    return make


def _quantized(precision: str) -> Callable[[Path], Any]:
    def make(out: Path) -> Any:
        import sdlite
        from sdlite.quant import Calibration, Gate

        gate = Gate(
            prompts=PROMPTS[:2],
            seeds=(0,),
            num_inference_steps=3,
            psnr_mean=20,
            psnr_worst=15,
            ssim_mean=0.5,
            engines=["onnxruntime"],
        )
        calibration = Calibration(prompts=PROMPTS, samples=4, num_inference_steps=3)
        return sdlite.quantize(
            "emoji", precision, out=out, calibration=calibration, gate=gate, threads=1
        )

    return make


CASES = (
    Case("onnxruntime fp16", None, {"backend": "onnxruntime"}),
    Case("onnxruntime int8-dynamic", _quantized("int8-dynamic"), {"backend": "onnxruntime"}),
    Case("onnxruntime int8-static", _quantized("int8-static"), {"backend": "onnxruntime"}),
    Case("onnxruntime fused export", _export("onnx-fused"), {"backend": "onnxruntime"}, fixed=True),
    Case("onnxruntime fixed export", _export("onnx-fixed"), {"backend": "onnxruntime"}, fixed=True),
    Case("openvino fp32", None, {"backend": "openvino", "precision": "fp32"}),
    Case("openvino fp16", None, {"backend": "openvino", "precision": "fp16"}),
    Case("openvino int8-static", _quantized("int8-static"), {"backend": "openvino"}),
    Case("openvino export", _export("openvino"), {"backend": "openvino"}, fixed=True),
    Case("torch fp32", None, {"backend": "torch", "precision": "fp32"}),
    Case("torch int8-dynamic", None, {"backend": "torch", "precision": "int8-dynamic"}),
)


def calls(case: Case, count: int) -> list[dict[str, Any]]:
    """Arguments of `count` calls of the pipeline, no two alike."""
    out = []
    for i, prompt, sampler, (tall, wide) in zip(
        range(count), *map(itertools.cycle, (PROMPTS, SAMPLERS, SIZES)), strict=False
    ):
        images = 1 if case.fixed or i % 5 == 4 else 1 + i % 7 % 2
        size = {} if case.fixed else {"height": tall, "width": wide}
        guided = {"guidance_scale": 2.0, "negative_prompt": "blurry"} if i % 5 == 4 else {}
        call = {
            "num_inference_steps": 1 + i % 2,
            "seed": i,
            "sampler": sampler,
            "num_images_per_prompt": images,
            **size,
            **guided,
        }
        out.append({"prompt": prompt, **call})
    return out


def digest(pipe: Any, call: dict[str, Any]) -> str:
    """SHA-256 of the call's pixels, or the error."""
    try:
        return hashlib.sha256(b"".join(i.tobytes() for i in pipe(**call).images)).hexdigest()
    except Exception as e:  # counted, not raised: other threads go on
        return f"{type(e).__name__}: {e}"


def compare(
    pipe: Any, wanted: Sequence[tuple[dict[str, Any], str]], threads: int, count: int
) -> dict[str, Any]:
    """`count` calls by `threads` threads, over and over through `wanted`, its calls in another
    order for each thread.
    """
    jobs = [wanted[(i * (1 + 2 * (i % threads))) % len(wanted)] for i in range(count)]
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        got = list(pool.map(lambda job: digest(pipe, job[0]), jobs))
    errors = [g for g in got if len(g) != 64]
    wrong = sum(g != want for g, (_, want) in zip(got, jobs, strict=True)) - len(errors)
    seconds = time.perf_counter() - start
    return {
        "threads": threads,
        "calls": count,
        "wrong": wrong,
        "errors": len(errors),
        "first_error": (errors or [None])[0],
        "seconds": seconds,
    }


def run(
    case: Case, folder: Path, count: int, distinct: int = 48, threads: Sequence[int] = THREADS
) -> list[dict[str, Any]]:
    """A row for each number of threads; together `count` calls. `folder` is made where the case
    needs one and it is not there.
    """
    import sdlite

    if case.make is not None and not folder.exists():
        case.make(folder)
    model = "emoji" if case.make is None else folder
    with sdlite.Pipeline.from_pretrained(model, threads=1, **case.load) as alone:
        wanted = [(c, digest(alone, c)) for c in calls(case, distinct)]
    if failed := [w for _, w in wanted if len(w) != 64]:
        raise RuntimeError(f"{case.name}: {failed[0]}")
    rows = []
    for number in threads:
        with sdlite.Pipeline.from_pretrained(model, threads=1, **case.load) as shared:
            rows.append(
                {
                    "case": case.name,
                    "distinct": distinct,
                    **compare(shared, wanted, number, -(-count // len(threads))),
                }
            )
    return rows


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument(
        "--calls", type=int, default=10_000, help="of each backend, shared by its cases"
    )
    ap.add_argument("--only", help="cases whose name holds this")
    args = ap.parse_args()
    warnings.simplefilter("ignore")
    wrong = 0
    with tempfile.TemporaryDirectory() as root:
        for case in CASES:
            if args.only and args.only not in case.name:
                continue
            alike = sum(c.load["backend"] == case.load["backend"] for c in CASES)
            for row in run(case, Path(root) / case.name.replace(" ", "-"), -(-args.calls // alike)):
                wrong += row["wrong"] + row["errors"]
                with open(RESULTS, "a", encoding="utf-8") as f:
                    f.write(json.dumps({**row, **environment()}) + "\n")
                print(json.dumps(row), flush=True)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
