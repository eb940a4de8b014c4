"""A quantized model as a folder: graphs, tokenizer, scheduler, configurations and manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from sdlite import families
from sdlite.io import remove
from sdlite.manifest import CalibrationRow, Manifest, NetworkRow, write_manifest
from sdlite.quant.candidate import Part, Parts, Work
from sdlite.quant.gate import Comparison


def model(work: Work, parts: Parts, folder: Path) -> None:
    """Write a model that can be opened to `folder`, in place of what is there. The parts get their
    files.
    """
    source = work.pipe.artifact
    for child in folder.iterdir():
        remove(child) if child.is_dir() else child.unlink()
    index = json.dumps(families.listed_index(source.index), indent=1) + "\n"
    (folder / "model_index.json").write_text(index, encoding="utf-8")
    for part in (*source.folders, "vae_decoder", "vae_encoder"):
        if (source.folder / part).is_dir():
            source.files.part(part).copy_configs(folder / part)
    for part, built in parts.items():
        built.files = built.graph.save(folder / part / f"model.{work.precision}.onnx")
    manifest(work, parts, folder, [])


def manifest(
    work: Work,
    parts: Parts,
    folder: Path,
    results: Sequence[Comparison],
    failures: Sequence[str] = (),
) -> None:
    """Write the manifest of the model in `folder`.

    Args:
        results: the quality check on each backend.
        failures: what of it does not hold: the model is marked as failed.
    """
    own = work.pipe.artifact.required_manifest()
    out = Manifest(
        name=own.name,
        student=own.student,
        sampler=own.sampler,
        size_multiple=own.size_multiple,
        preview=own.preview,
    )
    out.variants = {work.precision: {p: _row(p, built) for p, built in parts.items()}}
    if work.precision == "int8-static":
        out.calibration = _calibration(work)
    if results:
        out.quality = {
            "against": "fp32 onnxruntime",
            "engines": {r.engine: r.to_dict() for r in results},
        }
    if failures:
        out.quality = {**(out.quality or {}), "failed": list(failures)}
    write_manifest(folder, out)


def _row(part: str, built: Part) -> NetworkRow:
    graph, *weights = [f"{part}/{f.name}" for f in built.files]
    return {
        "file": graph,
        "weights": weights,
        "opset": built.graph.proto.opset_import[0].version,
        "storage": "int8",
        "arithmetic": built.arithmetic,
        "scheme": built.scheme,
    }


def _calibration(work: Work) -> CalibrationRow:
    c = work.calibration
    return {
        "prompts_sha256": hashlib.sha256("\n".join(c.shown).encode()).hexdigest(),
        "num_prompts": len(c.shown),
        "samples": c.samples,
        "seed": c.seed,
        "num_inference_steps": c.num_inference_steps or work.pipe.defaults.num_inference_steps,
        "observer": c.observer,
    }
