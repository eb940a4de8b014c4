"""What a quantization says of itself: the report, its lines for the screen, the grid of images, and
where both go when the gate fails.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdlite import images
from sdlite._version import __version__
from sdlite.artifact import Artifact
from sdlite.errors import SdliteError
from sdlite.io import remove, write_json
from sdlite.metrics import psnr
from sdlite.pipeline import Pipeline
from sdlite.quant.calibrate import Calibration
from sdlite.quant.gate import Comparison, Gate

if TYPE_CHECKING:
    from PIL.Image import Image

REPORT = "quantize-report.json"
GRID = "quantize-grid.png"
SHOWN = 16  # pairs in the grid
_SIDE = 128  # pixels of an image in the grid, at least
_TEXT = 14


def report(
    pipe: Pipeline,
    precision: str,
    calibration: Calibration,
    gate: Gate,
    parts: dict[str, Any],
    results: list[Comparison],
    *,
    back_to_float: list[str],
    search: list[dict[str, Any]],
    warnings: list[str],
) -> dict[str, Any]:
    """The report as it is written to `REPORT`.

    Args:
        pipe: the float pipeline.
        parts: part -> what was built.
        warnings: what is known before; the sizes are looked at here.
    """
    kept = ("scheme", "bytes", "float_bytes", "float_share", "rewrites", "layers")
    return {
        "sdlite": __version__,
        "model": pipe.artifact.name,
        "precision": precision,
        "holds": not search[-1]["failures"],
        "warnings": [*warnings, *_growth(precision, parts)],
        "engine_of_reference": pipe.report.engine,
        "calibration": dataclasses.asdict(calibration) if precision == "int8-static" else {},
        "gate": dataclasses.asdict(gate),
        "engines": [r.to_dict() for r in results],
        "back_to_float": back_to_float,
        "search": search,
        "grid": {
            "file": GRID,
            "columns": ["float", precision],
            "engines": [pipe.report.backend, results[0].engine],
            "pairs": [{"prompt": p, "seed": s} for p, s in _pairs(gate)],
        },
        "networks": {p: {k: built[k] for k in kept if k in built} for p, built in parts.items()},
    }


def _pairs(gate: Gate) -> list[tuple[str, int]]:
    return [(p, s) for p in gate.prompts or () for s in gate.seeds][:SHOWN]


def _growth(precision: str, parts: dict[str, Any]) -> list[str]:
    """A warning where the integer model is not smaller than the float one."""
    made, floats = (sum(built[k] for built in parts.values()) for k in ("bytes", "float_bytes"))
    if made < floats:
        return []
    return [
        f"{precision} has {made / 1e6:.1f} MB of weights, the float model {floats / 1e6:.1f} MB:"
        " what stays float outweighs what became integer; int8-static makes convolutions integer"
        " too."
    ]


def write(folder: Path, report: dict[str, Any], reference: np.ndarray, made: np.ndarray) -> None:
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


def table(report: dict[str, Any]) -> str:
    """The report in a few lines, for the screen."""
    lines = [f"{report['model']}: {report['precision']}"]
    for p, n in report["networks"].items():
        worst = min(
            (r for r in n["layers"] if r["sqnr"] is not None), key=lambda r: r["sqnr"], default=None
        )
        lines.append(
            f"  {p:<13} {n['float_bytes'] / 1e6:8.2f} -> {n['bytes'] / 1e6:8.2f} MB"
            f" ({n['bytes'] / n['float_bytes']:.2f}x), {n['float_share']:6.1%} of the weights in"
            " float" + (f"; worst layer {worst['name']} {worst['sqnr']:.1f} dB" if worst else "")
        )
    for e in report["engines"]:
        networks = ", ".join(
            f"{p} {'inf' if v is None or v == float('inf') else f'{v:.1f}'} dB"
            for p, v in e["networks"].items()
        )
        worst_psnr = "inf" if e["psnr_worst"] is None else f"{e['psnr_worst']:.1f}"
        lines.append(
            f"  {e['engine']}: {e['pictures']} pictures, PSNR mean {e['psnr_mean']:.1f} worst"
            f" {worst_psnr} dB, SSIM {e['ssim_mean']:.4f}, structure distance"
            f" {e['structure_distance_mean']:.4f}; {networks}"
        )
    if report["back_to_float"]:
        lines.append(f"  back to float: {', '.join(report['back_to_float'])}")
    lines += [f"  warning: {w}" for w in report["warnings"]]
    return "\n".join(lines)
