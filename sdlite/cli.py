"""The command line: `sdlite generate | quantize | export | distill | bench | info | verify |
models`. Each command calls one public function.

Exit codes: 0 done; 1 an error or an interrupt, explained in one line on stderr; 2 wrong usage; 141
nobody reads what is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io as streams
import json
import logging
import os
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Never

from sdlite import arguments
from sdlite._version import __version__
from sdlite.errors import InputError, MissingExtraError, SdliteError, printable
from sdlite.io import WORK, check_file, scratch, write

FORMATS = (".png", ".jpg", ".jpeg", ".webp")
ADVISE: dict[str, Any] = {
    "device": "cpu",
    "memory_gb": 4.0,
    "minutes": 600.0,
    "wish": "balanced",
}  # what `distill advise` takes when not said


# option -> what is accepted: whole numbers, and others. What depends on the model is checked where
# it is known.
WHOLE: dict[str, tuple[int | None, int | None]] = {
    "threads": (1, arguments.most_threads()),
    "steps": (1, None),
    "seed": (0, arguments.SEEDS),
    "num": (1, arguments.MOST_IMAGES),
    "height": (None, arguments.MOST_PIXELS),
    "width": (None, arguments.MOST_PIXELS),
    "vae_tile_size": (None, arguments.MOST_PIXELS),
    "samples": (1, None),
    "gate_prompts": (1, None),
    "batch": (1, arguments.MOST_IMAGES),
}
NUMBERS: dict[str, tuple[float | None, float | None]] = {
    "guidance": (0, None),
    "psnr_mean": (0, None),
    "psnr_worst": (0, None),
    "ssim_mean": (-1, 1),
    "max_float": (0, 1),
    "seconds": (0, None),
    "max_minutes": (0, None),
    "memory": (None, None),
    "minutes": (None, None),
    "images_per_second": (None, None),
}
PRINTED = "what is printed"  # in place of a file's name
MODEL = "embedded name, folder, or hub id org/name"
REVISION = "branch, tag or commit of a hub id; default: its main branch"
THREADS = "CPU threads; default: the engine's choice"
EXAMPLES = {
    "generate": (
        """
        sdlite generate "a red apple on a blue background" --seed 1 --out apple.png
        sdlite generate "a fox" --num 9 --grid --out foxes.png
        sdlite generate "a fox" --model my-model --backend openvino --steps 20 --out fox.jpg"""
    ),
    "quantize": (
        """
        sdlite quantize my-model --precision int8-static --prompts prompts.txt --out my-int8
        sdlite quantize emoji --precision int8-dynamic --psnr-mean 40 --out emoji-int8"""
    ),
    "export": (
        """
        sdlite export --list
        sdlite export emoji --target ncnn-fp16 --out emoji-ncnn
        sdlite export my-int8 --target web-int8 --reference my-model --out site"""
    ),
    "distill": (
        """
        sdlite distill advise --device phone --memory 2 --minutes 240 --out recipe.toml
        sdlite distill doctor recipe.toml --teacher my-sd --data pictures/
        sdlite distill recipe.toml --teacher my-sd --data pictures/ --out run --max-minutes 120
        sdlite distill recipe.toml --teacher my-sd --data pictures/ --out run --resume"""
    ),
    "bench": (
        """
        sdlite bench emoji
        sdlite bench my-int8 --backends onnxruntime openvino --threads 2 --out rows.jsonl"""
    ),
    "info": (
        """
        sdlite info emoji
        sdlite info org/name --revision v1.0 --json"""
    ),
    "verify": (
        """
        sdlite verify my-model"""
    ),
    "models": (
        """
        sdlite models"""
    ),
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one and the text does not say it; keeps the lines of
    examples.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    ap = _Parser(
        prog="sdlite",
        description="Run compressed Stable Diffusion students.",
        epilog="sdlite COMMAND --help shows options and examples.",
    )
    ap.add_argument("--version", action="version", version=f"sdlite {__version__}")
    sub = ap.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        epilog = "examples:\n" + textwrap.indent(textwrap.dedent(EXAMPLES[name]).strip("\n"), "  ")
        p = sub.add_parser(
            name,
            help=text,
            description=textwrap.fill(text, 100),
            epilog=epilog,
            formatter_class=_Help,
        )
        p.set_defaults(run=run)
        return p

    g = command("generate", _generate, "Make pictures from a prompt.")
    g.add_argument("prompt", help="what is painted; English for the embedded model")
    g.add_argument("--model", default="emoji", help=MODEL)
    g.add_argument("--revision", help=REVISION)
    g.add_argument(
        "--precision",
        help="fp32, fp16, int8-dynamic or int8-static; default: the first one the model holds",
    )
    g.add_argument(
        "--backend", default="auto", help="auto, onnxruntime, openvino, tensorrt or torch"
    )
    g.add_argument("--device", default="cpu", help="cpu or cuda; gpu or npu with openvino")
    g.add_argument(
        "--arithmetic",
        help=(
            "openvino computes floats in float32, bfloat16 or float16; default: by precision"
            " and CPU"
        ),
    )
    g.add_argument("--threads", type=int, help=THREADS)
    g.add_argument(
        "--negative-prompt", help="what guidance leads away from; needs a guidance above 1"
    )
    g.add_argument("--steps", type=int, help="default: the model's own")
    g.add_argument("--guidance", type=float, help="default: the model's own; 0 to 1 is none")
    g.add_argument(
        "--sampler",
        help="ddim, euler, dpm++2m, ...; a wrong name lists them; default: the model's own",
    )
    g.add_argument(
        "--seed",
        type=int,
        help="picture i uses seed + i; default: drawn, and written into the file",
    )
    g.add_argument("--num", type=int, default=1, help="number of pictures")
    g.add_argument("--height", type=int, help="pixels; default: what the model was trained at")
    g.add_argument("--width", type=int, help="pixels; default: what the model was trained at")
    g.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="height x width x pictures that may be made at once; default: the model's own",
    )
    g.add_argument(
        "--vae-tiling",
        action="store_true",
        help="decode large pictures in tiles: less memory, slightly other pixels",
    )
    g.add_argument(
        "--vae-tile-size",
        type=int,
        metavar="PX",
        help="the same, in tiles of at most PX pixels; default: the autoencoder's own size",
    )
    g.add_argument(
        "--grid", action="store_true", help="one file with all pictures instead of numbered files"
    )
    g.add_argument("--out", type=Path, required=True, help="picture file: " + ", ".join(FORMATS))
    g.add_argument("--quiet", action="store_true", help="no progress bar, no report")

    q = command(
        "quantize",
        _quantize,
        "Make an int8 model from a float one, compare the two, write it when the gate holds.",
    )
    q.add_argument("model", help=MODEL)
    q.add_argument("--precision", required=True, help="int8-static or int8-dynamic")
    q.add_argument("--out", type=Path, required=True, help="new folder")
    q.add_argument(
        "--prompts", type=Path, help="calibration prompts, one a line; default: the model's own"
    )
    q.add_argument("--samples", type=int, default=16, help="calibration pictures")
    q.add_argument(
        "--steps",
        type=int,
        help="sampling steps while calibrating and comparing; default: the model's own",
    )
    q.add_argument(
        "--sampler",
        help="for calibration and comparison, and the new model's own; default: the model's own",
    )
    q.add_argument("--observer", default="mse", help="min-max, percentile or mse")
    q.add_argument(
        "--scheme",
        default="u8s7",
        help="u8s7 (exact on every x86), u8s8 (VNNI or ARM only) or s8s8 (TensorRT)",
    )
    q.add_argument(
        "--height",
        type=int,
        help="pixels while calibrating and comparing; with --width; default: the model's own",
    )
    q.add_argument("--width", type=int, help="pixels; with --height")
    q.add_argument(
        "--gate-prompts",
        type=int,
        default=16,
        help="prompts that are compared with the float model",
    )
    q.add_argument(
        "--psnr-mean", type=float, default=36.0, help="dB that the gate wants on average"
    )
    q.add_argument(
        "--psnr-worst", type=float, default=30.0, help="dB that the gate wants of every picture"
    )
    q.add_argument(
        "--ssim-mean",
        type=float,
        default=0.98,
        help="structural similarity that the gate wants on average",
    )
    q.add_argument(
        "--max-float",
        type=float,
        default=0.3,
        help="share of the weights that may go back to float",
    )
    q.add_argument(
        "--engine",
        action="append",
        help="check on this backend; again for more; default: all installed",
    )
    q.add_argument(
        "--keep-failed",
        action="store_true",
        help="when the gate does not hold, keep the model too, in OUT.failed/model",
    )
    q.add_argument("--threads", type=int, help=THREADS)
    q.add_argument("--quiet", action="store_true", help="no progress bar, no report")

    e = command(
        "export", _export, "Export a model to a device's runtime and check it against the original."
    )
    e.add_argument("model", nargs="?", help=MODEL)
    e.add_argument("--target", help="built-in profile (--list) or a profile.toml")
    e.add_argument("--out", type=Path, help="new folder")
    e.add_argument(
        "--prompts",
        type=Path,
        help="pictures that are compared, one prompt a line; default: two of the model's own",
    )
    e.add_argument(
        "--steps", type=int, help="sampling steps of those pictures; default: the model's own"
    )
    e.add_argument(
        "--sampler", help="of those pictures, and the export's own; default: the model's own"
    )
    e.add_argument(
        "--fuse-schedule",
        action="store_true",
        help="onnx, fixed shapes: compute what depends on step or prompt alone once",
    )
    e.add_argument(
        "--reference",
        help="the float model that MODEL was quantised from: its pictures are compared too",
    )
    e.add_argument(
        "--keep-failed",
        action="store_true",
        help="when the gate does not hold, keep the export too, in OUT.failed/model",
    )
    e.add_argument("--threads", type=int, help=THREADS)
    e.add_argument("--list", action="store_true", help="show the built-in profiles")

    d = command(
        "distill",
        _distill,
        "Train a student by a recipe and write it as a model; or `distill doctor RECIPE`: find out"
        " why it would not train; or `distill advise`: a recipe for a device, its memory, a time"
        " budget and a wish, with reasons.",
    )
    d.add_argument(
        "recipe",
        nargs="+",
        metavar="[doctor] RECIPE | advise",
        help="TOML file, see sdlite.distill.recipe",
    )
    d.add_argument(
        "--teacher",
        type=Path,
        help="diffusers SD-1.x/2.x folder; advise: default is SD-1.4's shape",
    )
    d.add_argument("--data", help="shards, folder of pictures with captions, or .txt of prompts")
    d.add_argument(
        "--out", type=Path, help="folder of the run; advise: recipe file, default is stdout"
    )
    d.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    d.add_argument("--max-minutes", type=float, help="stop with a checkpoint after this time")
    d.add_argument("--dry-run", action="store_true", help="show what would be done")
    d.add_argument(
        "--no-export",
        action="store_true",
        help="leave the diffusers folder of the last stage, make no ONNX",
    )
    d.add_argument(
        "--device",
        help="advise: where the student will run: cpu, gpu, phone or browser; cpu when not said",
    )
    d.add_argument(
        "--memory", type=float, help="advise: GB of that device for the model; 4 when not said"
    )
    d.add_argument(
        "--minutes",
        type=float,
        help="advise: time for training, on this machine; 600 when not said",
    )
    d.add_argument("--wish", help="advise: quality, balanced or speed; balanced when not said")
    d.add_argument(
        "--images-per-second",
        type=float,
        help="advise: of training on this machine, from a run's stats.jsonl",
    )

    b = command(
        "bench",
        _bench,
        "Measure seconds and memory of a model on this machine, each precision and backend in its"
        " own process.",
    )
    b.add_argument("model", nargs="?", default="emoji", help=MODEL)
    b.add_argument("--precisions", nargs="+", help="default: those that the model holds")
    b.add_argument(
        "--backends",
        nargs="+",
        help="default: the installed ones that have the precision; torch only for plain folders",
    )
    b.add_argument("--steps", type=int, help="default: the model's own")
    b.add_argument("--guidance", type=float, help="default: the model's own; 0 to 1 is none")
    b.add_argument("--sampler", help="default: the model's own")
    b.add_argument("--height", type=int, help="pixels; default: what the model was trained at")
    b.add_argument("--width", type=int, help="pixels; default: what the model was trained at")
    b.add_argument("--batch", type=int, default=1, help="pictures of one call")
    b.add_argument("--threads", type=int, help=THREADS)
    b.add_argument(
        "--seconds",
        type=float,
        help="how long each row is repeated; default: all rows together in under two minutes",
    )
    b.add_argument(
        "--out", type=Path, help="JSONL file that the rows are added to, with all samples"
    )

    i = command("info", _info, "Show what a model is, what it holds and what it would run on.")
    i.add_argument("model", nargs="?", default="emoji", help=MODEL)
    i.add_argument("--revision", help=REVISION)
    i.add_argument("--json", action="store_true", help="all of it, for programs")

    v = command(
        "verify",
        _verify,
        "Check every file of a model against its manifest, or of an export against its report.",
    )
    v.add_argument("model", nargs="?", default="emoji", help=MODEL)
    v.add_argument("--revision", help=REVISION)

    command("models", _models, "List the embedded models.")
    return ap


def _check(args: argparse.Namespace) -> None:
    """Every number that was given, under its option's name.

    Raises:
        InputError: out of range, or not finite.
    """
    for name, value in vars(args).items():
        option = "--" + name.replace("_", "-")
        if value is not None and name in WHOLE:
            arguments.integer(option, value, *WHOLE[name])
        elif value is not None and name in NUMBERS:
            arguments.number(option, value, *NUMBERS[name])


def _out_paths(out: Path, count: int, as_grid: bool) -> list[Path]:
    if out.suffix.lower() not in FORMATS:
        raise InputError(
            f"--out {out}: the ending {out.suffix!r} is not one of {', '.join(FORMATS)}."
        )
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist; make it first.")
    paths = [out]
    if count > 1 and not as_grid:
        paths = [
            out.with_name(f"{out.stem}-{i:0{len(str(count - 1))}d}{out.suffix}")
            for i in range(count)
        ]
    for path in paths:
        check_file(path)
    return paths


def _generate(args: argparse.Namespace) -> None:
    from sdlite import images
    from sdlite.pipeline import Pipeline

    paths = _out_paths(args.out, args.num, args.grid)
    pipe = Pipeline.from_pretrained(
        args.model,
        precision=args.precision,
        backend=args.backend,
        device=args.device,
        revision=args.revision,
        threads=args.threads,
        arithmetic=args.arithmetic,
    )
    if args.vae_tiling or args.vae_tile_size is not None:
        pipe.enable_vae_tiling(args.vae_tile_size)
    out = pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        seed=args.seed,
        num_images_per_prompt=args.num,
        height=args.height,
        width=args.width,
        sampler=args.sampler,
        progress=not args.quiet,
        max_pixels=args.max_pixels,
    )
    if args.grid and args.num > 1:
        images.save(
            images.grid(out.images),
            paths[0],
            {**out.metadata[0], "seed": ",".join(map(str, out.seeds))},
        )
    else:
        for path, image in zip(paths, out.images, strict=True):
            images.save(image, path)
            args.wrote.append(path)
    if not args.quiet:
        _say(*str(out.report).split("\n"))
    seeds = str(out.seeds[0]) if len(out.seeds) == 1 else f"{out.seeds[0]} to {out.seeds[-1]}"
    shown = str(paths[0]) if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"
    _say(
        f"wrote {shown} ({len(out.images)} picture{'s' * (len(out.images) > 1)}, seed {seeds},"
        f" {out.timings['total']:.2f} s)"
    )


def _quantize(args: argparse.Namespace) -> None:
    import sdlite

    quantize = sdlite.quantize  # says which extra is missing
    from sdlite.quant import Calibration, Gate, read_prompts, table

    if (args.height is None) != (args.width is None):
        raise InputError("--height and --width go together.")
    size = None if args.height is None else (args.height, args.width)
    report = quantize(
        args.model,
        args.precision,
        out=args.out,
        scheme=args.scheme,
        threads=args.threads,
        progress=not args.quiet,
        sampler=args.sampler,
        keep_failed=args.keep_failed,
        calibration=Calibration(
            prompts=read_prompts(args.prompts) if args.prompts else None,
            samples=args.samples,
            num_inference_steps=args.steps,
            observer=args.observer,
            size=size,
        ),
        gate=Gate(
            psnr_mean=args.psnr_mean,
            psnr_worst=args.psnr_worst,
            ssim_mean=args.ssim_mean,
            num_prompts=args.gate_prompts,
            num_inference_steps=args.steps,
            size=size,
            max_float=args.max_float,
            engines=args.engine,
        ),
    )
    if not args.quiet:
        _say(*table(_shown(report)).split("\n"))
    _say(
        f"wrote {args.out} ({sum(n['bytes'] for n in report['networks'].values()) / 1e6:.2f} MB of"
        " weights)"
    )


def _export(args: argparse.Namespace) -> None:
    from sdlite.exporters import profile as profiles

    if args.list:
        for name, p in profiles.builtin().items():
            shape = "any shape" if p.dynamic else f"batch {p.batch}, fixed"
            _say(f"{name:<18} {p.precision:<12} {shape:<15} {p.about}")
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

    prompts = read_prompts(args.prompts) if args.prompts else None
    report = export(
        args.model,
        args.out,
        target=args.target,
        prompts=prompts,
        num_inference_steps=args.steps,
        fuse_schedule=args.fuse_schedule,
        reference=args.reference,
        threads=args.threads,
        sampler=args.sampler,
        keep_failed=args.keep_failed,
    )
    _say(*table(_shown(report)).split("\n"))
    _say(
        f"wrote {args.out} ({sum(f['bytes'] for f in report['files'].values()) / 1e6:.2f} MB of"
        " networks)"
    )


def _distill(args: argparse.Namespace) -> None:
    try:
        from sdlite.distill import recipe
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("sdlite"):
            raise
        raise MissingExtraError(
            f"distilling needs {e.name!r}: pip install 'sdlite[distill]'."
        ) from e

    if args.recipe == ["advise"]:
        _advise(args)
        return
    read = recipe.Recipe.load(args.recipe[-1])
    if args.recipe[0] == "doctor":
        from sdlite.distill.doctor import examine

        with scratch("doctor") as aside:
            found = examine(
                read,
                args.teacher,
                args.data,
                aside / "latents.safetensors",
                export=not args.no_export,
            )
        _say(*found)
        if failed := sum(f.level == "fail" for f in found):
            raise InputError(f"{failed} of {len(found)} checks failed; see above.")
        return
    if args.dry_run:
        _say(*str(recipe.plan(read, recipe.Teacher(args.teacher))).split("\n"))
        return
    done = recipe.run(
        read,
        teacher=args.teacher,
        data=args.data,
        out=args.out,
        resume=args.resume,
        max_minutes=args.max_minutes,
        export=not args.no_export,
    )
    _say(
        "finished"
        if done["finished"]
        else f"stopped after {done['seconds'] / 60:.1f} min; go on with --resume"
    )


def _advise(args: argparse.Namespace) -> None:
    from sdlite.distill.advise import advise

    if args.out is not None:
        if os.path.lexists(args.out):
            raise InputError(f"--out {args.out} exists; choose another file or remove it.")
        check_file(args.out)
    given = {
        "device": args.device,
        "memory_gb": args.memory,
        "minutes": args.minutes,
        "wish": args.wish,
    }
    given = {**ADVISE, **{k: v for k, v in given.items() if v is not None}}
    said = advise(**given, teacher=args.teacher, images_per_second=args.images_per_second)
    if args.out is None:
        _say(*str(said).removesuffix("\n").split("\n"))
        return
    write(args.out, str(said))
    _say(*said.reasons, f"then: {said.then}", f"wrote {args.out}")


def _bench(args: argparse.Namespace) -> None:
    from sdlite import bench

    if args.out:
        check_file(args.out)
    todo = bench.jobs(
        args.model,
        args.precisions,
        args.backends,
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        height=args.height,
        width=args.width,
        batch=args.batch,
        threads=args.threads,
        seconds=args.seconds,
    )
    _say(bench.HEADER)
    rows = bench.bench(todo, lambda row: _say(bench.line(row)))
    ran = [r for r in rows if "error" not in r]
    if not ran:
        raise InputError("every row failed; see above.")
    sizes = ", ".join(
        sorted(
            {
                f"{r['size'][0]}x{r['size'][1]} px, {r['steps']} steps, guidance {r['guidance']:g}"
                for r in ran
            }
        )
    )
    _say(
        f"{args.model}: {sizes}, batch {args.batch}; call s is the median of N calls after the"
        " first"
    )
    if args.out:
        bench.save(rows, args.out)
        _say(f"wrote {args.out}")


def _sampler(artifact: Any) -> dict[str, Any]:
    """What a call samples with; `note` says what to do where the model's scheduler is not one of
    ours.
    """
    try:
        return dict(artifact.samples_with)
    except SdliteError as e:
        return {"name": None, **dataclasses.asdict(artifact.sampler_defaults), "note": str(e)}


def _describe(artifact: Any) -> dict[str, Any]:
    m, scheduler = artifact.manifest, artifact.config("scheduler")
    sampler, predicts = _sampler(artifact), scheduler.get("prediction_type")
    if artifact.listing:  # -Infinity is what such a file may hold, and JSON may not
        sampler = {"prediction_type": predicts if isinstance(predicts, str) else None, **sampler}
    if m is None:
        export = artifact.export.describe() if artifact.export else None
        return {
            "name": artifact.name,
            "format": None,
            "student": artifact.student,
            "variants": {},
            "files": {},
            "sampler": sampler,
            "export": export,
            "runs_on": _runs_on(
                artifact, [artifact.export.precision] if artifact.export else ["fp32"]
            ),
        }
    variants = {
        p: {
            part: {**e, "bytes": sum(m.files[f]["bytes"] for f in (e["file"], *e["weights"]))}
            for part, e in parts.items()
        }
        for p, parts in m.variants.items()
    }
    return {
        "name": artifact.name,
        "format": m.format,
        "student": m.student,
        "sampler": sampler,
        "export": None,
        "runs_on": _runs_on(artifact, list(m.variants)),
        "variants": variants,
        "quality": m.quality,
        "calibration": m.calibration,
        "total_bytes": sum(f["bytes"] for f in m.files.values()),
    }


def _runs_on(artifact: Any, precisions: Sequence[str]) -> dict[str, str]:
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


def _export_lines(export: dict[str, Any]) -> list[str]:
    shape = "any size" if export["size"] is None else f"{export['size'][0]}x{export['size'][1]} px"
    shape += "" if export["batch"] is None else f", batch {export['batch']}"
    closest = (
        f", images at least {min(export['psnr']):.1f} dB PSNR to the model's"
        if export["psnr"]
        else ""
    )
    tools = ", ".join(f"{k} {v}" for k, v in (export["tools"] or {}).items())
    lines = [
        (
            f"export for {export['target']} (profile {export['profile']}): {export['precision']},"
            f" {shape}; made with {tools}"
        ),
        f"checked by {export['checked_by']}{closest}",
        *(f"not run, {part}: {why}" for part, why in (export["not_run"] or {}).items()),
    ]
    for part, row in export["networks"].items():
        given = ", ".join(f"{t['name']} {t['dtype']} {t['shape']}" for t in row["inputs"])
        lines.append(
            f"{part}: {row['file']}; {given} -> {row['output']['name']} {row['output']['shape']}"
        )
    return lines


def _open(args: argparse.Namespace) -> Any:
    from sdlite import hub
    from sdlite.artifact import Artifact

    return Artifact.open(hub.resolve(args.model, args.revision), any_kind=True)


def _info(args: argparse.Namespace) -> None:
    artifact = _open(args)
    refusal = artifact.refusal()
    info = (
        {"name": artifact.name, "format": None, "not_supported": refusal}
        if refusal
        else _describe(artifact)
    )
    if args.json:
        _print(
            json.dumps(info, indent=1) + "\n"
        )  # ASCII, so that no name reaches a terminal as it is
        return
    _say(f"{info['name']}  ({artifact.folder})")
    if refusal:
        _say(f"  {refusal}")
        return
    if artifact.failed:
        _say(f"  failed its quality check: {'; '.join(artifact.failed)}")
    if info["export"]:
        _say(*(f"  {line}" for line in _export_lines(info["export"])))
    elif info["format"] is None:
        _say("  plain diffusers folder")
    for k, v in info["student"].items():
        _say(f"  {k}: {v:,}" if isinstance(v, int) else f"  {k}: {v}")
    _say("  sampler: " + ", ".join(f"{k}={v}" for k, v in info["sampler"].items()))
    for precision, parts in info["variants"].items():
        _say(
            f"  {precision}: "
            + ", ".join(f"{part} {e['bytes'] / 1e6:.2f} MB" for part, e in parts.items())
        )
    for precision, words in info["runs_on"].items():
        _say(f"  {precision} runs on: {words}")


def _verify(args: argparse.Namespace) -> None:
    artifact = _open(args)
    checked = artifact.verify()
    _say(f"{artifact.name}: {len(checked)} files are whole and unchanged")
    if loose := artifact.loose_pickles():
        _say(f"note: {loose} are pickles; sdlite never loads them")


def _models(args: argparse.Namespace) -> None:
    from sdlite import hub
    from sdlite.artifact import Artifact

    for name in hub.embedded_models():
        info = _describe(Artifact.open(hub.resolve(name)))
        _say(
            f"{name}: {info['student'].get('unet_parameters', 0) / 1e6:.2f}M UNet,"
            f" {', '.join(info['variants'])}, {info['total_bytes'] / 1e6:.1f} MB"
        )


def _say(*lines: object) -> None:
    """Print lines, which may hold names out of files, as a terminal can take them."""
    _print("".join(f"{printable(line, 100_000)}\n" for line in lines))


def _print(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise OSError(e.errno, e.strerror, PRINTED) from e


def _complain(text: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"sdlite: {printable(text, 10_000)}", file=sys.stderr)


def _shown(value: Any) -> Any:
    """A report whose texts are each on one line."""
    if isinstance(value, dict):
        return {printable(k): _shown(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(v) for v in value]
    return printable(value) if isinstance(value, str) else value


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _complain(record.getMessage())


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that what was half written is removed.

    A signal that is ignored stays so, as SIGHUP is under nohup.
    """

    asked = False

    def stop(number: int, _: Any) -> None:
        nonlocal asked
        if asked and number != signal.SIGINT:
            return  # what is half written is being removed
        asked = True
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    except Exception as e:
        if asked:  # a C++ library that was being imported makes an error of its own of it
            raise KeyboardInterrupt from e
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Warnings and log in one line each; text that the terminal's encoding lacks as escapes; no
    file takes a closed stream's place.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, streams.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: _complain(f"warning: {message}")
    log, handler = logging.getLogger("sdlite"), _Log()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _system(e: OSError) -> str:
    """What the system refused: the file, why, and the next step where the disk is full."""
    names = [
        os.fsdecode(n)
        for n in (e.filename, e.filename2)
        if isinstance(n, (str, bytes, os.PathLike))
    ]
    name = next((n for n in names if WORK not in n), names[0] if names else "")
    said = f"{name}: {e.strerror or e}" if name else str(e.strerror or e) or type(e).__name__
    if e.errno not in (errno.ENOSPC, errno.EDQUOT) or name in ("", PRINTED):
        return said
    path = Path(name).absolute()
    disk = shutil.disk_usage(next(p for p in (path, *path.parents) if os.path.isdir(p)))
    free = (
        f"{disk.free >> 20} of {disk.total >> 20} MiB are free there now that what was half written"
        " is removed"
    )
    return (
        f"{said} ({free}). Make room, or choose another folder (--out; TMPDIR for temporary files)."
    )


