"""The limit of this CPU, scaling, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables.rows import (
    ARITHMETIC,
    NAMES,
    RESULTS,
    Result,
    failed,
    last_run,
    missing,
    number,
    read,
    results,
    spread,
    table,
)


def peaks(threads: int, folder: Path = RESULTS) -> dict[tuple[str, str], float]:
    """(dtype, op) -> the highest operations per second measured."""
    out: dict[tuple[str, str], float] = {}
    for r in last_run(read("roofline", folder)):
        if r["kind"] == "peak" and r["threads"] == threads and "error" not in r:
            key = (r["dtype"], r["op"])
            out[key] = max(out.get(key, 0.0), r["gops"] * 1e9)
    return out


def limit_seconds(case: dict[str, Any], folder: Path = RESULTS) -> float | None:
    """Least seconds of a call by this CPU's peaks, or None where the shape or the peak was not
    measured.
    """
    best, dtype = peaks(case["threads"], folder), ARITHMETIC.get(case["precision"], "float32")
    demand = {
        r["part"]: r
        for r in read("roofline", folder)
        if r["kind"] == "demand"
        and f"shape:{r['shape']}" == case["model"]
        and r["size_px"] == case["size_px"]
    }
    if not demand or not {(dtype, "conv"), (dtype, "matmul")} <= set(best):
        return None
    rows = case["batch"] * (1 if case["guidance"] == 1 else 2)
    calls = {"text_encoder": rows, "unet": rows * case["steps"], "vae_decoder": case["batch"]}
    return sum(
        n * sum(demand[p][op] / best[dtype, op] for op in ("conv", "matmul"))
        for p, n in calls.items()
    )


def share(r: Result, folder: Path = RESULTS) -> str:
    limit = limit_seconds(r.case, folder)
    return "" if limit is None or r.case.get("pipelines", 1) > 1 else f"{limit / r.seconds:.0%}"


def line_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """slope, intercept and the largest relative residual of a least-squares line."""
    slope, intercept = np.polyfit(x, y, 1)
    fitted = slope * np.asarray(x) + intercept
    return float(slope), float(intercept), float(np.max(np.abs(fitted - y) / np.asarray(y)))


def scaling(folder: Path = RESULTS) -> list[str]:
    found = [r for r in results("scaling", folder) if not r.error]
    if not found:
        return missing("scaling")
    base = {"steps": 4, "batch": 1, "size_px": 512, "threads": 2, "tile_px": 0, "pipelines": 1}
    body, lines = [], []
    for r in results("scaling", folder):
        c = r.case
        what = (
            ", ".join(f"{k.removesuffix('_px')} {c[k]}" for k in base if c[k] != base[k]) or "base"
        )
        if r.error:
            body.append([what, failed(r), "", "", "", ""])
            continue
        body.append(
            [
                what,
                spread(r.samples),
                number(r.stage("unet")),
                number(r.stage("vae_decoder")),
                number(r.images_per_second, 3),
                number(r.median("peak_mib"), 0),
            ]
        )
    steps = [r for r in found if all(r.case[k] == v for k, v in base.items() if k != "steps")]
    if len(steps) > 2:
        slope, intercept, worst = line_fit(
            [r.case["steps"] for r in steps], [r.seconds for r in steps]
        )
        lines = [
            (
                f"Seconds against steps: {slope:.3f} s a step + {intercept:.3f} s (text, VAE, the"
                f" rest); largest residual {worst:.0%}."
            ),
            "",
        ]
    c = found[0].case
    lines += [
        (
            f"{NAMES.get(c['model'], c['model'])}, {c['engine']} {c['precision']}, 512 px, 4 steps,"
            " batch 1, 2 threads, decoded at once; one thing changed a row."
        ),
        "",
    ]
    return lines + table(["changed", "s/call", "UNet s", "VAE s", "images/s", "peak MiB"], body)


def roofline(folder: Path = RESULTS) -> list[str]:
    rows = [r for r in last_run(read("roofline", folder)) if r["kind"] == "peak"]
    if not rows:
        return ["Not measured yet: run `python -m benchmarks.roofline`."]
    body = []
    for threads in sorted({r["threads"] for r in rows}):
        best = peaks(threads, folder)
        for dtype in ("float32", "bfloat16", "int8"):
            failed = next(
                (
                    r["error"]
                    for r in rows
                    if r["dtype"] == dtype and r["threads"] == threads and "error" in r
                ),
                "",
            )
            cells = [
                number(best.get((dtype, op)), 0, 1e-9) or f"failed: {failed[:80]}"
                for op in ("matmul", "conv")
            ]
            body.append(
                [str(threads), dtype, "openvino" if dtype == "int8" else "torch (oneDNN)", *cells]
            )
    return [
        *table(["threads", "arithmetic", "by", "matmul GOPS", "3x3 convolution GOPS"], body),
        "",
        (
            f"{rows[-1]['cpu']}; {rows[-1]['date']}, commit `{rows[-1]['commit']}`. Definitions:"
            " `benchmarks/roofline.py`."
        ),
    ]


def profiles(folder: Path = RESULTS) -> list[str]:
    rows = {
        (r["model"], r["engine"], r["precision"], r["size_px"]): r
        for r in read("profile", folder)
        if r["kind"] == "profile"
    }
    if not rows:
        return ["Not measured yet: run `python -m benchmarks.profile shape:bk-tiny`."]
    from benchmarks.profile import table as stages

    out: list[str] = []
    for (model, engine, precision, px), r in rows.items():
        out += [
            (
                f"{NAMES.get(model, model)}, {px} px, {r['steps']} steps, {engine} {precision},"
                f" {r['threads']} threads ({r['date']}, `{r['commit']}`):"
            ),
            "",
            *stages(r),
            "",
        ]
    return out[:-1]
