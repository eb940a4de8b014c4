"""QuantizeLinear / DequantizeLinear around layers: the integer graph, and the twin graph that
measures each layer alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from sdlite.onnx_graph import Graph, Layer, Weight, constant

Range = tuple[float, float]


@dataclass(frozen=True)
class Scheme:
    """How numbers become integers. Weights are symmetric per output channel.

    Attributes:
        activation: "uint8" is asymmetric, "int8" symmetric.
        weight_bits: 7 keeps u8 x s8 products of pairs inside int16, which x86 without VNNI
            saturates (vpmaddubsw).
        quantize_bias: to int32 at input scale x weight scale: engines with integer convolutions
            want it, TensorRT does not.
        quantize_output: of convolutions: onnxruntime's integer convolution needs it, TensorRT does
            not.
    """

    name: str
    activation: str
    weight_bits: int
    quantize_bias: bool
    quantize_output: bool

    @property
    def levels(self) -> int:
        """Largest integer of a weight."""
        return (1 << (self.weight_bits - 1)) - 1

    def parameters(self, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        """scale float32 (), zero point () for a range that includes zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        if self.activation == "int8":
            scale = np.float32(max(-low, high, 1e-8) / 127)
            return np.array(scale), np.array(0, np.int8)
        scale = np.float32(max(high - low, 1e-8) / 255)
        return np.array(scale), np.array(np.clip(np.round(-low / scale), 0, 255), np.uint8)


CPU = Scheme("u8s7", "uint8", 7, True, True)
CPU_VNNI = Scheme("u8s8", "uint8", 8, True, True)
TENSORRT = Scheme("s8s8", "int8", 8, False, False)
SCHEMES = {s.name: s for s in (CPU, CPU_VNNI, TENSORRT)}


def _weight(
    graph: Graph, layer: Layer, scheme: Scheme, bias: np.ndarray | None, input_scale: np.ndarray
) -> tuple[Weight, np.ndarray]:
    """Lazy int8 weight and its scales (out channels,). A channel whose bias would not fit int32
    gets a larger scale.
    """
    w = graph.weights[layer.weight]
    shape = [1] * len(w.shape)
    shape[layer.axis] = -1
    largest = np.abs(w.array()).max(tuple(i for i in range(len(w.shape)) if i != layer.axis))
    scale = np.maximum(largest, 1e-8).astype(np.float32) / np.float32(scheme.levels)
    if bias is not None and scheme.quantize_bias:
        scale = np.maximum(
            scale, np.abs(bias) / (np.float32(input_scale) * np.float32(2**30))
        ).astype(np.float32)

    def read() -> np.ndarray:
        rounded = np.round(w.array() / scale.reshape(shape))
        out: np.ndarray = np.clip(rounded, -scheme.levels, scheme.levels).astype(np.int8)
        return out

    return Weight(w.shape, np.dtype(np.int8), read, False, w.origin), scale


