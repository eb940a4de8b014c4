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
    """How numbers become integers.

    `activation` "uint8" is asymmetric, "int8" symmetric. `weight_bits` 7 keeps u8 x s8 products of
    pairs inside int16, which x86 without VNNI saturates (vpmaddubsw). Weights are symmetric per
    output channel.
    """

    name: str
    activation: str
    weight_bits: int
    # int32 at input scale x weight scale: engines with integer convolutions want it, TensorRT does
    # not
    quantize_bias: bool
    quantize_output: (
        bool  # of convolutions: onnxruntime's integer convolution needs it, TensorRT does not
    )

    @property
    def levels(self) -> int:
        return 2 ** (self.weight_bits - 1) - 1

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
        return np.clip(
            np.round(w.array() / scale.reshape(shape)), -scheme.levels, scheme.levels
        ).astype(np.int8)

    return Weight(w.shape, np.dtype(np.int8), read, False, w.origin), scale


class _Inserter:
    def __init__(self, graph: Graph, ranges: Mapping[str, Range], scheme: Scheme, twin: bool):
        self.out, self.ranges, self.scheme, self.twin = graph.copy(), ranges, scheme, twin
        self.graph = graph
        self.pairs: dict[str, tuple[str, np.ndarray]] = {}
        self.stems: dict[tuple[str, int, bytes], str] = {}

    def pair(
        self, x: str, new: list[NodeProto], target: str | None = None
    ) -> tuple[str, np.ndarray]:
        """Q and DQ after `x`; one pair for all readers. Returns (dequantised tensor, scale)."""
        if x in self.pairs and target is None:
            return self.pairs[x]
        scale, zero = self.scheme.parameters(*self.ranges[x])
        names = [f"{x}/scale", f"{x}/zero"]
        self.out.weights[names[0]], self.out.weights[names[1]] = constant(scale), constant(zero)
        y = target or f"{x}/dq"
        source = f"{x}/float" if target else x
        new += [
            helper.make_node("QuantizeLinear", [source, *names], [f"{x}/q"], name=f"{x}/quantize"),
            helper.make_node("DequantizeLinear", [f"{x}/q", *names], [y], name=f"{x}/dequantize"),
        ]
        self.pairs[x] = (y, scale)
        return self.pairs[x]

    def weight(
        self, layer: Layer, bias: np.ndarray | None, input_scale: np.ndarray, new: list[NodeProto]
    ) -> tuple[str, np.ndarray]:
        """DQ of a layer's int8 weight; one for all layers that read it with the same scales along
        the same axis. Returns (dequantised tensor, scales).
        """
        weight, scales = _weight(self.graph, layer, self.scheme, bias, input_scale)
        key = (layer.weight, layer.axis, scales.tobytes())
        if key not in self.stems:
            same = sum(k[0] == layer.weight for k in self.stems)
            stem = self.stems[key] = layer.weight + (f"/{same + 1}" if same else "")
            held = [f"{stem}/int8", f"{stem}/scale", f"{stem}/zero"]
            values = (weight, constant(scales), constant(np.zeros(len(scales), np.int8)))
            self.out.weights.update(zip(held, values, strict=True))
            dq = helper.make_node(
                "DequantizeLinear", held, [f"{stem}/dq"], name=f"{stem}/dequantize", axis=layer.axis
            )
            new.append(dq)
        return f"{self.stems[key]}/dq", scales

    def layer(self, node: NodeProto, layer: Layer) -> list[NodeProto]:
        new: list[NodeProto] = []
        x, scale = self.pair(layer.input, new)
        bias = self.graph.weights[node.input[2]].array() if len(node.input) > 2 else None
        weight, scales = self.weight(layer, bias, scale, new)
        inputs = [x, weight]
        if bias is not None and self.scheme.quantize_bias:
            both = (scales * scale).astype(np.float32)
            name = f"{layer.node}/bias"
            self.out.weights[name] = constant(
                np.clip(np.round(bias / both), -(2**31), 2**31 - 1).astype(np.int32)
            )
            self.out.weights[f"{name}/scale"], self.out.weights[f"{name}/zero"] = (
                constant(both),
                constant(np.zeros(len(both), np.int32)),
            )
            new.append(
                helper.make_node(
                    "DequantizeLinear",
                    [name, f"{name}/scale", f"{name}/zero"],
                    [f"{name}/dq"],
                    name=f"{name}/dequantize",
                    axis=0,
                )
            )
            inputs.append(f"{name}/dq")
        elif bias is not None:
            inputs.append(node.input[2])
        quantised = NodeProto()
        quantised.CopyFrom(node)
        del quantised.input[:], quantised.output[:]
        quantised.input.extend(inputs)
        y = layer.output
        has_output = self.scheme.quantize_output and layer.op == "Conv"
        if self.twin:
            quantised.name = node.name + "/twin"
            quantised.output.append(f"{y}/twin")
            new.append(quantised)
            result = f"{y}/twin"
            if has_output:
                scale_y, zero_y = self.scheme.parameters(*self.ranges[y])
                names = [f"{y}/twin.scale", f"{y}/twin.zero"]
                self.out.weights[names[0]], self.out.weights[names[1]] = (
                    constant(scale_y),
                    constant(zero_y),
                )
                new.append(
                    helper.make_node(
                        "QuantizeLinear",
                        [result, *names],
                        [f"{y}/twin.q"],
                        name=f"{y}/twin.quantize",
                    )
                )
                new.append(
                    helper.make_node(
                        "DequantizeLinear",
                        [f"{y}/twin.q", *names],
                        [f"{y}/twin.dq"],
                        name=f"{y}/twin.dequantize",
                    )
                )
                result = f"{y}/twin.dq"
            return [
                node,
                *new,
                helper.make_node("Sub", [y, result], [f"{y}/difference"], name=f"{y}/difference"),
                helper.make_node(
                    "ReduceSumSquare",
                    [f"{y}/difference"],
                    [noise_name(layer)],
                    name=f"{y}/noise",
                    keepdims=0,
                ),
                helper.make_node(
                    "ReduceSumSquare", [y], [signal_name(layer)], name=f"{y}/signal", keepdims=0
                ),
            ]
        quantised.output.append(f"{y}/float" if has_output else y)
        new.append(quantised)
        if has_output:
            self.pair(y, new, target=y)
        return new


def signal_name(layer: Layer) -> str:
    return f"{layer.output}/sum_of_squares"


def noise_name(layer: Layer) -> str:
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
    work = _Inserter(graph, ranges, scheme, twin)
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        nodes += work.layer(node, chosen[node.name]) if node.name in chosen else [node]
    work.out.replace(nodes)
    if twin:
        for layer in chosen.values():
            for name in (signal_name(layer), noise_name(layer)):
                work.out.proto.graph.output.append(
                    helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                )
    work.out.prune()
    return work.out
