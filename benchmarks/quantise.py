"""Time, peak memory and closeness of quantising, one process a row.

    python -m benchmarks.quantise emoji --samples 16
    python -m benchmarks.quantise shape:bk-tiny shape:sd14 --samples 2 8 --size 512

Shapes have random weights. Their images mean nothing, but how close the integer network comes to
the float one does: nothing in it is an outlier, so what is far here is a fault. The gate measures
and lets everything pass. `alone` is the PSNR of an image of which one network is integer and the
others float. Rows go to benchmarks/results/quantise.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.env import environment
from benchmarks.run import model_folder
from sdlite.memory import peak_mib

RESULTS = Path(__file__).parent / "results" / "quantise.jsonl"
PROMPTS = Path(__file__).parents[1] / "export" / "calibration"


def one_by_one(
    folder: str, quantised: Path, threads: int, gate: dict[str, Any]
) -> dict[str, float | None]:
    """part -> PSNR in dB of the gate's first image with that network alone in integer, on
    onnxruntime; None where it is equal.
    """
    import sdlite
    from sdlite.artifact import Artifact
    from sdlite.instrument import let_go, on_demand, with_networks
    from sdlite.metrics import psnr

    floats = on_demand(Artifact.open(folder), threads)
    height, width = gate["size"] or (None, None)

    def image(pipe: sdlite.Pipeline) -> Any:
        steps = gate["num_inference_steps"]
        made = pipe(
            gate["prompts"][0],
            seed=gate["seeds"][0],
            num_inference_steps=steps,
            height=height,
            width=width,
        )
        let_go(floats)
        return made.images[0]

    want, networks = image(floats), dict(floats.networks.parts)
    made = sdlite.Pipeline.from_pretrained(quantised, backend="onnxruntime", threads=threads)
    found = {
        p: psnr(want, image(with_networks(floats, {**networks, p: network})))
        for p, network in made.networks.parts.items()
    }
    return {p: v if v < float("inf") else None for p, v in found.items()}


def worker(job: dict[str, Any]) -> dict[str, Any]:
    from sdlite.quant import Calibration, Gate, quantize, read_prompts

    emoji = job["model"] == "emoji"
    prompts = read_prompts(PROMPTS / ("emoji.txt" if emoji else "sd.txt"))
    size = None if emoji else (job["size"], job["size"])
    steps = None if emoji else 4
    with tempfile.TemporaryDirectory() as tmp:
        before = set(Path(tempfile.gettempdir()).iterdir())
        begin = time.perf_counter()
        report = quantize(
            job["folder"],
            job["precision"],
            out=Path(tmp) / "out",
            threads=job["threads"],
            scheme=job["scheme"],
            calibration=Calibration(
                prompts=prompts[: len(prompts) - 64] if emoji else prompts,
                samples=job["samples"],
                size=size,
                num_inference_steps=steps,
                observer=job["observer"],
            ),
            gate=Gate(
                psnr_mean=0,
                psnr_worst=0,
                ssim_mean=-1,
                prompts=prompts[-64:] if emoji else prompts[-1:],
                num_prompts=64,
                seeds=(0, 1) if emoji else (0,),
                num_inference_steps=steps,
                size=size,
                max_float=0,
            ),
        )
        seconds = time.perf_counter() - begin
        alone = one_by_one(job["folder"], Path(tmp) / "out", job["threads"], report["gate"])
        stray = sorted(
            p.name for p in set(Path(tempfile.gettempdir()).iterdir()) - before - {Path(tmp)}
        )
    networks = {
        p: {k: n[k] for k in ("bytes", "float_bytes", "float_share")}
        for p, n in report["networks"].items()
    }
    return {
        "seconds": seconds,
        "peak_mib": peak_mib(),
        "stray_files": stray,
        "networks": networks,
        "engines": report["engines"],
        "alone": alone,
        "gate_prompts": len(report["gate"]["prompts"]),
        "gate_seeds": len(report["gate"]["seeds"]),
    }


def options() -> argparse.Namespace:
    """The command line."""
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("models", nargs="*", help="embedded names, folders or shape:NAME")
    ap.add_argument("--precision", nargs="+", default=["int8-static"])
    ap.add_argument("--scheme", nargs="+", default=["u8s7"])
    ap.add_argument("--observer", nargs="+", default=["mse"])
    ap.add_argument("--samples", nargs="+", type=int, default=[16])
    ap.add_argument("--size", type=int, default=512, help="pixels, for shapes")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sdlite-bench")
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--worker", help=argparse.SUPPRESS)
    return ap.parse_args()


def jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each process does: every model with every precision, scheme, observer and sample
    count.
    """
    for model in args.models:
        folder = model_folder(Case(model, "sdlite-ort", 4, args.size), args.cache)
        about = {"model": model, "folder": str(folder), "size": args.size, "threads": args.threads}
        for p, s, o, n in product(args.precision, args.scheme, args.observer, args.samples):
            yield {"precision": p, "scheme": s, "observer": o, "samples": n, **about}


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """The row of a job, made in a process of its own; or its error."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.quantise", "--worker"]
    out = subprocess.run([*command, json.dumps(job)], capture_output=True, text=True)
    lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
    if out.returncode or not lines:
        return {"error": (out.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def show(job: dict[str, Any], row: dict[str, Any]) -> None:
    """A row in a few lines."""
    what = [job[k] for k in ("model", "precision", "scheme", "observer", "samples")]
    print(*what, row.get("error") or f"{row['seconds']:.0f} s, peak {row['peak_mib']:.0f} MiB")
    for e in row.get("engines", []):
        print(
            f"  {e['engine']}: PSNR mean {e['psnr_mean']:.1f} worst {e['psnr_worst']:.1f} dB, SSIM"
            f" {e['ssim_mean']:.4f}, {e['networks']}"
        )
    alone = {p: "equal" if v is None else f"{v:.1f} dB" for p, v in row.get("alone", {}).items()}
    if alone:
        print("  integer alone: " + ", ".join(f"{p} {v}" for p, v in alone.items()))


def main() -> None:
    args = options()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {**environment(), "command": "python -m benchmarks.quantise " + " ".join(sys.argv[1:])}
    for job in jobs(args):
        row = measured(job)
        job.pop("folder")
        with open(args.out, "a") as f:
            f.write(json.dumps({**job, **row, **about}) + "\n")
        show(job, row)


if __name__ == "__main__":
    main()
