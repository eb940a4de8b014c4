"""`sdlite generate`: images from a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlite import arguments
from sdlite.cli import command, terminal
from sdlite.errors import InputError
from sdlite.io import check_file
from sdlite.preview import Preview

if TYPE_CHECKING:
    from sdlite.pipeline import Pipeline, PipelineOutput

FORMATS = (".png", ".jpg", ".jpeg", ".webp")
EXAMPLES = """
    sdlite generate "a red apple on a blue background" --seed 1 --out apple.png
    sdlite generate "a fox" --num 9 --grid --out foxes.png
    sdlite generate "a fox" --model my-model --backend openvino --steps 20 --out fox.jpg
    sdlite generate "a green apple" --image apple.png --strength 0.6 --out green.png"""


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "prompt", metavar="PROMPT", help="what is painted; English for the embedded model"
    )
    formats = ", ".join(FORMATS)
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"image file: {formats}")
    command.whole(p, "--num", "number of images", 1, arguments.MOST_IMAGES, default=1)
    p.add_argument(
        "--grid", action="store_true", help="one file with all images instead of numbered files"
    )
    text = "image i uses seed + i; default: drawn, and written into the file"
    command.whole(p, "--seed", text, 0, arguments.SEEDS)
    text = "image file that is written anew after each step: what the image will be"
    p.add_argument("--preview", type=Path, metavar="FILE", help=text)
    p.add_argument("--quiet", action="store_true", help="no progress bar, no report")
    _model_options(p)
    _edit_options(p)
    _sampling_options(p)


def _model_options(p: argparse.ArgumentParser) -> None:
    from sdlite import backends
    from sdlite.manifest import PRECISIONS

    group = p.add_argument_group("model and backend")
    group.add_argument("--model", default="emoji", help=command.MODEL)
    command.add_revision(group)
    precisions = command.one_of(PRECISIONS)
    group.add_argument("--precision", help=f"{precisions}; default: the first that the model holds")
    names = command.one_of(["auto", *backends.names()])
    group.add_argument("--backend", default="auto", help=names)
    every = [backends.get_backend(name) for name in backends.names()]
    by_backend = "; ".join(f"{b.name}: {', '.join(b.devices)}" for b in every)
    group.add_argument("--device", default="cpu", help=by_backend)
    told = "; ".join(f"{b.name}: {', '.join(b.arithmetic)}" for b in every if b.arithmetic)
    group.add_argument(
        "--arithmetic",
        help=f"what float layers are computed in ({told}); default: by precision and CPU",
    )
    command.add_threads(group)


def _edit_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("editing")
    group.add_argument("--image", type=Path, metavar="FILE", help="image to edit")
    group.add_argument(
        "--mask", type=Path, metavar="FILE", help="white is painted anew, the rest stays as it is"
    )
    text = "painted is what is transparent, in --mask or else in --image, as in OpenAI's API"
    group.add_argument("--alpha-mask", action="store_true", help=text)
    text = "share of the steps that is made; default: 0.8, with a mask 1"
    command.number(group, "--strength", text, 0, 1)
    text = "work on the mask and so many pixels around it alone"
    most = arguments.MOST_PIXELS
    command.whole(group, "--padding-mask-crop", text, 0, most, metavar="PX")
    group.add_argument(
        "--control-image",
        type=Path,
        metavar="FILE",
        help="what a model's ControlNet reads: edges, depth, a pose, as it was made for",
    )
    text = "how much that counts; default: 1, beside --image 0.8, with a mask 0.5"
    command.number(group, "--controlnet-conditioning-scale", text, 0)


def _sampling_options(p: argparse.ArgumentParser) -> None:
    from sdlite.prompt_weights import STYLES

    group = command.sampling(p, "sampling and size")
    command.add_guidance(group)
    command.numbers(group, "--timesteps", "the call's own timesteps, descending, such as 999,499")
    command.numbers(group, "--sigmas", "the call's own noise levels, descending, the end included")
    text = "noise drawn again in each step, for ddim and tcd; default: 0"
    command.number(group, "--eta", text, 0, 1)
    group.add_argument(
        "--prompt-weighting",
        metavar="STYLE",
        help=f"reads (word:1.3), [word] and long prompts: {command.one_of(STYLES)}; default: not",
    )
    group.add_argument(
        "--negative-prompt",
        metavar="PROMPT",
        help="what guidance leads away from; needs a guidance above 1",
    )
    command.add_size(group)
    group.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="height x width x images that may be made at once",
    )
    group.add_argument(
        "--vae-tiling",
        action="store_true",
        help="decode and encode large images in tiles: less memory, slightly different pixels",
    )
    text = "decode in tiles of at most PX pixels"
    most = arguments.MOST_PIXELS
    command.whole(group, "--vae-tile-size", text, high=most, metavar="PX")


def _run(args: argparse.Namespace) -> None:
    from sdlite.pipeline import Pipeline

    paths = _paths(args.out, args.num, args.grid)
    if args.preview is not None:
        _paths(args.preview, 1, as_grid=True)
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
    out = _made(
        pipe,
        args.preview,
        args.prompt,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        seed=args.seed,
        num_images_per_prompt=args.num,
        height=args.height,
        width=args.width,
        sampler=args.sampler,
        timesteps=args.timesteps,
        sigmas=args.sigmas,
        eta=args.eta,
        prompt_weighting=args.prompt_weighting,
        image=args.image,
        mask_image=_mask(args),
        strength=args.strength,
        padding_mask_crop=args.padding_mask_crop,
        control_image=args.control_image,
        controlnet_conditioning_scale=args.controlnet_conditioning_scale,
        progress=not args.quiet,
        max_pixels=args.max_pixels,
    )
    _save(out, paths, args.wrote)
    if not args.quiet:
        terminal.say(*str(out.report).split("\n"))
    terminal.say(_wrote(out, paths))


def _mask(args: argparse.Namespace) -> Any:
    """The call's mask.

    Raises:
        InputError: --alpha-mask without a file, or with one that is not transparent.
    """
    if not args.alpha_mask:
        return args.mask
    from sdlite import image_input

    given = args.mask or args.image
    if given is None:
        raise InputError("--alpha-mask is given without --image; give the image to edit.")
    return image_input.alpha_mask(given)


def _made(pipe: Pipeline, preview: Path | None, prompt: str, **arguments: Any) -> PipelineOutput:
    """The call's output; `preview` is written anew after each step."""
    if preview is None:
        return pipe(prompt, **arguments)
    from sdlite import images

    for what in pipe.stream(prompt, **arguments):
        if isinstance(what, Preview):
            shown = [i.resize((8 * i.width, 8 * i.height)) for i in what.images]
            images.save(images.grid(shown), preview)
        else:
            return what
    raise AssertionError("a stream ends with its output")