class _Inserter:
    """Puts integer layers into a copy of a graph. Methods append the nodes in front of a layer to
    `new`.
    """

    def __init__(self, graph: Graph, ranges: Mapping[str, Range], scheme: Scheme):
        self.out, self.ranges, self.scheme = graph.copy(), ranges, scheme
        self.graph = graph
        self.pairs: dict[str, tuple[str, np.ndarray]] = {}
        self.stems: dict[tuple[str, int, bytes], str] = {}

    def pair(
        self, x: str, new: list[NodeProto], target: str | None = None
    ) -> tuple[str, np.ndarray]:
        """Q and DQ after `x`; one pair for all readers. Returns (dequantized tensor, scale)."""
        if x in self.pairs and target is None:
            return self.pairs[x]
        y, source = (target, f"{x}/float") if target else (f"{x}/dq", x)
        self.pairs[x] = y, self._q_dq(x, x, source, y, "/", new)
        return self.pairs[x]

    def _q_dq(
        self, tensor: str, stem: str, source: str, y: str, mark: str, new: list[NodeProto]
    ) -> np.ndarray:
        """Nodes and constants of `source` -> Q -> DQ -> `y` in the range of `tensor`; its scale."""
        scale, zero = self.scheme.parameters(*self.ranges[tensor])
        names = [f"{stem}{mark}scale", f"{stem}{mark}zero"]
        self.out.weights[names[0]], self.out.weights[names[1]] = constant(scale), constant(zero)
        q = f"{stem}{mark}q"
        new += [
            helper.make_node("QuantizeLinear", [source, *names], [q], name=f"{stem}{mark}quantize"),
            helper.make_node("DequantizeLinear", [q, *names], [y], name=f"{stem}{mark}dequantize"),
        ]
        return scale

    def weight(
        self, layer: Layer, bias: np.ndarray | None, input_scale: np.ndarray, new: list[NodeProto]
    ) -> tuple[str, np.ndarray]:
        """DQ of a layer's int8 weight; one for all layers that read it with the same scales along
        the same axis. Returns (dequantized tensor, scales).
        """
        weight, scales = _weight(self.graph, layer, self.scheme, bias, input_scale)
        key = (layer.weight, layer.axis, scales.tobytes())
        if key not in self.stems:
            same = sum(k[0] == layer.weight for k in self.stems)
            stem = self.stems[key] = layer.weight + (f"/{same + 1}" if same else "")
            zeros = np.zeros(len(scales), np.int8)
            new.append(self._dq(stem, f"{stem}/int8", weight, scales, zeros, layer.axis))
        return f"{self.stems[key]}/dq", scales

    def _dq(
        self,
        stem: str,
        name: str,
        integer: Weight,
        scales: np.ndarray,
        zeros: np.ndarray,
        axis: int,
    ) -> NodeProto:
        """A node that gives `stem`/dq from an integer constant with scales along an axis."""
        held = [name, f"{stem}/scale", f"{stem}/zero"]
        values = (integer, constant(scales), constant(zeros))
        self.out.weights.update(zip(held, values, strict=True))
        return helper.make_node(
            "DequantizeLinear", held, [f"{stem}/dq"], name=f"{stem}/dequantize", axis=axis
        )

    def bias(self, layer: Layer, bias: np.ndarray, scales: np.ndarray, new: list[NodeProto]) -> str:
        """DQ of a layer's bias in int32, at input scale x weight scale (`scales`); its output."""
        integer = np.clip(np.round(bias / scales), -(2**31), 2**31 - 1).astype(np.int32)
        stem, zeros = f"{layer.node}/bias", np.zeros(len(scales), np.int32)
        new.append(self._dq(stem, stem, constant(integer), scales, zeros, 0))
        return f"{stem}/dq"

    def inputs(self, node: NodeProto, layer: Layer, new: list[NodeProto]) -> list[str]:
        """What the integer layer reads: activation, weight, and bias where there is one."""
        x, scale = self.pair(layer.input, new)
        bias = self.graph.weights[node.input[2]].array() if len(node.input) > 2 else None
        weight, scales = self.weight(layer, bias, scale, new)
        if bias is None:
            return [x, weight]
        if not self.scheme.quantize_bias:
            return [x, weight, node.input[2]]
        return [x, weight, self.bias(layer, bias, (scales * scale).astype(np.float32), new)]

    def has_output(self, layer: Layer) -> bool:
        """Whether the layer's output is rounded too."""
        return self.scheme.quantize_output and layer.op == "Conv"

    def layer(self, node: NodeProto, layer: Layer) -> list[NodeProto]:
        """A layer in integer, in place of `node`."""
        new: list[NodeProto] = []
        inputs, y, rounded = self.inputs(node, layer, new), layer.output, self.has_output(layer)
        new.append(_like(node, node.name, inputs, f"{y}/float" if rounded else y))
        if rounded:
            self.pair(y, new, target=y)
        return new

    def twin(self, node: NodeProto, layer: Layer) -> list[NodeProto]:
        """A layer, its integer copy, and the sums of squares of its output and of the copy's
        error.
        """
        new: list[NodeProto] = []
        inputs, y = self.inputs(node, layer, new), layer.output
        new.append(_like(node, f"{node.name}/twin", inputs, f"{y}/twin"))
        result = f"{y}/twin"
        if self.has_output(layer):
            result = f"{y}/twin.dq"
            self._q_dq(y, f"{y}/twin", f"{y}/twin", result, ".", new)
        difference = f"{y}/difference"
        subtract = helper.make_node("Sub", [y, result], [difference], name=difference)
        return [
            node,
            *new,
            subtract,
            _sum_of_squares(difference, noise_name(layer), f"{y}/noise"),
            _sum_of_squares(y, signal_name(layer), f"{y}/signal"),
        ]


def _like(node: NodeProto, name: str, inputs: Iterable[str], output: str) -> NodeProto:
    """The same operator with the same attributes on other tensors."""
    out = NodeProto()
    out.CopyFrom(node)
    del out.input[:], out.output[:]
    out.name = name
    out.input.extend(inputs)
    out.output.append(output)
    return out


def _sum_of_squares(x: str, y: str, name: str) -> NodeProto:
    return helper.make_node("ReduceSumSquare", [x], [y], name=name, keepdims=0)


def signal_name(layer: Layer) -> str:
    """The twin graph's output with the sum of squares of a layer's output."""
    return f"{layer.output}/sum_of_squares"


def noise_name(layer: Layer) -> str:
    """The twin graph's output with the sum of squares of the integer copy's error."""
    return f"{layer.output}/sum_of_squared_errors"


def insert(
    graph: Graph,
    layers: Iterable[Layer],
    ranges: Mapping[str, Range],
    scheme: Scheme,
    *,
    twin: bool = False,
) -> Graph:
    """The graph with these layers in integer (QDQ format).

    Args:
        ranges: (low, high) of every layer's input and of every convolution's output.
        twin: keep the float graph and add an integer copy of each layer on the same float input;
            the graph then returns, for each layer, the sum of squares of its output (`signal_name`)
            and of the copy's error (`noise_name`).
    """
    chosen = {layer.node: layer for layer in layers}
    work = _Inserter(graph, ranges, scheme)
    made = work.twin if twin else work.layer
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        nodes += made(node, chosen[node.name]) if node.name in chosen else [node]
    work.out.replace(nodes)
    if twin:
        for layer in chosen.values():
            for name in (signal_name(layer), noise_name(layer)):
                work.out.proto.graph.output.append(
                    helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                )
    work.out.prune()
    return work.out
