"""The article's strategies on a GPU, at a budget at which students draw: several trainings at once.

    python -m benchmarks.gpu.strategies --teacher TEACHER --state DIR
    python -m benchmarks.gpu.strategies --teacher TEACHER --state DIR --table steps

Every training is `benchmarks.distil` in a process of its own, `--together` of them on the one GPU:
the networks are small, and most of a step is the launching of kernels. A call stops them in time,
each with a checkpoint; the next one with the same `--state` goes on with exactly these, and with
what is not measured yet. A row is one strategy and seed, in gpu_strategies.jsonl; rows of an
earlier visit (benchmarks/results) are not made again. TEACHER: see `benchmarks.gpu.student`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import distil
from benchmarks.gpu import common

LOADING, MEASURING = 30, 75  # seconds of a process before and after its training
SHORTEST = 45  # seconds of training that are worth the loading
START = "feature + output"  # the student that `steps` starts from


@dataclass(frozen=True)
class Job:
    """One training."""

    strategy: str
    seed: int

    def __str__(self) -> str:
        return f"{self.strategy}, seed {self.seed}"


def wanted(args: argparse.Namespace) -> list[Job]:
    """All trainings of the table, seed by seed."""
    table = distil.SIZE if args.table == "size" else distil.STEPS
    names = [n for n in table if not args.only or n in args.only]
    return [Job(n, s) for s in range(args.seeds) for n in names]


def measured(args: argparse.Namespace) -> set[Job]:
    """Those that have a row of this budget."""
    rows = (distil.key(r) for r in distil.rows_of(args.out))
    size = (args.images, args.batch_size)
    return {
        Job(name, seed) for table, name, seed, *of in rows if (table, *of) == (args.table, *size)
    }


def ready(job: Job, done: set[Job], args: argparse.Namespace) -> bool:
    """Whether what it starts from is trained."""
    after = distil.STEPS[job.strategy].after if args.table == "steps" else None
    return after is None or Job(after, job.seed) in done


def command(args: argparse.Namespace, job: Job | None, minutes: float) -> list[str]:
    """Of one training; without a job, of what is not trained: teacher, latents, features."""
    out = [sys.executable, "-W", "ignore", "-m", "benchmarks.distil", args.table]
    out += ["--teacher", str(args.teacher), "--latents", str(args.state / "latents.safetensors")]
    out += ["--out", str(args.state / "runs"), "--results", str(args.out)]
    out += ["--images", str(args.images), "--batch-size", str(args.batch_size)]
    out += ["--seeds", str(args.seeds), "--mixed-precision", args.mixed_precision]
    out += ["--prompts", str(args.prompts), "--heldout", str(args.heldout)]
    out += ["--device", args.device]
    if args.table == "steps":
        out += ["--student", str(args.student)]
    if job is None:
        return [*out, "--references", "--threads", str(os.cpu_count() or 1)]
    own = ["--only", job.strategy, "--only-seeds", str(job.seed), "--threads", "2"]
    return [*out, *own, "--max-minutes", f"{minutes:.2f}"]


class Workers:
    """The processes that run."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.running = args, dict[Job, subprocess.Popen[bytes]]()
        self.environ = {
            **common.child(),
            "SDLITE_CACHE": str(args.state / "cache"),
            "OMP_NUM_THREADS": "2",
        }

    def log(self, job: Job | None) -> Path:
        """What a process said."""
        name = "references" if job is None else f"{job.strategy} {job.seed}".replace(" ", "-")
        return self.args.state / f"{self.args.table}-{name}.log"

    def start(self, job: Job, minutes: float) -> None:
        with open(self.log(job), "ab") as log:
            self.running[job] = subprocess.Popen(
                command(self.args, job, minutes), stdout=log, stderr=log, env=self.environ
            )

    def ended(self) -> dict[Job, int]:
        """Those that have ended since the last call, and their exit codes."""
        codes = {job: code for job, p in self.running.items() if (code := p.poll()) is not None}
        for job in codes:
            del self.running[job]
        return codes

    def stop(self) -> None:
        """A checkpoint of each, as Ctrl-C makes it; those that take too long are killed."""
        for p in self.running.values():
            p.terminate()
        for p in self.running.values():
            try:
                p.wait(30)
            except subprocess.TimeoutExpired:
                p.kill()

    def last_line(self, job: Job | None) -> str:
        lines = self.log(job).read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else ""


