"""Equal tensors are stored once by torch's exporter: whatever changes a graph must change what it
means alone.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

from onnx import helper

from sdlite.exporters.rewrites import a16w8
from sdlite.exporters.rewrites.bfloat16 import to_bfloat
from sdlite.exporters.rewrites.fixed_shapes import fix
from sdlite.exporters.rewrites.float16 import to_half
from sdlite.exporters.rewrites.hoist import hoist
from sdlite.exporters.targets import tensorrt
from sdlite.instrument import NamedOutputs
from sdlite.onnx_graph import Graph, constant
from sdlite.quant import dynamic, insert, rewrite
from sdlite.quant.observe import ChannelMax, Histogram, choose_range


def run(graph, tmp_path, inputs):
    return NamedOutputs(graph, tmp_path / "g.onnx", 1)(**inputs)


def sqnr(want, got):
    return 10 * np.log10(
        np.square(want, dtype=np.float64).sum() / np.square(got - want.astype(np.float64)).sum()
    )


def shared_graph(d=8):
    """LayerNormalization, linear and convolution pairs that read the same constants: norms n1 and
    n2 share weight and bias, linears a, b and c share one weight (c transposed, under Gemm),
    convolutions of two widths share theirs with their biases.
    """
    rng = np.random.default_rng(0)
    value = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    held = {
        "ones": np.ones(d, np.float32),
        "zeros": np.zeros(d, np.float32) + 0.1,
        "square": value(d, d),
        "kernel": value(d, 2 * d, 1, 1),
        "bias": value(d),
        "loud": value(d) * 30,
        "rows": np.array([-1, d], np.int64),
        "picture": np.array([1, d, 4, 4], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "ones", "zeros"], ["n1"], "norm1", axis=-1),
        node("MatMul", ["n1", "square"], ["a"], "a"),
        node("LayerNormalization", ["a", "ones", "zeros"], ["n2"], "norm2", axis=-1),
        node("MatMul", ["n2", "square"], ["b"], "b"),
        node(
            "LayerNormalization", ["b", "ones", "ones"], ["n3"], "norm3", axis=-1
        ),  # weight and bias are one tensor
        node("Reshape", ["n3", "rows"], ["flat"], "flat"),
        node("Gemm", ["flat", "square"], ["c"], "c", transB=1),
        node("Reshape", ["c", "picture"], ["p"], "p"),
        node("Sigmoid", ["p"], ["q"], "q"),
        node("Concat", ["p", "q"], ["pq"], "pq", axis=1),
        node("Concat", ["q", "p"], ["qp"], "qp", axis=1),
        node("Conv", ["pq", "kernel", "bias"], ["u"], "u"),
        node("Conv", ["qp", "kernel", "loud"], ["v"], "v"),
        node("Add", ["u", "v"], ["y"], "y"),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "shared", [info("x", 1, [1, 16, d])], [info("y", 1, [1, d, 4, 4])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return Graph(model, {k: constant(v, origin=k) for k, v in held.items()})


X = {"x": np.random.default_rng(1).standard_normal((1, 16, 8)).astype(np.float32)}


def test_a_constant_that_several_nodes_read_cannot_be_changed():
    graph = shared_graph()
    with pytest.raises(ValueError, match=r"square is read by 3 inputs.*Graph\.own"):
        graph.weights["square"] = constant(np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match="ones is read by 4"):
        graph.weights.update({"ones": constant(np.zeros(8, np.float32))})
    second = graph.producers()["n2"]
    name = graph.own(second, 1)
    assert name != "ones"
    assert graph.own(second, 1) == name, "its own already"
    graph.weights[name] = constant(np.zeros(8, np.float32))
    assert graph.weights["ones"].array().all()
    assert [n.input[1] for n in graph.nodes if n.op_type == "LayerNormalization"] == [
        "ones",
        name,
        "ones",
    ]


def test_rewrites_leave_the_function_where_constants_are_shared(tmp_path):
    graph = shared_graph()
    before = run(graph.outputs(["n1", "n2", "flat"]), tmp_path, X)
    seen = {k: ChannelMax() for k in ("n1", "n2", "flat")}
    for k, stats in seen.items():
        stats.add(before[k])
        # each wants scales of its own
        stats.values = stats.values * np.logspace(-2, 2, 8)[:: -1 if k == "n2" else 1]
    assert rewrite.smooth(graph, seen) == {
        "n1": "layer norm",
        "n2": "layer norm",
        "flat": "multiplied",
    }
    np.testing.assert_allclose(run(graph, tmp_path, X)["y"], before["y"], rtol=1e-5, atol=1e-5)
    assert len(rewrite.split_concat(graph, {"p": (1, 8, 4, 4), "q": (1, 8, 4, 4)})) == 2
    np.testing.assert_allclose(run(graph, tmp_path, X)["y"], before["y"], rtol=1e-5, atol=1e-5)


def test_convolutions_of_two_widths_may_share_a_weight(tmp_path):
    graph = shared_graph()
    for n in graph.nodes:
        if n.name == "qp":  # three channels from p, thirteen from a wider tensor
            n.input[:] = ["p3", "q13"]
    extra = [
        helper.make_node("Slice", [x, "from", to, "axis"], [y], y)
        for x, to, y in (("p", "3", "p3"), ("pq", "13", "q13"))
    ]
    graph.weights.update(
        {
            k: constant(np.array([v], np.int64))
            for k, v in (("from", 0), ("3", 3), ("13", 13), ("axis", 1))
        }
    )
    nodes = list(graph.nodes)
    graph.replace([*nodes[:10], *extra, *nodes[10:]])
    before = run(graph, tmp_path, X)["y"]
    assert len(rewrite.split_concat(graph, {"p": (1, 8, 4, 4), "p3": (1, 3, 4, 4)})) == 2
    np.testing.assert_allclose(run(graph, tmp_path, X)["y"], before, rtol=1e-5, atol=1e-5)


def test_integer_layers_may_share_weights_of_other_axes_and_biases(tmp_path):
    graph = shared_graph()
    kernel = graph.weights["kernel"].array()
    kernel[0] *= (
        1e-9  # the biases, not the weights, set this channel's scale: another one in each layer
    )
    layers = graph.layers()
    assert [x.name for x in layers] == ["square", "square#2", "square#3", "kernel", "kernel#2"], (
        "the search names each"
    )
    tensors = sorted({t for x in layers for t in (x.input, x.output)})
    values = run(graph.outputs(tensors), tmp_path, X)
    ranges = {t: (float(values[t].min()), float(values[t].max())) for t in tensors}
    got = run(insert.insert(graph, layers, ranges, insert.CPU_VNNI), tmp_path, X)["y"]
    noise = np.square(got - values["y"]).mean((0, 2, 3))
    assert (10 * np.log10(np.square(values["y"]).mean((0, 2, 3)) / noise)).min() > 30
    whole = insert.insert(graph, layers[:2], ranges, insert.CPU)
    assert sum(w.dtype == np.int8 and w.size == 64 for w in whole.weights.values()) == 1, (
        "equal scales: stored once"
    )


def test_random_text_encoder_is_close_in_int8(tmp_path):
    """Twelve layers whose norms are all ones and whose biases are all zeros: each is one constant,
    read by every layer.
    """
    import onnx_ir as ir
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from sdlite.spec import SPECS
    from sdlite.tracing import _TextEncoder, names_of, trace

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=999,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        eos_token_id=998,
        attn_implementation="eager",
    )
    ids = np.random.default_rng(0).integers(0, 998, (4, 77))
    wrapped = _TextEncoder(CLIPTextModel(config).eval(), names_of(SPECS["text_encoder"]))
    model = trace(
        "text_encoder",
        wrapped,
        (torch.zeros(2, 77, dtype=torch.int64),),
        {"input_ids": {0: torch.export.Dim("b", min=1, max=63)}},
    )
    ir.save(model, tmp_path / "text.onnx")
    graph = Graph.load(tmp_path / "text.onnx")
    assert (
        max(graph.readers(n.input[1]) for n in graph.nodes if n.op_type == "LayerNormalization")
        == 25
    )
    inputs = {"input_ids": ids}
    linear = sorted({x.input for x in graph.layers()})
    before = run(graph.outputs(linear), tmp_path, inputs)
    seen = {k: ChannelMax() for k in linear}
    for k in linear:
        seen[k].add(before[k])
    assert list(rewrite.smooth(graph, seen).values()).count("layer norm") == 24
    values = run(graph.outputs(linear), tmp_path, inputs)
    np.testing.assert_allclose(values["last_hidden_state"], before["last_hidden_state"], atol=1e-5)
    ranges = {}
    for layer in graph.layers():
        h = Histogram()
        h.add(values[layer.input])
        ranges[layer.input] = choose_range(h, "mse")
    got = run(insert.insert(graph, graph.layers(), ranges, insert.CPU), tmp_path, inputs)[
        "last_hidden_state"
    ]
    want = before["last_hidden_state"]
    assert 10 * np.log10(np.square(want).sum() / np.square(got - want).sum()) > 25


# --- the exporters' rewrites


@pytest.fixture
def stored(tmp_path):
    """The graph as a file, and its float answer."""
    graph = shared_graph()
    graph.save(tmp_path / "shared.onnx")
    return tmp_path / "shared.onnx", run(graph, tmp_path, X)["y"]


@pytest.mark.parametrize(
    ("made", "enough"),
    [
        (lambda path, out: to_half(path, out), 50),
        (lambda path, out: to_bfloat(path, out, rounded=True), 35),
        (lambda path, out: fix(Graph.load(path), {"x": (1, 16, 8)}, out), 110),
    ],
)
def test_other_arithmetic_and_fixed_shapes(stored, tmp_path, made, enough):
    path, want = stored
    assert sqnr(want, run(Graph.load(made(path, tmp_path / "out.onnx")), tmp_path, X)["y"]) > enough


def test_sixteen_bits(stored, tmp_path):
    path, want = stored
    graph = Graph.load(path)
    layers = graph.layers()
    values = run(
        graph.outputs(sorted({t for x in layers for t in (x.input, x.output)})), tmp_path, X
    )
    ranges = {k: (float(v.min()), float(v.max())) for k, v in values.items()}
    assert len(a16w8.choose(graph, graph, ("Conv", "MatMul", "Gemm"), ())) == 5
    assert sqnr(want, run(a16w8.insert(graph, layers, ranges), tmp_path, X)["y"]) > 30


def test_dynamic_layers(tmp_path):
    graph = shared_graph()
    want = run(graph, tmp_path, X)["y"]
    dynamic.insert(graph, [x for x in graph.layers() if x.op == "MatMul"], levels=63)
    assert [n.op_type for n in graph.nodes].count("MatMulInteger") == 2
    assert graph.weights["square"].dtype == np.float32, "Gemm reads it still"
    assert sum(w.dtype == np.int8 for w in graph.weights.values()) == 1
    assert sqnr(want, run(graph, tmp_path, X)["y"]) > 25


def test_tables_of_two_readers(tmp_path):
    """Two Gathers and a Gemm on one table: int8 rows for the first two, and as float again for
    TensorRT.
    """
    rng = np.random.default_rng(0)
    table = rng.standard_normal((8, 8)).astype(np.float32)
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Gather", ["table", "x"], ["a"], "a"),
        node("Gather", ["table", "x"], ["b"], "b"),
        node("Gather", ["table", "x"], ["c"], "c", axis=1),
        node("Add", ["a", "b"], ["ab"], "ab"),
        node("Gemm", ["ab", "table"], ["d"], "d"),
        node("MatMul", ["d", "c"], ["y"], "y"),
    ]
    proto = helper.make_graph(nodes, "tables", [info("x", 7, [3])], [info("y", 1, [3, 3])])
    graph = Graph(
        helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        {"table": constant(table, origin="table")},
    )
    inputs = {"x": np.array([1, 5, 2])}
    want = run(graph, tmp_path, inputs)["y"]
    assert rewrite.integer_embeddings(graph) == {"table": 64}
    assert np.array_equal(graph.weights["table"].array(), table)
    assert sqnr(want, run(graph, tmp_path, inputs)["y"]) > 35
    graph.save(tmp_path / "tables.onnx")
    floats = tensorrt.float_tables(tmp_path / "tables.onnx", tmp_path / "floats.onnx")
    assert not any(w.dtype == np.int8 for w in Graph.load(floats).weights.values())
    assert sqnr(want, run(Graph.load(floats), tmp_path, inputs)["y"]) > 35


def test_hoisted_graphs(tmp_path):
    """A constant that the time, the prompt and the step read."""
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Mul", ["timestep", "shared"], ["t"], "t"),
        node("MatMul", ["encoder_hidden_states", "shared"], ["p"], "p"),
        node("Add", ["sample", "shared"], ["s"], "s"),
        node("Add", ["s", "t"], ["st"], "st"),
        node("Add", ["st", "p"], ["y"], "y"),
    ]
    given = {"sample": [4, 4], "timestep": [], "encoder_hidden_states": [4, 4]}
    proto = helper.make_graph(
        nodes, "hoist", [info(k, 1, v) for k, v in given.items()], [info("y", 1, [4, 4])]
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    rng = np.random.default_rng(0)
    graph = Graph(model, {"shared": constant(rng.standard_normal((4, 4)).astype(np.float32))})
    inputs = {k: np.asarray(rng.standard_normal(v), np.float32) for k, v in given.items()}
    parts = hoist(graph, inputs, lambda g, x: run(g, tmp_path, x))
    before = {**run(parts["time"], tmp_path, {"timestep": inputs["timestep"]})}
    before |= run(
        parts["prompt"], tmp_path, {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    )
    step = {i.name for i in parts["step"].proto.graph.input}
    got = run(
        parts["step"], tmp_path, {k: v for k, v in {**inputs, **before}.items() if k in step}
    )["y"]
    np.testing.assert_allclose(got, run(graph, tmp_path, inputs)["y"], rtol=1e-6)
