"""ONNX graphs as networks that OpenVINO compiles for each shape."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from sdlite import cpu, memory, running
from sdlite.backends import compiled
from sdlite.backends.checked import Declared, declared, words_of
from sdlite.backends.network import tokens_of
from sdlite.errors import ArtifactError, InputError, SdliteError, UnknownNameError
from sdlite.io import scratch, working
from sdlite.spec import SPECS, Arrays, IOSpec, spec_of

log = logging.getLogger("sdlite")
Shapes = tuple[tuple[int, ...], ...]
HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
NARROW = 3  # pixels: feature maps from here on are right in fused half-precision subgraphs
SHAPES = 8  # compiled graphs of a network that are kept; the one used last always is
ACTIVE = 512 << 20  # bytes that their tensors may take together, by `_active`


@functools.cache
def core() -> ov.Core:
    """The process's one core, which is never freed: each that is made gives the thread a stack for
    its signal handlers, and freeing several leaves one that is gone, so that the next Ctrl-C is a
    segmentation fault (OpenVINO 2026.4).
    """
    return ov.Core()


def half() -> str:
    """What this CPU computes half-precision graphs in: bfloat16 where it has instructions for it
    (AMX, AVX512_BF16), else float32.
    """
    return (
        "bfloat16"
        if "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        else "float32"
    )


def arithmetic_of(precision: str, device: str, asked: str | None = None) -> str:
    """What float layers are computed in. fp32 is float32; fp16, and what int8 leaves in float, is
    the device's half precision.
    """
    if asked is not None or precision == "fp32":
        return asked or "float32"
    return half() if device == "cpu" else "float16"


def _narrowest(graph: ov.Model) -> int:
    """Pixels of the narrowest convolution's answer."""
    return min(
        (
            int(n.get_output_shape(0)[-1])
            for n in graph.get_ops()
            if n.get_type_name() == "Convolution"
        ),
        default=NARROW,
    )


def _mark_stored(graph: ov.Model) -> None:
    """In place: casts of float16 weights are marked as decompression, as `ov.save_model` marks
    them. Unmarked they are folded, and the weights are held twice in float32 (also beside those in
    bfloat16).
    """
    for node in graph.get_ops():
        if node.get_type_name() != "Convert":
            continue
        stored = node.input_value(0).get_node()
        if stored.get_type_name() == "Constant" and stored.get_element_type() == ov.Type.f16:
            node.get_rt_info()["decompression_0"] = ""


def _keep_angles(graph: ov.Model) -> None:
    """In place: sines and cosines are answers of the graph too, for what leads to an answer without
    a layer of weights stays float32. The angles of a timestep are up to 1000 radians, which
    bfloat16 tells apart by four; diffusers computes them in float32 in every precision.
    """
    found = [n.output(0) for n in graph.get_ops() if n.get_type_name() in ("Sin", "Cos")]
    if found:
        graph.add_outputs(found)


def _active(graph: ov.Model) -> int:
    """Bytes that a compiled graph of fixed shapes holds for its tensors, about: 3.1 to 3.4 times
    the largest answer of a convolution (embedded decoder, 1024 and 2048 px). Attention's maps are
    left out: they are fused.
    """
    return 4 * max(
        (
            n.output(0).get_tensor().size
            for n in graph.get_ops()
            if n.get_type_name() == "Convolution"
        ),
        default=0,
    )


def _ends(ports: Sequence[Any], spec: IOSpec) -> list[Declared]:
    """What a graph says of its inputs or outputs; of several names of one tensor, the one that
    a spec has.
    """
    known = {t.name for s in (*SPECS.values(), spec) for t in (*s.inputs, *s.outputs)}
    out: list[Declared] = []
    for port in ports:
        names, shape = (
            sorted(port.get_names(), key=lambda n: (n not in known, n)),
            port.get_partial_shape(),
        )
        sides = (
            None
            if shape.rank.is_dynamic
            else [None if s.is_dynamic else s.get_length() for s in shape]
        )
        out.append((names[0] if names else "", port.get_element_type().get_type_name(), sides))
    return out


