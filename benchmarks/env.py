"""What a result was measured on: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "accelerate",
    "openvino",
    "torch",
    "diffusers",
    "transformers",
    "optimum-onnx",
    "torchao",
    "openvino-genai",
    "nncf",
    "stable-diffusion-cpp-python",
    "onnx",
    "tokenizers",
    "sdlite",
)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(
        line.split("\t: ", 1) for line in (x.replace("\t\t", "\t") for x in lines) if "\t: " in line
    )
    flags = set(fields.get("flags", "").split())
    isa = (
        "amx"
        if "amx_int8" in flags
        else (
            "avx512_vnni"
            if "avx512_vnni" in flags
            else "avx512"
            if "avx512f" in flags
            else "avx2"
            if "avx2" in flags
            else "?"
        )
    )
    return (
        f"{fields.get('model name', '?')} (family {fields.get('cpu family', '?')}, model"
        f" {fields.get('model', '?')}, {isa})"
    )


def _git(*args: str) -> str:
    try:
        return subprocess.run(
            ["git", *args], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.rstrip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _dirty() -> bool:
    """Whether something that could change a result differs from the commit: not the results
    themselves, nor what is made of them.
    """
    made = ("benchmarks/results/", "benchmarks/plots/", "models.md", "docs/benchmarks.md")
    return any(not line[3:].startswith(made) for line in _git("status", "--porcelain").splitlines())


def gpu(device: str) -> dict[str, Any]:
    """GPU, driver and libraries where `device` is "cuda"; else no GPU."""
    if device != "cuda":
        return {"gpu": None}
    import torch

    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = ""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def environment() -> dict[str, Any]:
    """Machine, versions and commit; `SDLITE_COMMIT` is the commit where the tree has no .git of its
    own.
    """
    import os

    versions = {}
    for p in PACKAGES:
        try:
            versions[p] = importlib.metadata.version(p)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "commit": os.environ.get("SDLITE_COMMIT") or _git("rev-parse", "--short", "HEAD"),
        "dirty": _dirty(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
    }
