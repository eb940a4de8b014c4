"""What a quantization says of itself: the report, its lines for the screen, the grid of images, and
where both go when the gate fails.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from sdlite import images
from sdlite._version import __version__
from sdlite.artifact import Artifact
from sdlite.errors import SdliteError
from sdlite.io import remove, write_json
from sdlite.metrics import psnr
from sdlite.quant.candidate import Candidate, LayerRow, Parts, SearchRow, Work
from sdlite.quant.gate import Gate

if TYPE_CHECKING:
    from PIL.Image import Image

REPORT = "quantize-report.json"
GRID = "quantize-grid.png"
SHOWN = 16  # pairs in the grid
_SIDE = 128  # pixels of an image in the grid, at least
_TEXT = 14


class NetworkResult(TypedDict):
    """What the report says of one network; sizes are bytes of weights."""

    scheme: str
    bytes: int
    float_bytes: int
    float_share: float
    rewrites: dict[str, object]
    layers: list[LayerRow]


class Pair(TypedDict):
    """One pair of images in the grid."""

    prompt: str
    seed: int


class Grid(TypedDict):
    """Where the grid is and what it shows."""

    file: str
    columns: list[str]
    engines: list[str]
    pairs: list[Pair]


class Report(TypedDict):
    """What a quantization says of itself, as `quantize-report.json` holds it.

    `holds` is whether the gate does. `engines` are the comparisons, one for each backend.
    `search` has a row for each candidate; `back_to_float` are the layers of the last one.
    """

    sdlite: str
    model: str
    precision: str
    holds: bool
    warnings: list[str]
    engine_of_reference: str
    calibration: dict[str, Any]
    gate: dict[str, Any]
    engines: list[dict[str, Any]]
    back_to_float: list[str]
    search: list[SearchRow]
    grid: Grid
    networks: dict[str, NetworkResult]


def report(work: Work, found: Candidate, search: Sequence[SearchRow]) -> Report:
    """The report as it is written to `REPORT`.

    Args:
        found: the last candidate.
        search: a row for each of them.
    """
    pipe, precision, networks = work.pipe, work.precision, _networks(found.parts)
    calibration = dataclasses.asdict(work.calibration) if precision == "int8-static" else {}
    return {
        "sdlite": __version__,
        "model": pipe.artifact.name,
        "precision": precision,
        "holds": not found.failures,
        "warnings": [*work.warnings, *_growth(precision, networks)],
        "engine_of_reference": pipe.report.engine,
        "calibration": calibration,
        "gate": dataclasses.asdict(work.gate),
        "engines": [r.to_dict() for r in found.comparisons],
        "back_to_float": found.back,
        "search": list(search),
        "grid": {
            "file": GRID,
            "columns": ["float", precision],
            "engines": [pipe.report.backend, found.comparisons[0].engine],
            "pairs": [{"prompt": p, "seed": s} for p, s in _pairs(work.gate)],
        },
        "networks": networks,
    }


def _networks(parts: Parts) -> dict[str, NetworkResult]:
    return {
        p: {
            "scheme": built.scheme,
            "bytes": built.bytes,
            "float_bytes": built.float_bytes,
            "float_share": built.float_share,
            "rewrites": built.rewrites,
            "layers": built.layers,
        }
        for p, built in parts.items()
    }


def _pairs(gate: Gate) -> list[tuple[str, int]]:
    return [(p, s) for p in gate.shown for s in gate.seeds][:SHOWN]


def _growth(precision: str, networks: Mapping[str, NetworkResult]) -> list[str]:
    """A warning where the integer model is not smaller than the float one."""
    made = sum(n["bytes"] for n in networks.values())
    floats = sum(n["float_bytes"] for n in networks.values())
    if made < floats:
        return []
    return [
        f"{precision} has {made / 1e6:.1f} MB of weights, the float model {floats / 1e6:.1f} MB:"
        " what stays float outweighs what became integer; int8-static makes convolutions integer"
        " too."
    ]


def write(folder: Path, report: Report, reference: np.ndarray, made: np.ndarray) -> None:
    """The grid, then the report, each whole or not at all."""
    columns = report["grid"]["columns"]
    pairs = [(x["prompt"], x["seed"]) for x in report["grid"]["pairs"]]
    images.save(
        grid(reference, made, columns, pairs), folder / GRID, {"columns": " | ".join(columns)}
    )
    write_json(folder / REPORT, report)


def keep_failed(out: Path, write: Callable[[Path], None], candidate: Path | None = None) -> str:
    """What is known of a model that was not written, beside it in `out`.failed. A later failure of
    the same `out` takes its place.

    Args:
        write: writes report and images into the folder that it is given.
        candidate: the model's folder, whose manifest or report says that it failed; it is moved to
            `out`.failed/model.

    Returns:
        Where it is, in words, or why it could not be written.
    """
    real = Path(os.path.realpath(out))
    folder = real.with_name(f"{real.name}.failed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
    except OSError as e:
        return f"its report could not be written either ({folder}: {e.strerror or e})"
    said = f"its report and images are in {folder}"
    if candidate is None:
        return f"{said}, and keep_failed keeps the model too"
    try:
        _move(candidate, folder / "model")
    except OSError as e:
        return f"{said}; the model could not be kept ({e.filename or folder}: {e.strerror or e})"
    return f"{said}, and the model, marked as failed, in {folder / 'model'}"


def _move(candidate: Path, place: Path) -> None:
    """Move a failed model to its place, which may hold one that failed before, and nothing else.

    Raises:
        OSError: it holds something else, or cannot be written.
    """
    if place.exists():
        try:
            failed = Artifact.open(place, any_kind=True).failed
        except SdliteError:
            failed = []
        if not failed:
            raise FileExistsError(errno.EEXIST, "it holds something else", str(place))
        remove(place)
    shutil.move(candidate, place)


def grid(
    reference: np.ndarray,
    made: np.ndarray,
    columns: Sequence[str],
    pairs: Sequence[tuple[str, int]],
) -> Image:
    """Images in pairs, at most four in a row: the columns' names on top, and over each pair its
    prompt, seed and PSNR.

    Args:
        reference, made: uint8 (N, H, W, 3).
        pairs: prompt and seed of the first of them, those that are shown.
    """
    from PIL import Image, ImageDraw, ImageFont

    h, w = reference.shape[1:3]
    zoom = max(1, -(-_SIDE // min(h, w)))
    h, w, line = h * zoom, w * zoom, _TEXT + 6
    across = min(4, len(pairs))
    step_x, cell_x, cell_y = w + 2, 2 * w + 14, h + 2 * line + 6
    out = Image.new("RGB", (across * cell_x, line + -(-len(pairs) // across) * cell_y), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(_TEXT)

    def text(x: int, y: int, words: str, width: int) -> None:
        if draw.textlength(words, font) > width:
            while words and draw.textlength(words + "...", font) > width:
                words = words[:-1]
            words += "..."
        draw.text((x, y), words, "black", font)

    for i in range(across):
        for j, name in enumerate(columns):
            text(i * cell_x + j * step_x, 2, name, w)
    for i, ((prompt, seed), a, b) in enumerate(zip(pairs, reference, made, strict=False)):
        x, y = i % across * cell_x, line + i // across * cell_y
        text(x, y, repr(prompt), 2 * w)
        text(x, y + line - 2, f"seed {seed}, {psnr(a, b):.1f} dB", 2 * w)
        for j, pixels in enumerate((a, b)):
            scaled = Image.fromarray(pixels).resize((w, h), Image.Resampling.NEAREST)
            out.paste(scaled, (x + j * step_x, y + 2 * line))
    return out


def table(report: Report) -> str:
    """The report in a few lines, for the screen."""
    lines = [f"{report['model']}: {report['precision']}"]
    lines += [_network_line(p, n) for p, n in report["networks"].items()]
    lines += [_backend_line(e) for e in report["engines"]]
    if report["back_to_float"]:
        lines.append(f"  back to float: {', '.join(report['back_to_float'])}")
    lines += [f"  warning: {w}" for w in report["warnings"]]
    return "\n".join(lines)


def _network_line(part: str, n: NetworkResult) -> str:
    """Sizes of a network, and the layer that loses most."""
    ratios = [(r["sqnr"], r["name"]) for r in n["layers"] if r["sqnr"] is not None]
    worst = "; worst layer {1} {0:.1f} dB".format(*min(ratios)) if ratios else ""
    return (
        f"  {part:<13} {n['float_bytes'] / 1e6:8.2f} -> {n['bytes'] / 1e6:8.2f} MB"
        f" ({n['bytes'] / n['float_bytes']:.2f}x), {n['float_share']:6.1%} of the weights in"
        f" float{worst}"
    )


def _backend_line(e: Mapping[str, Any]) -> str:
    """How close the images of one backend are."""
    networks = ", ".join(f"{p} {_decibels(v)} dB" for p, v in e["networks"].items())
    return (
        f"  {e['engine']}: {e['pictures']} images, PSNR mean {e['psnr_mean']:.1f} worst"
        f" {_decibels(e['psnr_worst'])} dB, SSIM {e['ssim_mean']:.4f}, structure distance"
        f" {e['structure_distance_mean']:.4f}; {networks}"
    )


def _decibels(value: float | None) -> str:
    """None is what JSON holds of infinity."""
    return "inf" if value is None or value == float("inf") else f"{value:.1f}"
