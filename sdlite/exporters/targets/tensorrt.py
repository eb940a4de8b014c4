"""TensorRT engines: strongly typed float32, float16, bfloat16 or explicit-QDQ int8. One process for
each build.

Two members of one family, one builder. `tensorrt-rtx` builds without a GPU, for Ampere to
Blackwell. `tensorrt` (10 and 11) builds on the GPU that it builds for; no such machine was at hand,
so its build and its engines have not been run by us: the quality check runs the graph that the
builder was given. Every build begins with the parser's own verdict (`supports_model_v2`); its
failure names the node.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, TypedDict

import numpy as np

from sdlite.backends import Network
from sdlite.errors import ExportError, PrecisionError, SdliteError, UnknownNameError
from sdlite.exporters.rewrites.bfloat16 import to_bfloat
from sdlite.exporters.rewrites.fixed_shapes import input_shapes
from sdlite.exporters.rewrites.float16 import to_half
from sdlite.exporters.targets.base import NotRunnable, Runtime, Target
from sdlite.io import write
from sdlite.onnx_graph import Graph
from sdlite.settings import At, settings

CODE = """
import numpy as np
import tensorrt as trt
import torch

OUTPUTS = @OUTPUTS@
runtime = trt.Runtime(trt.Logger())


def load(part):
    with open(f"{part}/model.engine", "rb") as f:
        context = runtime.deserialize_cuda_engine(f.read()).create_execution_context()

    def network(**inputs):
        held = {k: torch.from_numpy(np.ascontiguousarray(v)).cuda() for k, v in inputs.items()}
        for name, tensor in held.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        made = {}
        for name in OUTPUTS[part]:
            made[name] = torch.empty(tuple(context.get_tensor_shape(name)), device="cuda")
            context.set_tensor_address(name, made[name].data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        return {name: x.cpu().numpy() for name, x in made.items()}

    return network
"""
FAILED = "build failed: "  # what stands before the reason in the building process' last line
Rows = Annotated[int, At(1)]


@settings
@dataclass(frozen=True)
class Options:
    """What the builder is told.

    Attributes:
        min, opt, max: rows of a call where the batch is free: the fewest, what the engine is tuned
            for, and the most.
        workspace_mib: most MiB of GPU memory that a layer may use besides its tensors.
        optimization_level: 0 (a quick build) to 5 (a quick engine).
        timing_cache: file of timings that builds share; written when it does not exist.
        version_compatible: the engine runs on later versions of the library.
        hardware_compatible: the engine runs on other GPUs, Ampere or newer.
        strip_weights: leave the weights out of the engine.
    """

    min: Rows = 1
    opt: Rows = 1
    max: Rows = 1
    workspace_mib: Annotated[int, At(1)] | None = None
    optimization_level: Annotated[int, At(0, 5)] | None = None
    timing_cache: str | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False


class Job(TypedDict):
    """What the building process is told, as JSON.

    `ranges`: input -> its shapes with the fewest, the best and the most rows, where they are free.
    """

    library: str
    part: str
    graph: str
    engine: str
    ranges: dict[str, list[list[int]]]
    options: dict[str, Any]  # those that are set, by name


class TensorRT(Target[Options]):
    """NVIDIA GPUs; engines are built on the GPU that they are for."""

    name = "tensorrt"
    extra = "tensorrt"
    packages = ("tensorrt",)
    precisions = ("fp32", "fp16", "bf16", "int8-static")
    dynamic = True
    free_size = False  # any batch in the profile's range, one image size
    opened_by: ClassVar[tuple[str, ...]] = ("tensorrt",)
    sample = "tensorrt.cpp"
    options_type = Options
    library = "tensorrt"  # the Python module

    def runtime(self) -> Runtime:
        """TensorRT's Python package, with torch for the memory of the GPU."""
        return Runtime(
            "TensorRT",
            "tensorrt torch",
            self.named(CODE),
            note="Written from TensorRT's documentation, not run by us.",
        )

    def prepare(self, part: str, graph: Path) -> Path:
        """The graph that the builder is given: float16 or bfloat16 arithmetic where the model's
        graph has float32.

        Raises:
            PrecisionError: an int8 graph with unsigned activations, which TensorRT does not take.
        """
        match self.precision(part):
            case "fp16":
                return to_half(graph, graph.with_name(f"{part}.half.onnx"))
            case "bf16":
                to_bfloat(graph, _rounded(part, graph), rounded=True)
                return to_bfloat(graph, graph.with_name(f"{part}.bfloat.onnx"))
            case "int8-static":
                _symmetric(part, graph)
                return float_tables(graph, graph.with_name(f"{part}.tables.onnx"))
            case _:
                return graph

    def judged(self, part: str, graph: Path) -> Path:
        """The same graph; for bfloat16, float32 arithmetic that is rounded in the same places."""
        return _rounded(part, graph) if self.profile.precision == "bf16" else graph

    def job(self, part: str, graph: Path, engine: Path) -> Job:
        """What `build` is told."""
        given = self.options
        rows = (given.min, given.opt, given.max)
        free = {k: s for k, s in input_shapes(graph).items() if any(isinstance(d, str) for d in s)}
        ranges = {
            k: [[d if isinstance(d, int) else n for d in s] for n in rows] for k, s in free.items()
        }
        return {
            "library": self.library,
            "part": part,
            "graph": str(graph),
            "engine": str(engine),
            "ranges": ranges,
            "options": {k: v for k, v in dataclasses.asdict(given).items() if v is not None},
        }

    def convert(self, part: str, graph: Path, out: Path) -> list[Path]:
        """ONNX to an engine, in a process of its own.

        Raises:
            ExportError: the parser or the builder refuses it, or the process was killed.
        """
        engine = out / "model.engine"
        job = json.dumps(self.job(part, graph, engine))
        done = subprocess.run([sys.executable, "-m", __name__, job], capture_output=True, text=True)
        if done.returncode < 0:
            raise ExportError(
                f"the build of {part} was ended by signal {-done.returncode}; 9 is most often too"
                " little memory. Nothing was written."
            )
        if done.returncode or not engine.exists():
            _, told, said = done.stderr.strip().rpartition(FAILED)
            if not told:  # an error that nobody meant: its last line says what
                last = said.splitlines()[-1:] or ["it said nothing"]
                nothing = f"the build of {part} gave no engine, exit {done.returncode}"
                said = f"{nothing}: {last[0]}"
            raise ExportError(said[:700])
        return [engine]

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """The engine on this machine's GPU."""
        from sdlite.backends.tensorrt import Engine, no_gpu

        if why := no_gpu():
            raise NotRunnable(why)
        return Engine(files[0], self.specs[part])


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
            f"{part} was quantized with unsigned activations; TensorRT takes symmetric int8: sdlite"
            " quantize MODEL --precision int8-static --scheme s8s8."
        )


