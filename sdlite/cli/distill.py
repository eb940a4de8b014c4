"""`sdlite distill run | doctor | advise`: train a student, find out why it would not train, or get
a recipe for a device. `sdlite distill RECIPE` is `sdlite distill run RECIPE`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdlite.cli import command, terminal
from sdlite.errors import InputError, MissingExtraError
from sdlite.io import check_file, scratch, write

RUN_EXAMPLES = """
    sdlite distill run recipe.toml --teacher my-sd --data images/ --out run --max-minutes 120
    sdlite distill run recipe.toml --teacher my-sd --data images/ --out run --resume
    sdlite distill run recipe.toml --teacher my-sd --data images/ --dry-run"""
DOCTOR_EXAMPLES = """
    sdlite distill doctor recipe.toml --teacher my-sd --data images/"""
ADVISE_EXAMPLES = """
    sdlite distill advise --device phone --memory 2 --minutes 240 --out recipe.toml
    sdlite distill advise --wish speed --teacher my-sd"""


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    """Says which extra is missing."""
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("sdlite"):
            raise
        raise MissingExtraError(
            f"distilling needs {e.name!r}: pip install 'sdlite[distill]'."
        ) from e


def _recipe_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", metavar="RECIPE", help="TOML file; `sdlite distill advise` writes one")
    p.add_argument(
        "--teacher",
        type=Path,
        required=True,
        metavar="DIR",
        help="diffusers folder of SD-1.x, 2.x or SDXL",
    )
    p.add_argument(
        "--data",
        required=True,
        help="WebDataset shards, folder of images with captions, or .txt of prompts",
    )
    p.add_argument(
        "--no-export",
        action="store_true",
        help="leave the diffusers folder of the last stage, make no ONNX graphs",
    )


def _run_options(p: argparse.ArgumentParser) -> None:
    _recipe_options(p)
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the run")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    text = "stop with a checkpoint after this time"
    command.number(p, "--max-minutes", text, 0, metavar="MIN")
    p.add_argument("--dry-run", action="store_true", help="show what would be done")


def _run_wrong(args: argparse.Namespace) -> str:
    return "" if args.out or args.dry_run else "distill run needs --out (or --dry-run)"


def _run(args: argparse.Namespace) -> None:
    with _extra():
        from accelerate import PartialState

        from sdlite.distill.recipe import Recipe
        from sdlite.distill.run import plan, run
        from sdlite.distill.teacher import Teacher

    read = Recipe.load(args.recipe)
    if args.dry_run:
        terminal.say(*plan(read, Teacher(args.teacher)).split("\n"))
        return
    done = run(
        read,
        teacher=args.teacher,
        data=args.data,
        out=args.out,
        resume=args.resume,
        max_minutes=args.max_minutes,
        export=not args.no_export,
    )
    stopped = f"stopped after {done['seconds'] / 60:.1f} min; go on with --resume"
    terminal.say("finished" if done["finished"] else stopped)
    PartialState().destroy_process_group()  # of launched processes, which end together


def _doctor(args: argparse.Namespace) -> None:
    with _extra():
        from sdlite.distill.doctor import examine
        from sdlite.distill.recipe import Recipe

    read = Recipe.load(args.recipe)
    with scratch("doctor") as aside:
        latents = aside / "latents.safetensors"
        found = examine(read, args.teacher, args.data, latents, export=not args.no_export)
    terminal.say(*found)
    if failed := sum(f.level == "fail" for f in found):
        raise InputError(f"{failed} of {len(found)} checks failed; see above.")


def _advise_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--device", default="cpu", help="where the student will run: cpu, gpu, phone or browser"
    )
    text = "memory of that device for the model"
    command.number(p, "--memory", text, default=4.0, metavar="GB")
    text = "time for training, on this machine"
    command.number(p, "--minutes", text, default=600.0, metavar="MIN")
    p.add_argument("--wish", default="balanced", help="quality, balanced or speed")
    p.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="diffusers folder of SD-1.x, 2.x or SDXL; default: SD-1.4's shape",
    )
    text = "of training on this machine, from a run's stats.jsonl"
    command.number(p, "--images-per-second", text)
    p.add_argument("--out", type=Path, metavar="FILE", help="recipe file; default: printed")


def _advise(args: argparse.Namespace) -> None:
    with _extra():
        from sdlite.distill.advise import advise

    if args.out is not None:
        if os.path.lexists(args.out):
            raise InputError(f"--out {args.out} exists; choose another file or remove it.")
        check_file(args.out)
    said = advise(
        device=args.device,
        memory_gb=args.memory,
        minutes=args.minutes,
        wish=args.wish,
        teacher=args.teacher,
        images_per_second=args.images_per_second,
    )
    if args.out is None:
        terminal.say(*str(said).removesuffix("\n").split("\n"))
        return
    write(args.out, str(said))
    terminal.say(*said.reasons, f"then: {said.then}", f"wrote {args.out}")


SUBCOMMANDS = (
    command.Command(
        "run",
        "Train a student by a recipe and write it as a model.",
        RUN_EXAMPLES,
        _run_options,
        _run,
        _run_wrong,
    ),
    command.Command(
        "doctor",
        "Find out why a recipe would not train, with this teacher and data.",
        DOCTOR_EXAMPLES,
        _recipe_options,
        _doctor,
    ),
    command.Command(
        "advise",
        "Write a recipe for a device, its memory, a time budget and a wish, with reasons.",
        ADVISE_EXAMPLES,
        _advise_options,
        _advise,
    ),
)


def _options(p: argparse.ArgumentParser) -> None:
    parsers = p.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for subcommand in SUBCOMMANDS:
        command.add(parsers, subcommand)


def with_subcommand(words: Sequence[str]) -> list[str]:
    """The words of a command line, `distill RECIPE ...` as `distill run RECIPE ...`."""
    named = {"-h", "--help", *(c.name for c in SUBCOMMANDS)}
    command_name, *rest = words
    return [command_name, *rest] if not rest or rest[0] in named else [command_name, "run", *rest]


DISTILL = command.Command(
    "distill",
    "Train a student of a teacher: run a recipe, examine it, or get one.",
    RUN_EXAMPLES + DOCTOR_EXAMPLES + ADVISE_EXAMPLES,
    _options,
    _run,
)
