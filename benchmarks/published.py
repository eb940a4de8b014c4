"""The published models on every engine, against diffusers' own pipeline of the same folder.

    python -m benchmarks.published [MODEL ...]

The folders are those of `benchmarks.published_models` (published configs and file layouts, narrow
random networks). Each model makes the images of its model card's call (at most four steps, 128 px)
twice: by diffusers, in float32, and by each engine; equal seeds, so the images should be equal but
for rounding: 80 dB and more. `another prompt` is how far apart two prompts are: a figure near it
means another image. A model that is refused has the words of the refusal. One process a model; rows
go to benchmarks/results/published.jsonl.

    python -m benchmarks.published vega --true-widths

makes one image of 1024 px in one step, by the UNet and the text encoders in their true widths, and
the narrow autoencoder: the published one alone would take minutes of two cores. Its rows go to
published_large.jsonl; `image_deviation` is of diffusers' image, of 255.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import large_models, published_models
from benchmarks.env import environment
from sdlite import image_input, metrics
from sdlite.errors import SdliteError

RESULTS = Path(__file__).parent / "results" / "published.jsonl"
RESULTS_LARGE = RESULTS.with_name("published_large.jsonl")
PROMPTS = ["a red fox in snow!", "two cats", "a photo of an astronaut riding a horse, 8k"]
SIZE, LARGE = 128, 1024
THREADS = 2


@dataclass(frozen=True)
class Run:
    """One engine at one precision; `arithmetic` as in `Pipeline.from_pretrained`."""

    backend: str
    precision: str
    arithmetic: str | None = None

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}" + (
            f" in {self.arithmetic}" if self.arithmetic else ""
        )


RUNS = (
    Run("torch", "fp32"),
    Run("onnxruntime", "fp32"),
    Run("openvino", "fp32"),
    Run("torch", "fp16"),
    Run("onnxruntime", "fp16"),
    Run("openvino", "fp16", "float32"),
    Run("openvino", "fp16"),
)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between two uint8 images; 100 where they are equal."""
    return min(metrics.psnr(a, b), 100.0)


def diffusers_images(
    folder: Path, name: str, prompts: list[str], size: int = SIZE, dtype: str = "float32"
) -> np.ndarray:
    """uint8 (N, size, size, 3): the folder's own diffusers pipeline computed in `dtype`, one CPU
    generator an image, seed i for prompt i.
    """
    import diffusers
    import torch

    model = published_models.MODELS[name]
    torch.set_num_threads(THREADS)
    checker = {"safety_checker": None} if model.safety_checker else {}
    half = {"torch_dtype": torch.float16} if "F16" in _dtypes(folder) else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **checker, **half).to(
        getattr(torch, dtype)
    )
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        **({"prompt": prompts} | asked(model.pipeline, size, len(prompts))),
        height=size,
        width=size,
        num_inference_steps=model.steps,
        guidance_scale=model.guidance,
        output_type="np",
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
    )
    made = (out.images * 255).round().astype(np.uint8)
    if more := asked(model.pipeline, size):  # sdlite keeps what is not painted, bit by bit
        kept = np.asarray(more["mask_image"])[..., None] < 128
        made = np.where(kept, np.asarray(more["image"]), made)
    return made


def asked(pipeline: str, size: int, count: int = 1) -> dict[str, Any]:
    """What an inpainting pipeline is given besides, all steps of it; diffusers takes a list of
    images and of masks where it is given a list of prompts.
    """
    if "Inpaint" not in pipeline:
        return {}
    image, mask = image_input.example(size, size)
    if count == 1:
        return {"image": image, "mask_image": mask, "strength": 1.0}
    return {"image": [image] * count, "mask_image": [mask] * count, "strength": 1.0}


def _dtypes(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "np") as f:
        return {f.get_slice(k).get_dtype() for k in f.keys()}  # noqa: SIM118


def sdlite_images(
    folder: Path, name: str, prompts: list[str], run: Run, size: int = SIZE
) -> np.ndarray:
    """uint8 (N, size, size, 3): the same by sdlite."""
    import sdlite

    model = published_models.MODELS[name]
    pipe = sdlite.Pipeline.from_pretrained(
        folder,
        precision=run.precision,
        backend=run.backend,
        arithmetic=run.arithmetic,
        threads=THREADS,
    )
    out = pipe(
        prompts,
        **asked(model.pipeline, size),
        seed=0,
        height=size,
        width=size,
        num_inference_steps=model.steps,
        guidance_scale=model.guidance,
    )
    return np.stack([np.asarray(i) for i in out.images])


