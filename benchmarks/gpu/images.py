"""Images by torch on a GPU: how near each precision is to the CPU's float32, and seconds against
diffusers, plain and compiled, in the same process.

    python -m benchmarks.gpu.images [--models emoji sd14 bk-tiny ssd-1b] [--sizes 512 1024]

Weights are random and in the models' true shapes; four steps, guidance as the model has it. Kinds:
`fp16`, `bf16` (arithmetic), `fp16 compiled`: the UNet by `torch.compile(mode="reduce-overhead")`,
which records CUDA graphs; diffusers' the same. Rows go to gpu_images.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sdlite
from benchmarks.gpu import common
from sdlite.artifact import Artifact

MODELS = ("emoji", "sd14", "bk-tiny", "ssd-1b")
STEPS, SEED, PROMPT = 4, 0, "a red fox in snow"
NEAR = 256  # px of the images that are compared with the CPU's
KINDS: dict[str, dict[str, str]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "fp16", "arithmetic": "bfloat16"},
}
# a graph for each shape: one for all shapes would be recorded again at every change
COMPILED = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
COMPILING, CALLING, OPENING = 150, 30, 90  # seconds that a row, and a model, may take


def opened(folder: Path, device: str, **how: str) -> sdlite.Pipeline:
    pipe = sdlite.Pipeline.from_pretrained(folder, backend="torch", device=device, **how)
    pipe.max_pixels = None
    return pipe


def closeness(folder: Path, device: str, size: int) -> dict[str, float]:
    """Kind -> dB of one image to the CPU's in float32."""
    call = {"seed": SEED, "num_inference_steps": STEPS, "height": size, "width": size}
    call["output_type"] = "np"
    with opened(folder, "cpu", precision="fp32") as pipe:
        right = pipe(PROMPT, **call).images[0]
    out = {}
    for kind, how in KINDS.items():
        with common.freed(), opened(folder, device, **how) as pipe:
            out[kind] = common.psnr(pipe(PROMPT, **call).images[0], right)
    return out


def compiled(pipe: sdlite.Pipeline) -> sdlite.Pipeline:
    """The pipeline with its UNet compiled."""
    network: Any = pipe.networks.parts["unet"]
    network.inner.module = torch.compile(network.inner.module, **COMPILED)
    return pipe


def ours(folder: Path, device: str, kind: str) -> Callable[[int, int], Any]:
    name, _, with_compiler = kind.partition(" ")
    pipe = opened(folder, device, **KINDS[name])
    if with_compiler:
        compiled(pipe)
    call = {"seed": SEED, "num_inference_steps": STEPS}
    return lambda size, batch: pipe([PROMPT] * batch, height=size, width=size, **call)


def theirs(folder: Path, device: str, kind: str) -> Callable[[int, int], Any]:
    """diffusers' own pipeline of the folder, as its documentation speeds it up."""
    import diffusers

    name, _, with_compiler = kind.removeprefix("diffusers ").partition(" ")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    # diffusers' own is 7.5 for every model: twice the work where a student needs no guidance
    scale = Artifact.open(folder).sampler_defaults.guidance_scale
    if with_compiler:
        pipe.unet = torch.compile(pipe.unet, **COMPILED)

    def call(size: int, batch: int) -> Any:
        draws = [torch.Generator().manual_seed(SEED + i) for i in range(batch)]
        sized = {"height": size, "width": size, "num_inference_steps": STEPS}
        return pipe([PROMPT] * batch, generator=draws, guidance_scale=scale, **sized)

    return call


CALLS = ("fp16", "diffusers fp16", "bf16", "fp16 compiled", "diffusers fp16 compiled")


def speed(args: Any, model: str, folder: Path, budget: common.Budget, about: Any) -> None:
    """A row for each kind, size and batch. A kind's pipeline is opened once."""
    for kind in args.kinds:
        sizes = [None] if model == "emoji" else args.sizes
        todo = [(s or 64, b) for s in sizes for b in args.batches]
        with common.freed():
            make = theirs if kind.startswith("diffusers") else ours
            call = None
            for size, batch in todo:
                name = f"{model} {kind} {size} px batch {batch}"
                if not budget.allows(name, COMPILING if kind.endswith("compiled") else CALLING):
                    continue
                row = {"model": model, "kind": kind, "size_px": size, "batch": batch}
                try:
                    call = call or make(folder, args.device, kind)
                    found = common.timed(lambda s=size, b=batch, c=call: c(s, b))
                except Exception as e:  # a kind that fails is a row
                    found = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
                common.keep(args.out, {**row, "steps": STEPS, **found, **about})
            del call


def main() -> int:
    ap = common.arguments(__doc__ or "", "images")
    ap.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    ap.add_argument("--sizes", nargs="+", type=int, default=[512, 1024], metavar="PX")
    ap.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    ap.add_argument("--kinds", nargs="+", default=list(CALLS), metavar="KIND")
    ap.add_argument("--near", type=int, default=NEAR, metavar="PX")
    args = ap.parse_args()
    budget, about = common.Budget(args.minutes), common.about(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as the CPU
    failed = False
    for model in args.models:
        if not budget.allows(model, OPENING):
            continue
        folder = common.folder(model, args.scratch)
        near = closeness(folder, args.device, 64 if model == "emoji" else args.near)
        common.keep(args.out, {"model": model, "psnr_to_cpu_fp32": near, **about})
        failed |= bool(near["fp16"] < 40 or np.isnan(near["fp16"]))
        speed(args, model, folder, budget, about)
    if budget.left_out:
        print("no time was left for:", "; ".join(budget.left_out))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
