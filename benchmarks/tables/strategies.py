"""The article's second table, and ours: what each way to distill gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables.rows import RESULTS, read, table
from sdlite.distill.evidence import DRAWS, judge

STRATEGIES = [  # the article's second table: strategy, fewer parameters, faster, FID
    ["feature", "40%", "2.5x", "18.2"],
    ["output", "60%", "4.0x", "22.1"],
    ["progressive", "50%", "3.2x", "16.8"],
    ["adversarial", "45%", "2.8x", "15.3"],
]
STEPS_TITLE = (
    "Fewer steps, and no guidance pass. `start` is the shipped UNet after 60,000 more images of"
    " task, output and feature losses (`train_student.py --init`): it comes from a four-step"
    " student, so its own 4 steps are better than a fresh student's would be. Strategies go on from"
    " it, each halving from the halving before:"
)
AIDS = (
    "feature + output + multi-scale",
    "feature + output + mask",
    "feature + output + channel, temperature 4 to 1",
)  # against feature + output
SCORES = {  # column -> (key of a row, factor, digits)
    "KID x1000": ("kid", 1, 1),
    "FID": ("fid", 1, 1),
    "identity@1 %": ("identity@1", 100, 1),
    "color %": ("colour", 100, 1),
    "held-out exact@1 %": ("heldout@1", 100, 1),
    "PSNR to teacher, dB": ("paired_psnr", 1, 2),
}


_HEADER = [
    "strategy",
    "UNet",
    "fewer parameters",
    "M MACs a call",
    "steps (network calls)",
    "s/image",
    "faster",
    *SCORES,
    "images",
    "minutes",
    "seeds",
]
Row = dict[str, Any]


def strategies(folder: Path = RESULTS) -> list[str]:
    """The article's second table as it stands there, and ours: each strategy of
    `benchmarks.distil`, mean and deviation over seeds.
    """
    rows = read("distil", folder)
    out = [
        "As the article has it:",
        "",
        *table(["strategy", "fewer parameters", "faster", "FID"], STRATEGIES),
        "",
    ]
    if not rows:
        return [*out, "Ours: not measured yet: run `python -m benchmarks.distil size` and `steps`."]
    size_title = "The student made smaller, sampled in 25 guided steps:"
    for which, title in (("size", size_title), ("steps", STEPS_TITLE)):
        mine = [r for r in rows if r["table"] == which]
        if mine:
            groups = _budgets(mine)
            said = [*aids(groups), ""] if which == "size" else []
            out += [title, "", *_table(mine, groups), "", *said, _note(mine), ""]
    return out[:-1]


def _table(mine: list[Row], groups: dict[tuple[str, int], list[Row]]) -> list[str]:
    fastest: dict[tuple[float, int], float] = {}  # equal networks and calls are equal work
    for r in mine:
        key = (r["parameters"], r["calls"])
        fastest[key] = min(fastest.get(key, r["seconds_per_image"]), r["seconds_per_image"])
    teacher = next((r for r in mine if r["strategy"] == "teacher"), None)
    body = []
    for (name, images), same in groups.items():
        parameters, macs, minutes = (
            float(np.median([r[k] for r in same])) for k in ("parameters", "macs", "minutes")
        )
        seconds = fastest[same[0]["parameters"], same[0]["calls"]]
        fewer = faster = ""
        if teacher is not None:
            fewer = f"{1 - parameters / teacher['parameters']:.0%}"
            faster = f"{fastest[teacher['parameters'], teacher['calls']] / seconds:.1f}x"
        calls = f"{same[0]['steps']} ({same[0]['calls']})"
        cost = [f"{macs / 1e6:,.0f}", calls, f"{seconds:.3f}", faster]
        budget = [f"{images:,}", f"{minutes:.1f}"] if images else ["", ""]
        head = [name, f"{parameters / 1e6:.1f}M", fewer]
        body.append([*head, *cost, *_scores(same), *budget, str(len(same))])
    return table(_HEADER, body)


def _scores(same: list[Row]) -> list[str]:
    """Mean and deviation over seeds of each score."""
    columns = [([r[k] * f for r in same], digits) for k, f, digits in SCORES.values()]
    return [
        f"{np.mean(v):.{d}f} ± {np.std(v, ddof=1) if len(v) > 1 else 0:.{d}f}" for v, d in columns
    ]


def _note(mine: list[Row]) -> str:
    """How a table was measured, and whether its students draw anything."""
    r = next((r for r in reversed(mine) if r["images"]), mine[-1])
    best = max((r["identity@1"] for r in mine if r["images"]), default=1.0)
    short = (
        f"No student of this budget draws recognizable images (identity@1 {best:.1%} at best): the"
        " table ranks losses, it does not promise students. "
    )
    return (short if best < DRAWS else "") + (
        f"Mean ± standard deviation over seeds; {r['prompts']} prompts and {r['heldout']}"
        " held-out ones a seed; s/image: torch, batch 1, float32, the fastest of the rows with the"
        " same network and calls. FID is biased at this N, and not comparable with the article's."
        f" Trained in {r.get('mixed_precision', 'no')}; {r['cpu']}, {r['cores']} cores;"
        f" {r['date']}, commit `{r['commit']}`, `{r['command']}`."
    )


def _budgets(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(strategy, images) -> one row a seed, of each strategy's largest budget; a seed that was
    measured twice counts once, the last time.
    """
    most = {
        name: max(r["images"] for r in rows if r["strategy"] == name)
        for name in dict.fromkeys(r["strategy"] for r in rows)
    }
    return {
        (n, i): list(
            {r["seed"]: r for r in rows if (r["strategy"], r["images"]) == (n, i)}.values()
        )
        for n, i in most.items()
    }


def aids(groups: dict[tuple[str, int], list[dict[str, Any]]]) -> list[str]:
    """Does an aid lower KID, seed by seed, by more than the seeds spread? Whoever loses is named
    too.
    """
    by_name = {name: {r["seed"]: r["kid"] for r in rows} for (name, _), rows in groups.items()}
    plain, out = by_name.get("feature + output", {}), []
    for name in (*AIDS, "feature + output"):
        against, base = (
            ("feature + output", plain) if name in AIDS else ("task", by_name.get("task", {}))
        )
        verdict = judge(base, by_name.get(name, {}))
        if verdict is not None:
            out.append(f"- {name} against {against}: {verdict}.")
    return out