@contextmanager
def _in_one_folder(files: Sequence[Path]) -> Iterator[Path]:
    """A graph and its weights as OpenVINO takes them: it refuses weights behind a link that leaves
    the graph's folder, as every file of the hub's cache is.

    Args:
        files: the graph, then its weights, all in one folder.

    Yields:
        The graph's path. What is mapped from it outlives the block.
    """
    real = [f.resolve() for f in files]
    if all(r == real[0].with_name(f.name) for r, f in zip(real, files, strict=True)):
        yield files[0]
        return
    with ExitStack() as stack:
        yield _linked(stack, real, [f.name for f in files]) / files[0].name


def _linked(stack: ExitStack, real: Sequence[Path], names: Sequence[str]) -> Path:
    """A folder, there until the stack is closed, with hard links to files, or with copies where the
    system allows no hard link.
    """
    for place in (lambda: compiled.root().parent, lambda: real[-1].parent.parent):
        with (
            ExitStack() as tried,
            suppress(OSError, InputError),
        ):  # another disk or owner, no home, no right to write
            place().mkdir(parents=True, exist_ok=True)
            view: Path = tried.enter_context(working(place(), "links"))
            for r, name in zip(real, names, strict=True):
                os.link(r, view / name)
            stack.push(tried.pop_all())
            return view
    log.warning(
        "no hard links to %s can be made, so OpenVINO reads a copy of %s", real[-1], names[-1]
    )
    view = stack.enter_context(scratch("links"))
    for r, name in zip(real, names, strict=True):
        shutil.copyfile(r, view / name)
    return view


