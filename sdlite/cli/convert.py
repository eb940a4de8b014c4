"""`sdlite convert`: a diffusers folder or a file of weights to a model that every backend runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlite.cli import command, terminal

EXAMPLES = """
    sdlite convert my-diffusers-folder --out my-model
    sdlite convert my-model.safetensors --lora style.safetensors:0.8 --out my-model
    sdlite convert my-diffusers-folder --prompts prompts.txt --steps 20 --out my-model
    sdlite generate "a fox" --model my-model --out fox.png"""


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "source",
        metavar="SOURCE",
        help="diffusers folder, one file of weights, hub id org/name, or a name"
        " that `sdlite models` lists",
    )
    command.add_revision(p)
    p.add_argument(
        "--variant",
        metavar="NAME",
        help="which weights of a folder or repository that has several, such as fp16 or non_ema",
    )
    command.add_out_folder(p)
    p.add_argument("--name", help="what reports call the model; default: the folder's name")
    p.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt a line: what quantize will calibrate with, unless told otherwise",
    )
    _changes(p)
    group = command.sampling(p, "defaults of a call, kept in the model")
    command.add_guidance(group)


def _changes(p: argparse.ArgumentParser) -> None:
    """What is done to the source first."""
    group = p.add_argument_group("what is changed first")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="a LoRA that is fused into the weights, 1 as strongly as it was trained; repeat",
    )
    group.add_argument(
        "--lora-skip-missing",
        action="store_true",
        help="leave out a LoRA's layers that the model does not have",
    )
    group.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:WORD]",
        help="a textual inversion, and the word that stands for it; repeat",
    )
    group.add_argument("--vae", metavar="PATH", help="an autoencoder instead of the source's own")
    group.add_argument(
        "--controlnet",
        metavar="FOLDER",
        help="a ControlNet that was made for the source's UNet: images are then made after a"
        " --control-image",
    )
    group.add_argument(
        "--precision", choices=["fp32", "fp16"], help="how weights are stored; default: as they are"
    )
    group.add_argument(
        "--prediction-type",
        choices=["epsilon", "v_prediction"],
        help="of one file of Stable Diffusion 2.x; default: v_prediction, as 2.1 at 768 px",
    )
    group.add_argument(
        "--clip-skip",
        type=int,
        metavar="N",
        help="layers that the text encoders do without, as diffusers counts; 1 reads the one"
        " before the last (of SDXL, the one before that)",
    )
    group.add_argument(
        "--from-pickle",
        action="store_true",
        help="read .ckpt, .pt and .bin, by torch's reader that runs no code",
    )


def _run(args: argparse.Namespace) -> None:
    import sdlite

    convert = sdlite.convert  # says which extra is missing
    from sdlite import hub
    from sdlite.checkpoints import is_file
    from sdlite.io import check_out

    check_out(args.out)
    made = hub.known(args.source)
    own = {"num_inference_steps": made.steps, "guidance_scale": made.guidance} if made else {}
    given = {
        "name": args.sampler,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
    }
    out = convert(
        args.source
        if is_file(args.source)
        else hub.resolve(args.source, args.revision, args.variant),
        args.out,
        name=args.name or "",
        sampler=own | {k: v for k, v in given.items() if v is not None},
        calibration_prompts=_prompts(args.prompts),
        lora=args.lora,
        lora_skip_missing=args.lora_skip_missing,
        embedding=args.embedding,
        vae=args.vae,
        precision=args.precision,
        prediction_type=args.prediction_type,
        from_pickle=args.from_pickle,
        clip_skip=args.clip_skip,
        variant=args.variant,
        controlnet=args.controlnet,
    )
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    terminal.say(f"wrote {out} ({size / 1e6:.2f} MB)")


def _prompts(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    from sdlite.quant import read_prompts

    return read_prompts(path)


CONVERT = command.Command(
    "convert",
    "Make a model with ONNX graphs of a diffusers folder or a file of weights.",
    EXAMPLES,
    _options,
    _run,
)
