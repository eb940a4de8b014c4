"""The published models on every export target: how near the export is, or the words of the refusal.

    python -m benchmarks.targets [MODEL ...] [--targets onnx web ...]

The models are narrow ones of `benchmarks.published_models` (published configs and layouts, random
weights), exported by each target's built-in profile with its own quality check: one image of 128 px
in two steps (one where the model is made for one; `qnn`: 64 px and one step, for the simulator
takes minutes) and an edit of it, against the model's own on onnxruntime in float32. `sampler`: what
the target asked for in place of the model's. One process an export; a row a model and run in
benchmarks/results/targets.jsonl, of which a later one replaces a cell.
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

from benchmarks.cases import Case
from benchmarks.env import environment
from benchmarks.export import sized
from benchmarks.peers import NARROW, model_folder
from benchmarks.published_models import MODELS
from sdlite.errors import ExportError, SdliteError

RESULTS = Path(__file__).parent / "results" / "targets.jsonl"
TARGETS = ("onnx", "openvino", "tensorrt-rtx", "web", "ncnn", "mnn", "coreml", "executorch", "qnn")
LAYOUTS = (
    "sd14",
    "sd21",
    "sd-turbo",
    "bk-sdm-v2-tiny",
    "sdxs-dreamshaper",
    "sd14-taesd",
    "lcm-dreamshaper",
    "sd-inpainting",
    "vega",
    "vega-fp16-vae",
)
SIZE, STEPS = 128, 2
SIMULATED = {"qnn": (64, 1)}  # size and steps of a target whose runtime is simulated
PROMPTS = ["a red fox in snow!"]
Cell = dict[str, Any]


def cell(folder: Path, name: str, target: str, sampler: str | None, scratch: Path) -> Cell:
    """One export, in short.

    Returns:
        {"psnr", "sqnr": least of the images (an edit among them) and of the networks, dB; "run":
        whether the target's runtime ran}, {"refused": words}, or {"failed": words} with the figures
        that a failed quality check has.
    """
    out, start = scratch / "out", time.perf_counter()
    try:
        report = exported(folder, name, target, sampler, out, scratch)
    except ExportError as e:
        kept = out.with_name("out.failed") / "export-report.json"
        figures = shown(json.loads(kept.read_text())) if kept.exists() else {}
        return {**figures, "failed": told(e, scratch, folder, name)}
    except SdliteError as e:
        return {"refused": told(e, scratch, folder, name)}
    return {**shown(report), "s": round(time.perf_counter() - start)}


def exported(
    folder: Path, name: str, target: str, sampler: str | None, out: Path, scratch: Path
) -> dict[str, Any]:
    """The report of an export that passed its quality check."""
    from sdlite.exporters.export import export

    size, steps = SIMULATED.get(target, (SIZE, STEPS))
    return dict(
        export(
            folder,
            out,
            target=sized(target, size, scratch),
            prompts=PROMPTS,
            num_inference_steps=min(steps, MODELS[name].steps),
            sampler=sampler,
            threads=2,
        )
    )


def shown(report: dict[str, Any]) -> Cell:
    """What the table says of a report."""
    parity = report["parity"]
    images = [*(parity["psnr"] or []), *(parity.get("edit") or [])]
    networks = parity["networks"].values()
    return {
        "psnr": round(min(images), 1),
        "sqnr": round(min(n["sqnr"] for n in networks), 1),
        "run": not report["not_run"],
    }


def told(e: Exception, scratch: Path, folder: Path, name: str) -> str:
    """An error's words without the places of this run."""
    words = str(e).split(" No model was written")[0]
    plain = folder.name.removesuffix("-onnx")
    for path, short in ((scratch, "DIR"), (folder, name), (folder.name, name), (plain, name)):
        words = words.replace(str(path), str(short))
    return " ".join(words.split())[:600]


def worker(job: dict[str, Any]) -> Cell:
    """A cell; a target that asks for another sampler gets it."""
    folder = Path(job["folder"])
    with tempfile.TemporaryDirectory() as tmp:
        found = cell(folder, job["model"], job["target"], None, Path(tmp))
    if "--sampler ddim" not in found.get("refused", ""):
        return found
    with tempfile.TemporaryDirectory() as tmp:
        return {"sampler": "ddim"} | cell(folder, job["model"], job["target"], "ddim", Path(tmp))


def measured(name: str, folder: Path, target: str) -> Cell:
    """A cell, in a process of its own."""
    job = json.dumps({"model": name, "folder": str(folder), "target": target})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.targets", "--worker", job],
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:  # a fault of ours, and a row of the table
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"fault": f"exit {done.returncode}: {said[:300]}"}
    found: Cell = json.loads(lines[-1])
    return found


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {', '.join(LAYOUTS)}")
    ap.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    ap.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sdlite-bench")
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--worker", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.worker:
        logging.disable(logging.WARNING)
        print(json.dumps(worker(json.loads(args.worker))))
        return
    about = environment()
    about = {k: about[k] for k in ("date", "commit", "dirty", "cpu")}
    for name in args.models or LAYOUTS:
        folder = model_folder(Case(NARROW + name, "sdlite-ort", STEPS, SIZE), args.cache)
        found = {}
        for target in args.targets:
            found[target] = measured(name, folder, target)
            print(name, target, json.dumps(found[target]), flush=True)
        with args.out.open("a") as f:
            f.write(json.dumps({"model": name, "targets": found, **about}) + "\n")


if __name__ == "__main__":
    main()
