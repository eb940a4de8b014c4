"""bfloat16 graphs: typed so that TensorRT takes them, and the gate's rounded twin computes what
they compute.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

import onnx
from onnx import TensorProto, helper, numpy_helper

from sdlite.backends.ort import Session
from sdlite.exporters.rewrites.bfloat16 import to_bfloat
from sdlite.exporters.rewrites.fixed_shapes import fix
from sdlite.onnx_graph import Graph
from tests.conftest import EMOJI


def _rounded(x):
    """To bfloat16 and back, halves to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.fixture
def product(tmp_path):
    """y = softmax(x w) as a file, and w."""
    w = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
        helper.make_node("Softmax", ["p"], ["y"], name="softmax"),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", (4, 32)), ("y", (4, 8)))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [numpy_helper.from_array(w, "w")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        str(tmp_path / "m.onnx"),
    )
    return tmp_path / "m.onnx", w


def test_rounded_twin_rounds_inputs_weights_and_results(product, tmp_path):
    import onnxruntime as ort

    path, w = product
    x = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)
    out = to_bfloat(path, tmp_path / "r.onnx", rounded=True)
    got = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    p = _rounded(_rounded(x) @ _rounded(w))
    want = np.exp(p - p.max(1, keepdims=True)) / np.exp(p - p.max(1, keepdims=True)).sum(
        1, keepdims=True
    )
    np.testing.assert_allclose(
        got, want, rtol=2**-7
    )  # a sum in another order may round to the neighbour
    assert np.median(np.abs(got - want)) < 1e-6


@pytest.fixture
def unet(tmp_path):
    shapes = {"sample": (1, 8, 8, 8), "timestep": (), "encoder_hidden_states": (1, 28, 192)}
    return fix(Graph.load(EMOJI / "unet/model.onnx"), shapes, tmp_path / "unet.onnx")


def test_unet_is_valid_and_near(unet, tmp_path):
    real = to_bfloat(unet, tmp_path / "b.onnx")
    onnx.checker.check_model(str(real), full_check=True)
    proto = onnx.shape_inference.infer_shapes(onnx.load(str(real)))
    kinds = {
        v.name: v.type.tensor_type.elem_type
        for v in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    }
    by_op = {}
    for n in proto.graph.node:
        by_op.setdefault(n.op_type, set()).update(kinds[o] for o in n.output if o in kinds)
    assert by_op["Conv"] == by_op["Gemm"] == by_op["MatMul"] == {TensorProto.BFLOAT16}
    assert (
        by_op["Softmax"]
        == by_op["LayerNormalization"]
        == by_op["InstanceNormalization"]
        == by_op["Sin"]
        == {TensorProto.FLOAT}
    )
    assert {kinds[v.name] for v in (*proto.graph.input, *proto.graph.output)} == {TensorProto.FLOAT}
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.normal(size=(1, 8, 8, 8)),
        "timestep": np.array(999.0),
        "encoder_hidden_states": rng.normal(size=(1, 28, 192)),
    }
    inputs = {k: v.astype(np.float32) for k, v in inputs.items()}
    twin = to_bfloat(unet, tmp_path / "r.onnx", rounded=True)
    want, got = (Session(str(p), "cpu", 1)(**inputs)["out_sample"] for p in (unet, twin))
    error = 10 * np.log10((want**2).sum() / ((got - want) ** 2).sum())
    assert 25 < error < 60  # 8 bits, and no more
