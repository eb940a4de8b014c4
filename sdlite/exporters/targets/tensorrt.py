"""TensorRT engines: strongly typed float32, float16, bfloat16 or explicit-QDQ int8. One process for
each build.

Two members of one family, one builder. `tensorrt-rtx` builds without a GPU, for Ampere to
Blackwell. `tensorrt` (10 and 11) builds on the GPU that it builds for; no such machine was at hand,
so its build and its engines have not been run by us: the gate checks the graph that the builder was
given. Every build begins with the parser's own verdict (`supports_model_v2`); its failure names the
node.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdlite.errors import ExportError, PrecisionError, SdliteError, UnknownNameError
from sdlite.exporters.profile import Profile
from sdlite.exporters.rewrites.bfloat16 import to_bfloat
from sdlite.exporters.rewrites.fixed_shapes import input_shapes
from sdlite.exporters.rewrites.float16 import to_half
from sdlite.exporters.targets import NotRunnable
from sdlite.io import write
from sdlite.onnx_graph import Graph

PACKAGES = ("tensorrt",)
PRECISIONS = ("fp32", "fp16", "bf16", "int8-static")
DYNAMIC = True
FREE_SIZE = False  # any batch in the profile's range, one picture size
LIBRARY = "tensorrt"
FAILED = "build failed: "  # what stands before the reason in the building process' last line
OPTIONS = {
    "min",
    "opt",
    "max",
    "workspace_mib",
    "optimization_level",
    "timing_cache",
    "version_compatible",
    "hardware_compatible",
    "strip_weights",
}


def prepare(part: str, graph: Path, profile: Profile) -> Path:
    """The graph that the builder is given: float16 or bfloat16 arithmetic where the artefact's
    graph has float32.

    Raises:
        PrecisionError: an int8 graph with unsigned activations, which TensorRT does not take.
    """
    if profile.precision == "fp16":
        return to_half(graph, graph.with_name(f"{part}.half.onnx"))
    if profile.precision == "bf16":
        to_bfloat(graph, _rounded(part, graph), rounded=True)
        return to_bfloat(graph, graph.with_name(f"{part}.bfloat.onnx"))
    if profile.precision == "int8-static":
        _symmetric(part, graph)
        return _float_tables(graph, graph.with_name(f"{part}.tables.onnx"))
    return graph


def judged(part: str, graph: Path, profile: Profile) -> Path:
    """What the gate runs where no engine runs: the same graph; for bfloat16 float32 arithmetic
    rounded in the same places.
    """
    return _rounded(part, graph) if profile.precision == "bf16" else graph


def _rounded(part: str, graph: Path) -> Path:
    return graph.with_name(f"{part}.rounded.onnx")


def _symmetric(part: str, graph: Path) -> None:
    held = Graph.load(graph)
    zeros = [
        held.weights[n.input[2]]
        for n in held.nodes
        if n.op_type == "QuantizeLinear" and n.input[2] in held.weights
    ]
    if any(z.dtype != np.int8 or z.array().any() for z in zeros):
        raise PrecisionError(
            f"{part} was quantised with unsigned activations; TensorRT takes symmetric int8: sdlite"
            " quantize MODEL --precision int8-static --scheme s8s8."
        )


def _float_tables(graph: Path, out: Path) -> Path:
    """The graph whose int8 embedding tables hold the same numbers in float32: TensorRT takes int8
    constants in front of DequantizeLinear alone.
    """
    held = Graph.load(graph)
    gathers = [n for n in held.nodes if n.op_type == "Gather" and n.input[0] in held.weights]
    gathers = [n for n in gathers if held.weights[n.input[0]].dtype == np.int8]
    if not gathers:
        return graph
    for n in gathers:
        name = held.own(n, 0)
        held.weights[name] = dataclasses.replace(held.weights[name], dtype=np.dtype(np.float32))
    changed = {n.output[0] for n in gathers}
    known = [v for v in held.proto.graph.value_info if v.name not in changed]
    del held.proto.graph.value_info[:]
    held.proto.graph.value_info.extend(known)
    held.save(out)
    return out


def build(job: dict[str, Any]) -> None:
    """In a process of its own: parse, check and build `job["graph"]` into `job["engine"]`.

    Raises:
        ExportError: the parser or the builder refuses; the message carries their words.
    """
    trt = importlib.import_module(job["library"])

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
                self.words.append(message)

    log = Log()
    builder = trt.Builder(log)
    if builder is None:
        raise ExportError(
            f"{job['library']} makes no builder here: {' '.join(log.words[-3:])[:400]}"
        )
    # TensorRT 11 knows strongly typed networks only and has no flag for it
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    flags = 0 if strong is None else 1 << int(strong)
    asked = builder.create_network(
        flags
    )  # of its own: a parser takes one model, and does not keep its network alive
    supported(trt.OnnxParser(asked, log), job)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["graph"]):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ExportError(f"{job['library']}'s parser refuses {job['part']}: {errors[:400]}")
    config = builder.create_builder_config()
    _configure(trt, builder, config, job)
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        raise ExportError(
            f"{job['library']} could not build {job['part']}: {' '.join(log.words[-3:])[:400]}"
        )
    Path(job["engine"]).write_bytes(bytes(blob))
    if job["options"].get("timing_cache"):
        write(job["options"]["timing_cache"], bytes(config.get_timing_cache().serialize()))


def supported(parser: Any, job: dict[str, Any]) -> None:
    """The parser's verdict on the whole graph, before it is parsed.

    Raises:
        ExportError: a node that the library does not take; the message names it and carries the
            parser's words.
    """
    if parser.supports_model_v2(Path(job["graph"]).read_bytes(), job["graph"]):
        return
    words = [
        f"node {e.node_name() or '(unnamed)'} ({e.node_operator() or 'no operator'}): {e.desc()}"
        for e in map(parser.get_error, range(parser.num_errors))
    ]
    raise ExportError(
        f"{job['library']} does not take {job['part']}:"
        f" {'; '.join(words)[:600] or 'the parser gives no reason'}"
    )


def _configure(trt: Any, builder: Any, config: Any, job: dict[str, Any]) -> None:
    """Shapes and options of a job onto a builder config."""
    options = job["options"]
    if job["ranges"]:
        shapes = builder.create_optimization_profile()
        for name, (low, best, high) in job["ranges"].items():
            shapes.set_shape(name, tuple(low), tuple(best), tuple(high))
        config.add_optimization_profile(shapes)
    if capabilities := options.get("compute_capabilities"):
        config.num_compute_capabilities = len(capabilities)
        for i, c in enumerate(capabilities):
            config.set_compute_capability(_capability(trt, c), i)
    if "workspace_mib" in options:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_mib"] << 20)
    if "optimization_level" in options:
        config.builder_optimization_level = options["optimization_level"]
    if options.get("timing_cache"):
        path = Path(options["timing_cache"])
        config.set_timing_cache(
            config.create_timing_cache(path.read_bytes() if path.exists() else b""),
            ignore_mismatch=False,
        )
    if options.get("version_compatible"):
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.get("strip_weights"):
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.get("hardware_compatible"):
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _capability(trt: Any, name: str) -> Any:
    known = trt.ComputeCapability.__members__
    if name not in known:
        raise UnknownNameError(
            f"compute_capabilities names {name!r}; this library knows {', '.join(known)}."
        )
    return known[name]


def job_of(
    part: str, graph: Path, engine: Path, profile: Profile, library: str = LIBRARY
) -> dict[str, Any]:
    """What `build` is told."""
    free = {k: s for k, s in input_shapes(graph).items() if any(isinstance(d, str) for d in s)}
    ranges = {
        k: [
            [d if isinstance(d, int) else profile.options.get(b, 1) for d in s]
            for b in ("min", "opt", "max")
        ]
        for k, s in free.items()
    }
    return {
        "library": library,
        "part": part,
        "graph": str(graph),
        "engine": str(engine),
        "ranges": ranges,
        "options": dict(profile.options),
    }


def convert(
    part: str, graph: Path, out: Path, profile: Profile, library: str = LIBRARY
) -> list[Path]:
    engine = out / "model.engine"
    job = job_of(part, graph, engine, profile, library)
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(job)], capture_output=True, text=True
    )
    if done.returncode < 0:
        raise ExportError(
            f"the build of {part} was ended by signal {-done.returncode}; 9 is most often too"
            " little memory. Nothing was written."
        )
    if done.returncode or not engine.exists():
        raise ExportError(
            (
                done.stderr.strip().rpartition(FAILED)[2]
                or f"the build of {part} gave no engine, exit {done.returncode}"
            )[:700]
        )
    return [engine]


def run(
    part: str, files: list[Path], profile: Profile, threads: int | None
) -> Callable[..., np.ndarray]:
    from sdlite.backends.tensorrt import Engine, no_gpu

    if why := no_gpu():
        raise NotRunnable(why)
    return Engine(files[0], part)


if __name__ == "__main__":
    try:
        build(json.loads(sys.argv[1]))
    except SdliteError as e:
        sys.exit(f"{FAILED}{e}")
