"""The report of an export: what it was made of, with what, how near it is to the model, and the
SHA-256 of every file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from sdlite import images
from sdlite.exporters.described import NetworkRow
from sdlite.exporters.parity import Figures, Parity, Recording
from sdlite.exporters.targets.base import Facts, Seconds, version
from sdlite.io import read_json, sha256, write_json
from sdlite.manifest import MANIFEST, REPORT, FileRow
from sdlite.quant import reports

GRID = "export-grid.png"  # the model's images and the export's, where the quality check fails


class ParityRow(TypedDict):
    """The figures of the quality check, in dB; see `sdlite.exporters.parity.Parity`. `pictures`:
    how many images were compared.
    """

    networks: dict[str, Figures]
    psnr: list[float] | None
    edit: list[float] | None
    own: list[float] | None
    reference: list[float] | None
    pictures: int


class ExportReport(TypedDict):
    """What `export` returns and `export-report.json` holds.

    `source`: precision of the graphs it was made of. `size`: (height, width) in pixels where shapes
    are fixed. `files` are what the target's converter made, `companions` the rest. `not_run`: part
    -> why the runtime did not run it here, `left_out`: part -> why it is not exported, of those
    that the model need not have. `picture_seconds`: of the target's own images.
    `failed`: what of the quality check does not hold.
    """

    sdlite: str
    model: str
    profile: dict[str, object]
    tools: dict[str, str]
    opened_by: list[str]
    source: str
    opset: int
    networks: dict[str, NetworkRow]
    left_out: dict[str, str]
    size: list[int] | None
    size_multiple: int
    files: dict[str, FileRow]
    companions: dict[str, FileRow]
    checked_by: str
    not_run: dict[str, str]
    parity: ParityRow
    calibration: Facts | None
    picture_seconds: Seconds | None
    seconds: float
    peak_mib: float | None
    converter_peak_mib: float | None
    failed: NotRequired[list[str]]


def parity_row(parity: Parity, count: int) -> ParityRow:
    """The figures of `count` images."""
    return {
        "networks": parity.networks,
        "psnr": parity.psnr,
        "edit": parity.edit,
        "own": parity.own,
        "reference": parity.reference,
        "pictures": count,
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Distribution -> version, of those that are installed."""
    return {p: v for p in packages if (v := version(p)) is not None}


def hashes(folder: Path, made: Iterable[Path]) -> tuple[dict[str, FileRow], dict[str, FileRow]]:
    """(`files`, `companions`): those in `made`, and the rest of the folder."""
    every: dict[str, FileRow] = {
        f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256(f)}
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }
    networks = {f.relative_to(folder).as_posix() for f in made}
    return (
        {k: v for k, v in every.items() if k in networks},
        {k: v for k, v in every.items() if k not in networks},
    )


def keep_failed(
    out: Path, candidate: Path | None, report: ExportReport, recording: Recording, parity: Parity
) -> str:
    """Write the report and the images of an export that fails its quality check to `out`.failed,
    and the export itself where it is asked for; see `sdlite.quant.reports.keep_failed`.

    Returns:
        Where they are, in words.
    """

    def write(folder: Path) -> None:
        if parity.images is not None:
            columns = ["model", str(report["profile"]["name"])]
            pairs = list(zip(recording.prompts, itertools.count(), strict=False))
            grid = reports.grid(recording.images, parity.images, columns, pairs)
            images.save(grid, folder / GRID)
        write_json(folder / REPORT, report)

    if candidate is not None:
        write_json(candidate / REPORT, report)
        if (candidate / MANIFEST).exists():
            manifest = read_json(candidate / MANIFEST)
            write_json(candidate / MANIFEST, {**manifest, "quality": {"failed": report["failed"]}})
    return reports.keep_failed(out, write, candidate)


def table(report: ExportReport) -> str:
    """The report in a few lines."""
    parity = report["parity"]
    tools = ", ".join(f"{k} {v}" for k, v in report["tools"].items())
    lines = [
        f"{report['model']} -> {report['profile']['name']} ({tools}), checked by"
        f" {report['checked_by']}"
    ]
    lines += [
        f"  {p:<13} SQNR {n['sqnr']:.1f} dB, largest error {n['max_error']:.3g}, {n['calls']}"
        f" call{'s' * (n['calls'] > 1)}, {_megabytes(report, p):.1f} MB"
        for p, n in parity["networks"].items()
    ]
    of = f"of {parity['pictures']}"
    if parity["psnr"]:
        lines.append(f"  images        PSNR {min(parity['psnr']):.1f} dB at worst {of}")
    if parity["edit"]:
        lines.append(f"  edited image  PSNR {parity['edit'][0]:.1f} dB")
    if parity["own"]:
        lines.append(f"  from prompts  PSNR {min(parity['own']):.1f} dB at worst, by itself")
    if parity["reference"]:
        lines.append(f"  to reference  PSNR {min(parity['reference']):.1f} dB at worst")
    if seconds := report["picture_seconds"]:
        lines.append(_time(seconds))
    kept = {p: row["kept"] for p, row in report["networks"].items() if "kept" in row}
    lines += [f"  {p:<13} {why}" for p, why in kept.items()]
    lines += [f"  left out      {p}: {why}" for p, why in report["left_out"].items()]
    lines += [f"  not run       {p}: {why}" for p, why in report["not_run"].items()]
    return "\n".join(lines)


def _megabytes(report: ExportReport, part: str) -> float:
    """Of a network's files."""
    return sum(f["bytes"] for n, f in report["files"].items() if n.split("/")[0] == part) / 1e6


def _time(seconds: Seconds) -> str:
    later = ", ".join(f"{s:.2f}" for s in seconds["later"])
    return (
        f"  seconds       {seconds['first']:.2f} to the first image with loading, then {later} an"
        f" image, {seconds['steps']} steps"
    )