class CompiledNetwork:
    """One graph, compiled for each shape that comes and run by one thread at a time. float32 where
    the graph is float unless `arithmetic` says
    otherwise: OpenVINO's own choice of bf16 would be another precision than asked.

    Fixed shapes are a tenth to a quarter faster than free ones, memory is planned ahead, and an
    answer does not depend on the calls before it: a graph for any shape rounds otherwise than one
    for its first (int8-static: 40 dB apart). `keep` of the compiled graphs stay in memory, those
    used last, with `ACTIVE` bytes of tensors.

    A cancel or a Ctrl-C ends a long run with the node that it is at.

    Fused half-precision subgraphs of fixed shapes are wrong in OpenVINO 2026.4 where a feature map
    is two pixels wide (the embedded UNet at 64 px: 3 dB from float32 on noise, unfused 32 dB; from
    three pixels on they agree), so they are not fused there; `tests/parity/test_openvino.py`.
    """

    def __init__(
        self,
        path: str,
        part: str | IOSpec,
        device: str,
        threads: int | None,
        precision: str,
        arithmetic: str | None = None,
        weights: Sequence[str | Path] = (),
        hashes: Sequence[str] = (),
        keep: int = SHAPES,
    ):
        """`weights`: files that the graph reads besides. `hashes`: SHA-256 of all files, for the
        cache of compiled networks; () keeps none.
        """
        self.core, self.name = core(), device.upper()
        self.files, self.hashes, self.keep = [Path(path), *map(Path, weights)], hashes, keep
        if not any(d.split(".")[0] == self.name for d in self.core.available_devices):
            raise UnknownNameError(
                f"device={device!r} is not seen by openvino {ov.__version__}; it sees"
                f" {', '.join(self.core.available_devices).lower()}. Choose one of those or install"
                " the driver."
            )
        arithmetic = arithmetic or (
            "float16" if precision == "fp16" and device != "cpu" else "float32"
        )
        self.options: dict[str, object] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[arithmetic],
        }
        if threads is not None and device == "cpu":
            self.options["INFERENCE_NUM_THREADS"] = threads
        spec = spec_of(part)
        self.outputs = [t.name for t in spec.outputs]
        self.half = arithmetic != "float32"
        self.requests: OrderedDict[Shapes, ov.InferRequest] = OrderedDict()
        self.active: dict[Shapes, int] = {}  # bytes of their tensors
        self._runs = running.Runs()
        # a request holds one answer, and `infer` lets other threads in
        self._lock = threading.Lock()
        self.mapped = self.files[0].parent  # what the weights are mapped from
        self._graph: ov.Model | None = self._read()
        given = _ends(self._graph.inputs, spec)
        declared(path, spec, given, _ends(self._graph.outputs, spec))
        self.tokens = tokens_of({name: sides or () for name, _, sides in given})

    @property
    def model(self) -> ov.CompiledModel:
        """The compiled graph of the last call."""
        return next(reversed(self.requests.values())).get_compiled_model()

    def _read(self) -> ov.Model:
        try:
            with _in_one_folder(self.files) as path:
                self.mapped = path.parent
                graph = self.core.read_model(str(path))
        except OSError:
            raise
        except Exception as e:  # openvino raises RuntimeError and its own types
            raise self._damaged(e) from e
        _mark_stored(graph)
        return graph

    def _damaged(self, e: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self.files[0]} cannot be loaded by openvino ({words_of(e)}); run `sdlite verify` on"
            " the model."
        )

    def _key(self, options: dict[str, object], shapes: dict[str, list[int]]) -> dict[str, object]:
        """What the compiled network depends on."""
        device = [
            self.core.get_property(self.name, p)
            for p in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
        ]
        return {
            "files": list(self.hashes),
            "openvino": ov.get_version(),
            "device": [self.name, *map(str, device)],
            "cpu": [cpu.name(), sorted(cpu.features()), os.cpu_count()],
            "options": {k: str(v) for k, v in options.items()},
            "shapes": shapes,
            "marks": ["float16 weights", "angles in float32"],  # of ours, in the graph
        }

    def _compile(self, shapes: dict[str, list[int]]) -> tuple[ov.InferRequest, int]:
        """The request, and the bytes of its tensors."""
        graph, self._graph = (
            self._graph or self._read(),
            None,
        )  # not kept: with the compiled copy it would be two sets of weights
        options = self.options
        try:
            if graph.is_dynamic():
                graph.reshape(shapes)
            active = _active(graph)
            if self.half and self.name == "CPU":
                _keep_angles(graph)
                if _narrowest(graph) < NARROW:
                    options = {**options, "SNIPPETS_MODE": "DISABLE"}
            size = sum(f.stat().st_size for f in self.files) if self.hashes else 0
            with (
                compiled.kept(self._key(options, shapes), size) if self.hashes else nullcontext()
            ) as cache:
                if cache is not None:
                    options = {**options, "CACHE_DIR": str(cache)}
                with memory.released(self.mapped, *([cache] if cache else [])):
                    model = self.core.compile_model(graph, self.name, options)
                    del graph
        except (OSError, SdliteError):
            raise
        except Exception as e:
            raise self._damaged(e) from e
        return model.create_infer_request(), active

    def _request(self, shapes: dict[str, list[int]]) -> tuple[Shapes, ov.InferRequest]:
        key = tuple(tuple(shapes[k]) for k in sorted(shapes))
        if key not in self.requests:
            while len(self.requests) >= self.keep:
                self._drop()
            self.requests[key], self.active[key] = self._compile(shapes)
        self.requests.move_to_end(key)
        while len(self.requests) > 1 and sum(self.active.values()) > ACTIVE:
            self._drop()
        return key, self.requests[key]

    def _drop(self) -> None:
        """The graph that was not used for longest."""
        key, _ = self.requests.popitem(last=False)
        if self.active.pop(key) > ACTIVE // 8:
            memory.trim()

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        with self._lock:
            running.check()
            key, request = self._request({k: list(v.shape) for k, v in inputs.items()})
            try:
                self._runs(lambda: request.infer(inputs), request.cancel, running.elements(inputs))
            except BaseException:  # what was stopped, or still runs, is not used again
                self.requests[key] = request.get_compiled_model().create_infer_request()
                raise
            return {name: request.get_tensor(name).data.copy() for name in self.outputs}
