"""`sdlite quantize`: an int8 model from a float one, written when the quality check holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlite import arguments
from sdlite.cli import command, terminal
from sdlite.errors import InputError
from sdlite.manifest import PRECISIONS

EXAMPLES = """
    sdlite quantize my-model --precision int8-static --prompts prompts.txt --out my-int8
    sdlite quantize emoji --precision int8-dynamic --psnr-mean 40 --out emoji-int8"""


def _options(p: argparse.ArgumentParser) -> None:
    command.add_model(p)
    integers = [name for name in PRECISIONS if name.startswith("int8")]
    p.add_argument("--precision", required=True, help=command.one_of(integers))
    command.add_out_folder(p)
    command.add_threads(p)
    p.add_argument("--quiet", action="store_true", help="no progress bar, no report")
    _calibration_options(p)
    _check_options(p)
    group = command.sampling(p, "sampling, for calibration and check")
    command.add_size(group)


def _calibration_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("calibration of int8-static")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt a line; default: those that the model brings",
    )
    command.whole(group, "--samples", "calibration images", 1, default=16)
    group.add_argument("--observer", default="mse", help="min-max, percentile or mse")
    group.add_argument(
        "--scheme",
        default="u8s7",
        help="u8s7 (exact on every x86), u8s8 (VNNI or ARM only) or s8s8 (TensorRT)",
    )


def _check_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("quality check against the float model")
    command.whole(group, "--gate-prompts", "prompts that are compared", 1, default=16)
    for name, value, low, high, text in (
        ("--psnr-mean", 36.0, 0, None, "least PSNR on average, in dB"),
        ("--psnr-worst", 30.0, 0, None, "least PSNR of every image, in dB"),
        ("--ssim-mean", 0.98, -1, 1, "least structural similarity on average"),
        ("--max-float", 0.3, 0, 1, "share of the weights that may go back to float"),
    ):
        command.number(group, name, text, low, high, default=value)
    group.add_argument(
        "--engine",
        action="append",
        metavar="BACKEND",
        help="check on this backend; repeat for more; default: all that are installed",
    )
    command.add_keep_failed(group, "model")


def _run(args: argparse.Namespace) -> None:
    import sdlite

    quantize = sdlite.quantize  # says which extra is missing
    from sdlite.quant import Calibration, Gate, read_prompts, table

    size = _size(args.height, args.width)
    calibration = Calibration(
        prompts=read_prompts(args.prompts) if args.prompts else None,
        samples=args.samples,
        num_inference_steps=args.steps,
        observer=args.observer,
        size=size,
    )
    gate = Gate(
        psnr_mean=args.psnr_mean,
        psnr_worst=args.psnr_worst,
        ssim_mean=args.ssim_mean,
        num_prompts=args.gate_prompts,
        num_inference_steps=args.steps,
        size=size,
        max_float=args.max_float,
        engines=args.engine,
    )
    report = quantize(
        args.model,
        args.precision,
        out=args.out,
        calibration=calibration,
        gate=gate,
        scheme=args.scheme,
        threads=args.threads,
        progress=not args.quiet,
        sampler=args.sampler,
        keep_failed=args.keep_failed,
    )
    if not args.quiet:
        terminal.say(*table(terminal.shown(report)).split("\n"))
    size_mb = sum(n["bytes"] for n in report["networks"].values()) / 1e6
    terminal.say(f"wrote {args.out} ({size_mb:.2f} MB of weights)")


def _size(height: int | None, width: int | None) -> tuple[int, int] | None:
    if height is None and width is None:
        return None
    if height is None or width is None:
        raise InputError("--height and --width go together.")
    return arguments.size("size", (height, width))


QUANTIZE = command.Command(
    "quantize",
    "Make an int8 model from a float one, compare the two, and write it if the quality check"
    " holds.",
    EXAMPLES,
    _options,
    _run,
)
