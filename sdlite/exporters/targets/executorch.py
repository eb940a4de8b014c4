"""ExecuTorch (.pte): XNNPACK for ARM and x86 CPUs, or Vulkan for phones' GPUs; fixed shapes,
float32.

Made from the torch networks, not from ONNX. PyPI's wheel runs XNNPACK; it has no Vulkan backend, so
Vulkan programs are exported and not run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdlite.errors import ExportError, UnknownNameError
from sdlite.exporters.profile import Profile
from sdlite.exporters.targets import NotRunnable
from sdlite.spec import SPECS

PACKAGES = ("executorch", "torch", "diffusers", "transformers", "onnx-ir")
PRECISIONS = ("fp32",)
DYNAMIC = False
OPTIONS = {"delegate"}
DELEGATES = {
    "xnnpack": ("executorch.backends.xnnpack.partition.xnnpack_partitioner", "XnnpackPartitioner"),
    "vulkan": ("executorch.backends.vulkan.partitioner.vulkan_partitioner", "VulkanPartitioner"),
}


def _delegate(profile: Profile) -> str:
    name = profile.options.get("delegate", "xnnpack")
    if name not in DELEGATES:
        raise UnknownNameError(
            f"profile {profile.name}: delegate={name!r} is not known; choose one of"
            f" {', '.join(DELEGATES)}."
        )
    return str(name)


def convert_torch(
    part: str, network: Any, example: tuple[Any, ...], out: Path, profile: Profile
) -> list[Path]:
    import importlib

    import torch
    from executorch.exir import to_edge_transform_and_lower

    module, name = DELEGATES[_delegate(profile)]
    partitioner = getattr(importlib.import_module(module), name)()
    logging.getLogger("executorch").setLevel(logging.ERROR)
    with torch.no_grad():
        program = torch.export.export(network.eval(), example, strict=False)
    try:
        lowered = to_edge_transform_and_lower(program, partitioner=[partitioner]).to_executorch()
    except Exception as e:  # its passes raise their own kinds
        raise ExportError(
            f"ExecuTorch could not lower {part} ({type(e).__name__}):"
            f" {str(e).splitlines()[0][:300]}"
        ) from e
    path = out / "model.pte"
    path.write_bytes(lowered.buffer)
    return [path]


def run(
    part: str, files: list[Path], profile: Profile, threads: int | None
) -> Callable[..., np.ndarray]:
    if _delegate(profile) == "vulkan":
        raise NotRunnable(
            "ExecuTorch's wheel has no Vulkan backend; the program needs an Android build of the"
            " runtime"
        )
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(files[0])).load_method("forward")
    if method is None:
        raise ExportError(f"ExecuTorch cannot load {files[0]}.")
    inputs = SPECS[part].inputs

    def network(**given: np.ndarray) -> np.ndarray:
        row = [torch.from_numpy(np.array(given[t.name], t.dtype)) for t in inputs]
        out: np.ndarray = method.execute(row)[0].numpy().copy()
        return out

    return network
