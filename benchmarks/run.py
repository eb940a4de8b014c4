"""Speed and memory, sdlite against its peers on the same weights.

    python -m benchmarks.run emoji bk-tiny-256 [--rounds 2] [--out benchmarks/results/speed.jsonl]

Every case is its own process (so peak memory and cold start are its own) and rounds interleave the cases. A row has load seconds, first
call, all raw samples of the steady state, seconds per stage, peak memory, and a hash-free check: PSNR of its picture to the first
engine's at equal latents. A case that fails is a row with `error`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import SUITES, Case
from benchmarks.env import environment
from sdlite.artifact import sha256

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
PROMPT = "red apple on a blue background"


def model_folder(case: Case, cache: Path) -> Path:
    """The case's artefact; random-weight shapes are written and converted once into `cache`."""
    if not case.model.startswith("shape:"):
        from sdlite.hub import resolve

        return resolve(case.model)
    shape = case.model.removeprefix("shape:")
    out = cache / f"{shape}-onnx"
    if not (out / "sdlite.json").exists():
        from benchmarks.shapes import write_sd_folder
        from sdlite.exporters.onnx import convert

        plain = cache / shape
        if not (plain / "model_index.json").exists():
            write_sd_folder(shape, plain)
        convert(plain, out, sampler={"name": "ddim", "num_inference_steps": 4, "guidance_scale": 1.0})
    return out


Call = Callable[[np.ndarray], tuple[np.ndarray, dict[str, float]]]


def quantised(case: Case, folder: Path, cache: Path) -> Path:
    """The case's folder in its precision; int8 is made once into `cache`, with a gate that measures and lets everything pass."""
    if not case.precision.startswith("int8"):
        return folder
    out = cache / f"{case.model.removeprefix('shape:')}-{case.precision}-{sha256(folder / 'sdlite.json')[:8]}"
    if not out.exists():
        from sdlite.quant import Calibration, Gate, quantize, read_prompts

        prompts = read_prompts(Path(__file__).parents[1] / "export" / "calibration" / ("emoji.txt" if case.model == "emoji" else "sd.txt"))
        quantize(
            folder, case.precision, out=out, threads=case.threads,
            calibration=Calibration(prompts=prompts, samples=8 if case.model == "emoji" else 2),
            gate=Gate(psnr_mean=0, psnr_worst=0, ssim_mean=-1, num_prompts=8 if case.model == "emoji" else 1, seeds=(0,), engines=["onnxruntime"]),
        )  # fmt: skip
    return out


