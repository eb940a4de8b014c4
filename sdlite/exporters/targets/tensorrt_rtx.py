"""TensorRT for RTX: engines for Ampere to Blackwell, built ahead of time without a GPU. See
`tensorrt`.

The engines cannot run without a GPU, and have not been run by us: without one the quality check
runs the graph that the builder was given.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlite.backends import Network
from sdlite.exporters.targets import tensorrt
from sdlite.exporters.targets.base import NotRunnable, Runtime
from sdlite.settings import settings


@settings
@dataclass(frozen=True)
class Options(tensorrt.Options):
    """`compute_capabilities`: of the GPUs, such as ["SM89", "SM120"]; TensorRT itself builds for
    the GPU at hand.
    """

    compute_capabilities: tuple[str, ...] = ()


class TensorRTRTX(tensorrt.TensorRT):
    """NVIDIA RTX GPUs."""

    name = "tensorrt-rtx"
    extra = "tensorrt-rtx"
    packages = ("tensorrt-rtx-cu13",)
    opened_by = ()
    options_type = Options
    library = "tensorrt_rtx"

    def runtime(self) -> Runtime:
        """TensorRT for RTX's Python package, with torch for the memory of the GPU."""
        return Runtime(
            "TensorRT for RTX",
            "tensorrt-rtx torch",
            self.named(tensorrt.CODE).replace(
                "import tensorrt as trt", "import tensorrt_rtx as trt"
            ),
            note="Written from TensorRT for RTX's documentation, not run by us.",
        )

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """The engine on this machine's GPU."""
        from sdlite.backends.tensorrt import Engine, no_gpu

        if why := no_gpu(self.library):
            raise NotRunnable(
                "a TensorRT-RTX engine needs an NVIDIA GPU of compute capability 8.0 or more:"
                f" {why}"
            )
        return Engine(files[0], self.specs[part], importlib.import_module(self.library))