def _interrupted(args: argparse.Namespace) -> str:
    """What is there after an interrupt."""
    if args.wrote:
        return f"interrupted; {', '.join(map(str, args.wrote))} had been written"
    return "interrupted; nothing was written"


def _nobody_reads() -> int:
    """The exit code of a program that SIGPIPE ends; what is still to be printed goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    return 141


def _ended(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit code."""
    try:
        with _terminable():
            _check(args)
            args.run(args)
        return 0
    except SdliteError as e:
        _complain(e)
    except BrokenPipeError:
        return _nobody_reads()
    except OSError as e:
        _complain(_system(e))
    except MemoryError as e:
        _complain(
            f"the memory ran out{f' ({e})' if str(e) else ''}. Close other programs, or ask for"
            " less: a smaller size, fewer images at once."
        )
    except RecursionError:
        _complain("a file is nested too deep to be read; fetch or save the model again.")
    except KeyboardInterrupt as e:
        _complain(f"interrupted; {e}" if e.args else _interrupted(args))
    return 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for, with `wrote`: images that are whole, of several."""
    parser = _parser()
    args = parser.parse_args(argv, argparse.Namespace(wrote=[]))
    if args.command == "export" and not args.list and not (args.model and args.target and args.out):
        parser.error("export needs MODEL, --target and --out (or --list)")
    if args.command == "distill":
        doctor = len(args.recipe) == 2 and args.recipe[0] == "doctor"
        if len(args.recipe) > 1 and not doctor:
            parser.error(
                "distill takes one recipe (or `doctor RECIPE`, or `advise` alone), not"
                f" {' '.join(args.recipe)}"
            )
    if args.command == "distill" and args.recipe != ["advise"]:
        if missing := [f"--{k}" for k in ("teacher", "data") if getattr(args, k) is None]:
            parser.error(f"distill needs {' and '.join(missing)}")
        asked = ("device", "memory", "minutes", "wish", "images_per_second")
        if wrong := ["--" + k.replace("_", "-") for k in asked if getattr(args, k) is not None]:
            parser.error(
                f"{', '.join(wrong)}: for `distill advise` alone; how a training runs is said in"
                " the recipe's [train]"
            )
        if not doctor and not args.dry_run and args.out is None:
            parser.error("distill needs --out")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    with _streams():
        try:
            args = _arguments(argv)
        except SystemExit:  # --help, --version, wrong usage
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                return _nobody_reads()
            raise
        return _ended(args)


if __name__ == "__main__":
    raise SystemExit(main())
