"""Every export profile on one model: what it gives, how it was checked, how long it took. One
process a row.

    python -m benchmarks.export emoji                      # all built-in profiles
    python -m benchmarks.export shape:bk-tiny --profiles onnx ncnn-fp16
    python -m benchmarks.export narrow:vega --size 128     # a key of published_models.MODELS

int8 profiles take a model that `sdlite quantize` made: give its folder (for TensorRT with --scheme
s8s8). A profile that fails is a row with its error. `--steps 0` takes the model's own number. Rows
go to benchmarks/results/exports.jsonl; `python -m benchmarks.report` makes the matrix in
export/README.md of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.env import environment
from benchmarks.run import model_folder

PROFILES = Path(__file__).parents[1] / "export" / "profiles"
RESULTS = Path(__file__).parent / "results" / "exports.jsonl"


def sized(profile: str, size_px: int, folder: Path) -> Path:
    """A copy of a built-in profile in `folder`, for square images of this size."""
    out = folder / f"{profile}.toml"
    out.write_text(f"height = {size_px}\nwidth = {size_px}\n{(PROFILES / out.name).read_text()}")
    return out


def worker(job: dict[str, Any]) -> dict[str, Any]:
    from sdlite.errors import SdliteError
    from sdlite.exporters.export import export

    with tempfile.TemporaryDirectory() as tmp:
        target: str | Path = job["profile"]
        if job["size_px"]:
            target = sized(job["profile"], job["size_px"], Path(tmp))
        try:
            r = export(
                job["folder"],
                Path(tmp) / "out",
                target=target,
                num_inference_steps=job["steps"] or None,
                threads=job["threads"],
                reference=job["reference"],
            )
        except SdliteError as e:
            return {"error": f"{type(e).__name__}: {e}".replace(tmp, "DIR")}
    return {
        "target": r["profile"]["target"],
        "precision": r["profile"]["precision"],
        "dynamic": r["profile"]["dynamic"],
        "tools": r["tools"],
        "opset": r["opset"],
        "source": r["source"],
        "bytes": sum(
            f["bytes"] for name, f in r["files"].items() if name.split("/")[0] in r["networks"]
        ),
        "checked_by": r["checked_by"],
        "not_run": next(iter(r["not_run"].values()), None),
        "parity": r["parity"],
        "gate": r["profile"]["gate"],
        "options": r["profile"]["options"],
        "seconds": r["seconds"],
        "peak_mib": r["peak_mib"],
        "converter_peak_mib": r["converter_peak_mib"],
        "picture_seconds": r["picture_seconds"],
        "calibration": r["calibration"],
    }


def main() -> None:
    from sdlite.exporters import profile

    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument(
        "model", nargs="?", default="emoji", help="embedded name, folder, shape:NAME or narrow:NAME"
    )
    ap.add_argument("--profiles", nargs="+", help="default: all that suit the model's precisions")
    ap.add_argument(
        "--reference", help="the float model of an int8 one: its images are compared too"
    )
    ap.add_argument("--label", help="name of the model in the row; default: as given")
    ap.add_argument("--steps", type=int, default=4)
    ap.add_argument(
        "--size", type=int, help="height and width of the images, pixels; default: the model's own"
    )
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sdlite-bench")
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--worker", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    folder = model_folder(Case(args.model, "sdlite-ort", args.steps, args.size or 512), args.cache)
    held = json.loads((folder / "sdlite.json").read_text())["variants"]
    names = args.profiles or [n for n, p in profile.builtin().items() if {*p.sources} & {*held}]
    about = {**environment(), "command": "python -m benchmarks.export " + " ".join(sys.argv[1:])}
    for name in names:
        job = {
            "folder": str(folder),
            "profile": name,
            "steps": args.steps,
            "threads": args.threads,
            "reference": args.reference,
            "size_px": args.size,
        }
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.export", "--worker", json.dumps(job)],
            capture_output=True,
            text=True,
        )
        lines = done.stdout.strip().splitlines()
        row = (
            json.loads(lines[-1])
            if done.returncode == 0 and lines
            else {"error": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}
        )
        row = {
            "model": args.label or args.model,
            "profile": name,
            "steps": args.steps,
            "size_px": args.size,
            **row,
            **about,
        }
        with open(args.out, "a") as f:
            f.write(json.dumps(row) + "\n")
        what = row.get("error")
        if what is None:
            worst = min(row["parity"]["psnr"] or [0])
            what = f"{row['checked_by']}, PSNR {worst:.1f} dB, {row['seconds']:.0f} s"
        print(f"{name}: {what}", flush=True)


if __name__ == "__main__":
    main()
