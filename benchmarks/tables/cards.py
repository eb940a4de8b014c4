"""Cards of models.md: the embedded student, and the published models that run as they are."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.tables.models import EMBEDDED, latest
from benchmarks.tables.rows import read, table

# our name of a published config -> its id on the hub
PUBLISHED = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15-fp16": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sd21-base": "stabilityai/stable-diffusion-2-1-base",
    "sd-turbo": "stabilityai/sd-turbo",
    "bk-sdm-base": "nota-ai/bk-sdm-base",
    "bk-sdm-small": "nota-ai/bk-sdm-small",
    "bk-sdm-tiny": "nota-ai/bk-sdm-tiny",
    "bk-sdm-v2-tiny": "nota-ai/bk-sdm-v2-tiny",
    "tiny-sd": "segmind/tiny-sd",
    "small-sd": "segmind/small-sd",
    "lcm-dreamshaper": "SimianLuo/LCM_Dreamshaper_v7",
    "sdxs-09": "IDKiro/sdxs-512-0.9",
    "sdxs-dreamshaper": "IDKiro/sdxs-512-dreamshaper",
}
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
            f"`{hub}`",
            f"`{name}`",
            f"{min(float(last[name]['runs'][k]) for k in FLOAT):.1f}",
            f"{float(last[name]['runs']['onnxruntime fp16']):.1f}",
        ]
        for name, hub in PUBLISHED.items()
        if name in last and not isinstance(last[name].get("runs", {}).get("torch fp32", ""), str)
    ]
    refused = sorted(
        name for name, r in last.items() if "refused" in str(r.get("runs", {}).get("torch fp32"))
    )
    return [
        *table(["hub id", "config in our tests", "fp32, dB", "fp16, dB"], body),
        "",
        f"Refused in one line, before any weights are read: {', '.join(refused)}.",
    ]
