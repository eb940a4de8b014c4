"""The command line: `sdlite COMMAND`, one file a command, each of which calls one public function.

A file defines a `Command` (its name, help, examples, options, and what runs it); `COMMANDS` lists
them, and nothing else does. Exit codes: 0 done; 1 an error or an interrupt, explained in one line
on stderr; 2 wrong usage; 141 nobody reads what is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sdlite._version import __version__
from sdlite.cli.bench import BENCH
from sdlite.cli.command import Command, Parser, add
from sdlite.cli.convert import CONVERT
from sdlite.cli.distill import DISTILL, with_subcommand
from sdlite.cli.export import EXPORT
from sdlite.cli.generate import GENERATE
from sdlite.cli.info import INFO
from sdlite.cli.models import MODELS
from sdlite.cli.outcome import exit_code, nobody_reads
from sdlite.cli.quantize import QUANTIZE
from sdlite.cli.terminal import prepared
from sdlite.cli.verify import VERIFY

COMMANDS: tuple[Command, ...] = (
    GENERATE,
    CONVERT,
    INFO,
    VERIFY,
    MODELS,
    QUANTIZE,
    EXPORT,
    BENCH,
    DISTILL,
)


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, or with the options of one: reading the registries that options
    list takes longer than the rest of `sdlite --help`.
    """
    out = Parser(
        prog="sdlite",
        description="Run compressed Stable Diffusion students, and make, check and export them.",
        epilog='examples:\n  sdlite generate "a red apple" --out apple.png\n'
        "  sdlite generate --help     options and examples of a command",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--version", action="version", version=f"sdlite {__version__}")
    commands = out.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands"
    )
    for command in COMMANDS:
        add(commands, command, with_options=only in (None, command.name))
    return out


def read(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with `run`, the function that takes them, and `wrote`, the images that are
    whole so far.

    Raises:
        SystemExit: --help, --version or wrong usage. InputError: a number out of its range.
    """
    given = next(iter(argv), "")
    words = with_subcommand(argv) if given == DISTILL.name else argv
    known = {c.name for c in COMMANDS}
    every = parser(given if given in known else "")
    args, unknown = every.parse_known_args(words, argparse.Namespace(wrote=[]))
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if wrong := args.check(args):
        args.parser.error(wrong)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code.

    Args:
        argv: the words after `sdlite`; default: those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with prepared():
        try:
            return exit_code(lambda: read(words))
        except SystemExit:
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                return nobody_reads()
            raise
