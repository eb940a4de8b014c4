"""OpenVINO: the artefact's ONNX graphs on Intel's runtime.

GPU and NPU are the same calls with another device name and have not been run by us.
"""

from __future__ import annotations

import numpy as np
import openvino as ov

from sdlite.artifact import Artifact
from sdlite.backends import Network, NetworkReport
from sdlite.errors import ArtifactError, PrecisionError, UnknownNameError
from sdlite.spec import SPECS

PRECISIONS = ("fp32", "fp16", "int8-static")
DEVICES = ("cpu", "gpu", "npu")


def engine() -> str:
    return f"openvino {ov.__version__}"


def notes(precision: str, device: str) -> list[str]:
    if precision == "fp16" and device == "cpu":
        return ["fp16 on the CPU is storage: weights are float16 on disk, arithmetic is float32"]
    return []


class CompiledNetwork:
    """One graph, compiled. float32 where the graph is float: OpenVINO's own choice of bf16 would be another precision than asked."""

    def __init__(self, path: str, part: str, device: str, threads: int | None, precision: str):
        core = ov.Core()
        name = device.upper()
        if not any(d.split(".")[0] == name for d in core.available_devices):
            raise UnknownNameError(
                f"device={device!r} is not seen by {engine()}; it sees {', '.join(core.available_devices).lower()}. Choose one of those or install the driver."
            )
        half = precision == "fp16" and device != "cpu"
        options: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f16" if half else "f32"}
        if threads is not None and device == "cpu":
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            self.model = core.compile_model(core.read_model(path), name, options)
        except Exception as e:  # openvino raises RuntimeError and its own types
            raise ArtifactError(
                f"{path} cannot be loaded by openvino ({str(e).splitlines()[0][:200]}); run `sdlite verify` on the model."
            ) from e
        self.request, self.output = self.model.create_infer_request(), SPECS[part].output.name

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        self.request.infer(inputs)
        out: np.ndarray = self.request.get_tensor(self.output).data.copy()
        return out


def load_part(artifact: Artifact, part: str, precision: str, device: str, threads: int | None) -> tuple[Network, NetworkReport]:
    if not artifact.has_onnx(precision):
        held = ", ".join(artifact.manifest.variants) if artifact.manifest else "none"
        raise PrecisionError(f"{artifact.name} holds no {precision} ONNX graphs (it holds: {held}); choose a precision that it holds.")
    assert artifact.manifest is not None
    entry = artifact.manifest.variants[precision][part]
    files = [entry["file"], *entry["weights"]]
    artifact.verify(files)
    network = CompiledNetwork(str(artifact.folder / entry["file"]), part, device, threads, precision)
    size = sum(artifact.manifest.files[f]["bytes"] for f in files)
    return network, NetworkReport(part, entry["file"], size, entry["storage"], entry["arithmetic"], 0.0)