def load(case: Case, folder: Path) -> Call:
    """The engine's pipeline as latents -> (picture uint8 (B, H, W, 3), seconds per stage)."""
    arguments: dict[str, Any] = {"num_inference_steps": case.steps, "guidance_scale": case.guidance}
    prompts = [PROMPT] * case.batch
    if case.engine.startswith("sdlite"):
        import sdlite

        backend = {"sdlite-ort": "onnxruntime", "sdlite-openvino": "openvino", "sdlite-torch": "torch"}[case.engine]
        pipe = sdlite.Pipeline.from_pretrained(folder, precision=case.precision, backend=backend, threads=case.threads)

        def call(latents: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
            out = pipe(prompts, latents=latents, seed=0, sampler="ddim", **arguments)
            return np.stack([np.asarray(i) for i in out.images]), out.timings

        return call

    import torch
    from diffusers import DDIMScheduler

    torch.set_num_threads(case.threads)
    if case.engine == "optimum-ort":
        import onnxruntime
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = case.threads
        peer: Any = ORTStableDiffusionPipeline.from_pretrained(folder, session_options=options)
    else:
        from diffusers import StableDiffusionPipeline

        peer = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        if case.engine == "diffusers-compile":
            peer.unet = torch.compile(peer.unet)
            peer.vae.decode = torch.compile(peer.vae.decode)
    peer.scheduler = DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)

    def call_peer(latents: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        out = peer(prompts, latents=torch.from_numpy(latents), **arguments)
        return np.stack([np.asarray(i) for i in out.images]), {}

    return call_peer


def worker(case: Case, folder: Path, picture: Path) -> dict[str, Any]:
    start = time.perf_counter()
    call = load(case, folder)
    load_seconds = time.perf_counter() - start
    from sdlite.artifact import read_json
    from sdlite.sampling import Noise

    channels = read_json(folder / "unet" / "config.json")["in_channels"]
    latents = np.stack([Noise(s).normal((channels, case.size_px // 8, case.size_px // 8)) for s in range(case.batch)])
    start = time.perf_counter()
    image, _ = call(latents)
    first = time.perf_counter() - start
    samples, stages = [], []
    for _ in range(case.repeats):
        start = time.perf_counter()
        image, timings = call(latents)
        samples.append(time.perf_counter() - start)
        stages.append(timings)
    np.save(picture, image)
    row: dict[str, Any] = {"load_seconds": load_seconds, "first_call_seconds": first, "samples_seconds": samples}
    row |= {
        "median_seconds": float(np.median(samples)),
        "p10_seconds": float(np.quantile(samples, 0.1)),
        "p90_seconds": float(np.quantile(samples, 0.9)),
    }
    if stages[0]:
        row["stage_seconds"] = {k: float(np.median([s[k] for s in stages])) for k in stages[0]}
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def run_case(case: Case, folder: Path, picture: Path) -> dict[str, Any]:
    """One process; its wall time is the cold start to `repeats + 1` pictures."""
    job = json.dumps({"case": asdict(case), "folder": str(folder), "picture": str(picture)})
    env = {**os.environ, "OMP_NUM_THREADS": str(case.threads), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.run", "--worker", job], capture_output=True, text=True, env=env)
    lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
    if out.returncode or not lines:
        return {"error": (out.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    ap.add_argument("suites", nargs="*", help=", ".join(SUITES))
    ap.add_argument("--rounds", type=int, default=2, help="how often every case is started anew, interleaved")
    ap.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sdlite-bench", help="where random-weight models are kept")
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--worker", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        print(json.dumps(worker(Case(**job["case"]), Path(job["folder"]), Path(job["picture"]))))
        return

    if not args.suites or (unknown := set(args.suites) - set(SUITES)):
        ap.error(f"name one or more suites of {', '.join(SUITES)}" + (f", not {sorted(unknown)}" if args.suites else ""))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {**environment(), "command": "python -m benchmarks.run " + " ".join(sys.argv[1:])}
    with tempfile.TemporaryDirectory() as tmp:
        for name in args.suites:
            folders = {c: quantised(c, model_folder(c, args.cache), args.cache) for c in SUITES[name]}
            for r in range(args.rounds):
                for k, case in enumerate(SUITES[name]):
                    reference = Path(tmp) / f"{name}-{case.steps}-{case.guidance}.npy"
                    picture = Path(tmp) / f"{k}.npy"
                    row = run_case(case, folders[case], picture)
                    if picture.exists():
                        if (case.engine == "sdlite-ort" and case.precision == "fp32") or not reference.exists():
                            picture.replace(reference)
                        else:
                            a, b = (np.load(p).astype(float) for p in (picture, reference))
                            mse = float(((a - b) ** 2).mean())
                            row["psnr_to_sdlite_ort"] = None if mse == 0 else 10 * np.log10(255**2 / mse)
                            picture.unlink()
                    with open(args.out, "a") as f:
                        f.write(json.dumps({"suite": name, "round": r, "case": asdict(case), **row, **about}) + "\n")
                    print(
                        case.key,
                        row.get("error")
                        or f"{row['median_seconds']:.4f} s, peak {row['peak_mib']:.0f} MiB, load {row['load_seconds']:.2f} s",
                    )


if __name__ == "__main__":
    main()
