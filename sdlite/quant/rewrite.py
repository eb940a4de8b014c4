"""Float-to-float rewrites that make a graph easier to quantize. The graph's function stays the same
(tests: 1e-5 relative).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from onnx import NodeProto, helper

from sdlite.onnx_graph import Graph, Layer, Weight, constant
from sdlite.quant.observe import ChannelMax


def split_concat(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Conv(Concat(a, b)) -> Conv(a) + Conv(b), so that the two halves of a skip connection get a
    scale each.

    Args:
        shapes: shapes of the concatenated tensors, as seen in a run.

    Returns:
        The module names of the convolutions that were split (in a U-Net: `conv_shortcut` of the up
        blocks).
    """
    producers, done = graph.producers(), []
    layers = {layer.node: layer for layer in graph.layers()}
    out: list[NodeProto] = []
    for n in graph.nodes:
        concat = producers.get(n.input[0]) if n.op_type == "Conv" else None
        known = n.name in layers and concat is not None and concat.input[0] in shapes
        if not known or concat is None or not _halves(n, concat):
            out.append(n)
            continue
        out += _split(graph, n, concat, shapes[concat.input[0]][1])
        done.append(layers[n.name].name)
    graph.replace(out)
    graph.prune()
    return done


def _split(graph: Graph, conv: NodeProto, concat: NodeProto, width: int) -> list[NodeProto]:
    """A convolution as the sum of two, of the first `width` channels and of the others."""
    weight, y = graph.weights[conv.input[1]], conv.output[0]
    halves = []
    for i, part in enumerate((slice(0, width), slice(width, None))):
        # by node: another may read the same weight at another width
        name = f"{conv.input[1]}@{conv.name}@{i}"
        graph.weights[name] = _columns(weight, part)
        half = NodeProto()
        half.CopyFrom(conv)
        del half.input[:], half.output[:]
        half.name = f"{conv.name}@{i}"
        half.input.extend([concat.input[i], name, *(conv.input[2:] if i else [])])
        half.output.append(f"{y}@{i}")
        halves.append(half)
    return [*halves, helper.make_node("Add", [f"{y}@0", f"{y}@1"], [y], name=conv.name + "/sum")]


def _halves(conv: NodeProto, concat: NodeProto) -> bool:
    """Whether a convolution reads all channels of two tensors side by side."""
    groups = next((a.i for a in conv.attribute if a.name == "group"), 1)
    axis = next((a.i for a in concat.attribute if a.name == "axis"), None)
    return concat.op_type == "Concat" and len(concat.input) == 2 and axis == 1 and groups == 1


def split_first_token(graph: Graph, tensor: str) -> list[str]:
    """MatMul(x) -> Concat(MatMul(x[:, :1]), MatMul(x[:, 1:])) for the graph input `tensor` (B, L,
    D).

    CLIP's first token carries values many times larger than the others and is the same for every
    prompt: with a scale of its own it does not set the scale of the words. Source: MixDQ
    (arXiv:2405.17873), section 4.1.
    """
    layers = {
        layer.node: layer
        for layer in graph.layers()
        if layer.input == tensor and layer.op == "MatMul"
    }
    if not layers:
        return []
    out: list[NodeProto] = []
    for i, (start, stop) in enumerate(((0, 1), (1, np.iinfo(np.int64).max))):
        for k, v in (("starts", start), ("ends", stop), ("axes", 1)):
            graph.weights[f"{tensor}@{i}.{k}"] = constant(np.array([v], np.int64))
        inputs = [tensor, *(f"{tensor}@{i}.{k}" for k in ("starts", "ends", "axes"))]
        out.append(helper.make_node("Slice", inputs, [f"{tensor}@{i}"], name=f"{tensor}@{i}"))
    for n in graph.nodes:
        out += _by_token(n, tensor) if n.name in layers else [n]
    graph.replace(out)
    return [layer.name for layer in layers.values()]


def _by_token(node: NodeProto, tensor: str) -> list[NodeProto]:
    """A MatMul of `tensor` as one of its first token and one of the others."""
    y = node.output[0]
    out = [
        helper.make_node(
            "MatMul", [f"{tensor}@{i}", node.input[1]], [f"{y}@{i}"], name=f"{node.name}@{i}"
        )
        for i in range(2)
    ]
    name = node.name + "/tokens"
    return [*out, helper.make_node("Concat", [f"{y}@0", f"{y}@1"], [y], name=name, axis=1)]


def smooth(
    graph: Graph,
    seen: Mapping[str, ChannelMax],
    alpha: float = 0.5,
    worth: float = 8.0,
    keep: Sequence[str] = (),
) -> dict[str, str]:
    """SmoothQuant (arXiv:2211.10438, eq. 4): move outlier channels of a Linear's input into its
    weight.

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha); x / s is folded into a LayerNormalization when that
    makes x and nothing else reads it. Otherwise a multiplication is added, and only where the
    largest channel is `worth` times the median one. Inputs that only layers of `keep` (regular
    expressions of layers that stay float) read are left: nothing is gained, and float16 weights
    keep their storage.

    Returns:
        input tensor -> "layer norm" or "multiplied".
    """
    producers, consumers = graph.producers(), graph.consumers()
    results = {o.name for o in graph.proto.graph.output}
    done: dict[str, str] = {}
    extra: dict[str, list[NodeProto]] = {}
    for x, group in _linear_readers(graph).items():
        factors = None if _left(x, group, keep) else _factors(graph, group, seen.get(x), alpha)
        if factors is None:
            continue
        only = len(consumers[x]) == len(group) and x not in results
        norm = producers.get(x)
        if norm is not None and only and _foldable(graph, norm):
            for i in range(1, len(norm.input)):
                name = graph.own(norm, i)
                graph.weights[name] = _scaled(graph.weights[name], 1 / factors)
            done[x] = "layer norm"
        elif _outlying(seen[x], worth):
            extra[x] = [_multiplied(graph, x, 1 / factors, consumers[x], group)]
            done[x] = "multiplied"
        else:
            continue
        _scale_weights(graph, group, consumers[x], factors)
    if extra:
        graph.insert(extra)
    return done


