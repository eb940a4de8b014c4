"""ONNX graphs as networks on onnxruntime: sessions on the CPU, or on CUDA with bound inputs."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

import onnxruntime as ort

from sdlite import running
from sdlite.artifact import Artifact
from sdlite.backends import fused
from sdlite.backends.checked import declared, words_of
from sdlite.backends.held import entry
from sdlite.backends.network import Network, tokens_of
from sdlite.errors import ArtifactError, UnknownNameError
from sdlite.manifest import NetworkRow
from sdlite.spec import Arrays

import numpy as np  # isort: skip

T = TypeVar("T")
LARGE = 32 << 20  # bytes of a network
_SHRINK = ("memory.enable_memory_arena_shrinkage", "cpu:0")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# onnxruntime's own choice is TF32 (10 bits) for float32 products, and its report float32
OPTIONS = {"cpu": {}, "cuda": {"use_tf32": "0"}}

_Level = ort.GraphOptimizationLevel
_level: ContextVar[ort.GraphOptimizationLevel | None] = ContextVar("level", default=None)


@contextmanager
def _opened_with(level: ort.GraphOptimizationLevel) -> Iterator[None]:
    token = _level.set(level)
    try:
        yield
    finally:
        _level.reset(token)


def once() -> AbstractContextManager[None]:
    """Sessions that are opened within it are called once. Weights stay in their files: they are
    neither cast, transposed and packed beforehand, nor is memory kept for a second call.

    SD-1.4's UNet in float16, opened and called once: 1.8 GB and 1.2 s; else 6.0 GB and 6 s.
    """
    return _opened_with(_Level.ORT_DISABLE_ALL)


def sparing() -> AbstractContextManager[None]:
    """Sessions that are opened within it leave out the last rewriting, of convolutions to blocks of
    channels, which holds every weight twice: SD-1.4's UNet in float16 opens in 4.3 GB and half the
    time (else 6.0 GB) and is called in a twentieth more time. Answers differ by rounding, 93 dB.
    """
    return _opened_with(_Level.ORT_ENABLE_EXTENDED)


def session_options(threads: int | None, size: int = 0) -> ort.SessionOptions:
    """Of a network with files of `size` bytes."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors are raised, in one line
    # One block for all of a shape's tensors: a tenth faster where tensors are small; where they are
    # large no faster, and at 512 px a third to two fifths more memory. The weights tell which it is
    # before there is a shape.
    options.enable_mem_pattern = size < LARGE
    # A pool of threads for each network: idle ones would spin on the cores that the next network
    # wants (embedded student, 2 cores: 2.5 times slower).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if (level := _level.get()) is not None:
        options.graph_optimization_level = level
        options.enable_cpu_mem_arena = level != _Level.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _load_libraries() -> None:
    """CUDA and cuDNN where they came as Python packages, which torch would load, and onnxruntime
    1.21 and newer loads when it is told. What is missing is told by the session.
    """
    if (load := getattr(ort, "preload_dlls", None)) is not None:
        with redirect_stdout(io.StringIO()):
            load()


