"""Dynamic int8: Linear weights in int8 per output channel, activations quantized at run time by the
engine.

Convolutions stay float, in the storage that they have: onnxruntime's CPU engine has no ConvInteger
for u8 x s8, and its u8 x u8 one is slower than float. The report says what share of the weights
that is.

An activation has one scale for its whole tensor (DynamicQuantizeLinear), so backends run such a
network row by row. One scale a token, which needs no such thing, was tried as MatMulNBits with 8
bits: closer by 16 dB and 2.5 to 4 times slower, as slow as float (onnxruntime 1.32, AVX-512 with
VNNI).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from onnx import NodeProto, TensorProto, helper

from sdlite.onnx_graph import Graph, Layer, Weight, constant
from sdlite.quant import rewrite
from sdlite.quant.candidate import Part, Parts, Work
from sdlite.quant.insert import CPU, Scheme
from sdlite.quant.static import float_parameters, quantizable

SCHEMES = ("u8s7", "u8s8")  # an activation is uint8; of `insert.SCHEMES` the weights


class DynamicBuilder:
    """Builds the one dynamic candidate of a float model: no layer goes back to float by itself."""

    def __init__(self, work: Work, keep: Mapping[str, Sequence[str]], scheme: Scheme = CPU):
        """`keep`: part -> regular expressions of layers that stay in float. `scheme`: one of
        `SCHEMES`.
        """
        self.order: list[str] = []
        self.sizes: dict[str, int] = {}
        self._parts = {p: build_part(work.graph(p), keep[p], scheme) for p in work.parts}

    def build(self, back: Collection[str]) -> Parts:
        """The networks; `back` is empty."""
        return self._parts


def build_part(graph: Graph, keep: Sequence[str] = (), scheme: Scheme = CPU) -> Part:
    """A float graph, which is rewritten, with its MatMul layers in integer.

    Args:
        keep: regular expressions of layers that stay in float.
        scheme: one of `SCHEMES`: how many bits weights have.
    """
    layers = [x for x in quantizable(graph, keep) if x.op == "MatMul"]
    floats, parameters = graph.total_bytes(), float_parameters(graph)
    insert(graph, layers, scheme.levels)
    name = "dynamic" if scheme is CPU else f"dynamic {scheme.name}"
    embeddings = rewrite.integer_embeddings(graph)
    integer = sum(layer.parameters for layer in layers) + sum(embeddings.values())
    return Part(
        graph=graph,
        scheme=name,
        arithmetic="int8 Linear, rest float32",
        float_bytes=floats,
        float_share=1 - integer / parameters,
        rewrites={"embeddings": embeddings},
        layers=[
            {"name": x.name, "op": x.op, "parameters": x.parameters, "scheme": name, "sqnr": None}
            for x in layers
        ],
    )


def insert(graph: Graph, layers: Iterable[Layer], levels: int) -> None:
    """Make these MatMul layers integer: DynamicQuantizeLinear, once for all readers of an
    activation, MatMulInteger and the product of both scales. onnxruntime fuses the three. `levels`:
    largest integer of a weight.
    """
    chosen = {layer.node: layer for layer in layers}
    nodes: list[NodeProto] = []
    made: set[str] = set()
    for node in graph.nodes:
        if node.name not in chosen:
            nodes.append(node)
            continue
        layer = chosen[node.name]
        x, w, y = layer.input, layer.weight, layer.output
        if x not in made:
            made.add(x)
            held = [f"{x}/q", f"{x}/scale", f"{x}/zero"]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [x], held, name=f"{x}/quantize"))
        if f"{w}/int8" not in graph.weights:
            graph.weights.update(
                {f"{w}/{k}": v for k, v in _integer(graph.weights[w], levels).items()}
            )
        nodes += [
            helper.make_node(
                "MatMulInteger",
                [f"{x}/q", f"{w}/int8", f"{x}/zero"],
                [f"{y}/sum"],
                name=f"{node.name}/int8",
            ),
            helper.make_node(
                "Cast", [f"{y}/sum"], [f"{y}/float"], name=f"{node.name}/cast", to=TensorProto.FLOAT
            ),
            helper.make_node(
                "Mul", [f"{x}/scale", f"{w}/scales"], [f"{y}/scale"], name=f"{node.name}/scales"
            ),
            helper.make_node("Mul", [f"{y}/float", f"{y}/scale"], [y], name=f"{node.name}/scale"),
        ]
    graph.replace(nodes)
    graph.prune()


def _integer(w: Weight, levels: int) -> dict[str, Weight]:
    """int8 (in, out) and its scales (out,)."""
    scales = np.maximum(np.abs(w.array()).max(0), 1e-8).astype(np.float32) / np.float32(levels)

    def read() -> np.ndarray:
        out: np.ndarray = np.clip(np.round(w.array() / scales), -levels, levels).astype(np.int8)
        return out

    integer = Weight(w.shape, np.dtype(np.int8), read, origin=w.origin)
    return {"int8": integer, "scales": constant(scales)}
