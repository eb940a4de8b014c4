"""bfloat16 arithmetic: a graph that computes in float32 to one that computes in bfloat16, inputs
and outputs staying float32.

onnxruntime's CPU has no bfloat16 kernels. For the quality check there is a second graph with the
same casts, which computes in float32 and rounds to bfloat16 wherever the first one stores bfloat16.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from sdlite.errors import ExportError
from sdlite.exporters.rewrites.float16 import FLOAT32, before_sines
from sdlite.onnx_graph import Graph

BFLOAT_CONV = 22  # the first opset whose Conv and normalizations take bfloat16
CONSTANTS = ("Cast", "Constant", "ConstantOfShape", "Range")


def to_bfloat(graph: Path, out: Path, *, rounded: bool = False) -> Path:
    """Write `graph` with bfloat16 arithmetic to `out` (weights float32 beside it, cast when an
    engine is built). Norms and softmax stay float32.

    Args:
        rounded: instead of bfloat16, float32 rounded to bfloat16: what onnxruntime can run.

    Raises:
        ExportError: the result is not a valid graph.
    """
    source = Graph.load(graph)
    typed = onnx.shape_inference.infer_shapes(onnx.load(str(graph), load_external_data=False))
    values = [*typed.graph.value_info, *typed.graph.input, *typed.graph.output]
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {k for k, w in source.weights.items() if w.dtype.name == "float32"}
    source.replace(_Typing(floats, _wide(source), rounded).nodes(source))
    if not rounded:
        for opset in source.proto.opset_import:
            if opset.domain == "":
                # later versions differ in types only, for the operators of our networks
                opset.version = max(opset.version, BFLOAT_CONV)
    source.save(out)
    try:
        onnx.checker.check_model(str(out))
    except onnx.checker.ValidationError as e:
        raise ExportError(
            f"{graph.stem} in bfloat16 is not a valid graph: {str(e).splitlines()[0][:300]}"
        ) from e
    return out


def _wide(graph: Graph) -> set[str]:
    """Names of nodes that stay float32: see `FLOAT32`, what makes constants, and `before_sines`."""
    kept = {n.name for n in graph.nodes if n.op_type in (*FLOAT32, *CONSTANTS)}
    return kept | before_sines(graph.nodes)


class _Typing:
    """Every float tensor exists as float32 under its own name, and as bfloat16 under `name/bf16`
    where an operator reads it so.
    """

    def __init__(self, floats: set[str], wide: set[str], rounded: bool):
        self.floats, self.wide, self.rounded, self.have = floats, wide, rounded, set[str]()

    def nodes(self, graph: Graph) -> list[NodeProto]:
        out: list[NodeProto] = []
        for node in graph.nodes:
            small = node.name not in self.wide and any(o in self.floats for o in node.output)
            out += self._narrow(node) if small else [node]
        return _without_dead_casts(out, {o.name for o in graph.proto.graph.output})

    def _narrow(self, node: NodeProto) -> list[NodeProto]:
        new = [n for x in dict.fromkeys(node.input) if x in self.floats for n in self._cast(x)]
        made = NodeProto()
        made.CopyFrom(node)
        for i, x in enumerate(node.input):
            made.input[i] = f"{x}/bf16" if x in self.floats else x
        after: list[NodeProto] = []
        for i, y in enumerate(node.output):
            if y not in self.floats:
                continue
            raw = f"{y}/wide" if self.rounded else f"{y}/bf16"
            made.output[i] = raw
            if self.rounded:
                after += self._round(raw, f"{y}/bf16")
            self.have.add(y)
            after.append(
                helper.make_node(
                    "Cast", [f"{y}/bf16"], [y], name=f"{y}/widen", to=TensorProto.FLOAT
                )
            )
        return [*new, made, *after]

    def _cast(self, x: str) -> list[NodeProto]:
        if x in self.have:
            return []
        self.have.add(x)
        if self.rounded:
            return self._round(x, f"{x}/bf16")
        return [
            helper.make_node(
                "Cast", [x], [f"{x}/bf16"], name=f"{x}/narrow", to=TensorProto.BFLOAT16
            )
        ]

    def _round(self, x: str, y: str) -> list[NodeProto]:
        return [
            helper.make_node(
                "Cast", [x], [f"{y}/bits"], name=f"{y}/narrow", to=TensorProto.BFLOAT16
            ),
            helper.make_node("Cast", [f"{y}/bits"], [y], name=f"{y}/round", to=TensorProto.FLOAT),
        ]


def _without_dead_casts(nodes: list[NodeProto], results: set[str]) -> list[NodeProto]:
    """Casts back to float32 that nothing reads are left out."""
    read = {x for n in nodes for x in n.input} | results
    return [n for n in nodes if not (n.op_type == "Cast" and n.output[0] not in read)]
