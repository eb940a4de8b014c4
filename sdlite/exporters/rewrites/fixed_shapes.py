"""Fixed shapes: dimensions by name become numbers, and everything that depended on them becomes
constants.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from sdlite import memory
from sdlite.errors import InputError
from sdlite.onnx_graph import Graph


def fix(graph: Graph, shapes: dict[str, tuple[int | str, ...]], out: Path) -> Path:
    """Write `graph` with these input shapes (numbers, or names that stay free) to `out` (weights
    beside it), shape arithmetic folded by onnxruntime's basic optimization.

    Raises:
        InputError: an input has another rank.
    """
    import onnxruntime as ort

    fixed = graph.copy()
    for value in fixed.proto.graph.input:
        dims, wanted = value.type.tensor_type.shape.dim, shapes[value.name]
        if len(dims) != len(wanted):
            raise InputError(
                f"input {value.name} has {len(dims)} dimensions, the shape {wanted} has"
                f" {len(wanted)}."
            )
        for dim, n in zip(dims, wanted, strict=True):
            dim.Clear()
            if isinstance(n, str):
                dim.dim_param = n
            else:
                dim.dim_value = n
    for value in fixed.proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    raw = out.with_name(out.stem + ".raw.onnx")
    files = fixed.save(raw)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", out.name + ".data"
    )
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
    )
    ort.InferenceSession(str(raw), options, providers=["CPUExecutionProvider"])
    memory.trim()  # the converter comes next, perhaps in a process of its own
    for path in files:
        path.unlink()
    return out


def size_of(graph: Path) -> int:
    """Bytes of a graph file and of the weights beside it."""
    return sum(f.stat().st_size for f in graph.parent.glob(f"{graph.name}*"))


def opset_of(proto: onnx.ModelProto) -> int:
    """Version of ONNX's own operators."""
    return int(next(o.version for o in proto.opset_import if o.domain == ""))


def input_shapes(path: Path) -> dict[str, tuple[int | str, ...]]:
    """Input name -> dimensions, numbers or names."""
    proto = onnx.load(str(path), load_external_data=False)
    return {
        v.name: tuple(d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim)
        for v in proto.graph.input
    }
