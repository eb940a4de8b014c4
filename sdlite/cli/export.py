"""`sdlite export`: a model for a device's runtime, checked against the original."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlite.cli import command, terminal
from sdlite.errors import MissingExtraError

EXAMPLES = """
    sdlite export --list
    sdlite export emoji --target ncnn-fp16 --out emoji-ncnn
    sdlite export my-int8 --target web-int8 --reference my-model --out site"""


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", nargs="?", help=command.MODEL)
    p.add_argument("--list", action="store_true", help="show the built-in profiles")
    p.add_argument("--target", metavar="PROFILE", help="built-in profile or a profile.toml")
    command.add_out_folder(p, required=False)
    command.add_threads(p)
    p.add_argument(
        "--fuse-schedule",
        action="store_true",
        help="onnx, fixed shapes: compute what depends on the step or the prompt alone only once",
    )
    group = p.add_argument_group("quality check")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="images that are compared, one prompt a line; default: two that the model brings",
    )
    group.add_argument(
        "--reference",
        metavar="MODEL",
        help="the float model that MODEL was quantized from: its images are compared too",
    )
    command.add_keep_failed(group, "export")
    command.sampling(p, "sampling, for the check; the export keeps the sampler")


def _wrong(args: argparse.Namespace) -> str:
    if args.list or (args.model and args.target and args.out):
        return ""
    return "export needs MODEL, --target and --out (or --list)"


def _run(args: argparse.Namespace) -> None:
    if args.list:
        _list()
        return
    try:
        from sdlite.exporters.export import export, table
        from sdlite.quant.calibrate import read_prompts
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("sdlite"):
            raise
        raise MissingExtraError(
            f"exporting needs {e.name!r}: pip install 'sdlite[quantize]'."
        ) from e
    report = export(
        args.model,
        args.out,
        target=args.target,
        prompts=read_prompts(args.prompts) if args.prompts else None,
        num_inference_steps=args.steps,
        fuse_schedule=args.fuse_schedule,
        reference=args.reference,
        threads=args.threads,
        sampler=args.sampler,
        keep_failed=args.keep_failed,
    )
    terminal.say(*table(terminal.shown(report)).split("\n"))
    size_mb = sum(f["bytes"] for f in report["files"].values()) / 1e6
    terminal.say(f"wrote {args.out} ({size_mb:.2f} MB of networks)")


def _list() -> None:
    from sdlite.exporters import profile

    for name, p in profile.builtin().items():
        shape = "any shape" if p.dynamic else f"batch {p.batch}, fixed"
        terminal.say(f"{name:<18} {p.precision:<12} {shape:<15} {p.about}")


EXPORT = command.Command(
    "export",
    "Export a model to a device's runtime and check it against the original.",
    EXAMPLES,
    _options,
    _run,
    _wrong,
)
