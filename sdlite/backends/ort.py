"""onnxruntime: the artefact's ONNX graphs on the CPU execution provider, or on CUDA with inputs bound to the device.

CUDA was written against onnxruntime's IOBinding API and has not been run on a GPU by us.
"""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from sdlite.artifact import Artifact
from sdlite.backends import ROW_BY_ROW, Network, NetworkReport, RowByRow, entry, fused, words_of
from sdlite.errors import ArtifactError, UnknownNameError
from sdlite.spec import SPECS

import numpy as np  # isort: skip

PRECISIONS = ("fp32", "fp16", "int8-dynamic", "int8-static")
DEVICES = ("cpu", "cuda")
LARGE = 32 << 20  # bytes of a network
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def engine() -> str:
    return f"onnxruntime {ort.__version__}"


def notes(precision: str, device: str) -> list[str]:
    if precision == "fp16" and device == "cpu":
        return ["fp16 on the CPU is storage: weights are float16 on disk, arithmetic is float32"]
    if precision == "int8-dynamic":
        return [ROW_BY_ROW]
    return []


def session_options(threads: int | None, size: int = 0) -> ort.SessionOptions:
    """Of a network with files of `size` bytes."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # One block for all of a shape's tensors: a tenth faster where tensors are small; where they are large no faster, and at 512 px a third
    # to two fifths more memory. The weights tell which it is before there is a shape.
    options.enable_mem_pattern = size < LARGE
    # A pool of threads for each network: idle ones would spin on the cores that the next network wants (embedded student, 2 cores: 2.5 times slower).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


class Session:
    """One graph, its files of `size` bytes. Called with the names of its IOSpec; refuses others."""

    def __init__(self, path: str, device: str, threads: int | None, size: int = 0):
        self.provider = _PROVIDERS[device]
        if self.provider not in ort.get_available_providers():
            raise UnknownNameError(
                f"device={device!r} needs {self.provider}, and this onnxruntime {ort.__version__} has {', '.join(ort.get_available_providers())}; "
                "uninstall onnxruntime and pip install 'sdlite[cuda]' (the two are one module: never both)."
            )
        try:
            self.session = ort.InferenceSession(path, session_options(threads, size), providers=[self.provider])
        except Exception as e:  # onnxruntime raises many unrelated types
            raise ArtifactError(f"{path} cannot be loaded by onnxruntime ({words_of(e)}); run `sdlite verify` on the model.") from e
        if self.provider not in self.session.get_providers():  # a listed provider still falls back in silence
            raise UnknownNameError(
                f"device={device!r}: onnxruntime lists {self.provider} but could not start it; check the CUDA and cuDNN libraries."
            )
        self.output = self.session.get_outputs()[0].name

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        out: np.ndarray = self.session.run([self.output], inputs)[0]
        return out


class CudaSession(Session):
    """Keeps each input's device buffer while the same array comes again: the prompt's embeddings cross once, latents every step."""

    def __init__(self, path: str, device: str, threads: int | None, size: int = 0):
        super().__init__(path, device, threads, size)
        self._held: dict[str, tuple[np.ndarray, ort.OrtValue]] = {}

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        binding = self.session.io_binding()
        for name, array in inputs.items():
            held = self._held.get(name)
            if held is None or held[0] is not array:
                held = (array, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0))
                self._held[name] = held
            binding.bind_ortvalue_input(name, held[1])
        binding.bind_output(self.output, "cpu")
        self.session.run_with_iobinding(binding)
        out: np.ndarray = binding.copy_outputs_to_cpu()[0]
        return out


def load_part(artifact: Artifact, part: str, precision: str, device: str, threads: int | None) -> tuple[Network, NetworkReport]:
    row, size = entry(artifact, part, precision)
    path = artifact.folder / row["file"]
    network: Any
    if row.get("cuts"):
        network = fused.load(path.parent, threads, SPECS[part].output.name)
    else:
        network = (CudaSession if device == "cuda" else Session)(str(path), device, threads, size)
    # int8-dynamic has one activation scale for a whole tensor: an image must not set that of another
    if row.get("batch") or precision == "int8-dynamic":
        network = RowByRow(network)
    return network, NetworkReport(part, row["file"], size, row["storage"], row["arithmetic"], 0.0)
