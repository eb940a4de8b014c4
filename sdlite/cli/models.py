"""`sdlite models`: the embedded models."""

from __future__ import annotations

import argparse

from sdlite.cli import command, terminal

EXAMPLES = """
    sdlite models"""


def _options(p: argparse.ArgumentParser) -> None:
    """It takes none."""


def _run(args: argparse.Namespace) -> None:
    from sdlite import hub
    from sdlite.artifact import Artifact

    for name in hub.embedded_models():
        manifest = Artifact.open(hub.resolve(name)).manifest
        if manifest is None:
            continue
        parameters = manifest.student.get("unet_parameters", 0)
        size = sum(f["bytes"] for f in manifest.files.values())
        terminal.say(
            f"{name}: {parameters / 1e6:.2f}M UNet, {', '.join(manifest.variants)},"
            f" {size / 1e6:.1f} MB"
        )


MODELS = command.Command("models", "List the embedded models.", EXAMPLES, _options, _run)
