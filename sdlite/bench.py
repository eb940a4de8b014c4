"""`sdlite bench`: seconds and memory of one model on this machine, for each precision and backend,
one process each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sdlite import backends, hub, memory
from sdlite.artifact import Artifact
from sdlite.errors import InputError, UnknownNameError
from sdlite.io import append
from sdlite.manifest import PRECISIONS
from sdlite.sampling import known_sampler

PROMPT = "a red apple on a blue background"
# seconds for all rows together, loading and first images included, when nobody says how long to
# repeat
BUDGET = 100.0


@dataclass(frozen=True)
class Job:
    """One row: what is run, and for how long at most."""

    model: str
    precision: str
    backend: str
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    height: int | None = None
    width: int | None = None
    batch: int = 1
    threads: int | None = None
    seconds: float | None = None  # of repeating; None: a share of what is left of BUDGET
    least: int = 2  # images after the first
    also: str = ""  # another precision that is the same files in the same arithmetic


def jobs(
    model: str,
    precisions: Sequence[str] | None = None,
    backend_names: Sequence[str] | None = None,
    **settings: Any,
) -> list[Job]:
    """Every precision that the model holds on every installed backend that has it, or what is asked
    for.

    Raises:
        UnknownNameError: a precision or backend does not exist. InputError: nothing is left that
            could run.
    """
    artifact = Artifact.open(hub.resolve(model, None))
    known_sampler(settings.get("sampler") or artifact.sampler_name)
    held = list(artifact.listing.variants) if artifact.listing else ["fp32"]
    for p in precisions or ():
        if p not in PRECISIONS:
            raise UnknownNameError(
                f"precision={p!r} is not known; choose one of {', '.join(PRECISIONS)}."
            )
    for b in backend_names or ():
        backends.ready(b)  # says which name is wrong or which extra is missing
    out: list[Job] = []
    for p in precisions or held:
        able = backends.installed_with(p) if artifact.has_onnx(p) else []
        if artifact.export:
            able = [b for b in artifact.export.backends if p in held and backends.installed(b)]
        elif not able and artifact.manifest is None and backends.installed("torch"):
            able = ["torch"]
        for b in backend_names or able:
            same = next(
                (
                    j
                    for j in out
                    if j.backend == b == "onnxruntime"
                    and precisions is None
                    and _same(artifact, j.precision, p)
                ),
                None,
            )
            if same is None:
                out.append(Job(model, p, b, **settings))
            else:
                out[out.index(same)] = dataclasses.replace(same, also=p)
    if not out:
        lacking = [p for p in precisions or () if p not in held]
        made = [p for p in lacking if p.startswith("int8")]
        way = (
            f"make one: sdlite quantize {model} --precision {made[0]} --out DIR"
            if made
            else "pip install 'sdlite[cpu]', or name --backends"
        )
        raise InputError(
            f"no installed engine runs {', '.join(precisions or held)} of {artifact.name}, which"
            f" holds {', '.join(held)}: {way}."
        )
    return out


def _same(artifact: Artifact, a: str, b: str) -> bool:
    """Whether two precisions are the same files: float16 weights are exact in float32, which
    onnxruntime computes in.
    """
    return artifact.manifest is not None and artifact.manifest.variants.get(
        a
    ) == artifact.manifest.variants.get(b)


def measure(job: Job) -> dict[str, Any]:
    """Run one job in this process: {load_seconds, first_seconds, samples_seconds, stage_seconds,
    peak_mib, engine, steps, size}.

    Images are made until `job.seconds` have passed, at least `job.least` and at most fifty, after
    a first one that is reported alone.
    """
    from sdlite.instrument import asked
    from sdlite.pipeline import Pipeline, PipelineOutput

    def run(pipe: Pipeline) -> PipelineOutput:
        return pipe(
            [PROMPT] * job.batch,
            seed=0,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance,
            height=job.height,
            width=job.width,
            sampler=job.sampler,
            **asked(pipe, job.height, job.width),
        )

    begin = time.perf_counter()
    pipe = Pipeline.from_pretrained(
        job.model, precision=job.precision, backend=job.backend, threads=job.threads
    )
    pipe.max_pixels = None  # what was asked for is measured
    loaded = time.perf_counter()
    out = run(pipe)
    first = time.perf_counter()
    samples: list[float] = []
    stages: list[dict[str, float]] = []
    while len(samples) < job.least or (
        time.perf_counter() - first < (job.seconds or 0.0) and len(samples) < 50
    ):
        start = time.perf_counter()
        out = run(pipe)
        samples.append(time.perf_counter() - start)
        stages.append(out.timings)
    image = out.images[0]
    return {
        "engine": pipe.report.engine,
        "steps": job.steps or pipe.defaults.num_inference_steps,
        "guidance": pipe.defaults.guidance_scale if job.guidance is None else job.guidance,
        "size": list(image.size),
        "load_seconds": loaded - begin,
        "first_seconds": first - loaded,
        "samples_seconds": samples,
        "stage_seconds": {k: sorted(s[k] for s in stages)[len(stages) // 2] for k in stages[0]},
        "peak_mib": memory.peak_mib(),
        "bytes": sum(n.bytes for n in pipe.report.networks),
        "arithmetic": {n.part: n.arithmetic for n in pipe.report.networks},
    }


def bench(
    todo: Sequence[Job], done: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """Rows of all jobs, each from a new process; a job that fails is a row with `error`. `done` is
    called after each.

    Jobs without `seconds` share BUDGET: what loading and the first images leave of a row's share
    is spent on repeating, once at least, so that a model whose images take seconds is still
    measured in every row within about two minutes.
    """
    rows = []
    begin = time.perf_counter()
    for i, job in enumerate(todo):
        if job.seconds is None:
            left = max(BUDGET - (time.perf_counter() - begin), 0.0)
            job = dataclasses.replace(job, seconds=min(left / (len(todo) - i) / 2, 10.0), least=1)
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "sdlite.bench",
            json.dumps(dataclasses.asdict(job)),
        ]
        ran = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
        if ran.returncode or not lines:
            row = {"error": (ran.stderr.strip().splitlines() or ["no output"])[-1][:300]}
        else:
            row = json.loads(lines[-1])
        rows.append({**dataclasses.asdict(job), **row})
        done(rows[-1])
    return rows


# column -> its width and format
COLUMNS = {
    "MB": ">8.1f",
    "load s": ">8.2f",
    "first s": ">9.3f",
    "call s": ">9.3f",
    "p90": ">8.3f",
    "img/s": ">8.2f",
    "text": ">8.3f",
    "unet": ">8.3f",
    "vae": ">8.3f",
    "peak MiB": ">10",
    "N": ">4",
}
HEADER = f"{'precision':<13}{'backend':<13}" + "".join(
    format(name, how.split(".")[0]) for name, how in COLUMNS.items()
)


def line(row: dict[str, Any]) -> str:
    """One row as text, under `HEADER`; the call's time is the median over N calls of `batch`
    images each.
    """
    precision = row["precision"] + (f", {row['also']}" if row.get("also") else "")
    head = f"{precision:<13}{row['backend']:<13}"
    if "error" in row:
        return f"{head}  failed: {row['error']}"
    s = sorted(row["samples_seconds"])
    stage = row["stage_seconds"]
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    median, p90 = s[len(s) // 2], s[min(len(s) - 1, int(0.9 * len(s)))]
    figures = (
        row["bytes"] / 1e6,
        row["load_seconds"],
        row["first_seconds"],
        median,
        p90,
        row["batch"] / median,
        *(stage[p] for p in ("text_encoder", "unet", "vae_decoder")),
        peak,
        len(s),
    )
    return head + "".join(format(x, how) for x, how in zip(figures, COLUMNS.values(), strict=True))


def _cpu() -> str:
    """The processor's name as the system has it."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")),
        platform.processor(),
    )


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Append to a JSONL file, with what it was measured on."""
    import platform

    from sdlite._version import __version__

    about = {
        "date": date.today().isoformat(),
        "sdlite": __version__,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    append(path, "".join(json.dumps({**r, **about}) + "\n" for r in rows))


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.argv[1])))))
