"""The published models in int8 on every engine, against diffusers' images of the same folder.

    python -m benchmarks.published_int8 [MODEL ...]

The narrow models and calls of `benchmarks.published`: each is converted and quantized with
`sdlite.quantize` (scheme u8s7, SAMPLES calibration images of other prompts, a gate that lets
everything pass), and torch quantizes the float folder by itself. A row a model in
benchmarks/results/published_int8.jsonl: `runs` has the least PSNR of the images to diffusers' in
float32, dB, or the words of a refusal; `networks` the SQNR of each network on the float model's own
inputs, dB; `apart` the least PSNR between the images of onnxruntime and of OpenVINO in float32, of
one int8-static graph. One process a model.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import published_models
from benchmarks.cases import Case
from benchmarks.env import environment
from benchmarks.peers import NARROW, model_folder, plain_folder
from benchmarks.published import PROMPTS, SIZE, THREADS, Run, diffusers_images, psnr, sdlite_images
from sdlite.errors import SdliteError

RESULTS = Path(__file__).parent / "results" / "published_int8.jsonl"
SHOWN = ["a wooden boat on a lake", "a blue door", "portrait of an old man", "city at night, rain"]
SAMPLES = 4
RUNS = (
    Run("onnxruntime", "int8-dynamic"),
    Run("torch", "int8-dynamic"),
    Run("openvino", "int8-dynamic"),
    Run("onnxruntime", "int8-static"),
    Run("openvino", "int8-static", "float32"),
    Run("openvino", "int8-static"),
    Run("torch", "int8-static"),
)
PRECISIONS = ("int8-dynamic", "int8-static")
VERSIONS = ("onnxruntime", "openvino", "torch", "torchao", "diffusers")


def quantized(floats: Path, name: str, precision: str, out: Path) -> dict[str, dict[str, float]]:
    """`floats` in int8 at `out`; SQNR of its networks, dB, by engine. A network that stays as it is
    (int8-dynamic has convolutions in float) is left out.
    """
    import sdlite
    from sdlite.quant import Calibration, Gate

    model = published_models.MODELS[name]
    call: dict[str, Any] = {
        "num_inference_steps": model.steps,
        "guidance_scale": model.guidance,
        "size": (SIZE, SIZE),
    }
    engines = ["onnxruntime", *(["openvino"] if precision == "int8-static" else [])]
    gate = Gate(
        psnr_mean=0,
        psnr_worst=0,
        ssim_mean=-1,
        prompts=PROMPTS[:1],
        seeds=(0,),
        engines=engines,
        **call,
    )
    sdlite.quantize(
        floats,
        precision,
        out=out,
        gate=gate,
        calibration=Calibration(prompts=SHOWN, samples=SAMPLES, **call),
        threads=THREADS,
    )
    found = json.loads((out / "sdlite.json").read_text())["quality"]["engines"]
    return {e: {p: round(v, 1) for p, v in found[e]["networks"].items() if v} for e in engines}


def measure(name: str, scratch: Path, cache: Path) -> dict[str, Any]:
    """A row: {"runs", "networks", "apart", "minutes"}, or {"refused": words}; the float model is
    kept in `cache`.
    """
    start, runs = time.perf_counter(), dict[str, float | str]()
    case = Case(NARROW + name, "sdlite-ort", 4, SIZE)
    folder = plain_folder(case, cache)
    try:
        floats = model_folder(case, cache)
    except SdliteError as e:
        words = str(e).replace(str(folder), name).replace(folder.name, name)
        return {"refused": words}
    networks = {p: quantized(floats, name, p, scratch / p) for p in PRECISIONS}
    wanted = diffusers_images(folder, name, PROMPTS)
    made: dict[str, np.ndarray] = {}
    for run in RUNS:
        source = folder if run.backend == "torch" else scratch / run.precision
        try:
            made[str(run)] = sdlite_images(source, name, PROMPTS, run)
        except SdliteError as e:
            runs[str(run)] = f"refused: {str(e).replace(str(source), name)}"
            continue
        runs[str(run)] = least(made[str(run)], wanted)
    static, same = (str(r) for r in RUNS[3:5])
    return {
        "runs": runs,
        "networks": networks,
        "apart": least(made[static], made[same]),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }


def least(a: np.ndarray, b: np.ndarray) -> float:
    """The least PSNR of pairs of images, dB."""
    return round(min(psnr(x, y) for x, y in zip(a, b, strict=True)), 1)


def row(name: str, cache: Path) -> dict[str, Any]:
    """A model's row, made in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.published_int8"]
    done = subprocess.run(
        [*command, "--worker", name, "--cache", str(cache)], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = published_models.MODELS
    ap.add_argument("models", nargs="*", metavar="MODEL", help=f"default: all; {', '.join(known)}")
    ap.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sdlite-bench")
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--worker", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.worker:
        logging.disable(logging.WARNING)
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(measure(args.worker, Path(scratch), args.cache)))
        return
    about = environment()
    versions = {k: v for k, v in about["versions"].items() if k in VERSIONS}
    about = {k: about[k] for k in ("date", "commit", "dirty", "cpu")} | {"versions": versions}
    for name in args.models or known:
        found = row(name, args.cache)
        with args.out.open("a") as f:
            f.write(json.dumps({"model": name, **found, **about}) + "\n")
        print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
