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


def environment() -> dict[str, Any]:
    import os

    versions = {}
    for p in PACKAGES:
        try:
            versions[p] = importlib.metadata.version(p)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": _dirty(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
    }