def run(args: argparse.Namespace, budget: common.Budget) -> bool:
    """Train and measure what is not measured; whether all of it now is."""
    workers, tried = Workers(args), set[Job]()
    try:
        while True:
            for job, code in workers.ended().items():
                print(f"{job}: exit {code}; {workers.last_line(job)}")
            done = measured(args)
            todo = [j for j in wanted(args) if j not in done | tried | {*workers.running}]
            able = [j for j in todo if ready(j, done, args)]
            seconds = budget.left - LOADING - MEASURING
            if able and seconds >= SHORTEST and len(workers.running) < args.together:
                tried.add(able[0])
                workers.start(able[0], seconds / 60)
            elif not workers.running:
                break
            elif budget.left <= 0:
                print("no time was left for the end of:", "; ".join(map(str, workers.running)))
                break
            else:
                time.sleep(0.2)
    finally:
        workers.stop()
    left = [j for j in wanted(args) if j not in measured(args)]
    print(f"{len(wanted(args)) - len(left)} of {len(wanted(args))} are measured")
    return not left


def prepare(args: argparse.Namespace) -> None:
    """Latents, features and the teacher's rows, in one process and on all cores.

    Raises:
        SystemExit: it failed; the last line of what it said.
    """
    rows = {distil.key(r)[:4] for r in distil.rows_of(args.out)}
    latents = args.state / "latents.safetensors"
    if latents.exists() and all((args.table, "teacher", s, 0) in rows for s in range(args.seeds)):
        return
    workers = Workers(args)
    environ = {**workers.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    with open(workers.log(None), "ab") as log:
        done = subprocess.run(command(args, None, 0), stdout=log, stderr=log, env=environ)
    if done.returncode:
        raise SystemExit(f"what all trainings share could not be made: {workers.last_line(None)}")


def show(args: argparse.Namespace) -> None:
    """The table so far: mean and standard deviation over seeds."""
    for row in distil.summary(distil.rows_of(args.out))["rows"]:
        if row["table"] == args.table:
            values = ", ".join(
                f"{k} {row['mean'][k]:.3g} +- {row['std'][k]:.2g}" for k in ("identity@1", "kid")
            )
            print(f"{row['strategy']}, {row['images']:,} images, {row['seeds']} seeds: {values}")


def arguments() -> argparse.Namespace:
    ap = common.arguments(__doc__ or "", "strategies")
    ap.add_argument("--teacher", type=Path, required=True, help="diffusers folder")
    ap.add_argument("--state", type=Path, required=True, help="folder of runs and checkpoints")
    ap.add_argument("--table", choices=("size", "steps"), default="size")
    ap.add_argument("--student", type=Path, help=f"for steps; default: {START!r} of the first seed")
    ap.add_argument("--only", nargs="+", metavar="STRATEGY")
    ap.add_argument("--images", type=int, default=200_000, help="of each training")
    ap.add_argument("--batch-size", type=int, default=distil.USUAL_BATCH)
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--together", type=int, default=6, metavar="N", help="trainings at once")
    ap.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    ap.add_argument("--prompts", type=int, default=128)
    ap.add_argument("--heldout", type=int, default=64)
    args = ap.parse_args()
    common.begun(args.out)
    if args.table == "steps" and args.student is None:
        name = distil.run_name(START, 0, args.images, args.batch_size)
        args.student = args.state / "runs" / name / "model"
        # a training that was stopped leaves a model too: its row says that it is whole
        whole = ("size", START, 0, args.images, args.batch_size)
        if not args.student.exists() or whole not in map(distil.key, distil.rows_of(args.out)):
            ap.error(f"{args.student} is not trained: run --table size first, or give --student")
    return args


def main() -> int:
    args = arguments()
    budget = common.Budget(args.minutes)
    args.state.mkdir(parents=True, exist_ok=True)
    prepare(args)
    whole = run(args, budget)
    show(args)
    if not whole:
        print("the same command goes on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
