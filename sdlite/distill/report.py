"""`report.md` of a distillation run: what was trained, its curves, its images; made from the
files that the stages left.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from sdlite.distill.students import parameters
from sdlite.errors import MissingExtraError
from sdlite.io import replacing
from sdlite.io import write as write_text

if TYPE_CHECKING:
    from sdlite.distill.latent_cache import CachedLatents
    from sdlite.distill.recipe import Recipe
    from sdlite.distill.teacher import Teacher

REPORT, CURVES = "report.md", "curves.png"
SHOWN = 20  # of the samples that were left out
# what a row says besides its loss and the terms of it
BESIDE = ("step", "images", "lr", "images_per_second", "grad_norm", "gpu_peak_mib")


def statistics(folder: Path) -> list[dict[str, float]]:
    """Rows of a stage's `stats.jsonl`, one for each step: what a resumed run wrote again replaces
    what it had written before.
    """
    path = folder / "stats.jsonl"
    if not path.exists():
        return []
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            row["step"], row["loss"]
        except (
            ValueError,
            TypeError,
            KeyError,
        ):  # a line that was being written when the process was killed
            continue
        rows = {k: v for k, v in rows.items() if k < row["step"]} | {row["step"]: row}
    return list(rows.values())


def curves(stages: Sequence[Path], path: Path) -> list[Path]:
    """One panel for each stage: its loss and terms over the images seen. Returns the stages that
    had anything to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise MissingExtraError(
            "the report's curves need matplotlib: pip install 'sdlite[distill]'."
        ) from e

    drawn = [(s, rows) for s in stages if (rows := statistics(s))]
    if not drawn:
        return []
    figure = Figure(figsize=(7, 2.6 * len(drawn)), layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
    for axes, (stage, rows) in zip(panels, drawn, strict=True):
        terms = [k for k in rows[0] if k not in BESIDE]
        positive = all(row[k] > 0 for row in rows for k in terms)
        for k in terms:
            axes.plot(
                [r["images"] for r in rows],
                [r[k] for r in rows],
                label=k,
                linewidth=1.8 if k == "loss" else 1.0,
            )
        axes.set_yscale("log" if positive else "linear")
        axes.set_title(stage.name, loc="left", fontsize=10)
        axes.set_xlabel("images", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    with replacing(path) as tmp:
        figure.savefig(tmp, format="png", dpi=120)
    return [s for s, _ in drawn]


def write(
    out: Path,
    title: str,
    about: dict[str, str],
    stages: Sequence[Path],
    finished: bool,
    left_out: dict[str, str],
) -> Path:
    """Write `out/report.md` and `out/curves.png`.

    Args:
        about: what to say first, name -> value.
        stages: folders of `fit`, in order; those without statistics are named as not begun.
        left_out: samples that were not used, name -> why; the first ones are listed.
    """
    drawn = curves(stages, out / CURVES)
    lines = [
        f"# {title}",
        "",
        "Finished." if finished else "Stopped before its end; go on with `--resume`.",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in about.items()), ""]
    lines += [
        "| stage | images | loss: first, last, least | images/s | learning rate at the end |",
        "|---|---|---|---|---|",
    ]
    for stage in stages:
        rows = statistics(stage)
        if not rows:
            lines.append(f"| {stage.name} | not begun | | | |")
            continue
        losses = [r["loss"] for r in rows]
        speeds = sorted(r["images_per_second"] for r in rows)
        lines.append(
            f"| {stage.name} | {rows[-1]['images']:,} | {losses[0]:.4g}, {losses[-1]:.4g},"
            f" {min(losses):.4g} | {speeds[len(speeds) // 2]:.1f} | {rows[-1]['lr']:.2g} |"
        )
    lines += [
        "",
        (
            "The loss is a running mean over about 20 steps; images/s is the median over the rows"
            " of `stats.jsonl`."
        ),
        "",
    ]
    if drawn:
        lines += [f"![loss of each stage]({CURVES})", ""]
    for stage in stages:
        images = sorted(stage.glob("sample-*.png"))
        if images:
            lines += [
                f"## {stage.name}",
                "",
                (f"![images at the end of {stage.name}]({images[-1].relative_to(out).as_posix()})"),
                "",
            ]
            earlier = ", ".join(
                f"[{p.stem.removeprefix('sample-')}]({p.relative_to(out).as_posix()})"
                for p in images[:-1]
            )
            lines += [f"Earlier, by step: {earlier}", ""] if earlier else []
    if left_out:
        lines += ["## Left out", "", f"{len(left_out):,} samples, all in skipped.json:", ""]
        lines += [f"- `{key}`: {why}" for key, why in list(left_out.items())[:SHOWN]]
        lines += ["- ...", ""] if len(left_out) > SHOWN else [""]
    path = out / REPORT
    write_text(path, "\n".join(lines))
    return path


def about_run(
    recipe: Recipe, taught: Teacher, student: nn.Module, source: CachedLatents, data: Path
) -> dict[str, str]:
    """The report's first table."""
    mine, theirs = parameters(student), parameters(taught.unet)
    return {
        "student": f"{mine:,} UNet parameters, {mine / theirs:.1%} of the teacher's {theirs:,}",
        "teacher": taught.artifact.name,
        "data": (
            f"{len(source):,} images of {data.name}, {len(source.skipped)} left out,"
            f" {taught.shown_size}"
        ),
        "recipe": ", ".join(s.name for s in recipe.stages),
    }
