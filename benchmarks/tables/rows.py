"""Committed rows of `benchmarks/results` and the parts of a Markdown table.

Of a suite the last run counts: rows with the command, commit and date of its newest row, all rounds
and samples of a case together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "results"
NAMES = {
    "shape:sd14": "SD-1.4 (original)",
    "shape:w0.62": "`w0.62`",
    "shape:extreme-120m": "`extreme-120m`, tiny VAE",
    "shape:bk-base": "`bk-base`",
    "shape:bk-small": "`bk-small`",
    "shape:bk-tiny": "`bk-tiny`",
}
ARITHMETIC = {
    "bf16": "bfloat16",
    "f16": "float32",
    "q8_0": "int8",
    "int8": "int8",
    "int8-static": "int8",
    "int8-dynamic": "int8",
}


def read(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_run(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the date, commit and command of the last one."""
    key = ("date", "commit", "command")
    return [r for r in rows if all(r.get(k) == rows[-1].get(k) for k in key)] if rows else []


@dataclass(frozen=True)
class Result:
    """One case over all rounds. Seconds are of a whole call, which makes `batch` images."""

    case: dict[str, Any]
    samples: tuple[float, ...]
    rows: tuple[dict[str, Any], ...]
    error: str | None

    @property
    def name(self) -> tuple[str, str]:
        return self.case["engine"], self.case["precision"]

    @property
    def ours(self) -> bool:
        return bool(self.case["engine"].startswith("sdlite"))

    @property
    def seconds(self) -> float:
        return float(np.median(self.samples))

    @property
    def images_per_second(self) -> float:
        return float(self.case["batch"] * self.case.get("pipelines", 1) / self.seconds)

    def median(self, key: str) -> float | None:
        values = [r[key] for r in self.rows if r.get(key) is not None]
        return float(np.median(values)) if values else None

    def stage(self, key: str) -> float | None:
        values = [r["stage_seconds"][key] for r in self.rows if key in r.get("stage_seconds", {})]
        return float(np.median(values)) if values else None


def results(suite: str, folder: Path = RESULTS) -> list[Result]:
    """The last run of a suite, one entry a case, in the order of its first round; rows older than
    `setting` are not shown.
    """
    rows = last_run([r for r in read("speed", folder) if r["suite"] == suite and "setting" in r])
    cases: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        cases.setdefault(json.dumps(r["case"], sort_keys=True), []).append(r)
    out = []
    for found in cases.values():
        good = tuple(r for r in found if "error" not in r)
        error = None if good else found[-1]["error"]
        out.append(
            Result(
                found[0]["case"], tuple(s for r in good for s in r["samples_seconds"]), good, error
            )
        )
    return out


def table(header: list[str], body: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(r) + " |" for r in body),
    ]


def number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:,.{digits}f}"


def spread(samples: Sequence[float]) -> str:
    """Median (lowest to highest), seconds; four digits behind the point where there are only
    milliseconds.
    """
    digits = 2 if np.median(samples) >= 0.2 else 4
    return (
        f"{np.median(samples):.{digits}f} ({min(samples):.{digits}f} to {max(samples):.{digits}f})"
    )


def failed(r: Result) -> str:
    """Why a case has no figures, as a cell."""
    return f"failed: {(r.error or '').replace('|', '/')[:160]}"


def missing(suite: str) -> list[str]:
    return [f"Not measured yet: run `python -m benchmarks.run {suite}`."]


def footnotes(suite: str, folder: Path = RESULTS) -> list[str]:
    rows = last_run([r for r in read("speed", folder) if r["suite"] == suite and "setting" in r])
    if not rows:
        return []
    r, found = rows[-1], results(suite, folder)
    counts = sorted({len(x.samples) for x in found if not x.error})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "0"
    v = ", ".join(f"{k} {x}" for k, x in r["versions"].items() if k != "sdlite")
    dirty = ", with uncommitted changes" if r["dirty"] else ""
    return [
        f"N = {n} images a row in {1 + max(x['round'] for x in rows)} interleaved processes;"
        f" seconds are the median (lowest to highest). {r['cpu']}, {r['cores']} cores, threads"
        f" {'/'.join(map(str, sorted({x['case']['threads'] for x in rows})))}; {v}. {r['date']},"
        f" commit `{r['commit']}`{dirty}, `{r['command']}`."
    ]


def order(found: list[Result]) -> list[Result]:
    """Fastest first, failed rows last."""
    return sorted(found, key=lambda r: (r.error is not None, r.seconds if r.samples else 0.0))
