"""The same images by onnxruntime on a GPU: how near, how fast, and what crosses to the device.

    python -m benchmarks.gpu.graphs [--models emoji sd14 bk-tiny] [--sizes 512]

The models are those of `benchmarks.gpu.images`, converted here. Copies are counted where arrays are
bound: a call of the UNet should move its latents there and its answer back, and the prompt's
embeddings once an image. Rows go to gpu_graphs.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime as ort

import sdlite
from benchmarks.gpu import common, images

MODELS = ("emoji", "sd14", "bk-tiny")
KINDS = ("fp32", "fp16")


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


def measure(folder: Path, device: str, kind: str, size: int, batch: int) -> dict[str, Any]:
    call = {"seed": images.SEED, "num_inference_steps": images.STEPS}
    call |= {"height": size, "width": size, "output_type": "np"}
    with images.opened(folder, "cpu", precision="fp32") as pipe:
        right = pipe(images.PROMPT, **call).images[0]
    how = {"precision": kind, "backend": "onnxruntime", "device": device}
    with sdlite.Pipeline.from_pretrained(folder, **how) as pipe:
        pipe.max_pixels = None
        near = common.psnr(pipe(images.PROMPT, **call).images[0], right)
        with counted() as crossed:
            pipe(images.PROMPT, **call)
        prompts = [images.PROMPT] * batch
        found = common.timed(lambda: pipe(prompts, **call))
        providers = pipe.networks.parts["unet"].inner.session.get_providers()  # type: ignore[attr-defined]
    return {"psnr_to_cpu_fp32": near, "crossed": dict(crossed), "providers": providers, **found}


def main() -> int:
    ap = common.arguments(__doc__ or "", "graphs")
    ap.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    ap.add_argument("--sizes", nargs="+", type=int, default=[512], metavar="PX")
    ap.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    args = ap.parse_args()
    budget, about = common.Budget(args.minutes), common.about(args.device)
    for model in args.models:
        if not budget.allows(model, 90):
            continue
        folder = converted(model, args.scratch)
        for kind in KINDS:
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
