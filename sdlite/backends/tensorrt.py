"""TensorRT: engines of `sdlite export --target tensorrt`, with device buffers that stay and a CUDA
    graph for each set of shapes.

Written for TensorRT 10 and 11 and cuda-python 12 and 13 from their documentation; no NVIDIA GPU was
at hand, so it HAS NOT BEEN RUN. Everything that does not touch the device is tested.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from pathlib import Path
from typing import Any

import numpy as np

from sdlite import running
from sdlite.artifact import Artifact
from sdlite.backends.base import Backend
from sdlite.backends.network import Network, RowByRow, tokens_of
from sdlite.backends.report import NetworkReport
from sdlite.errors import ArtifactError, MissingExtraError, PrecisionError, UnknownNameError
from sdlite.spec import Arrays, IOSpec, spec_of

INSTALL = {  # module -> its distribution, and what pip is told
    "tensorrt": ("tensorrt", "'sdlite[tensorrt]'"),
    "tensorrt_rtx": ("tensorrt-rtx", "'sdlite[tensorrt-rtx]'"),
    "cuda": ("cuda-python", "cuda-python"),
}


def _cudart() -> Any:
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError as e:
        raise MissingExtraError(
            "TensorRT engines need cuda-python: pip install 'sdlite[tensorrt]'."
        ) from e
    return runtime


def _ok(result: tuple[Any, ...]) -> Any:
    """cuda-python returns (error, values...). The values, or an error that says which call
    failed.
    """
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA: {error.name if hasattr(error, 'name') else error}")
    return values[0] if len(values) == 1 else tuple(values)


def no_gpu(library: str = "tensorrt") -> str | None:
    """Why an engine of the library (tensorrt or tensorrt_rtx, as Python imports it) cannot run
    here, or None.
    """
    for package in (library, "cuda"):
        if importlib.util.find_spec(package) is None:
            name, how = INSTALL[package]
            return f"{name} is not installed: pip install {how}"
    try:
        count = _ok(_cudart().cudaGetDeviceCount())
    except (RuntimeError, MissingExtraError) as e:
        return f"no CUDA device: {e}"
    return None if count else "no CUDA device"


class Buffers:
    """Device memory by tensor name; grows, never shrinks, so that addresses in a captured graph
    stay right while shapes stay.
    """

    def __init__(self, cuda: Any):
        self.cuda = cuda
        self.address: dict[str, int] = {}
        self.size: dict[str, int] = {}

    def ensure(self, name: str, size: int) -> bool:
        """At least `size` bytes for `name`. Returns whether the address changed."""
        if size <= self.size.get(name, 0):
            return False
        if name in self.address:
            _ok(self.cuda.cudaFree(self.address[name]))
        self.address[name], self.size[name] = int(_ok(self.cuda.cudaMalloc(size))), size
        return True

    def close(self) -> None:
        """Free device memory."""
        for address in self.address.values():
            self.cuda.cudaFree(address)
        self.address, self.size = {}, {}


class Engine:
    """One engine: named arrays -> the network's output, for one thread at a time. The first call
    with new shapes runs plainly, the second is captured, later ones replay.
    """

    def __init__(self, path: Path, part: str | IOSpec, trt: Any = None, cuda: Any = None):
        trt = trt or importlib.import_module("tensorrt")
        self.trt, self.cuda, self.spec = trt, cuda or _cudart(), spec_of(part)
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.engine = trt.Runtime(self.logger).deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise ArtifactError(
                f"{path} is not an engine of TensorRT {trt.__version__} for this GPU; build it"
                " here: sdlite export --target tensorrt."
            )
        self.context = self.engine.create_execution_context()
        self.stream = _ok(self.cuda.cudaStreamCreate())
        self.buffers = Buffers(self.cuda)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.graph: Any = None
        self.calls = 0  # since the shapes or an address changed
        # shapes, buffers, stream and graph are the engine's, not the call's
        self._lock = threading.Lock()

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        with self._lock:
            running.check()
            return self._run(inputs)

    @property
    def tokens(self) -> int | None:
        """How many hidden states of text the engine takes; None: any number."""
        names = [t.name for t in self.spec.inputs]
        return tokens_of({n: tuple(self.engine.get_tensor_shape(n)) for n in names})

    def _run(self, inputs: Arrays) -> Arrays:
        arrays = {
            t.name: np.array(
                inputs[t.name], np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(t.name)))
            )
            for t in self.spec.inputs
        }
        shapes = {k: a.shape for k, a in arrays.items()}
        if shapes != self.shapes:
            self._forget()
            self.shapes = {}  # of no call, until all of them are taken
            for name, shape in shapes.items():
                if not self.context.set_input_shape(name, shape):
                    raise UnknownNameError(
                        f"{self.spec.part}: the engine was not built for {name} of shape {shape};"
                        " export it with that range."
                    )
            self.shapes = shapes
        out = {
            t.name: np.empty(
                tuple(self.context.get_tensor_shape(t.name)),
                np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(t.name))),
            )
            for t in self.spec.outputs
        }
        for name, array in [*arrays.items(), *out.items()]:
            if self.buffers.ensure(name, array.nbytes):
                self._forget()
                self.context.set_tensor_address(name, self.buffers.address[name])
        kind = self.cuda.cudaMemcpyKind
        for name, array in arrays.items():
            _ok(
                self.cuda.cudaMemcpyAsync(
                    self.buffers.address[name],
                    array.ctypes.data,
                    array.nbytes,
                    kind.cudaMemcpyHostToDevice,
                    self.stream,
                )
            )
        self._enqueue()
        for name, array in out.items():
            _ok(
                self.cuda.cudaMemcpyAsync(
                    array.ctypes.data,
                    self.buffers.address[name],
                    array.nbytes,
                    kind.cudaMemcpyDeviceToHost,
                    self.stream,
                )
            )
        _ok(self.cuda.cudaStreamSynchronize(self.stream))
        return {name: array.astype(np.float32, copy=False) for name, array in out.items()}

    def _enqueue(self) -> None:
        """Plain once (it sets the context up), then capture, then replay."""
        self.calls += 1
        if self.graph is not None:
            _ok(self.cuda.cudaGraphLaunch(self.graph, self.stream))
            return
        if self.calls == 2 and self._capturable():
            _ok(
                self.cuda.cudaStreamBeginCapture(
                    self.stream, self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
                )
            )
            done = self.context.execute_async_v3(int(self.stream))
            # an engine that cannot be captured (it waits for the device inside) runs plainly
            error, captured = self.cuda.cudaStreamEndCapture(self.stream)
            if done and not int(error):
                self.graph = _ok(self.cuda.cudaGraphInstantiate(captured, 0))
                _ok(self.cuda.cudaGraphLaunch(self.graph, self.stream))
                return
        if not self.context.execute_async_v3(int(self.stream)):
            raise RuntimeError(f"TensorRT could not run {self.spec.part}; its log has the reason.")

    def _capturable(self) -> bool:
        """Whether the context can be captured; TensorRT for RTX tells."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return ask is None or bool(ask(int(self.stream)))

    def _forget(self) -> None:
        if self.graph is not None:
            _ok(self.cuda.cudaGraphExecDestroy(self.graph))
        self.graph, self.calls = None, 0

    def close(self) -> None:
        """Free device memory."""
        with self._lock:
            self._forget()
            self.buffers.close()
            if self.stream is not None:
                _ok(self.cuda.cudaStreamDestroy(self.stream))
            self.stream = None


