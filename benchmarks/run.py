"""Speed and memory, sdlite against its peers on the same weights.

    python -m benchmarks.run peers-512 zoo-512 scaling [--rounds 2] [--out \
        benchmarks/results/speed.jsonl]
    # only make what the cases open: conversion, int8, IR, gguf:
    python -m benchmarks.run peers-512 --prepare

Every case is its own process (so peak memory and cold start are its own) and rounds interleave the
cases. A row has load seconds, first call, all raw samples of the steady state, seconds per stage,
peak memory, bytes and parameters, the engine's setting, and a hash-free check: PSNR of its image
to the first engine's at equal latents. A case that fails, or whose model cannot be made, is a row
with `error`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import SETTINGS, SUITES, Case
from benchmarks.env import environment
from benchmarks.peers import load, model_folder, plain_folder, prepare, weight_bytes
from sdlite.memory import peak_mib

__all__ = ["main", "model_folder"]
RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
PARTS = ("text_encoder", "unet", "vae")


def parameters(folder: Path) -> dict[str, int]:
    """Parameters of each network of a diffusers folder, by its safetensors' headers."""
    from math import prod

    from safetensors import safe_open

    from sdlite.weights import weight_files

    out = {}
    for part in PARTS:
        out[part] = 0
        for file in weight_files(folder / part):
            with safe_open(file, "np") as f:
                names = [k for k in f.keys() if "position_ids" not in k]  # noqa: SIM118
                out[part] += sum(prod(f.get_slice(k).get_shape()) for k in names)
    return out


