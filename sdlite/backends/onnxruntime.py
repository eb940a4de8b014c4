"""onnxruntime: ONNX graphs on the CPU execution provider, or on CUDA with inputs bound to the
device.

CUDA was written against onnxruntime's IOBinding API and has not been run on a GPU by us.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from sdlite.artifact import Artifact
from sdlite.backends.base import Backend
from sdlite.backends.network import AUTOENCODER, ROW_BY_ROW, Network, Overflowing, RowByRow
from sdlite.backends.report import NetworkReport

STORAGE = "fp16 on the CPU is storage: weights are float16 on disk, arithmetic is float32"


class OnnxRuntime(Backend):
    """ONNX graphs on onnxruntime."""

    name = "onnxruntime"
    package = "onnxruntime"
    precisions = ("fp32", "fp16", "int8-dynamic", "int8-static")
    extra = "cpu"
    also = " (or 'sdlite[cuda]' for NVIDIA GPUs; never both)"
    devices = ("cpu", "cuda")
    order = 0

    def engine(self) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    def once(self) -> AbstractContextManager[None]:
        from sdlite.backends.ort import once

        return once()

    def notes(self, precision: str, device: str, arithmetic: str | None = None) -> list[str]:
        if precision == "fp16" and device == "cpu":
            return [STORAGE]
        return [ROW_BY_ROW] if precision == "int8-dynamic" else []

    def load_part(
        self,
        artifact: Artifact,
        part: str,
        precision: str,
        device: str,
        threads: int | None,
        arithmetic: str | None = None,
    ) -> tuple[Network, NetworkReport]:
        from sdlite.backends.ort import open_network

        network, row, size = open_network(artifact, part, precision, device, threads)
        on_gpu = precision == "fp16" and device == "cuda"
        if part in AUTOENCODER and on_gpu and artifact.has_onnx("fp32"):
            network = Overflowing(
                network, lambda: open_network(artifact, part, "fp32", device, threads)[0], part
            )
        # int8-dynamic has one activation scale for a whole tensor: an image must not set that of
        # another
        if row.get("batch") or precision == "int8-dynamic":
            network = RowByRow(network)
        report = NetworkReport(part, row["file"], size, row["storage"], row["arithmetic"])
        return network, report
