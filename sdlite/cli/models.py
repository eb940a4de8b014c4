"""`sdlite models`: the embedded models, and the published ones that have a name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TypedDict

from sdlite import published
from sdlite.cli import command, terminal

EXAMPLES = """
    sdlite models
    sdlite models --json
    sdlite generate "a fox" --model bk-sdm-tiny --out fox.png"""


class Embedded(TypedDict):
    """A model that is part of the package."""

    name: str
    unet_parameters: int
    precisions: list[str]
    bytes: int


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="all of it, for programs")


def _embedded() -> Iterator[Embedded]:
    from sdlite import hub
    from sdlite.artifact import Artifact

    for name in hub.embedded_models():
        manifest = Artifact.open(hub.resolve(name)).manifest
        if manifest is None:
            continue
        yield {
            "name": name,
            "unet_parameters": manifest.student.get("unet_parameters", 0),
            "precisions": list(manifest.variants),
            "bytes": sum(f["bytes"] for f in manifest.files.values()),
        }


def _line(row: Embedded) -> str:
    return (
        f"{row['name']}: {row['unet_parameters'] / 1e6:.2f}M UNet, {', '.join(row['precisions'])},"
        f" {row['bytes'] / 1e6:.1f} MB"
    )


def _lines(row: published.Published) -> Iterator[str]:
    yield f"{row.name}: {row.about}"
    size = f"{row.unet_parameters / 1e6:.0f}M UNet"
    yield f"  {row.pinned}; {size}, family {row.family}, {row.license.name}"
    runs = [f"{m.precision} {m.seconds:.1f} s and {m.peak_mib:,} MiB" for m in row.measured]
    yield f"  {row.made_for}{'; its shape: ' if runs else ''}{', '.join(runs)}"
    if row.note:
        yield f"  {row.note}"


def _run(args: argparse.Namespace) -> None:
    rows = published.table().values()
    if args.json:
        out = {"embedded": list(_embedded()), "published": [r.describe() for r in rows]}
        terminal.write(json.dumps(out, indent=1) + "\n")
        return
    terminal.say(*map(_line, _embedded()), "", "Published, fetched from the hub when first used:")
    for row in rows:
        terminal.say(*_lines(row))
    terminal.say(
        "", "Layouts were tested with random weights; the weights themselves were not run."
    )
    for where in dict.fromkeys(m.where for r in rows for m in r.measured):
        terminal.say(f"Seconds and memory: {where}.")
    for license_ in dict.fromkeys(r.license for r in rows):
        terminal.say(f"{license_.name}: {license_.restrictions}.")


MODELS = command.Command(
    "models", "List the embedded models and the published ones.", EXAMPLES, _options, _run
)
