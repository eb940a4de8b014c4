"""OpenVINO: the artefact's ONNX graphs on Intel's runtime.

GPU and NPU are the same calls with another device name and have not been run by us.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from sdlite import cpu
from sdlite.artifact import Artifact
from sdlite.backends import Network, NetworkReport, compiled, mapped, words_of
from sdlite.errors import ArtifactError, PrecisionError, SdliteError, UnknownNameError
from sdlite.spec import SPECS

log = logging.getLogger("sdlite")
PRECISIONS = ("fp32", "fp16", "int8-static")
DEVICES = ("cpu", "gpu", "npu")
HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
ARITHMETIC = tuple(HINTS)
NARROW = 3  # pixels: feature maps from here on are right in fused half-precision subgraphs


def engine() -> str:
    return f"openvino {ov.__version__}"


def half() -> str:
    """What this CPU computes half-precision graphs in: bfloat16 where it has instructions for it (AMX, AVX512_BF16), else float32."""
    return "bfloat16" if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "float32"


def arithmetic_of(precision: str, device: str, asked: str | None = None) -> str:
    """What float layers are computed in. fp32 is float32; fp16, and what int8 leaves in float, is the device's half precision."""
    if asked is not None or precision == "fp32":
        return asked or "float32"
    return half() if device == "cpu" else "float16"


def notes(precision: str, device: str, arithmetic: str | None = None) -> list[str]:
    chosen = arithmetic_of(precision, device, arithmetic)
    out = ["compiled at the first call, for its shapes; other shapes compile once more, for any"]
    if device != "cpu" or arithmetic is not None:
        return out
    if precision == "fp16" and chosen == "float32":
        out.append("fp16 on this CPU is storage: weights are float16 on disk, arithmetic is float32")
    elif chosen != "float32":
        out.append(f"float layers are computed in {chosen}, which this CPU has instructions for; arithmetic='float32' is exact and slower")
    return out


def _narrowest(graph: ov.Model) -> int:
    """Pixels of the narrowest convolution's answer."""
    return min((int(n.get_output_shape(0)[-1]) for n in graph.get_ops() if n.get_type_name() == "Convolution"), default=NARROW)


@contextmanager
def _in_one_folder(files: Sequence[Path]) -> Iterator[Path]:
    """A graph and its weights as OpenVINO takes them: it refuses weights behind a link that leaves the
    graph's folder, as every file of the hub's cache is.

    Args:
        files: the graph, then its weights, all in one folder.

    Yields:
        The graph's path. What is mapped from it outlives the block.
    """
    real = [f.resolve() for f in files]
    if all(r == real[0].with_name(f.name) for r, f in zip(real, files, strict=True)):
        yield files[0]
        return
    view = _linked(real, [f.name for f in files])
    try:
        yield view / files[0].name
    finally:
        shutil.rmtree(view, ignore_errors=True)


def _linked(real: Sequence[Path], names: Sequence[str]) -> Path:
    """A new folder with hard links to files, or with copies where the system allows no hard link."""
    for place in (compiled.root().parent, real[-1].parent.parent):
        view = None
        try:
            place.mkdir(parents=True, exist_ok=True)
            view = Path(tempfile.mkdtemp(prefix=".links-", dir=place))
            for r, name in zip(real, names, strict=True):
                os.link(r, view / name)
            return view
        except OSError:  # another disk, another owner, or a folder that cannot be written
            if view is not None:
                shutil.rmtree(view, ignore_errors=True)
    log.warning("no hard links to %s can be made, so OpenVINO reads a copy of %s", real[-1], names[-1])
    view = Path(tempfile.mkdtemp(prefix="sdlite-links-"))
    for r, name in zip(real, names, strict=True):
        shutil.copy(r, view / name)
    return view


