"""TensorRT for RTX: engines for Ampere to Blackwell, built ahead of time without a GPU. One process for each build.

The engines cannot run without a GPU, and have not been run by us: the gate checks the graph that the builder was given. The parser's
own verdict (`supports_model_v2`) is checked too; it stands for the TensorRT family.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sdlite.errors import ExportError
from sdlite.exporters.profile import Profile
from sdlite.exporters.static import input_shapes
from sdlite.exporters.targets import NotRunnable

PACKAGES = ("tensorrt-rtx-cu13",)
PRECISIONS = ("fp32", "fp16", "int8-static")
DYNAMIC = True


def build(job: dict) -> None:  # type: ignore[type-arg]
    """In a process of its own: parse, check and build `job["graph"]` into `job["engine"]`.

    Raises:
        ExportError: the parser or the builder refuses; the message carries their words.
    """
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
                self.words.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["graph"]):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ExportError(f"TensorRT-RTX's parser refuses {job['part']}: {errors[:400]}")
    config = builder.create_builder_config()
    if job["profile"]:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in job["profile"].items():
            profile.set_shape(name, tuple(low), tuple(best), tuple(high))
        config.add_optimization_profile(profile)
    capabilities = job["compute_capabilities"]
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, c in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, c), i)
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        raise ExportError(f"TensorRT-RTX could not build {job['part']}: {' '.join(log.words[-3:])[:400]}")
    Path(job["engine"]).write_bytes(bytes(blob))


def convert(part: str, graph: Path, out: Path, profile: Profile) -> list[Path]:
    engine = out / "model.engine"
    shapes = input_shapes(graph)
    free = {k: s for k, s in shapes.items() if any(isinstance(d, str) for d in s)}
    ranges = {
        k: [[d if isinstance(d, int) else profile.options.get(b, 1) for d in s] for b in ("min", "opt", "max")] for k, s in free.items()
    }
    job = {
        "part": part, "graph": str(graph), "engine": str(engine), "profile": ranges,
        "compute_capabilities": profile.options.get("compute_capabilities", []),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-m", __name__, json.dumps(job)], capture_output=True, text=True)
    if done.returncode or not engine.exists():
        words = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ExportError(words.split("ExportError: ")[-1][:500])
    return [engine]


def run(part: str, files: list[Path], profile: Profile, threads: int | None) -> Callable[..., np.ndarray]:
    raise NotRunnable("a TensorRT-RTX engine needs an NVIDIA GPU of compute capability 8.0 or more, and there is none here")


if __name__ == "__main__":
    build(json.loads(sys.argv[1]))