def _linear_readers(graph: Graph) -> dict[str, list[Layer]]:
    """Activation -> the Linear layers that read it."""
    groups: dict[str, list[Layer]] = {}
    for layer in graph.layers():
        if layer.op in ("MatMul", "Gemm"):
            groups.setdefault(layer.input, []).append(layer)
    return groups


def _left(x: str, group: Sequence[Layer], keep: Sequence[str]) -> bool:
    """Whether an activation is left as it is: a rewrite made it, or only layers that stay in float
    read it.
    """
    return "@" in x or all(any(re.search(k, layer.name) for k in keep) for layer in group)


def _factors(
    graph: Graph, group: Sequence[Layer], stats: ChannelMax | None, alpha: float
) -> np.ndarray | None:
    """SmoothQuant's s (D,), with geometric mean 1; None where the channels were not seen."""
    if stats is None or stats.values is None:
        return None
    rows = [np.abs(graph.weights[layer.weight].array()).max(layer.axis) for layer in group]
    w = np.maximum.reduce(rows)
    if w.shape != stats.values.shape:
        return None
    s = np.maximum(stats.values, 1e-5) ** alpha / np.maximum(w, 1e-5) ** (1 - alpha)
    return np.asarray(s / np.exp(np.log(s).mean()), np.float32)


def _foldable(graph: Graph, norm: NodeProto) -> bool:
    """Whether factors can go into this node."""
    known = all(i in graph.weights for i in norm.input[1:])
    return norm.op_type == "LayerNormalization" and known


def _outlying(stats: ChannelMax, worth: float) -> bool:
    """Whether the largest channel is more than `worth` times the median one."""
    return stats.values is not None and bool(stats.values.max() > worth * np.median(stats.values))


def _multiplied(
    graph: Graph, x: str, factors: np.ndarray, readers: Sequence[NodeProto], group: Sequence[Layer]
) -> NodeProto:
    """A node that multiplies `x`, which the layers of the group then read."""
    graph.weights[x + "@smooth"] = constant(factors)
    chosen = {layer.node for layer in group}
    for n in readers:
        if n.name in chosen:
            n.input[0] = x + "@smoothed"
    return helper.make_node("Mul", [x, x + "@smooth"], [x + "@smoothed"], name=x + "/smooth")


def _scale_weights(
    graph: Graph, group: Sequence[Layer], readers: Sequence[NodeProto], factors: np.ndarray
) -> None:
    """In place: the weights that read an activation take its factors."""
    nodes = {n.name: n for n in readers}
    for layer in group:
        name = graph.own(nodes[layer.node], 1)
        by_axis = factors[:, None] if layer.axis == 1 else factors[None]
        graph.weights[name] = _scaled(graph.weights[name], by_axis)


def _columns(w: Weight, part: slice) -> Weight:
    count = len(range(w.shape[1])[part])
    return Weight(
        (w.shape[0], count, *w.shape[2:]), w.dtype, lambda: w.read()[:, part], w.half, w.origin
    )


def _rows_as_int8(w: Weight, scale: np.ndarray) -> Weight:
    return Weight(
        w.shape,
        np.dtype(np.int8),
        lambda: np.clip(np.round(w.array() / scale), -127, 127).astype(np.int8),
        False,
        w.origin,
    )


def _scaled(w: Weight, factor: np.ndarray) -> Weight:
    return Weight(w.shape, w.dtype, lambda: w.array() * factor, False, w.origin)


def integer_embeddings(graph: Graph) -> dict[str, int]:
    """Store tables that Gather reads as int8 rows with a scale each; the sum after it stays float.
    Returns module -> parameters.
    """
    done: dict[str, int] = {}
    out: list[NodeProto] = []
    for n in graph.nodes:
        table = graph.weights.get(n.input[0]) if n.op_type == "Gather" else None
        rows = not any(a.name == "axis" and a.i for a in n.attribute)
        if table is None or not rows or table.dtype != np.float32 or len(table.shape) != 2:
            out.append(n)
            continue
        out += _integer_rows(graph, n, table)
        module = table.origin.removeprefix("weights.").removeprefix("module.")
        done[module.removesuffix(".weight")] = table.size
    graph.replace(out)
    graph.prune()
    return done


def _integer_rows(graph: Graph, gather: NodeProto, table: Weight) -> list[NodeProto]:
    """Gather of int8 rows, times their scales."""
    (name, ids), y, at = gather.input[:2], gather.output[0], gather.name
    largest = np.maximum(np.abs(table.array()).max(1, keepdims=True), 1e-8)
    scale = largest.astype(np.float32) / 127
    graph.weights[name + "@q"] = _rows_as_int8(table, scale)
    graph.weights[name + "@scale"] = constant(scale)
    return [
        helper.make_node("Gather", [name + "@q", ids], [y + "@q"], name=at + "/rows", axis=0),
        helper.make_node("Gather", [name + "@scale", ids], [y + "@s"], name=at + "/scales", axis=0),
        helper.make_node("Cast", [y + "@q"], [y + "@f"], name=at + "/cast", to=1),
        helper.make_node("Mul", [y + "@f", y + "@s"], [y], name=at + "/rescale"),
    ]
