"""Plots of committed rows, as SVGs that are equal for equal data and matplotlib."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.tables.rows import RESULTS, order, read, results

PLOTS = RESULTS.parent / "plots"


def _points(folder: Path) -> dict[str, Any]:
    """What each plot shows, as plain data: {} where nothing was measured."""
    quality = {(r["precision"], r["backend"]): r for r in read("quality", folder)}
    backend = {"sdlite-ort": "onnxruntime", "sdlite-openvino": "openvino"}
    emoji = [
        (f"{r.name[0]} {r.name[1]}", r.seconds, quality[k]["mean"]["identity@1"])
        for r in results("int8-emoji", folder)
        if not r.error
        and (k := (r.case["precision"].replace("fp32", "fp16"), backend.get(r.case["engine"], "")))
        in quality
    ]
    memory = [
        (" ".join(r.name), r.median("peak_mib"), r.seconds)
        for r in order(results("peers-512", folder))
        if not r.error
    ]
    scale = [
        (r.case, r.seconds, r.median("peak_mib")) for r in results("scaling", folder) if not r.error
    ]
    return {"speed-quality": emoji, "memory": memory, "scaling": scale}


def digest(points: Any) -> str:
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()[:16]


def plots(folder: Path = RESULTS) -> dict[str, str]:
    """name -> digest of the data of each plot that has any."""
    return {name: digest(p) for name, p in _points(folder).items() if p}


def stale_plots(folder: Path = RESULTS, out: Path = PLOTS) -> list[str]:
    """Plots whose file is not drawn from the committed results; no matplotlib needed: the data's
    digest stands in the file.
    """
    want = plots(folder)
    there = {p.stem: p.read_text() for p in out.glob("*.svg")}
    return sorted(
        {n for n, d in want.items() if f"data {d}" not in there.get(n, "")}
        | (set(there) - set(want))
    )


def draw(folder: Path = RESULTS, out: Path = PLOTS) -> list[Path]:
    """SVGs that are equal for equal data and matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "sdlite", "svg.fonttype": "none", "figure.figsize": (7, 4), "font.size": 9}
    )
    import matplotlib.pyplot as plt

    out.mkdir(exist_ok=True)
    made = []
    for name, points in _points(folder).items():
        if not points:
            (out / f"{name}.svg").unlink(missing_ok=True)
            continue
        {"speed-quality": _draw_quality, "memory": _draw_memory, "scaling": _draw_scaling}[name](
            plt, points
        )
        path = out / f"{name}.svg"
        plt.tight_layout()
        plt.savefig(
            path,
            metadata={
                "Date": None,
                "Creator": "benchmarks.report",
                "Description": f"data {digest(points)}",
            },
        )
        plt.close("all")
        made.append(path)
    return made


def _draw_quality(plt: Any, points: list[tuple[str, float, float]]) -> None:
    _, ax = plt.subplots()
    for label, seconds, quality in points:
        ax.plot(seconds * 1e3, quality * 100, "o")
        ax.annotate(
            label, (seconds * 1e3, quality * 100), textcoords="offset points", xytext=(5, 4)
        )
    ax.set(
        xlabel="ms an image (64 px, 4 steps)",
        ylabel="identity@1, %",
        title="Speed against quality, embedded student",
    )


def _draw_memory(plt: Any, points: list[tuple[str, float, float]]) -> None:
    _, ax = plt.subplots()
    names = [p[0] for p in points][::-1]
    ax.barh(
        names,
        [p[1] for p in points][::-1],
        color=["C0" if n.startswith("sdlite") else "0.7" for n in names],
    )
    ax.set(xlabel="peak MiB, BK-Tiny shape, 512 px, 4 steps (blue: ours; fastest on top)")


def _draw_scaling(plt: Any, points: list[tuple[dict[str, Any], float, float]]) -> None:
    _, (left, middle, right) = plt.subplots(1, 3)
    base = {"steps": 4, "batch": 1, "size_px": 512, "threads": 2, "tile_px": 0, "pipelines": 1}

    def along(key: str, at: int = 1, **fixed: int) -> tuple[list[float], list[float]]:
        want = {**base, **fixed}
        found = sorted(
            (p[0][key], p[at])
            for p in points
            if all(p[0][k] == v for k, v in want.items() if k != key)
        )
        return [x for x, _ in found], [y for _, y in found]

    left.plot(*along("steps"), "o-")
    left.set(xlabel="steps", ylabel="s", ylim=(0, None))
    middle.plot(*along("batch"), "o-")
    middle.set(xlabel="batch", ylabel="s", ylim=(0, None))
    right.plot(*along("size_px", 2), "o-", label="at once")
    right.plot(*along("size_px", 2, tile_px=256), "s--", label="tiles of 256 px")
    right.set(xlabel="px", ylabel="peak MiB", ylim=(0, None))
    right.legend()
