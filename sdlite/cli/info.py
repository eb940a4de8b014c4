"""`sdlite info`: what a model is, what it holds and what it would run on."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from sdlite.cli import command, terminal
from sdlite.errors import SdliteError

if TYPE_CHECKING:
    from sdlite.artifact import Artifact

EXAMPLES = """
    sdlite info emoji
    sdlite info org/name --revision v1.0 --json"""
Entry = dict[str, object]  # of a network: file, weights, storage, arithmetic, ... and bytes


class Description(TypedDict):
    """What `sdlite info --json` prints."""

    name: str
    format: str | None
    student: NotRequired[Mapping[str, object]]
    calls: NotRequired[str]
    sampler: NotRequired[Mapping[str, object]]
    export: NotRequired[Mapping[str, Any] | None]
    runs_on: NotRequired[Mapping[str, str]]
    variants: NotRequired[Mapping[str, Mapping[str, Entry]]]
    files: NotRequired[Mapping[str, object]]
    quality: NotRequired[Mapping[str, object] | None]
    calibration: NotRequired[Mapping[str, object] | None]
    total_bytes: NotRequired[int]
    not_supported: NotRequired[str]


def opened(model: str, revision: str | None) -> Artifact:
    """The model by name, of kinds that sdlite does not run too."""
    from sdlite import hub
    from sdlite.artifact import Artifact

    return Artifact.open(hub.resolve(model, revision), any_kind=True)


def describe(artifact: Artifact) -> Description:
    """What a model is, what it holds, and what each of its precisions would run on here."""
    if refusal := artifact.refusal():
        return {"name": artifact.name, "format": None, "not_supported": refusal}
    m, export = artifact.manifest, artifact.export
    held = list(m.variants) if m else [export.precision] if export else ["fp32"]
    out: Description = {
        "name": artifact.name,
        "format": m.format if m else None,
        "student": artifact.student,
        "sampler": _sampler(artifact),
        "calls": _calls(artifact),
        "export": export.describe() if export else None,
        "runs_on": _runs_on(artifact, held),
        "variants": {},
    }
    if m is None:
        return {**out, "files": {}}
    total = sum(f["bytes"] for f in m.files.values())
    variants = {
        precision: {
            part: {**row, "bytes": artifact.bytes_of([row["file"], *row["weights"]])}
            for part, row in parts.items()
        }
        for precision, parts in m.variants.items()
    }
    more: Description = {**out, "variants": variants, "quality": m.quality}
    return {**more, "calibration": m.calibration, "total_bytes": total}


def _calls(artifact: Artifact) -> str:
    """What a call has, or may have, that other models do not take; "" where it is nothing."""
    from sdlite import families

    if families.inpaints(artifact.config("unet"), artifact.config("vae")):
        return "made for inpainting: a call has image and mask_image"
    return "a call may have control_image" if artifact.family.controls else ""


def _sampler(artifact: Artifact) -> Mapping[str, object]:
    """What a call samples with; `note` says what to do where sdlite has no sampler that does as the
    model's scheduler.
    """
    try:
        out: dict[str, object] = dict(artifact.samples_with)
    except SdliteError as e:
        out = {"name": None, **dataclasses.asdict(artifact.sampler_defaults), "note": str(e)}
    if artifact.listing:
        predicts = artifact.config("scheduler").get("prediction_type")
        # such a file may hold -Infinity, which JSON has not
        out = {"prediction_type": predicts if isinstance(predicts, str) else None, **out}
    return out


def _runs_on(artifact: Artifact, precisions: Sequence[str]) -> dict[str, str]:
    """Precision -> what `backend="auto"` would choose here and why, or why nothing."""
    from sdlite import backends

    out = {}
    for precision in precisions:
        try:
            name, reason = backends.choose(artifact, precision)
            out[precision] = f"{name} ({reason})"
        except SdliteError as e:
            out[precision] = str(e)
    return out


def _run(args: argparse.Namespace) -> None:
    artifact = opened(args.model, args.revision)
    info = describe(artifact)
    if args.json:  # ASCII, so that no name reaches a terminal as it is
        terminal.write(json.dumps(info, indent=1) + "\n")
        return
    terminal.say(f"{info['name']}  ({artifact.folder})")
    if "not_supported" in info:
        terminal.say(f"  {info['not_supported']}")
        return
    if artifact.failed:
        terminal.say(f"  failed its quality check: {'; '.join(artifact.failed)}")
    terminal.say(*(f"  {line}" for line in _lines(info)))


def _lines(info: Description) -> Iterator[str]:
    if info["export"]:
        yield from _export_lines(info["export"])
    elif info["format"] is None:
        yield "plain diffusers folder"
    for key, value in info["student"].items():
        yield f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}"
    yield "sampler: " + ", ".join(f"{k}={v}" for k, v in info["sampler"].items())
    if info["calls"]:
        yield f"calls: {info['calls']}"
    for precision, parts in info["variants"].items():
        sizes = [f"{part} {_megabytes(e['bytes'])}" for part, e in parts.items()]
        yield f"{precision}: {', '.join(sizes)}"
    for precision, words in info["runs_on"].items():
        yield f"{precision} runs on: {words}"


def _megabytes(count: object) -> str:
    return f"{count / 1e6:.2f} MB" if isinstance(count, int) else "?"


def _export_lines(export: Mapping[str, Any]) -> Iterator[str]:
    size = export["size"]
    shape = "any size" if size is None else f"{size[0]}x{size[1]} px"
    if export["batch"] is not None:
        shape += f", batch {export['batch']}"
    tools = ", ".join(f"{k} {v}" for k, v in (export["tools"] or {}).items())
    yield (
        f"export for {export['target']} (profile {export['profile']}): {export['precision']},"
        f" {shape}; made with {tools}"
    )
    psnr = export["psnr"]
    closest = f", images at least {min(psnr):.1f} dB PSNR to the model's" if psnr else ""
    yield f"checked by {export['checked_by']}{closest}"
    for part, why in (export["not_run"] or {}).items():
        yield f"not run, {part}: {why}"
    for part, row in export["networks"].items():
        given = ", ".join(f"{t['name']} {t['dtype']} {t['shape']}" for t in row["inputs"])
        made = f"{row['output']['name']} {row['output']['shape']}"
        yield f"{part}: {row['file']}; {given} -> {made}"


def _options(p: argparse.ArgumentParser) -> None:
    command.add_model(p, default="emoji")
    command.add_revision(p)
    p.add_argument("--json", action="store_true", help="all of it, for programs")


INFO = command.Command(
    "info",
    "Show what a model is, what it holds and what it would run on.",
    EXAMPLES,
    _options,
    _run,
)
