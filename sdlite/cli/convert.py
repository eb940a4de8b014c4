"""`sdlite convert`: a diffusers folder to a model that onnxruntime and OpenVINO run."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlite.cli import command, terminal

EXAMPLES = """
    sdlite convert my-diffusers-folder --out my-model
    sdlite convert my-diffusers-folder --prompts prompts.txt --steps 20 --out my-model
    sdlite generate "a fox" --model my-model --out fox.png"""


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "source", metavar="SOURCE", help="diffusers SD-1.x or SD-2.x folder, or hub id org/name"
    )
    command.add_revision(p)
    command.add_out_folder(p)
    p.add_argument("--name", help="what reports call the model; default: the folder's name")
    p.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt a line: what quantize will calibrate with, unless told otherwise",
    )
    group = command.sampling(p, "defaults of a call, kept in the model")
    command.add_guidance(group)


def _run(args: argparse.Namespace) -> None:
    import sdlite

    convert = sdlite.convert  # says which extra is missing
    from sdlite import hub
    from sdlite.io import check_out

    check_out(args.out)
    given = {
        "name": args.sampler,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
    }
    out = convert(
        hub.resolve(args.source, args.revision),
        args.out,
        name=args.name or "",
        sampler={k: v for k, v in given.items() if v is not None},
        calibration_prompts=_prompts(args.prompts),
    )
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    terminal.say(f"wrote {out} ({size / 1e6:.2f} MB)")


def _prompts(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    from sdlite.quant import read_prompts

    return read_prompts(path)


CONVERT = command.Command(
    "convert", "Make a model with ONNX graphs of a diffusers folder.", EXAMPLES, _options, _run
)
