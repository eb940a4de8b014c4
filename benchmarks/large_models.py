"""Memory and time of converting, quantizing and exporting models of gigabytes, at their true shape.

    python -m benchmarks.large_models MODEL [--dtype float16] [--tasks convert int8-dynamic]
        [--scratch DIR]

The folder is that of `benchmarks.published_models` in its true widths, its random weights written a
tensor at a time. Each task runs in a process of its own, whose peak is its largest resident set.
The bar is 1.3 times the largest network as it is stored, plus 2 GB. Quantizing and exporting (task
`export-` and a profile's name, of the converted model) are judged on one image of 256 px in two
steps and its edit, so their seconds are those of the work on the weights; a float network on a CPU
computes in float32, so their bar counts it so. Rows (`cpu_seconds`: of all cores together)
go to benchmarks/results/large_models.jsonl, with the PSNR of that image and of an edit of it, and
the SQNR of each network, in dB; the exit status is 1 where a peak is over its bar.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import published_models
from benchmarks.env import environment
from benchmarks.published_models import Published

RESULTS = Path(__file__).parent / "results" / "large_models.jsonl"
TIMES, PLUS = 1.3, 2e9
EXPORT = "export-"
EXPORTED = ("onnx", "onnx-fp16", "openvino", "openvino-fp16", "tensorrt-rtx-fp16")
TASKS = ("convert", "int8-dynamic", "int8-static", *(EXPORT + p for p in EXPORTED))
NAMES = {"F16": np.float16, "F32": np.float32}
VAE = {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32}
TEXT = {"hidden_size": 768, "intermediate_size": 3072}
TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
XL = {
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "norm_num_groups": 32,
    "projection_class_embeddings_input_dim": 2816,
}
SD1 = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}
WIDTHS: dict[str, dict[str, Any]] = {
    "sd14": SD1,
    "sd21-base": SD1 | {"cross_attention_dim": 1024, "norm_num_groups": 32},
    "lcm-dreamshaper": SD1,
    "vega": XL,
    "ssd-1b": XL,
}
TEXTS = {"sd21-base": {"hidden_size": 1024, "intermediate_size": 4096}}

CHILD = """
import json, sys, time
import sdlite
from sdlite.memory import peak_mib
from sdlite.quant import Calibration, Gate
task, source, out = sys.argv[1:]
start, said = time.perf_counter(), {}
if task == "convert":
    sdlite.convert(source, out)
elif task.startswith("export-"):
    import pathlib, tempfile
    from benchmarks.export import sized
    from sdlite.exporters.export import export
    with tempfile.TemporaryDirectory() as tmp:
        profile = sized(task.removeprefix("export-"), 256, pathlib.Path(tmp))
        made = export(source, out, target=profile, prompts=["two cats"], num_inference_steps=2)
    parity = made["parity"]
    said = {"psnr_mean": min(parity["psnr"]), "networks": {
        p: n["sqnr"] for p, n in parity["networks"].items()}, "checked_by": made["checked_by"]}
else:
    call = {"num_inference_steps": 2, "size": (256, 256)}
    gate = Gate(psnr_mean=0, psnr_worst=0, ssim_mean=-1, num_prompts=1, seeds=(0,),
        engines=["onnxruntime"], **call)
    shown = Calibration(prompts=["a red fox", "two cats", "a boat"], samples=2, **call)
    sdlite.quantize(source, task, out=out, gate=gate, calibration=shown)
    with open(f"{out}/sdlite.json") as f:
        found = json.load(f)["quality"]["engines"]["onnxruntime"]
    said = {"psnr_mean": found["psnr_mean"], "networks": found["networks"]}
print(json.dumps({"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time(),
    "peak_mib": peak_mib(), **said}))
