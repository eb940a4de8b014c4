"""float16 arithmetic: a graph that computes in float32 to one that computes in float16, inputs and
outputs staying float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from sdlite.errors import ExportError

# Sums over many elements stay in float32: norms, and the softmax of attention.
FLOAT32 = (
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "ReduceMean",
    "Softmax",
    "Sin",
    "Cos",
    "Resize",
)


def before_sines(nodes: Iterable[NodeProto]) -> set[str]:
    """Names of nodes whose results reach a sine or a cosine: the angles of a timestep, up to 1000
    radians, which 11 bits tell apart by half a radian and 8 bits not at all. diffusers computes
    them in float32 in every precision.
    """
    known = list(nodes)
    producers = {o: n for n in known for o in n.output}
    ahead = [n for n in known if n.op_type in ("Sin", "Cos")]
    out: set[str] = set()
    while ahead:
        found = {producers[x].name: producers[x] for n in ahead for x in n.input if x in producers}
        ahead = [n for name, n in found.items() if name not in out]
        out |= {n.name for n in ahead}
    return out


def to_half(graph: Path, out: Path) -> Path:
    """Write `graph` with float16 arithmetic to `out`, weights inside or beside it by size. What
    `FLOAT32` names, and `before_sines`, stays float32.

    Raises:
        ExportError: the result is not a valid graph.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    # types of inner values are needed, and inferring them must not carry the weights along (2 GB
    # limit)
    typed = onnx.shape_inference.infer_shapes(onnx.load(str(graph), load_external_data=False))
    onnx.load_external_data_for_model(typed, str(graph.parent))
    own = {n.name for n in typed.graph.node}
    model = convert_float_to_float16(
        typed,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=[*FLOAT32],
        node_block_list=[*before_sines(typed.graph.node)],
        min_positive_val=1e-7,
    )
    _without_roundings(model, own)
    OnnxModel(model).topological_sort()
    large = model.ByteSize() > 1 << 30
    onnx.save_model(
        model,
        str(out),
        save_as_external_data=large,
        location=out.name + ".data",
        all_tensors_to_one_file=True,
    )
    try:
        onnx.checker.check_model(str(out))
    except onnx.checker.ValidationError as e:
        raise ExportError(
            f"{graph.stem} in float16 is not a valid graph: {str(e).splitlines()[0][:300]}"
        ) from e
    return out


def _without_roundings(model: ModelProto, own: set[str]) -> None:
    """In place: a float32 node reads what another one, or the caller, gives as it is. The converter
    puts a cast to float16 and one back between the two, beside the nodes of the graph's `own`.
    """
    new = [n for n in model.graph.node if n.op_type == "Cast" and n.name not in own]
    casts = {n.output[0]: n for n in new}
    given = {
        y: casts[n.input[0]].input[0]
        for y, n in casts.items()
        if _to(n) == TensorProto.FLOAT
        and n.input[0] in casts
        and _to(casts[n.input[0]]) == TensorProto.FLOAT16
    }
    for node in model.graph.node:
        for i, x in enumerate(node.input):
            node.input[i] = given.get(x, x)
    read = {x for n in model.graph.node for x in n.input} | {o.name for o in model.graph.output}
    kept = [n for n in model.graph.node if n.output[0] not in casts or n.output[0] in read]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _to(cast: NodeProto) -> int:
    return next(int(a.i) for a in cast.attribute if a.name == "to")