def measure(name: str, scratch: Path) -> dict[str, Any]:
    """{"another_prompt": dB, "runs": {run: least dB over the prompts, or "refused: ..." or "fault:
    ..."}}.
    """
    os.environ["SDLITE_CACHE"] = str(scratch / "cache")
    runs: dict[str, float | str] = {}
    wanted: dict[str, np.ndarray] = {}
    for run in RUNS:
        dtype = "float16" if run.precision == "fp16" else published_models.MODELS[name].dtype
        folder = scratch / dtype / name
        if not folder.exists():
            published_models.write(name, folder, dtype=dtype)
        try:
            got = sdlite_images(folder, name, PROMPTS, run)
        except SdliteError as e:
            runs[str(run)] = f"refused: {str(e).replace(str(folder), name)}"
            continue
        except Exception as e:  # a raw error is a fault of ours, and a row of the table
            runs[str(run)] = f"fault: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
            continue
        if dtype not in wanted:
            wanted[dtype] = diffusers_images(folder, name, PROMPTS)
        runs[str(run)] = min(psnr(a, b) for a, b in zip(got, wanted[dtype], strict=True))
    if "float16" in wanted:  # what half the mantissa costs where the peer computes
        folder = scratch / "float16" / name
        peer = diffusers_images(folder, name, PROMPTS, dtype="bfloat16")
        runs["diffusers in bfloat16"] = min(
            psnr(a, b) for a, b in zip(peer, wanted["float16"], strict=True)
        )
    shown = next(iter(wanted.values()), None)
    apart = None if shown is None else psnr(*diffusers_apart(scratch, name))
    return {"another_prompt": apart, "runs": runs}


def measure_true(name: str, scratch: Path, size: int) -> dict[str, Any]:
    """As `measure`, of one image in true widths, on torch in float32 from weights in float16."""
    narrow = published_models.write(name, scratch / "narrow", dtype="float16")
    folder = large_models.write(name, scratch / name, "float16")
    shutil.rmtree(folder / "vae")
    shutil.copytree(narrow / "vae", folder / "vae")
    model = dataclasses.replace(published_models.MODELS[name], steps=1, guidance=1.0)
    published_models.MODELS[name] = model
    [ours] = sdlite_images(folder, name, PROMPTS[:1], Run("torch", "fp16"), size)
    [theirs] = diffusers_images(folder, name, PROMPTS[:1], size)
    spread = float(theirs.std())
    return {"runs": {"torch fp16": psnr(ours, theirs)}, "image_deviation": spread, "steps": 1}


def diffusers_apart(scratch: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """diffusers' images of two prompts at one seed."""
    folder = scratch / published_models.MODELS[name].dtype / name
    first, second = (diffusers_images(folder, name, [p])[0] for p in PROMPTS[:2])
    return first, second


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"default: all; {', '.join(published_models.MODELS)}",
    )
    ap.add_argument("--out", type=Path, help="file of the rows")
    ap.add_argument("--true-widths", action="store_true", help=f"one image of {LARGE} px")
    ap.add_argument("--worker", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.worker:
        logging.disable(logging.WARNING)
        with tempfile.TemporaryDirectory() as aside:
            scratch = Path(aside)
            if args.true_widths:
                print(json.dumps(measure_true(args.worker, scratch, LARGE)))
            else:
                print(json.dumps(measure(args.worker, scratch)))
        return
    shown, out = {"size_px": SIZE, "prompts": len(PROMPTS)}, args.out or RESULTS
    if args.true_widths:
        shown, out = {"size_px": LARGE, "prompts": 1}, args.out or RESULTS_LARGE
    about = {
        **environment(),
        "command": " ".join(["python -m benchmarks.published", *sys.argv[1:]]),
    }
    for name in args.models or published_models.MODELS:
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", "-m", "benchmarks.published", "--worker", name),
                *(["--true-widths"] if args.true_widths else []),
            ],
            capture_output=True,
            text=True,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            result: dict[str, Any] = {
                "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
            }
        else:
            result = json.loads(lines[-1])
        row = {"model": name, **shown, **result, **about}
        with open(out, "a") as f:
            f.write(json.dumps(row) + "\n")
        print(name, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
