"""torch: any diffusers SD-1.x/2.x folder as it is, by diffusers' and transformers' own classes;
safetensors only.
"""

from __future__ import annotations

from sdlite.artifact import Artifact
from sdlite.backends.base import Backend
from sdlite.backends.held import lacking
from sdlite.backends.network import ROW_BY_ROW, Network
from sdlite.backends.report import NetworkReport
from sdlite.errors import PrecisionError
from sdlite.families import vae_stride

STORAGE = "fp16 on the CPU is storage: weights are rounded to float16, arithmetic is float32"
TF32 = (
    "convolutions may round to TF32 (10 bits), as torch does on CUDA unless"
    " torch.backends.cudnn.allow_tf32 = False"
)
LINEAR = "int8-dynamic: Linear layers by torchao, made while loading; convolutions stay float32"


class Torch(Backend):
    """Weights of a diffusers folder on torch."""

    name = "torch"
    package = "torch"
    precisions = ("fp32", "fp16", "int8-dynamic")
    extra = "torch"
    devices = ("cpu", "cuda")
    arithmetic = ("float32", "bfloat16", "float16")
    order = 2
    graphs = False

    def engine(self) -> str:
        import torch

        return f"torch {torch.__version__}"

    def runs(self, artifact: Artifact, precision: str) -> bool:
        return precision in self.precisions and artifact.has_weights

    def size_multiple(self, artifact: Artifact) -> int:
        return vae_stride(artifact.config("vae"))

    def notes(self, precision: str, device: str, arithmetic: str | None = None) -> list[str]:
        if precision == "fp16" and device == "cpu" and arithmetic is None:
            return [STORAGE]
        if precision != "int8-dynamic":
            told = arithmetic or ("float32" if precision == "fp32" else "float16")
            return [TF32] if device == "cuda" and told == "float32" and _tf32() else []
        return [LINEAR, ROW_BY_ROW] if device == "cpu" else [LINEAR]

    def load_part(
        self,
        artifact: Artifact,
        part: str,
        precision: str,
        device: str,
        threads: int | None,
        arithmetic: str | None = None,
    ) -> tuple[Network, NetworkReport]:
        from sdlite.backends.torch_module import open_part

        if not artifact.has_weights:
            raise lacking(artifact, precision)
        if precision == "int8-dynamic" and arithmetic not in (None, "float32"):
            raise PrecisionError(
                f"int8-dynamic on torch leaves the other layers in float32, and {arithmetic!r} is"
                " asked for; leave arithmetic out, or use precision='fp16'."
            )
        return open_part(artifact, part, precision, device, threads, arithmetic)


def _tf32() -> bool:
    import torch

    return bool(torch.backends.cudnn.allow_tf32)
