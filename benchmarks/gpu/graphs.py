"""The same images by onnxruntime on a GPU: how near, how fast, and what crosses to the device.

    python -m benchmarks.gpu.graphs [--models emoji sd14 bk-tiny] [--sizes 512]

The models are those of `benchmarks.gpu.images`, converted here. Copies are counted where arrays are
bound: a call of the UNet should move its latents there and its answer back, and the prompt's
embeddings once an image. Kinds: `fp32`, `fp16`, and `fp16 nhwc`, with the provider's prefer_nhwc.
Rows go to gpu_graphs.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import sdlite
from benchmarks.gpu import common, images

MODELS = ("emoji", "sd14", "bk-tiny")
KINDS: dict[str, dict[str, str]] = {  # kind -> options of the CUDA provider
    "fp32": {},
    "fp16": {},
    "fp16 nhwc": {"prefer_nhwc": "1"},
}


def converted(model: str, scratch: Path) -> Path:
    """The model with its graphs; "emoji" has them."""
    folder = common.folder(model, scratch)
    out = scratch / f"{model}-onnx"
    if model == "emoji":
        return folder
    if not out.exists():
        sdlite.convert(folder, out)
    return out


@contextmanager
def told(device: str, options: dict[str, str]) -> Iterator[None]:
    """Sessions that are opened while it lasts have these options of their provider too."""
    real = ort.InferenceSession

    def opened(path: str, how: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:
        [(name, own)] = providers
        return real(path, how, providers=[(name, {**own, **(options if device == "cuda" else {})})])

    ort.InferenceSession = opened
    try:
        yield
    finally:
        ort.InferenceSession = real


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Arrays and bytes that are bound for the device while it lasts."""
    seen: Counter[str] = Counter()
    real = ort.OrtValue.ortvalue_from_numpy

    def counting(array: Any, *where: Any) -> Any:
        seen["arrays"] += 1
        seen["bytes"] += array.nbytes
        return real(array, *where)

    ort.OrtValue.ortvalue_from_numpy = staticmethod(counting)
    try:
        yield seen
    finally:
        ort.OrtValue.ortvalue_from_numpy = staticmethod(real)


def arguments(size: int) -> dict[str, Any]:
    """Of the call whose image is compared, and which is timed."""
    call = {"seed": images.SEED, "num_inference_steps": images.STEPS}
    return call | {"height": size, "width": size, "output_type": "np"}


@lru_cache
def right(folder: Path, size: int) -> np.ndarray:
    """The CPU's image in float32."""
    with images.opened(folder, "cpu", precision="fp32") as pipe:
        image: np.ndarray = pipe(images.PROMPT, **arguments(size)).images[0]
    return image


def measure(folder: Path, device: str, kind: str, size: int, batch: int) -> dict[str, Any]:
    call = arguments(size)
    how = {"precision": kind.partition(" ")[0], "backend": "onnxruntime", "device": device}
    with told(device, KINDS[kind]), sdlite.Pipeline.from_pretrained(folder, **how) as pipe:
        pipe.max_pixels = None
        near = common.psnr(pipe(images.PROMPT, **call).images[0], right(folder, size))
        with counted() as crossed:
            pipe(images.PROMPT, **call)
        prompts = [images.PROMPT] * batch
        found = common.timed(lambda: pipe(prompts, **call))
        providers = pipe.networks.parts["unet"].inner.session.get_providers()  # type: ignore[attr-defined]
    return {"psnr_to_cpu_fp32": near, "crossed": dict(crossed), "providers": providers, **found}


def main() -> int:
    ap = common.arguments(__doc__ or "", "graphs")
    ap.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    ap.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    ap.add_argument("--sizes", nargs="+", type=int, default=[512], metavar="PX")
    ap.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    args = ap.parse_args()
    budget, about = common.Budget(args.minutes), common.about(args.device)
    for model in args.models:
        if not budget.allows(model, 90):
            continue
        folder = converted(model, args.scratch)
        for kind in args.kinds:
            for size in [64] if model == "emoji" else args.sizes:
                for batch in args.batches:
                    name = f"{model} {kind} {size} px batch {batch}"
                    if not budget.allows(name, 45):
                        continue
                    row = {"model": model, "kind": kind, "size_px": size, "batch": batch}
                    try:
                        with common.freed():
                            found = measure(folder, args.device, kind, size, batch)
                    except Exception as e:  # a kind that fails is a row
                        found = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
                    common.keep(args.out, {**row, "steps": images.STEPS, **found, **about})
    if budget.left_out:
        print("no time was left for:", "; ".join(budget.left_out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
