"""ONNX for onnxruntime (CPU, CUDA, mobile): fixed or free shapes; float32, float16 weights with float32 arithmetic, or QDQ int8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from sdlite.exporters.profile import Profile
from sdlite.exporters.targets import NotRunnable
from sdlite.quant.graph import Graph

PACKAGES = ("onnx", "onnxruntime")
PRECISIONS = ("fp32", "fp16", "int8-static")
DYNAMIC = True


def convert(part: str, graph: Path, out: Path, profile: Profile) -> list[Path]:
    source = Graph.load(graph)
    if profile.precision == "fp16":
        source.weights = {k: dataclasses.replace(w, half=w.dtype == np.float32) for k, w in source.weights.items()}
    files = source.save(out / "model.onnx")
    onnx.checker.check_model(str(files[0]))
    return files


def run(part: str, files: list[Path], profile: Profile, threads: int | None) -> Callable[..., np.ndarray]:
    try:
        from sdlite.backends.ort import Session
    except ModuleNotFoundError as e:
        raise NotRunnable(f"{e.name} is not installed") from e
    return Session(str(files[0]), "cpu", threads)