def worker(case: Case, path: Path, plain: Path, picture: Path) -> dict[str, Any]:
    """Load, one first image, `case.repeats` more; seconds, MiB and bytes."""
    from sdlite.io import read_json
    from sdlite.sampling import Noise

    channels = read_json(plain / "unet" / "config.json")["in_channels"]
    latents = np.stack(
        [
            Noise(s).normal((channels, case.size_px // 8, case.size_px // 8))
            for s in range(case.batch)
        ]
    )
    start = time.perf_counter()
    call = load(case, path)
    load_seconds = time.perf_counter() - start
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
    row: dict[str, Any] = {
        "load_seconds": load_seconds,
        "first_call_seconds": first,
        "samples_seconds": samples,
    }
    row |= {
        "median_seconds": float(np.median(samples)),
        "p10_seconds": float(np.quantile(samples, 0.1)),
        "p90_seconds": float(np.quantile(samples, 0.9)),
    }
    if stages[0]:
        row["stage_seconds"] = {k: float(np.median([s[k] for s in stages])) for k in stages[0]}
    row["peak_mib"] = peak_mib()
    return row | {"bytes": weight_bytes(case, path), "parameters": parameters(plain)}


def child(case: Case, **job: Any) -> dict[str, Any]:
    """One process for one job; its last JSON line, or its error."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(case.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    text = json.dumps({"case": asdict(case), **job})
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.run", "--worker", text],
        capture_output=True,
        text=True,
        env=env,
    )
    lines = [line for line in out.stdout.splitlines() if line.startswith('{"')]
    if out.returncode or not lines:
        return {
            "error": (
                _reason(out.stderr) if out.returncode >= 0 else f"ended by signal {-out.returncode}"
            )
        }
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _reason(stderr: str) -> str:
    """The exception of a traceback (its last unindented `Name: text` line), without folders of any
    machine.
    """
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    named = [
        line
        for line in lines
        if not line.startswith((" ", "W", "I"))
        and ": " in line
        and line.split(":")[0].isidentifier()
    ]
    named += [
        line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Unsupported"))
    ]
    text = (named or lines or ["no output"])[-1]
    return re.sub(r"/(?:[^\s/'\"]+/)+", "", text)[:300]


def made(
    cases: Sequence[Case], cache: Path, teacher: Path | None = None
) -> dict[Case, dict[str, Any]]:
    """What each case opens: {"path", "plain"}, or {"error"}; made in processes of their own,
    once.
    """
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    out = {}
    for c in cases:
        key = (c.model, c.precision, c.engine)
        if key not in known:
            known[key] = child(c, cache=str(cache), teacher=teacher and str(teacher))
            if "error" in known[key]:
                print(f"{c.key}: cannot be made: {known[key]['error']}", flush=True)
        out[c] = known[key]
    return out


def compare(case: Case, picture: Path, reference: Path) -> dict[str, Any]:
    """PSNR to the reference image; the first image, or our own float32, becomes it.
    stable-diffusion.cpp draws another noise.
    """
    if not picture.exists():
        return {}
    if (case.engine == "sdlite-ort" and case.precision == "fp32") or (
        not reference.exists() and case.engine != "stable-diffusion.cpp"
    ):
        picture.replace(reference)
        return {}
    a = np.load(picture).astype(float)
    picture.unlink()
    if case.engine == "stable-diffusion.cpp" or not reference.exists():
        return {}
    b = np.load(reference).astype(float)
    if a.shape != b.shape:
        return {"error": f"the image is {a.shape}, not {b.shape}"}
    mse = float(((a - b) ** 2).mean())
    return {"psnr_to_sdlite_ort": None if mse == 0 else 10 * float(np.log10(255**2 / mse))}


def line(case: Case, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{case.key} failed: {row['error']}"
    return (
        f"{case.key}: {row['median_seconds']:.4f} s, peak {row['peak_mib']:.0f} MiB, load"
        f" {row['load_seconds']:.2f} s, first {row['first_call_seconds']:.2f} s"
    )


def run_suite(
    name: str,
    cases: Sequence[Case],
    jobs: dict[Case, dict[str, Any]],
    rounds: int,
    out: Path,
    about: dict[str, Any],
) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        for r in range(rounds):
            for case in cases:
                picture, job = Path(tmp) / "picture.npy", jobs[case]
                row = job if "error" in job else child(case, picture=str(picture), **job)
                model = case.model.replace(":", "-")
                same = f"{model}-{case.size_px}-{case.steps}-{case.guidance}-{case.batch}.npy"
                row = {**row, **compare(case, picture, Path(tmp) / same)}
                with open(out, "a") as f:
                    f.write(
                        json.dumps(
                            {
                                "suite": name,
                                "round": r,
                                "case": asdict(case),
                                "setting": SETTINGS[case.engine],
                                **row,
                                **about,
                            }
                        )
                        + "\n"
                    )
                print(line(case, row), flush=True)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """In the child: make what a case opens (`cache`), or measure it."""
    case = Case(**job["case"])
    if "cache" in job:
        cache, teacher = Path(job["cache"]), job["teacher"] and Path(job["teacher"])
        return {
            "path": str(prepare(case, cache, teacher)),
            "plain": str(plain_folder(case, cache, teacher)),
        }
    return worker(case, Path(job["path"]), Path(job["plain"]), Path(job["picture"]))


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("suites", nargs="*", help=", ".join(SUITES))
    ap.add_argument(
        "--rounds", type=int, default=2, help="how often every case is started anew, interleaved"
    )
    ap.add_argument("--only", default="", help="cases whose line contains this")
    ap.add_argument("--prepare", action="store_true", help="make the models of the suites and stop")
    ap.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "sdlite-bench",
        help="where random-weight models are kept",
    )
    ap.add_argument(
        "--teacher",
        type=Path,
        help="UNet folder of the embedded student's teacher, for the suite `teacher`; default: the"
        " released asset emoji-teacher",
    )
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--worker", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return
    if not args.suites or (unknown := set(args.suites) - set(SUITES)):
        ap.error(
            f"name one or more suites of {', '.join(SUITES)}"
            + (f", not {sorted(unknown)}" if args.suites else "")
        )
    args.cache.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {**environment(), "command": "python -m benchmarks.run " + " ".join(sys.argv[1:])}
    for name in args.suites:
        cases = [c for c in SUITES[name] if args.only in c.key]
        jobs = made(cases, args.cache, args.teacher)
        if not args.prepare:
            run_suite(name, cases, jobs, args.rounds, args.out, about)


if __name__ == "__main__":
    main()
