"""What a command is, and the options that several commands have."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never, TypeVar

from sdlite import arguments
from sdlite.errors import printable

P = TypeVar("P", bound=argparse.ArgumentParser)
Options = argparse._ActionsContainer  # a parser, or a group of its options
MODEL = "a name that `sdlite models` lists, a folder, or a hub id org/name"


@dataclass(frozen=True)
class Command:
    """A command of `sdlite`, or of a command that has commands of its own.

    Attributes:
        help: one sentence.
        examples: shell lines, as `--help` ends with them.
        options: adds the arguments to a parser.
        run: does the work; raises `SdliteError` or `OSError` where it fails.
        check: what is wrong with the arguments together, "" where nothing is.
    """

    name: str
    help: str
    examples: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    check: Callable[[argparse.Namespace], str] = field(default=lambda args: "")


class Parser(argparse.ArgumentParser):
    """Its errors of usage print no control characters."""

    def error(self, message: str) -> Never:
        super().error(printable(message))


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one and the text does not say it; keeps the lines of
    examples.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def add(
    parsers: argparse._SubParsersAction[P], command: Command, with_options: bool = True
) -> None:
    """Add a command to the commands of a parser."""
    shown = textwrap.indent(textwrap.dedent(command.examples).strip("\n"), "  ")
    made = parsers.add_parser(
        command.name,
        help=command.help,
        description=textwrap.fill(command.help, 100),
        epilog=f"examples:\n{shown}",
        formatter_class=Help,
    )
    made.set_defaults(run=command.run, check=command.check, parser=made)
    if with_options:
        command.options(made)


class _Whole(argparse.Action):
    """A whole number of `low` to `high`; another one is an `InputError`, with exit code 1."""

    low: int | None = None
    high: int | None = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        value = arguments.integer(self.option_strings[0], values, self.low, self.high)
        setattr(namespace, self.dest, value)


class _Number(argparse.Action):
    """A finite number of `low` to `high`; another one is an `InputError`, with exit code 1."""

    low: float | None = None
    high: float | None = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        value = arguments.number(self.option_strings[0], values, self.low, self.high)
        setattr(namespace, self.dest, value)


def whole(
    options: Options,
    name: str,
    text: str,
    low: int | None = None,
    high: int | None = None,
    default: int | None = None,
    metavar: str = "N",
) -> None:
    """Add an option that takes a whole number of `low` to `high`, both included."""
    action = options.add_argument(
        name, type=int, action=_Whole, help=text, default=default, metavar=metavar
    )
    assert isinstance(action, _Whole)
    action.low, action.high = low, high


def number(
    options: Options,
    name: str,
    text: str,
    low: float | None = None,
    high: float | None = None,
    default: float | None = None,
    metavar: str = "X",
) -> None:
    """Add an option that takes a finite number of `low` to `high`, both included."""
    action = options.add_argument(
        name, type=float, action=_Number, help=text, default=default, metavar=metavar
    )
    assert isinstance(action, _Number)
    action.low, action.high = low, high


def numbers(options: Options, name: str, text: str) -> None:
    """Add an option that takes numbers with commas between them."""
    options.add_argument(name, type=numbers_of, metavar="X,X", help=text)


def numbers_of(text: str) -> list[float]:
    return [int(x) if x.strip().isdigit() else float(x) for x in text.split(",")]


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add MODEL, which may be left out where there is a default."""
    if default is None:
        parser.add_argument("model", metavar="MODEL", help=MODEL)
    else:
        parser.add_argument("model", metavar="MODEL", nargs="?", default=default, help=MODEL)


def add_revision(options: Options) -> None:
    """Add --revision."""
    options.add_argument(
        "--revision",
        help="branch, tag or commit of a hub id; default: its main branch, or a name's commit",
    )


def add_threads(options: Options) -> None:
    """Add --threads."""
    text = "CPU threads; default: the backend's choice"
    whole(options, "--threads", text, 1, arguments.most_threads())


def add_size(options: Options) -> None:
    """Add --height and --width, in pixels."""
    for name in ("--height", "--width"):
        whole(options, name, "pixels", high=arguments.MOST_PIXELS, metavar="PX")


def sampling(parser: argparse.ArgumentParser, what: str = "sampling") -> Options:
    """Add a group of options whose defaults are the model's own: --steps and --sampler; for others
    to add to.
    """
    from sdlite.sampling import SAMPLERS

    group = parser.add_argument_group(what, "What is left out is the model's own.")
    whole(group, "--steps", "sampling steps", 1)
    group.add_argument("--sampler", metavar="NAME", help="one of " + ", ".join(SAMPLERS))
    return group


def add_guidance(options: Options) -> None:
    """Add --guidance."""
    number(options, "--guidance", "guidance scale; 0 to 1 is no guidance", 0)


def add_keep_failed(options: Options, what: str) -> None:
    """Add --keep-failed."""
    options.add_argument(
        "--keep-failed",
        action="store_true",
        help=f"where the quality check fails, keep the {what} in OUT.failed/model",
    )


def add_out_folder(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --out, a folder."""
    parser.add_argument(
        "--out", type=Path, required=required, metavar="DIR", help="new or empty folder"
    )


def one_of(names: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b or c"."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