def float_tables(graph: Path, out: Path) -> Path:
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


def build(job: Job) -> None:
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
    # a network of its own: a parser takes one model, and does not keep its network alive
    asked = builder.create_network(flags)
    supported(trt.OnnxParser(asked, log), job)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["graph"]):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ExportError(f"{job['library']}'s parser refuses {job['part']}: {errors[:400]}")
    config = builder.create_builder_config()
    configure(trt, builder, config, job)
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        raise ExportError(
            f"{job['library']} could not build {job['part']}: {' '.join(log.words[-3:])[:400]}"
        )
    Path(job["engine"]).write_bytes(bytes(blob))
    if job["options"].get("timing_cache"):
        write(job["options"]["timing_cache"], bytes(config.get_timing_cache().serialize()))


def supported(parser: Any, job: Job) -> None:
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


def configure(trt: ModuleType, builder: Any, config: Any, job: Job) -> None:
    """Put the shapes and options of a job into a builder's config."""
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


def _capability(trt: ModuleType, name: str) -> object:
    known = trt.ComputeCapability.__members__
    if name not in known:
        raise UnknownNameError(
            f"compute_capabilities names {name!r}; this library knows {', '.join(known)}."
        )
    return known[name]


if __name__ == "__main__":
    try:
        build(json.loads(sys.argv[1]))
    except SdliteError as e:
        sys.exit(f"{FAILED}{e}")