class TensorRT(Backend):
    """Engines that were built on this GPU."""

    name = "tensorrt"
    package = "tensorrt"
    precisions = ("fp32", "fp16", "bf16", "int8-static")
    extra = "tensorrt"
    devices = ("cuda",)
    order = 3
    graphs = False

    def engine(self) -> str:
        import tensorrt

        return f"tensorrt {tensorrt.__version__}"

    def runs(self, artifact: Artifact, precision: str) -> bool:
        """Engines are for one GPU, so that only a folder exported for it is run."""
        return artifact.export is not None and precision == artifact.export.precision

    def load_part(
        self,
        artifact: Artifact,
        part: str,
        precision: str,
        device: str,
        threads: int | None,
        arithmetic: str | None = None,
    ) -> tuple[Network, NetworkReport]:
        """From a folder that `sdlite export --target tensorrt` wrote."""
        name = f"{part}/model.engine"
        if artifact.export is None or not artifact.files.has(name):
            raise ArtifactError(
                f"{artifact.folder} holds no TensorRT engine of {part}; make them on this GPU:"
                " sdlite export MODEL --target tensorrt."
            )
        if (held := artifact.export.precision) != precision:
            raise PrecisionError(
                f"the engines in {artifact.folder} are {held}, not {precision}; pass"
                f" precision={held!r} or export again."
            )
        path = artifact.files.file(name)
        if why := no_gpu():
            raise UnknownNameError(f"device='cuda': {why}; use backend='onnxruntime' on the CPU.")
        spec = artifact.spec(part)
        network = Engine(path, spec)
        fixed = next(iter(network.engine.get_tensor_shape(spec.inputs[0].name))) == 1
        row = NetworkReport(part, name, path.stat().st_size, precision, precision)
        return (RowByRow(network) if fixed else network), row