def _paths(out: Path, count: int, as_grid: bool) -> list[Path]:
    """The files that will be written.

    Raises:
        InputError: an ending or a folder that cannot be written to.
    """
    if out.suffix.lower() not in FORMATS:
        raise InputError(
            f"--out {out}: the ending {out.suffix!r} is not one of {', '.join(FORMATS)}."
        )
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist; make it first.")
    paths = [out]
    if count > 1 and not as_grid:
        digits = len(str(count - 1))
        paths = [out.with_name(f"{out.stem}-{i:0{digits}d}{out.suffix}") for i in range(count)]
    for path in paths:
        check_file(path)
    return paths


def _save(out: PipelineOutput, paths: list[Path], wrote: list[Path]) -> None:
    """One file an image, or one file for all; `wrote` grows by each that is whole."""
    from sdlite import images

    if len(paths) < len(out.images):
        seeds = ",".join(map(str, out.seeds))
        images.save(images.grid(out.images), paths[0], {**out.metadata[0], "seed": seeds})
        return
    for path, image in zip(paths, out.images, strict=True):
        images.save(image, path)
        wrote.append(path)


def _wrote(out: PipelineOutput, paths: list[Path]) -> str:
    count = len(out.images)
    seeds = str(out.seeds[0]) if count == 1 else f"{out.seeds[0]} to {out.seeds[-1]}"
    files = str(paths[0]) if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"
    made = "1 image" if count == 1 else f"{count} images"
    return f"wrote {files} ({made}, seed {seeds}, {out.timings['total']:.2f} s)"


GENERATE = command.Command("generate", "Make images from a prompt.", EXAMPLES, _options, _run)
