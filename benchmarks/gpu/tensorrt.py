"""TensorRT's engines on a GPU: seconds to build, bytes, images, and seconds against torch.

    python -m benchmarks.gpu.tensorrt [--models emoji bk-tiny sd14] [--kinds fp16 bf16 int8]

The models are those of `benchmarks.gpu.graphs`; int8 is quantized here for TensorRT (s8s8). Engines
are made by `sdlite export` with the built-in profile of each kind, without its gate, and run by
sdlite's own runner. A library that is not installed is a row that says so. Rows go to
gpu_tensorrt.jsonl: `build_seconds` by network, `bytes` of the engines, `psnr_to_source` (one step,
of the export's own check), `psnr_to_cpu_fp32` (four steps; of an int8 engine to the float model),
and `torch_seconds`: the torch backend in float16 in the same process.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sdlite
from benchmarks.gpu import common, graphs, images
from sdlite.exporters import profile, targets
from sdlite.exporters.export import export
from sdlite.exporters.targets.base import NotRunnable
from sdlite.exporters.targets.tensorrt import TensorRT
from sdlite.instrument import with_networks
from sdlite.quant import Calibration, Gate

MODELS = ("emoji", "bk-tiny", "sd14")
LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # target -> its module
PROFILES = {
    ("tensorrt", "fp16"): "tensorrt",
    ("tensorrt", "bf16"): "tensorrt-bf16",
    ("tensorrt", "int8"): "tensorrt-int8",
    ("tensorrt-rtx", "fp16"): "tensorrt-rtx-fp16",
    ("tensorrt-rtx", "bf16"): "tensorrt-rtx-bf16",
    ("tensorrt-rtx", "int8"): "tensorrt-rtx-int8",
}
KINDS = ("fp16", "bf16", "int8")
SECONDS = {"fp16": 90, "bf16": 90, "int8": 180}  # that a row may take
OWN = 64  # px of the embedded student


def library(target: str) -> dict[str, str]:
    """Version of a target's library, or that it is missing."""
    if importlib.util.find_spec(LIBRARIES[target]) is None:
        return {"library": target, "missing": f"{target} is not installed"}
    [package] = targets.of(profile.load(PROFILES[target, "fp16"])).packages
    return {"library": target, "library_version": importlib.metadata.version(package)}


def written(name: str, size: int, rows: int, out: Path) -> Path:
    """A built-in profile for this size and up to so many rows of the UNet, without its gate: what
    does not hold is a figure here.
    """
    text = (profile.assets() / "profiles" / f"{name}.toml").read_text()
    text = re.sub(r"\[gate\][^\[]*", "[gate]\n\n", text)
    text = re.sub(r"(?m)^max = \d+$", f"max = {rows}", text)
    out.write_text(f"height = {size}\nwidth = {size}\n{text}")
    return out


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """part -> seconds of its build, of the exports that are made while it lasts."""
    spent: dict[str, float] = {}
    real = TensorRT.convert

    def convert(self: TensorRT, part: str, graph: Path, out: Path) -> list[Path]:
        begin = time.perf_counter()
        files = real(self, part, graph, out)
        spent[part] = time.perf_counter() - begin
        return files

    TensorRT.convert = convert  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        TensorRT.convert = real  # type: ignore[method-assign]


def quantized(model: str, folder: Path, scratch: Path) -> Path:
    """The model in int8 for TensorRT; shapes are calibrated at 256 px, on one image of two
    steps.
    """
    out = scratch / f"{model}-s8s8"
    if not out.exists():
        small = model != "emoji"
        call: dict[str, Any] = {"num_inference_steps": 2, "size": (256, 256)} if small else {}
        shown = Calibration(prompts=[images.PROMPT] if small else None, samples=1, **call)
        free = {"psnr_mean": 0.0, "psnr_worst": 0.0, "ssim_mean": -1.0, "max_float": 0}
        gate = Gate(**free, num_prompts=1, seeds=(0,), engines=["onnxruntime"], **call)
        if small:
            gate.prompts = [images.PROMPT]
        sdlite.quantize(folder, "int8-static", out=out, scheme="s8s8", calibration=shown, gate=gate)
    return out


