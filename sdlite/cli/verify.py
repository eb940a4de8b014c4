"""`sdlite verify`: every file of a model against its list."""

from __future__ import annotations

import argparse

from sdlite.cli import command, terminal
from sdlite.cli.info import opened

EXAMPLES = """
    sdlite verify my-model
    sdlite verify org/name --revision v1.0"""


def _options(p: argparse.ArgumentParser) -> None:
    command.add_model(p, default="emoji")
    command.add_revision(p)


def _run(args: argparse.Namespace) -> None:
    artifact = opened(args.model, args.revision)
    checked = artifact.verify()
    terminal.say(f"{artifact.name}: {len(checked)} files are whole and unchanged")
    if loose := artifact.loose_pickles():
        terminal.say(f"note: {loose} are pickles; sdlite never loads them")


VERIFY = command.Command(
    "verify",
    "Check every file of a model against its manifest, or of an export against its report.",
    EXAMPLES,
    _options,
    _run,
)
