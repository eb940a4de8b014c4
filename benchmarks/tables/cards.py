"""Cards of models.md: the embedded student, and the published models that run as they are."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.tables.models import EMBEDDED, latest
from benchmarks.tables.rows import read, table
from sdlite import published as names

FLOAT = ("torch fp32", "onnxruntime fp32", "openvino fp32")


def embedded() -> list[str]:
    """A card for each embedded model: what it is, what it holds, how good it is."""
    out: list[str] = []
    for path in sorted(EMBEDDED.glob("*/sdlite.json")):
        manifest = read_manifest(path.parent.name)
        out += [f"## {manifest['name']}", "", *_facts(manifest), "", *_quality(), ""]
    return out[:-1]


def read_manifest(name: str) -> dict[str, Any]:
    """The manifest of an embedded model."""
    found: dict[str, Any] = json.loads((EMBEDDED / name / "sdlite.json").read_text())
    return found


def _facts(manifest: dict[str, Any]) -> list[str]:
    student, sampler = manifest["student"], manifest["sampler"]
    size = sum(f["bytes"] for f in manifest["files"].values()) / 1e6
    counts = ("unet_parameters", "text_encoder_parameters", "vae_parameters")
    unet, text, vae = (f"{student[k] / 1e6:.2f}M" for k in counts)
    facts = {
        "Makes": "64 px emoji from English prompts, on ten background colors",
        "Size": f"UNet {unet}, text encoder {text}, VAE {vae}; {size:.1f} MB with both precisions",
        "Precisions": f"{', '.join(manifest['variants'])}; int8 by `sdlite quantize emoji`",
        "Defaults": f"{sampler['name']}, {sampler['num_inference_steps']} steps,"
        f" guidance {sampler['guidance_scale']:g}",
        "Architecture": student["architecture"],
        "Teacher": student["teacher"],
        "Recipe": student["recipe"],
        "Data": student["data"].replace("pictures", "images"),
        "Training images": f"{student.get('training_images') or 0:,}",
        "License": student["licence"],
        "Limits": "fine detail (letters, the rungs of a ladder, windows) is blurred; one image a"
        " caption was seen in training, so a seed changes little",
    }
    return [*table(["", ""], [[f"**{k}**", v] for k, v in facts.items()])]


def _quality() -> list[str]:
    rows = {
        (r["model"], r["precision"], r["backend"]): r
        for r in latest("quality")
        if (r["model"], r["steps"]) in (("student", 4), ("teacher", 50))
    }
    shown = {
        "student, fp16": ("student", "fp16", "onnxruntime"),
        "student, int8-static": ("student", "int8-static", "onnxruntime"),
        "teacher, 50 guided steps": ("teacher", "fp32", "torch"),
    }
    body = [
        [title, *(f"{rows[key]['mean'][m] * f:.1f}" for m, f in _MEASURES.values())]
        for title, key in shown.items()
        if key in rows
    ]
    return [
        *table(["", *_MEASURES], body),
        "",
        "Identity is how often the nearest real emoji is the prompted one; every row, with"
        " deviations and definitions, is in [docs/benchmarks.md](docs/benchmarks.md#quality).",
    ]


_MEASURES = {
    "identity, %": ("identity@1", 100),
    "background color, %": ("colour", 100),
    "KID x1000": ("kid", 1),
}


def published() -> list[str]:
    """A line for each published model that runs as it is, and those that are refused."""
    last = {r["model"]: r for r in read("published")}
    body = [
        [
            f"`{row.name}`",
            f"`{row.repo}`",
            row.made_for,
            f"{row.unet_parameters / 1e6:.0f}",
            row.license.name,
            f"{min(float(last[row.layout]['runs'][k]) for k in FLOAT):.1f}",
            f"{float(last[row.layout]['runs']['onnxruntime fp16']):.1f}",
        ]
        for row in names.table().values()
        if row.layout in last
        and not isinstance(last[row.layout].get("runs", {}).get("torch fp32", ""), str)
    ]
    head = ["name", "hub id", "made for", "UNet, M", "license", "fp32, dB", "fp16, dB"]
    refused = sorted(
        name for name, r in last.items() if "refused" in str(r.get("runs", {}).get("torch fp32"))
    )
    return [
        *table(head, body),
        "",
        f"Refused in one line, before any weights are read: {', '.join(refused)}.",
    ]
