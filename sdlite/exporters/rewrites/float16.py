"""float16 arithmetic: a graph that computes in float32 to one that computes in float16, inputs and
outputs staying float32.
"""

from __future__ import annotations

from pathlib import Path

import onnx

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


def to_half(graph: Path, out: Path) -> Path:
    """Write `graph` with float16 arithmetic to `out`, weights inside or beside it by size.

    Raises:
        ExportError: the result is not a valid graph.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    # types of inner values are needed, and inferring them must not carry the weights along (2 GB
    # limit)
    typed = onnx.shape_inference.infer_shapes(onnx.load(str(graph), load_external_data=False))
    onnx.load_external_data_for_model(typed, str(graph.parent))
    model = convert_float_to_float16(
        typed,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=[*FLOAT32],
        min_positive_val=1e-7,
    )
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
