"""TensorRT for RTX: engines for Ampere to Blackwell, built ahead of time without a GPU. See
`tensorrt`.

The engines cannot run without a GPU, and have not been run by us: the gate checks the graph that
the builder was given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sdlite.exporters.profile import Profile
from sdlite.exporters.targets import NotRunnable, tensorrt

PACKAGES = ("tensorrt-rtx-cu13",)
PRECISIONS = tensorrt.PRECISIONS
DYNAMIC = True
FREE_SIZE = tensorrt.FREE_SIZE
OPTIONS = {*tensorrt.OPTIONS, "compute_capabilities"}  # TensorRT itself builds for the GPU at hand
LIBRARY = "tensorrt_rtx"
prepare, judged = tensorrt.prepare, tensorrt.judged


def convert(part: str, graph: Path, out: Path, profile: Profile) -> list[Path]:
    return tensorrt.convert(part, graph, out, profile, LIBRARY)


def run(
    part: str, files: list[Path], profile: Profile, threads: int | None
) -> Callable[..., np.ndarray]:
    raise NotRunnable(
        "a TensorRT-RTX engine needs an NVIDIA GPU of compute capability 8.0 or more, and there is"
        " none here"
    )
