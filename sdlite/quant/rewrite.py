"""Float-to-float rewrites that make a graph easier to quantise. Each leaves the function as it was
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
        if (
            n.name not in layers
            or concat is None
            or not _halves(n, concat)
            or concat.input[0] not in shapes
        ):
            out.append(n)
            continue
        width, weight = shapes[concat.input[0]][1], graph.weights[n.input[1]]
        halves = []
        for i, (x, part) in enumerate(
            zip(concat.input, (slice(0, width), slice(width, None)), strict=True)
        ):
            name = (  # by node: another may read the same weight at another width
                f"{n.input[1]}@{n.name}@{i}"
            )
            graph.weights[name] = _columns(weight, part)
            halves.append(NodeProto())
            halves[-1].CopyFrom(n)
            del halves[-1].input[:], halves[-1].output[:]
            halves[-1].name = f"{n.name}@{i}"
            halves[-1].input.extend([x, name, *(n.input[2:] if i else [])])
            halves[-1].output.append(f"{n.output[0]}@{i}")
        out += [
            *halves,
            helper.make_node(
                "Add", [f"{n.output[0]}@0", f"{n.output[0]}@1"], [n.output[0]], name=n.name + "/sum"
            ),
        ]
        done.append(layers[n.name].name)
    graph.replace(out)
    graph.prune()
    return done


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
    out = []
    for i, (start, stop) in enumerate(((0, 1), (1, np.iinfo(np.int64).max))):
        for k, v in (("starts", start), ("ends", stop), ("axes", 1)):
            graph.weights[f"{tensor}@{i}.{k}"] = constant(np.array([v], np.int64))
        inputs = [tensor, *(f"{tensor}@{i}.{k}" for k in ("starts", "ends", "axes"))]
        out.append(helper.make_node("Slice", inputs, [f"{tensor}@{i}"], name=f"{tensor}@{i}"))
    for n in graph.nodes:
        if n.name not in layers:
            out.append(n)
            continue
        for i in range(2):
            out.append(
                helper.make_node(
                    "MatMul",
                    [f"{tensor}@{i}", n.input[1]],
                    [f"{n.output[0]}@{i}"],
                    name=f"{n.name}@{i}",
                )
            )
        out.append(
            helper.make_node(
                "Concat",
                [f"{n.output[0]}@0", f"{n.output[0]}@1"],
                [n.output[0]],
                name=n.name + "/tokens",
                axis=1,
            )
        )
    graph.replace(out)
    return [layer.name for layer in layers.values()]


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
    groups: dict[str, list[Layer]] = {}
    for layer in graph.layers():
        if layer.op in ("MatMul", "Gemm"):
            groups.setdefault(layer.input, []).append(layer)
    done, extra = {}, {}
    for x, group in groups.items():
        stats = seen.get(x)
        if (
            stats is None
            or stats.values is None
            or "@" in x
            or all(any(re.search(k, layer.name) for k in keep) for layer in group)
        ):
            continue
        rows = [np.abs(graph.weights[layer.weight].array()).max(layer.axis) for layer in group]
        w = np.maximum.reduce(rows)
        if w.shape != stats.values.shape:
            continue
        s = np.maximum(stats.values, 1e-5) ** alpha / np.maximum(w, 1e-5) ** (1 - alpha)
        s = (s / np.exp(np.log(s).mean())).astype(np.float32)
        norm = producers.get(x)
        only = len(consumers[x]) == len(group) and x not in results
        if (
            norm is not None
            and norm.op_type == "LayerNormalization"
            and only
            and all(i in graph.weights for i in norm.input[1:])
        ):
            for i in range(1, len(norm.input)):
                name = graph.own(norm, i)
                graph.weights[name] = _scaled(graph.weights[name], 1 / s)
            done[x] = "layer norm"
        elif stats.values.max() > worth * np.median(stats.values):
            graph.weights[x + "@smooth"] = constant(1 / s)
            extra[x] = helper.make_node(
                "Mul", [x, x + "@smooth"], [x + "@smoothed"], name=x + "/smooth"
            )
            for n in consumers[x]:
                if n.name in {layer.node for layer in group}:
                    n.input[0] = x + "@smoothed"
            done[x] = "multiplied"
        else:
            continue
        nodes = {n.name: n for n in consumers[x]}
        for layer in group:
            name = graph.own(nodes[layer.node], 1)
            graph.weights[name] = _scaled(
                graph.weights[name], s[:, None] if layer.axis == 1 else s[None]
            )
    if extra:
        graph.replace(_after(graph, extra))
    return done


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


def _after(graph: Graph, extra: Mapping[str, NodeProto]) -> list[NodeProto]:
    """The nodes in order, each of `extra` placed after the producer of its key (or first, for graph
    inputs).
    """
    made = {o for n in graph.nodes for o in n.output}
    out = [n for x, n in extra.items() if x not in made]
    for n in graph.nodes:
        out.append(n)
        out += [extra[o] for o in n.output if o in extra]
    return out


def integer_embeddings(graph: Graph) -> dict[str, int]:
    """Gather(table) -> int8 rows with a scale each: storage only, the sum after it stays float.
    Returns module -> parameters.
    """
    done, out = {}, []
    for n in graph.nodes:
        table = graph.weights.get(n.input[0]) if n.op_type == "Gather" else None
        rows = not any(a.name == "axis" and a.i for a in n.attribute)
        if table is None or not rows or table.dtype != np.float32 or len(table.shape) != 2:
            out.append(n)
            continue
        name = n.input[0]
        scale = (
            np.maximum(np.abs(table.array()).max(1, keepdims=True), 1e-8).astype(np.float32) / 127
        )
        graph.weights[name + "@q"] = _rows_as_int8(table, scale)
        graph.weights[name + "@scale"] = constant(scale)
        y = n.output[0]
        out += [
            helper.make_node(
                "Gather", [name + "@q", n.input[1]], [y + "@q"], name=n.name + "/rows", axis=0
            ),
            helper.make_node(
                "Gather", [name + "@scale", n.input[1]], [y + "@s"], name=n.name + "/scales", axis=0
            ),
            helper.make_node("Cast", [y + "@q"], [y + "@f"], name=n.name + "/cast", to=1),
            helper.make_node("Mul", [y + "@f", y + "@s"], [y], name=n.name + "/rescale"),
        ]
        done[
            table.origin.removeprefix("weights.").removeprefix("module.").removesuffix(".weight")
        ] = table.size
    graph.replace(out)
    graph.prune()
    return done
