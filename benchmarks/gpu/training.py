"""Images a second of a real distillation on a GPU: `bk-tiny` (323M) from an 860M teacher.

    python -m benchmarks.gpu.training [--only "bf16, batch 32" ...] [--steps 16]

Each row is the real command, `sdlite distill`, in a process of its own, as
`benchmarks.real_teacher` runs it on CPUs: SD-1.4's shape with random weights, 512 px, output and
feature terms, weights, EMA and AdamW in float32. `images_per_second` is of the median step after
the first `WARM`, `spread` half the steps' range over their median, `gpu_peak_mib` what tensors had.
A configuration that runs out of memory is a row with its error. Rows go to gpu_training.jsonl.
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import real_teacher
from benchmarks.gpu import common
from benchmarks.real_teacher import How

WARM = 3  # steps that are not counted
SECONDS = {True: 180, False: 90}  # that a row may take, compiled or not
WHOLE = How(gradient_checkpointing=False, plain_attention=False)
AGAIN = How(gradient_checkpointing=True, plain_attention=False)


@dataclass(frozen=True)
class Run:
    """One configuration."""

    batch_size: int
    how: How
    precision: str = "bf16"


RUNS = {
    "bf16, batch 32": Run(32, WHOLE),
    "bf16, batch 32, checkpointing": Run(32, AGAIN),
    "bf16, batch 128, checkpointing": Run(128, AGAIN),
    "bf16, batch 32, checkpointing, sharded": Run(32, How(plain_attention=False, sharded=True)),
    "bf16, batch 64": Run(64, WHOLE),
    "float32, batch 32, checkpointing": Run(32, AGAIN, "no"),
    "bf16, batch 8": Run(8, WHOLE),
    # last: compiling takes minutes
    "bf16, batch 32, compiled": Run(32, How(False, plain_attention=False, compile=True)),
}


def measure(args: argparse.Namespace, teacher: Path, run: Run, seconds: float) -> dict[str, Any]:
    """A row of one configuration, which is ended after so many seconds."""
    aside = args.scratch / "training"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    batch = args.batch or run.batch_size
    try:
        row = real_teacher.measure(
            teacher,
            aside,
            student=args.student,
            steps=WARM + args.steps,
            batch_size=batch,
            micro=None,
            precision=run.precision,
            pictures=4,
            px=args.px,
            threads=os.cpu_count() or 1,
            how=run.how,
            most_seconds=seconds,
        )
    except SystemExit as e:  # the command failed: its last line
        return {"error": str(e).splitlines()[-1][:700], "batch_size": batch, **asdict(run.how)}
    finally:
        shutil.rmtree(aside)
    steps = row["step_seconds"][WARM:]
    middle = float(np.median(steps))
    return {
        **row,
        "images_per_second": batch / middle,
        "spread": (max(steps) - min(steps)) / 2 / middle,
    }


def main() -> int:
    ap = common.arguments(__doc__ or "", "training")
    ap.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    ap.add_argument("--steps", type=int, default=16, help="that are counted")
    ap.add_argument("--teacher", default="sd14", metavar="SHAPE", help="of benchmarks.shapes")
    ap.add_argument("--student", default="bk-tiny", help="preset of sdlite.distill.students")
    ap.add_argument("--px", type=int, default=512)
    ap.add_argument("--batch", type=int, help="instead of the configurations' own")
    args = ap.parse_args()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    budget, about = common.Budget(args.minutes), common.about(args.device)
    teacher = common.folder(args.teacher, args.scratch)
    for name in args.only:
        run = RUNS[name]
        if not budget.allows(name, SECONDS[run.how.compile]):
            continue
        found = measure(args, teacher, run, budget.left + 60)
        row = {"run": name, "teacher": args.teacher, **found}
        common.keep(args.out, {**row, **about})
    if budget.left_out:
        print("no time was left for:", "; ".join(budget.left_out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