class CompiledNetwork:
    """One graph, compiled at its first call. float32 where the graph is float unless `arithmetic` says otherwise: OpenVINO's own choice of
    bf16 would be another precision than asked.

    It is compiled for the shapes of the first call, which is a tenth to a quarter faster and plans memory ahead, and once more for any
    shape when others come. Fused half-precision subgraphs of fixed shapes are wrong in OpenVINO 2026.4 where a feature map is two pixels
    wide (the embedded UNet at 64 px: 3 dB from float32 on noise, unfused 32 dB; from three pixels on they agree), so they are not fused
    there; `tests/parity/test_openvino.py`.
    """

    def __init__(
        self,
        path: str,
        part: str,
        device: str,
        threads: int | None,
        precision: str,
        arithmetic: str | None = None,
        weights: Sequence[str | Path] = (),
        hashes: Sequence[str] = (),
    ):
        """`weights`: files that the graph reads besides. `hashes`: SHA-256 of all files, for the cache of compiled networks; () keeps none."""
        self.core, self.name = ov.Core(), device.upper()
        self.files, self.hashes = [Path(path), *map(Path, weights)], hashes
        if not any(d.split(".")[0] == self.name for d in self.core.available_devices):
            raise UnknownNameError(
                f"device={device!r} is not seen by {engine()}; it sees {', '.join(self.core.available_devices).lower()}. Choose one of those or install the driver."
            )
        arithmetic = arithmetic or ("float16" if precision == "fp16" and device != "cpu" else "float32")
        self.options: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[arithmetic]}
        if threads is not None and device == "cpu":
            self.options["INFERENCE_NUM_THREADS"] = threads
        self.output = SPECS[part].output.name
        self.request: ov.InferRequest | None = None
        self.half = arithmetic != "float32"
        self.shapes: dict[str, list[int]] | None = {}  # {} before the first call, None: any
        self.mapped = self.files[0].parent  # what the weights are mapped from
        self._graph: ov.Model | None = self._read()

    def _read(self) -> ov.Model:
        try:
            with _in_one_folder(self.files) as path:
                self.mapped = path.parent
                return self.core.read_model(str(path))
        except OSError:
            raise
        except Exception as e:  # openvino raises RuntimeError and its own types
            raise self._damaged(e) from e

    def _damaged(self, e: Exception) -> ArtifactError:
        return ArtifactError(f"{self.files[0]} cannot be loaded by openvino ({words_of(e)}); run `sdlite verify` on the model.")

    def _key(self, options: dict[str, object]) -> dict[str, Any]:
        """What the compiled network depends on."""
        device = [self.core.get_property(self.name, p) for p in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        return {
            "files": list(self.hashes), "openvino": ov.get_version(), "device": [self.name, *map(str, device)],
            "cpu": [cpu.name(), sorted(cpu.features())], "options": {k: str(v) for k, v in options.items()}, "shapes": self.shapes,
        }  # fmt: skip

    def _compile(self, shapes: dict[str, list[int]]) -> None:
        graph, self._graph = self._graph or self._read(), None  # not kept: with the compiled copy it would be two sets of weights
        self.request = None
        self.shapes = shapes if self.shapes == {} else None  # fixed the first time, any shape from then on
        options = self.options
        try:
            if self.shapes is not None:
                if graph.is_dynamic():
                    graph.reshape(shapes)
                if self.half and self.name == "CPU" and _narrowest(graph) < NARROW:
                    options = {**options, "SNIPPETS_MODE": "DISABLE"}
            size = sum(f.stat().st_size for f in self.files) if self.hashes else 0
            with compiled.kept(self._key(options), size) if self.hashes else nullcontext() as cache:
                if cache is not None:
                    options = {**options, "CACHE_DIR": str(cache)}
                with mapped.released(self.mapped, *([cache] if cache else [])):
                    self.model = self.core.compile_model(graph, self.name, options)
                    del graph
        except (OSError, SdliteError):
            raise
        except Exception as e:
            raise self._damaged(e) from e
        self.request = self.model.create_infer_request()

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        shapes = {k: list(v.shape) for k, v in inputs.items()}
        if self.request is None or (self.shapes is not None and shapes != self.shapes):
            self._compile(shapes)
        assert self.request is not None
        self.request.infer(inputs)
        out: np.ndarray = self.request.get_tensor(self.output).data.copy()
        return out


def load_part(artifact: Artifact, part: str, precision: str, device: str, threads: int | None,
              arithmetic: str | None = None) -> tuple[Network, NetworkReport]:  # fmt: skip
    if not artifact.has_onnx(precision):
        held = ", ".join(artifact.manifest.variants) if artifact.manifest else "none"
        raise PrecisionError(f"{artifact.name} holds no {precision} ONNX graphs (it holds: {held}); choose a precision that it holds.")
    assert artifact.manifest is not None
    entry = artifact.manifest.variants[precision][part]
    files = [entry["file"], *entry["weights"]]
    artifact.verify(files)
    chosen = arithmetic_of(precision, device, arithmetic)
    network = CompiledNetwork(
        str(artifact.folder / entry["file"]), part, device, threads, precision, chosen,
        weights=[artifact.folder / w for w in entry["weights"]], hashes=[artifact.manifest.files[f]["sha256"] for f in files],
    )  # fmt: skip
    size = sum(artifact.manifest.files[f]["bytes"] for f in files)
    said = chosen if entry["arithmetic"] == "float32" else entry["arithmetic"].replace("float32", chosen)
    return network, NetworkReport(part, entry["file"], size, entry["storage"], said, 0.0)
