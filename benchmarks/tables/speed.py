"""Seconds and memory of a suite: sdlite, its peers, the embedded student and its teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.tables.machine import share
from benchmarks.tables.rows import (
    ARITHMETIC,
    RESULTS,
    Result,
    failed,
    missing,
    number,
    order,
    results,
    spread,
    table,
)


def teacher(folder: Path = RESULTS) -> list[str]:
    """The embedded student against its teacher, the same engine in each line."""
    found = {
        (r.case["model"], r.case["engine"]): r for r in results("teacher", folder) if not r.error
    }
    body = []
    for (model, engine), r in found.items():
        slow = found.get(("emoji-teacher", engine))
        if model == "emoji" and slow is not None:
            body.append(
                [
                    f"`{engine}`",
                    (
                        f"{slow.seconds * 1e3:,.0f} ({min(slow.samples) * 1e3:,.0f} to"
                        f" {max(slow.samples) * 1e3:,.0f})"
                    ),
                    (
                        f"{r.seconds * 1e3:.1f} ({min(r.samples) * 1e3:.1f} to"
                        f" {max(r.samples) * 1e3:.1f})"
                    ),
                    f"{slow.seconds / r.seconds:.0f}x",
                ]
            )
    if not body:
        return missing("teacher")
    return table(
        ["engine, fp32", "teacher, 50 guided steps, ms", "student, 4 steps, ms", "faster"], body
    )


def floats(suite: str = "emoji", folder: Path = RESULTS) -> list[str]:
    """A suite of float32 engines: seconds of an image, memory, load, first image."""
    found = [r for r in results(suite, folder) if not r.error]
    if not found:
        return missing(suite)
    body = [
        [
            f"`{r.case['engine']}`",
            str(r.case["steps"]),
            f"{r.case['guidance']:g}",
            spread(r.samples),
            number(r.median("peak_mib"), 0),
            number(r.median("load_seconds")),
            number(r.median("first_call_seconds")),
        ]
        for r in sorted(found, key=lambda r: (r.case["steps"], r.seconds))
    ]
    return table(
        ["engine, fp32", "steps", "g", "s/image", "peak MiB", "load s", "first call s"], body
    )


_PEERS = [
    "engine",
    "precision",
    "s/image",
    "x diffusers fp32",
    "peak MiB",
    "weights MB",
    "UNet s/step",
    "VAE s",
    "text s",
    "load s",
    "first call s",
    "of the limit",
    "PSNR to our fp32, dB",
    "setting",
]


def peers(suite: str = "peers-512", folder: Path = RESULTS) -> list[str]:
    """sdlite and other tools, fastest first; ours are bold."""
    found = order(results(suite, folder))
    if not found:
        return missing(suite)
    base = next((r for r in found if r.name == ("diffusers", "fp32") and not r.error), None)
    body = []
    for r in found:
        engine, precision = r.name
        if r.error:
            body.append([engine, precision, failed(r), *[""] * (len(_PEERS) - 3)])
            continue
        mark = "**" if r.ours else ""
        ratio = "" if base is None else f"{base.seconds / r.seconds:.2f}"
        body.append(
            [f"{mark}{engine}{mark}", precision, spread(r.samples), ratio, *_parts(r, folder)]
        )
    return table(_PEERS, body)


def _parts(r: Result, folder: Path) -> list[str]:
    """Memory, bytes, seconds of each stage, and how close the image is."""
    slow, step = r.seconds >= 0.2, r.stage("unet")
    return [
        number(r.median("peak_mib"), 0),
        number(r.median("bytes"), 0, 1e-6),
        number(None if step is None else step / r.case["steps"], 3 if slow else 4),
        number(r.stage("vae_decoder"), 2 if slow else 4),
        number(r.stage("text_encoder"), 3),
        number(r.median("load_seconds"), 1),
        number(r.median("first_call_seconds"), 1 if slow else 2),
        share(r, folder),
        number(r.median("psnr_to_sdlite_ort"), 1),
        r.rows[0]["setting"] if r.rows else "",
    ]


def _best(found: list[Result], ours: bool, key: Callable[[Result], float]) -> Result | None:
    return min((r for r in found if r.ours is ours), key=key, default=None)


def _seconds(r: Result) -> float:
    return r.seconds


def _memory(r: Result) -> float:
    return r.median("peak_mib") or 0.0


def verdict(suite: str = "peers-512", folder: Path = RESULTS) -> list[str]:
    """Fastest of all, fastest int8 against the best peer's int8, least memory: as measured, whoever
    wins.
    """
    found = [r for r in results(suite, folder) if not r.error]
    int8 = [r for r in found if ARITHMETIC.get(r.case["precision"]) == "int8"]
    lines = []
    for title, rows, key, unit in (
        ("Fastest", found, _seconds, "s"),
        ("Fastest in int8", int8, _seconds, "s"),
        ("Least peak memory", found, _memory, "MiB"),
    ):
        mine, other = _best(rows, True, key), _best(rows, False, key)
        if mine and other:
            a, b, digits = key(mine), key(other), 0 if unit == "MiB" else 2
            lines.append(
                f"- {title}: ours {' '.join(mine.name)} {a:.{digits}f} {unit}, best peer"
                f" {' '.join(other.name)} {b:.{digits}f} {unit}: {b / a:.2f}x."
            )
    return lines


def claim(suite: str = "peers-512", folder: Path = RESULTS) -> list[str]:
    """README's sentences: our fastest row beside the fastest and the smallest other tool, and the
    embedded student beside its teacher.
    """
    found = [r for r in results(suite, folder) if not r.error]
    mine, other = _best(found, True, _seconds), _best(found, False, _seconds)
    small = _best(found, False, _memory)
    if mine is None or other is None or small is None:
        return missing(suite)
    return [
        f"A 512 px image in {mine.seconds:.1f} s and {_memory(mine) / 1024:.1f} GiB on two CPU"
        f" cores: {other.seconds / mine.seconds:.2f} times as fast as the fastest other tool"
        f" ({other.name[0]}, {other.seconds:.1f} s), in {_memory(mine) / _memory(small):.0%} of"
        f" the memory of the smallest ({small.name[0]}). BK-SDM-Tiny's shape with random weights,"
        f" 4 steps, int8: `python -m benchmarks.run {suite}`,"
        " [all rows](docs/benchmarks.md#against-other-tools).",
        *_claim_of_the_student(folder),
    ]


def _claim_of_the_student(folder: Path) -> list[str]:
    rows = [r for r in results("teacher", folder) if not r.error]
    found = {r.case["model"]: r.seconds for r in rows if r.case["engine"] == "sdlite-ort"}
    if set(found) != {"emoji", "emoji-teacher"}:
        return []
    fast, slow = found["emoji"], found["emoji-teacher"]
    return [
        "",
        f"The embedded student `emoji` makes a 64 px image in {fast * 1e3:.0f} ms on two cores,"
        f" {slow / fast:.0f} times as fast as its teacher: `python -m benchmarks.run teacher`.",
    ]


def memory(folder: Path = RESULTS) -> list[str]:
    """Least memory of a 512 px image, decoded at once and in tiles."""
    found = [r for r in results("memory-512", folder) if not r.error]
    if not found:
        return missing("memory-512")
    body = [
        [
            f"`{r.case['engine']}`",
            f"tiles of {r.case['tile_px']} px" if r.case["tile_px"] else "at once",
            number(r.median("peak_mib"), 0),
            number((r.median("peak_mib") or 0) * 2**20, 2, 1e-9),
            spread(r.samples),
            number(r.stage("vae_decoder")),
        ]
        for r in found
    ]
    return table(
        ["engine, int8-static", "decoded", "peak MiB", "peak GB", "s/image", "VAE s"], body
    )
