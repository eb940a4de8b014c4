"""What calibration sees of a tensor, computed in the graph: a network whose hundreds of tensors
come back whole needs their sum beside its weights, and of a 1024 px image it is more than they are.

Each function adds outputs to a copy of a graph. A tensor may be an input of the graph. What comes
back does not grow with the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from onnx import NodeProto, TensorProto, helper

from sdlite.onnx_graph import Graph, constant

SAMPLE = 1 << 18  # values of one array that go into a histogram; minimum and maximum see all
_END = np.iinfo(np.int64).max


def values(graph: Graph, tensors: Iterable[str]) -> Graph:
    """`values_name(x)`: float32 (2 + n,), the least and the largest value of `x`, then at most
    `SAMPLE` of its values, evenly spread.
    """
    out = graph.copy()
    for key, number in (("end", _END), ("zero", 0), ("one", 1), ("most", SAMPLE)):
        out.weights[f"seen/{key}"] = constant(np.array([number], np.int64))
    out.weights["seen/less"] = constant(np.array([SAMPLE - 1], np.int64))
    out.weights["seen/flat"] = constant(np.array([-1], np.int64))
    extra = {}
    for x in tensors:
        names = [f"{x}/seen.{k}" for k in ("flat", "low", "high", "size", "up", "stride", "some")]
        flat, low, high, size, up, stride, some = names
        cut = [flat, "seen/zero", "seen/end", "seen/zero", stride]
        extra[x] = [
            _node("Reshape", [x, "seen/flat"], flat),
            _node("ReduceMin", [flat], low, keepdims=1),
            _node("ReduceMax", [flat], high, keepdims=1),
            _node("Shape", [flat], size),
            _node("Add", [size, "seen/less"], up),
            _node("Div", [up, "seen/most"], stride),
            _node("Slice", cut, some),
            _node("Concat", [low, high, some], values_name(x), axis=0),
        ]
    return _added(out, extra, TensorProto.FLOAT)


def values_name(tensor: str) -> str:
    """The output of `values`."""
    return f"{tensor}/seen"


def channels(graph: Graph, widths: Mapping[str, int]) -> Graph:
    """`channels_name(x)`: float32 (D,), the largest absolute value of each channel of `x` (..., D).

    Args:
        widths: tensor -> D.
    """
    out, extra = graph.copy(), {}
    for x, width in widths.items():
        shape = f"{x}/channels.shape"
        out.weights[shape] = constant(np.array([-1, width], np.int64))
        extra[x] = [
            _node("Reshape", [x, shape], f"{x}/channels.rows"),
            _node("Abs", [f"{x}/channels.rows"], f"{x}/channels.size"),
            _largest(out, f"{x}/channels.size", [0], channels_name(x)),
        ]
    return _added(out, extra, TensorProto.FLOAT)


def channels_name(tensor: str) -> str:
    """The output of `channels`."""
    return f"{tensor}/channels"


def tokens(graph: Graph, tensor: str) -> Graph:
    """`tokens_name(tensor)`: float32 (L,), the largest absolute value of each token of a tensor (B,
    L, D).
    """
    out = graph.copy()
    nodes = [
        _node("Abs", [tensor], f"{tensor}/tokens.size"),
        _largest(out, f"{tensor}/tokens.size", [0, 2], tokens_name(tensor)),
    ]
    return _added(out, {tensor: nodes}, TensorProto.FLOAT)


def tokens_name(tensor: str) -> str:
    """The output of `tokens`."""
    return f"{tensor}/tokens"


def shapes(graph: Graph, tensors: Iterable[str]) -> Graph:
    """`shape_name(x)`: int64, the shape of `x`."""
    extra = {x: [_node("Shape", [x], shape_name(x))] for x in tensors}
    return _added(graph.copy(), extra, TensorProto.INT64)


def shape_name(tensor: str) -> str:
    """The output of `shapes`."""
    return f"{tensor}/shape"


def _largest(graph: Graph, x: str, axes: list[int], y: str) -> NodeProto:
    """ReduceMax over axes, which are an attribute before operators of version 18."""
    if graph.proto.opset_import[0].version < 18:
        return helper.make_node("ReduceMax", [x], [y], name=y, axes=axes, keepdims=0)
    graph.weights[f"{y}.axes"] = constant(np.array(axes, np.int64))
    return _node("ReduceMax", [x, f"{y}.axes"], y, keepdims=0)


def _node(op: str, inputs: list[str], output: str, **attributes: int) -> NodeProto:
    return helper.make_node(op, inputs, [output], name=output, **attributes)


def _added(graph: Graph, extra: Mapping[str, Sequence[NodeProto]], kind: int) -> Graph:
    """The graph with nodes after each tensor, the last one's result an output of the graph."""
    graph.insert(extra)
    for nodes in extra.values():
        end = nodes[-1].output[0]
        graph.proto.graph.output.append(helper.make_tensor_value_info(end, kind, None))
    return graph