"""


def true_shape(name: str) -> Published:
    """A model of `WIDTHS` as it is published, in its true widths."""
    model = published_models.MODELS[name]
    return dataclasses.replace(
        model,
        unet=model.unet | WIDTHS[name],
        vae=model.vae | VAE,
        text=model.text | TEXTS.get(name, TEXT),
        text_2=model.text_2 and model.text_2 | TEXT_2,
    )


def write(name: str, out: Path, dtype: str) -> Path:
    """The folder at `out`: the narrow model's small files, and the true networks."""
    import diffusers
    import transformers

    def text(kind: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda c: kind(
            transformers.CLIPTextConfig(**{k: v for k, v in c.items() if k != "torch_dtype"})
        )

    published_models.write(name, out, dtype=dtype)
    model, vae, unet = true_shape(name), diffusers.AutoencoderKL, diffusers.UNet2DConditionModel
    rows = [
        ("unet", {"_class_name": unet.__name__, **model.unet}, unet.from_config),
        ("vae", {"_class_name": vae.__name__, **model.vae}, vae.from_config),
        ("text_encoder", model.text, text(transformers.CLIPTextModel)),
    ]
    if model.text_2:
        made = text(transformers.CLIPTextModelWithProjection)
        rows.append(("text_encoder_2", model.text_2, made))
    rng = np.random.default_rng(0)
    for part, config, make in rows:
        [path] = (out / part).glob("*.safetensors")
        (out / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_random(path, shapes(make, config), dtype, rng)
    return out


def shapes(make: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> dict[str, Any]:
    """Tensor name -> shape of a network, which takes no memory."""
    import torch

    with torch.device("meta"):
        tensors = make(config).state_dict()
    return {k: tuple(v.shape) for k, v in tensors.items() if not k.endswith("position_ids")}


def write_random(
    path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, rng: np.random.Generator
) -> None:
    """A safetensors file, one tensor in memory at a time: norms are ones, biases zeros, matrices
    keep the size of what they are given.
    """
    kind = next(k for k, v in NAMES.items() if np.dtype(v).name == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        length = math.prod(shape) * np.dtype(NAMES[kind]).itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + length]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            if len(shape) == 1:
                values = np.full(shape, float(name.endswith("weight")), np.float32)
            else:
                spread = 1.0 if "token_embedding" in name else math.prod(shape[1:]) ** -0.5
                values = rng.standard_normal(shape, np.float32) * np.float32(spread)
            f.write(np.ascontiguousarray(values, NAMES[kind]).tobytes())


def largest(folder: Path) -> int:
    """Bytes of the largest network of a model's folder."""
    return max(
        sum(f.stat().st_size for f in part.glob("*.safetensors"))
        for part in folder.iterdir()
        if part.is_dir()
    )


def measured(task: str, source: Path, out: Path) -> dict[str, Any]:
    """A task in a process of its own."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, task, str(source), str(out)],
        capture_output=True,
        text=True,
        env=environ,
    )
    if done.returncode:
        raise RuntimeError(f"{task} of {source}: {done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("model", choices=list(WIDTHS))
    ap.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    ap.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS[:2])
    ap.add_argument("--scratch", type=Path, help="a folder with four times the model's bytes free")
    args = ap.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        aside, over = Path(scratch), False
        source = write(args.model, aside / "source", args.dtype)
        stored = largest(source)
        for task in ("convert", *(t for t in args.tasks if t != "convert")):
            start = source if task == "convert" else aside / "convert"
            row = measured(task, start, aside / task)
            widened = 2 if args.dtype == "float16" and task != "convert" else 1
            bar = (TIMES * stored * widened + PLUS) / 2**20
            row |= {"largest_mib": stored / 2**20, "bar_mib": bar}
            about = {"model": args.model, "dtype": args.dtype, "task": task}
            at = {"time": time.strftime("%H:%M"), "load": os.getloadavg()[0]}
            over |= row["peak_mib"] > bar
            with RESULTS.open("a") as f:
                f.write(json.dumps({**about, **row, **at, "env": environment()}) + "\n")
            print(about, {k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()})
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
