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

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from sdlite.onnx_graph import Graph, Layer, Weight, constant
from sdlite.quant import rewrite

LEVELS = 63  # 7 bits: x86 without VNNI saturates the sums of two u8 x s8 products


def build_dynamic(
    graphs: dict[str, Graph], layers: dict[str, list[Layer]]
) -> Callable[[Iterable[str]], dict[str, Any]]:
    """Part -> its dynamic graph and what the report says of it. The result ignores its argument:
    nothing goes back to float one by one.

    Args:
        graphs: part -> float graph, which is rewritten.
        layers: part -> layers that may become integer; those that are MatMul do.
    """
    built = {p: _build(g, [x for x in layers[p] if x.op == "MatMul"]) for p, g in graphs.items()}
    return lambda back: built


def _build(graph: Graph, layers: list[Layer]) -> dict[str, Any]:
    floats = graph.total_bytes()
    total = sum(w.size for w in graph.weights.values() if w.dtype == np.float32)
    insert(graph, layers)
    embeddings = rewrite.integer_embeddings(graph)
    integer = sum(layer.parameters for layer in layers) + sum(embeddings.values())
    return {
        "graph": graph,
        "scheme": "dynamic",
        "arithmetic": "int8 Linear, rest float32",
        "bytes": graph.total_bytes(),
        "float_bytes": floats,
        "float_share": 1 - integer / total,
        "rewrites": {"embeddings": embeddings},
        "layers": [
            {
                "name": x.name,
                "op": x.op,
                "parameters": x.parameters,
                "scheme": "dynamic",
                "sqnr": None,
            }
            for x in layers
        ],
    }


def insert(graph: Graph, layers: Iterable[Layer]) -> None:
    """Make these MatMul layers integer: DynamicQuantizeLinear, once for all readers of an
    activation, MatMulInteger and the product of both scales. onnxruntime fuses the three.
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
            graph.weights.update({f"{w}/{k}": v for k, v in _integer(graph.weights[w]).items()})
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


def _integer(w: Weight) -> dict[str, Weight]:
    """int8 (in, out) and its scales (out,)."""
    scales = np.maximum(np.abs(w.array()).max(0), 1e-8).astype(np.float32) / np.float32(LEVELS)

    def read() -> np.ndarray:
        return np.clip(np.round(w.array() / scales), -LEVELS, LEVELS).astype(np.int8)

    integer = Weight(w.shape, np.dtype(np.int8), read, origin=w.origin)
    return {"int8": integer, "scales": constant(scales)}
