"""Markdown of what was tried to break sdlite: hostile files, kills, threads and soaks, out of their
committed rows.
"""

from __future__ import annotations

from typing import Any

from benchmarks.hostile.__main__ import table as hostile_table
from benchmarks.tables.rows import read, table

Row = dict[str, Any]


def _of_last_commit(rows: list[Row], key: str) -> dict[str, list[Row]]:
    """Value of `key` -> its rows of the commit that it was measured at last."""
    last = {r[key]: r["commit"] for r in rows}
    out: dict[str, list[Row]] = {}
    for r in rows:
        if r["commit"] == last[r[key]]:
            out.setdefault(r[key], []).append(r)
    return out


def hostile() -> list[str]:
    """Bad models and changed files: kind x how they ended."""
    return hostile_table(read("hostile"))


def kills() -> list[str]:
    """Command x what was left behind, of the commit that it was measured at last."""
    body = []
    for command, rows in _of_last_commit(read("kills"), "command").items():
        faults = [str(sum(len(r[k]) for r in rows)) for k in ("lost", "wrong", "left")]
        signals = sum(sum(r["signals"].values()) for r in rows)
        tried = [str(sum(r["kills"] for r in rows)), str(signals)]
        body.append([f"`{command}`", *tried, *faults, f"`{rows[0]['commit']}`"])
    head = [
        "command",
        "kill -9",
        "signals",
        "lost",
        "taken for whole",
        "left by the next run",
        "commit",
    ]
    return table(head, body)


def threads() -> list[str]:
    """Case x calls by 2, 8 and 32 threads that gave another image than alone, of every run."""
    cases: dict[str, list[Row]] = {}
    for r in read("threads"):
        cases.setdefault(r["case"], []).append(r)
    body = []
    for case, rows in cases.items():
        sums = [f"{sum(r[k] for r in rows):,}" for k in ("calls", "wrong", "errors")]
        body.append(
            [case, *sums, ", ".join(f"`{c}`" for c in dict.fromkeys(r["commit"] for r in rows))]
        )
    return table(["case", "calls", "another image", "errors", "commits"], body)


def soak() -> list[str]:
    """Backend x memory over many calls of mixed sizes, and around a large one."""
    body = []
    for backend, rows in _of_last_commit(read("soak"), "backend").items():
        r = rows[-1]
        levels, large = list(r["rss_mib"].values()), r["large"]
        ends = [str(levels[len(levels) // 2]), str(levels[-1])]
        around = [str(large[k]) for k in ("before", "held", "after", "closed")]
        calls = [f"{r['calls']:,}", str(r["shapes"])]
        body.append([backend, *calls, *ends, *around, f"`{r['commit']}`"])
    said = _compilations(_of_last_commit(read("soak"), "backend").get("openvino", []))
    head = ["backend", "calls", "shapes", "MiB half way", "MiB at the end", "before a 1024 px call"]
    return [*table([*head, "held by it", "after small calls", "closed", "commit"], body), *said]


def _compilations(rows: list[dict[str, Any]]) -> list[str]:
    """What compiling leaves behind in OpenVINO, when the last row says it."""
    levels = list(rows[-1].get("compilations", {}).values()) if rows else []
    if not levels:
        return []
    return [
        "",
        "OpenVINO keeps the compiled graphs of the last eight shapes of each network, and its"
        f" memory is mostly theirs. When one is kept, {20 * len(levels)} compilations of the UNet"
        f" leave it at {min(levels)} to {max(levels)} MiB.",
    ]