@contextmanager
def opened(out: Path, target: str, source: Path, device: str) -> Iterator[sdlite.Pipeline]:
    """The pipeline of an export: by its backend, or the source's with the target's networks.

    Raises:
        NotRunnable: this machine does not run them.
    """
    with ExitStack() as stack:
        if targets.of(profile.load(target)).opened_by:
            pipe = sdlite.Pipeline.from_pretrained(out, backend="tensorrt", device=device)
        else:
            own = sdlite.Pipeline.from_pretrained(source, backend="onnxruntime")
            made_for = targets.of(profile.load(target))
            made_for.specs = {p: own.artifact.spec(p) for p in own.networks.parts}
            parts = {p: made_for.run(p, [out / p / "model.engine"], None) for p in made_for.specs}
            for network in parts.values():
                stack.callback(getattr(network, "close", lambda: None))
            pipe = with_networks(own, parts)
        pipe.max_pixels = None
        yield stack.enter_context(pipe)


def exported(
    source: Path, target: str, kind: str, size: int, rows: int, out: Path
) -> dict[str, Any]:
    """Make the engines at `out`; what the export says of them."""
    given = written(PROFILES[target, kind], size, rows, out.with_suffix(".toml"))
    with clocked() as spent:
        report = export(source, out, target=given, prompts=[images.PROMPT], num_inference_steps=1)
    psnr = report["parity"]["psnr"]
    return {
        "build_seconds": spent,
        "export_seconds": report["seconds"],
        "bytes": sum(f["bytes"] for f in report["files"].values()),
        "psnr_to_source": psnr and min(psnr),
        "networks": report["parity"]["networks"],
        "checked_by": report["checked_by"],
        "not_run": next(iter(report["not_run"].values()), None),
        "tools": report["tools"],
    }


def timed(
    args: argparse.Namespace, folder: Path, source: Path, target: str, size: int, out: Path
) -> dict[str, Any]:
    """Images and seconds of the engines at `out`, and of torch; "not_run" where they do not run."""
    call = graphs.arguments(size)
    found: dict[str, Any] = {}
    try:
        with common.freed(), opened(out, target, source, args.device) as pipe:
            image = pipe(images.PROMPT, **call).images[0]
            found["psnr_to_cpu_fp32"] = common.psnr(image, graphs.right(folder, size))
            for batch in args.batches:
                prompts = [images.PROMPT] * batch
                found[f"batch_{batch}"] = common.timed(lambda p=prompts: pipe(p, **call))
    except NotRunnable as e:
        return {"not_run": str(e)}
    with common.freed():
        torch_call = images.ours(folder, args.device, "fp16")
        for batch in args.batches:
            clock = common.timed(lambda b=batch: torch_call(size, b))
            found[f"batch_{batch}"] |= {
                "torch_seconds": clock["seconds"],
                "torch_spread": clock["spread"],
                "torch_peak_mib": clock["peak_mib"],
            }
    return found


def measure(args: argparse.Namespace, model: str, target: str, kind: str) -> dict[str, Any]:
    """One row: engines of a model, built and run."""
    args.scratch.mkdir(parents=True, exist_ok=True)
    folder = graphs.converted(model, args.scratch)
    size = OWN if model == "emoji" else args.size
    source = quantized(model, folder, args.scratch) if kind == "int8" else folder
    out = args.scratch / f"{model}-{target}-{kind}-{size}"
    shutil.rmtree(out, ignore_errors=True)
    # a guided call has two rows
    found = exported(source, target, kind, size, 2 * max(args.batches), out)
    found |= timed(args, folder, source, target, size, out)
    shutil.rmtree(out)
    return {"size_px": size, **found}


def main() -> int:
    ap = common.arguments(__doc__ or "", "tensorrt")
    ap.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    ap.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    ap.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    ap.add_argument("--size", type=int, default=512, metavar="PX")
    ap.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    args = ap.parse_args()
    budget, about = common.Budget(args.minutes), common.about(args.device)
    for target in args.libraries:
        known = library(target)
        if "missing" in known:
            common.keep(args.out, {**known, **about})
            continue
        for model in args.models:
            for kind in args.kinds:
                if not budget.allows(f"{target} {model} {kind}", SECONDS[kind]):
                    continue
                row = {**known, "model": model, "kind": kind, "steps": images.STEPS}
                try:
                    found = measure(args, model, target, kind)
                except Exception as e:  # a kind that fails is a row
                    found = {"error": f"{type(e).__name__}: {str(e)[:600]}"}
                common.keep(args.out, {**row, **found, **about})
    if budget.left_out:
        print("no time was left for:", "; ".join(budget.left_out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
