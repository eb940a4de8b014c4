"""Exports of each model and profile, and what `--fuse-schedule` saves."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.tables.rows import read, table

_HEADER = [
    "model",
    "profile",
    "precision",
    "networks",
    "checked",
    "worst image PSNR / network SQNR",
    "s",
    "peak MiB + converter's",
    "tools",
    "date",
]
Row = dict[str, Any]


def exports() -> list[str]:
    """The matrix of export/README.md: the last row of each model and profile."""
    last = {(r["model"], r["profile"]): r for r in read("exports")}
    if not last:
        return ["Not measured yet: run `python -m benchmarks.export emoji`."]
    body = []
    for (model, name), r in sorted(last.items()):
        if "error" in r:
            kind, _, words = r["error"].splitlines()[0].partition(": ")
            why = f"refused: {words}" if kind == "InputError" else f"failed: {kind}: {words[:120]}"
            body.append([model, f"`{name}`", "", "", why, "", "", "", "", r["date"]])
            continue
        size = f", {r['size_px']} px" if r.get("size_px") else ""
        peaks = [p for p in (r["peak_mib"], r.get("converter_peak_mib")) if p]
        body.append(
            [
                model + size,
                f"`{name}`",
                r["precision"],
                f"{r['bytes'] / 1e6:.1f} MB",
                _checked(r),
                _closeness(r),
                f"{r['seconds']:.0f}",
                " + ".join(f"{p:,.0f}" for p in peaks),
                ", ".join(f"{k} {v}" for k, v in r["tools"].items()),
                r["date"],
            ]
        )
    return table(_HEADER, body)


def _checked(r: Row) -> str:
    """Where the networks ran, or why not."""
    how = "on the runtime"
    if r["not_run"] is not None:
        how = f"not run ({r['not_run']}); {r['checked_by']}"
    if made := r.get("picture_seconds"):
        how += f"; an image in {made['first']:.1f} s, then {np.median(made['later']):.1f} s"
    provider = r["options"].get("provider") or ("vulkan" if r["options"].get("vulkan") else "")
    return how + (f", {provider}" if provider else "")


def _closeness(r: Row) -> str:
    """The worst image and the worst network, and the worst image to the float model's."""
    parity = r["parity"]
    image = min([*(parity["psnr"] or [float("nan")]), *(parity.get("edit") or [])])
    network = min(n["sqnr"] for n in parity["networks"].values())
    to_float = f", {min(parity['reference']):.1f} dB to fp32" if parity.get("reference") else ""
    return f"{image:.1f} dB / {network:.1f} dB{to_float}"


def fused() -> list[str]:
    """What `--fuse-schedule` saves of the UNet's calls: the last row of each model, size and
    guidance.
    """
    last = {(r["model"], r["size_px"], r["steps"], r["guidance"]): r for r in read("fused")}
    spread = lambda x: f"{np.median(x):.3f} ({min(x):.3f} to {max(x):.3f})"  # noqa: E731
    body = [
        [
            model,
            f"{size} px" if size else "own",
            str(steps),
            f"{guidance:g}",
            *(spread(r["samples_seconds"][n]) for n in ("onnx-fixed", "onnx-fused")),
            f"{r['saved']:.1%}",
            f"{r['largest_difference']:.1e}",
            str(len(r["samples_seconds"]["onnx-fixed"])),
            f"{r['date']} `{r['commit']}`, {r['cpu']}",
        ]
        for (model, size, steps, guidance), r in sorted(last.items(), key=str)
    ]
    if not body:
        return ["Not measured yet: run `python -m benchmarks.fused emoji`."]
    return table(
        [
            "model",
            "image",
            "steps",
            "guidance",
            "s, one graph",
            "s, three graphs",
            "saved",
            "largest difference",
            "images",
            "measured",
        ],
        body,
    )
