"""ExecuTorch (.pte): XNNPACK for ARM and x86 CPUs, or Vulkan for phones' GPUs; fixed shapes,
float32.

Made from the torch networks, not from ONNX. PyPI's wheel runs XNNPACK; it has no Vulkan backend, so
Vulkan programs are exported and not run.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sdlite.backends import Network
from sdlite.errors import ExportError
from sdlite.exporters.targets.base import NotRunnable, Runtime, Target
from sdlite.settings import settings
from sdlite.spec import Arrays

if TYPE_CHECKING:
    import torch

CODE = """
import numpy as np
import torch
from executorch.runtime import Runtime

INPUTS = @INPUTS@
OUTPUTS = @OUTPUTS@


def load(part):
    method = Runtime.get().load_program(f"{part}/model.pte").load_method("forward")

    def network(**inputs):  # by place
        made = method.execute([torch.from_numpy(inputs[name]) for name in INPUTS[part]])
        return {name: x.numpy().copy() for name, x in zip(OUTPUTS[part], made)}

    return network
"""
PARTITIONERS = {  # delegate -> (module, class)
    "xnnpack": ("executorch.backends.xnnpack.partition.xnnpack_partitioner", "XnnpackPartitioner"),
    "vulkan": ("executorch.backends.vulkan.partitioner.vulkan_partitioner", "VulkanPartitioner"),
}


@settings
@dataclass(frozen=True)
class Options:
    """`delegate`: what runs the networks on the device."""

    delegate: Literal["xnnpack", "vulkan"] = "xnnpack"


class ExecuTorch(Target[Options]):
    """PyTorch's runtime for phones and boards."""

    name = "executorch"
    extra = "executorch"
    packages = ("executorch", "torch", "diffusers", "transformers", "onnx-ir")
    from_torch = True
    options_type = Options

    def runtime(self) -> Runtime:
        """ExecuTorch's Python package."""
        return Runtime("ExecuTorch", "executorch", self.named(CODE))

    def convert_torch(
        self, part: str, network: torch.nn.Module, example: tuple[torch.Tensor, ...], out: Path
    ) -> list[Path]:
        """A torch network to a program.

        Raises:
            ExportError: ExecuTorch cannot lower it.
        """
        import torch
        from executorch.exir import to_edge_transform_and_lower

        module, name = PARTITIONERS[self.options.delegate]
        partitioner = getattr(importlib.import_module(module), name)()
        logging.getLogger("executorch").setLevel(logging.ERROR)
        with torch.no_grad():
            program = torch.export.export(network.eval(), example, strict=False)
        try:
            lowered = to_edge_transform_and_lower(program, partitioner=[partitioner])
            made = lowered.to_executorch()
        except Exception as e:  # its passes raise their own kinds
            raise ExportError(
                f"ExecuTorch could not lower {part} ({type(e).__name__}):"
                f" {str(e).splitlines()[0][:300]}"
            ) from e
        path = out / "model.pte"
        path.write_bytes(made.buffer)
        return [path]

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """The program on this machine's CPU."""
        if self.options.delegate == "vulkan":
            raise NotRunnable(
                "ExecuTorch's wheel has no Vulkan backend; the program needs an Android build of"
                " the runtime"
            )
        import torch
        from executorch.runtime import Runtime as Loader

        method = Loader.get().load_program(str(files[0])).load_method("forward")
        if method is None:
            raise ExportError(f"ExecuTorch cannot load {files[0]}.")
        spec = self.specs[part]

        def network(**given: np.ndarray) -> Arrays:
            row = [torch.from_numpy(np.array(given[t.name], t.dtype)) for t in spec.inputs]
            made = zip(spec.outputs, method.execute(row), strict=True)
            return {t.name: x.numpy().copy() for t, x in made}

        return network
