"""onnxruntime against OpenVINO on one model: what `backend="auto"` rests on
(`sdlite/backends/auto.py`).

python -m benchmarks.engines FOLDER --model shape:bk-tiny --px 512

Every row is a process of its own, with one thread, and has seconds of the processor beside those of
the clock: they bear a machine that others use too. OpenVINO's first image is measured without
compiled networks of an earlier process, and once more with them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.env import environment

RESULTS = Path(__file__).parent / "results" / "engines.jsonl"
ENGINES = ("onnxruntime", "openvino")


def measure(
    folder: str, precision: str, backend: str, px: int, steps: int, images: int
) -> dict[str, Any]:
    """Seconds of loading, of the first image and of `images` more, as {clock, cpu}."""
    import sdlite

    def timed(work: Any) -> tuple[Any, dict[str, float]]:
        clock, cpu = time.perf_counter(), time.process_time()
        done = work()
        return done, {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}

    def image() -> Any:
        return pipe(
            "a red apple",
            seed=0,
            num_inference_steps=steps,
            guidance_scale=1.0,
            height=px,
            width=px,
        )

    pipe, load = timed(
        lambda: sdlite.Pipeline.from_pretrained(
            folder, precision=precision, backend=backend, threads=1
        )
    )
    first = timed(image)[1]
    later = [timed(image)[1] for _ in range(images)]
    arithmetic = {n.part: n.arithmetic for n in pipe.report.networks}
    return {
        "load_seconds": load,
        "first_seconds": first,
        "samples_seconds": later,
        "arithmetic": arithmetic,
        "busy": os.getloadavg()[0],
    }


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("folder")
    ap.add_argument("--model", required=True, help="what rows call it")
    ap.add_argument("--precision", default="int8-static")
    ap.add_argument("--px", type=int, default=512)
    ap.add_argument("--steps", type=int, default=4)
    ap.add_argument("--images", type=int, default=5)
    ap.add_argument("--rounds", type=int, default=2)
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        for number in range(args.rounds):
            for engine in ENGINES:
                call = (args.folder, args.precision, engine, args.px, args.steps, args.images)
                code = (
                    "import json; from benchmarks.engines import measure;"
                    f" print(json.dumps(measure(*{call!r})))"
                )
                on = {
                    **os.environ,
                    "SDLITE_CACHE": cache,
                    "SDLITE_OPENVINO_CACHE": "20",
                    "OMP_NUM_THREADS": "1",
                }
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", code],
                    capture_output=True,
                    text=True,
                    check=True,
                    env=on,
                )
                case = {
                    "model": args.model,
                    "engine": engine,
                    "precision": args.precision,
                    "size_px": args.px,
                    "steps": args.steps,
                }
                row = {
                    "round": number,
                    "case": case,
                    **json.loads(done.stdout.splitlines()[-1]),
                    **environment(),
                }
                with open(RESULTS, "a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")
                print(json.dumps(row)[:300], flush=True)


if __name__ == "__main__":
    main()
