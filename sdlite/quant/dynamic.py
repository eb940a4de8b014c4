"""Dynamic int8: Linear weights in int8 per output channel, activations quantised at run time by the engine.

onnxruntime's own `quantize_dynamic` rewrites the graph. Convolutions stay float: its CPU engine has no ConvInteger for u8 x s8, and
its u8 x u8 one is slower than float. The report says what share of the weights that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from sdlite.artifact import PARTS
from sdlite.quant import rewrite
from sdlite.quant.graph import Graph


def build_dynamic(work: Any) -> Callable[[Iterable[str]], dict[str, Any]]:
    """`work` is `sdlite.quant.api._Work`. The result ignores its argument: nothing goes back to float one by one."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from sdlite.quant.api import KEEP_FLOAT, _quantisable

    built: dict[str, Any] = {}
    for p in PARTS:
        graph = work.graph(p)
        floats = graph.total_bytes()
        total = sum(w.size for w in graph.weights.values() if w.dtype == np.float32)
        layers = [layer for layer in _quantisable(graph, KEEP_FLOAT[p]) if layer.op == "MatMul"]
        embeddings = rewrite.integer_embeddings(graph)
        if layers:
            source, target = work.scratch / f"{p}-plain.onnx", work.scratch / f"{p}-dynamic.onnx"
            for w in graph.weights.values():  # onnxruntime's tool looks for initializers by name: no casts in between
                object.__setattr__(w, "half", False)
            graph.save(source)
            quantize_dynamic(
                source, target, op_types_to_quantize=["MatMul"], nodes_to_quantize=[layer.node for layer in layers], per_channel=True,
                reduce_range=True, weight_type=QuantType.QInt8, use_external_data_format=True,
            )  # fmt: skip
            graph = Graph.load(target)
        built[p] = {
            "graph": graph,
            "scheme": "dynamic",
            "arithmetic": "int8 Linear, rest float32",
            "bytes": graph.total_bytes(),
            "float_bytes": floats,
            "float_share": 1 - (sum(layer.parameters for layer in layers) + sum(embeddings.values())) / total,
            "rewrites": {"embeddings": embeddings},
            "layers": [
                {"name": layer.name, "op": layer.op, "parameters": layer.parameters, "scheme": "dynamic", "sqnr": None} for layer in layers
            ],
        }
    return lambda back: built