class Session:
    """One graph, its files of `size` bytes. Called with the names of its IOSpec; refuses others.

    Gives `outputs`, or all that the graph has.
    """

    def __init__(
        self,
        path: str,
        device: str,
        threads: int | None,
        size: int = 0,
        outputs: Sequence[str] = (),
    ):
        self.device, self.provider = device, _PROVIDERS[device]
        if self.provider not in ort.get_available_providers():
            raise UnknownNameError(
                f"device={device!r} needs {self.provider}, and this onnxruntime {ort.__version__}"
                f" has {', '.join(ort.get_available_providers())}; uninstall onnxruntime and pip"
                " install 'sdlite[cuda]' (the two are one module: never both)."
            )
        if device == "cuda":
            _load_libraries()
        try:
            self.session = ort.InferenceSession(
                path, session_options(threads, size), providers=[(self.provider, OPTIONS[device])]
            )
        except Exception as e:  # onnxruntime raises many unrelated types
            raise ArtifactError(
                f"{path} cannot be loaded by onnxruntime ({words_of(e)}); run `sdlite verify` on"
                " the model."
            ) from e
        if (
            self.provider not in self.session.get_providers()
        ):  # a listed provider still falls back in silence
            raise UnknownNameError(
                f"device={device!r}: onnxruntime lists {self.provider} but could not start it;"
                " check the CUDA and cuDNN libraries."
            )
        self.names = [o.name for o in self.session.get_outputs()]
        self.outputs = list(outputs or self.names)
        self.tokens = tokens_of({i.name: i.shape for i in self.session.get_inputs()})
        self._mine = threading.local()
        self._runs = running.Runs()
        self._largest = 0  # elements of the largest long run since memory was given back

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        made = self._run(lambda options: self.session.run(self.outputs, inputs, options), inputs)
        return dict(zip(self.outputs, made, strict=True))

    def _run(self, work: Callable[[ort.RunOptions], T], inputs: dict[str, np.ndarray]) -> T:
        """`work` with the options of this run, which can be stopped where it is long.

        onnxruntime keeps the memory of its largest run (embedded student at 2048 px: 10 GB).
        Shrinking costs a run that comes back the time to have that memory cleared again, 0.25 s a
        GB, so the first run of a quarter of the size or less does it.
        """
        options, elements = ort.RunOptions(), running.elements(inputs)
        if self._largest >= 4 * elements:
            options.add_run_config_entry(*_SHRINK)
            self._largest = 0
        try:
            return self._runs(
                lambda: work(options), lambda: setattr(options, "terminate", True), elements
            )
        finally:
            if self._runs.seconds > running.LONG:
                self._largest = max(self._largest, elements)


class BoundSession(Session):
    """Inputs are bound to the device. The prompt's embeddings are the same array in every step, and
    cross once: each thread keeps those of its last call.
    """

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        binding = self.session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._on_device(name, array))
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self._run(lambda options: self.session.run_with_iobinding(binding, options), inputs)
        return dict(zip(self.outputs, binding.copy_outputs_to_cpu(), strict=True))

    def _on_device(self, name: str, array: np.ndarray) -> ort.OrtValue:
        held = getattr(self._mine, "embeds", None)
        if held is not None and held[0] is array:
            return held[1]
        value = ort.OrtValue.ortvalue_from_numpy(
            np.asarray(array, order="C"), self.device, 0
        )  # a scalar stays one
        if name == "encoder_hidden_states":
            self._mine.embeds = (array, value)
        return value


def _session(path: str | Path, threads: int | None) -> Session:
    size = sum(f.stat().st_size for f in Path(path).parent.glob(f"{Path(path).name}*"))
    return Session(str(path), "cpu", threads, size)


def runner(path: str | Path, threads: int | None) -> tuple[fused.Run, list[str]]:
    """A graph file on onnxruntime's CPU, and the names of its inputs."""
    held = _session(path, threads)
    return (lambda inputs: held(**inputs)), [i.name for i in held.session.get_inputs()]


def hoisted(folder: Path, threads: int | None, output: str) -> fused.Hoisted:
    """The three graphs of `folder` as one network whose answer is called `output`."""
    (time, _), (step, inputs) = (
        runner(folder / f"{name}.onnx", threads) for name in fused.GRAPHS if name != "prompt"
    )
    prompt = _session(folder / "prompt.onnx", threads)
    return fused.Hoisted(
        time, lambda given: prompt(**given), step, inputs, output, tokens=prompt.tokens
    )


def open_network(
    artifact: Artifact, part: str, precision: str, device: str, threads: int | None
) -> tuple[Network, NetworkRow, int]:
    """A network, its row of the listing, and the bytes of its files.

    Raises:
        PrecisionError, ArtifactError, UnknownNameError: see `Backend.load_part`.
    """
    row, size = entry(artifact, part, precision)
    spec = artifact.spec(part)
    path = artifact.folder / row["file"]
    if row.get("cuts"):
        files = {row["file"], *row["weights"]}
        if lost := {f"{part}/{name}.onnx" for name in fused.GRAPHS} - files:
            raise ArtifactError(
                f"{path.parent} has three graphs, and its report does not list {min(lost)}; export"
                " the model again."
            )
        return hoisted(path.parent, threads, spec.output.name), row, size
    kind = BoundSession if device == "cuda" else Session
    network = kind(str(path), device, threads, size, [t.name for t in spec.outputs])
    ends = (network.session.get_inputs(), network.session.get_outputs())
    declared(path, spec, *([(t.name, t.type, t.shape) for t in end] for end in ends))
    return network, row, size
