"""a16w8 graphs and the qnn target: right arithmetic on onnxruntime, whole graphs on the HTP
simulator, a gate that can fail.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

import onnx
from onnx import TensorProto, helper, numpy_helper

from sdlite.errors import ExportError, InputError, PrecisionError
from sdlite.exporters import profile, targets
from sdlite.exporters.export import export
from sdlite.exporters.rewrites import a16w8
from sdlite.exporters.targets import qnn
from sdlite.onnx_graph import Graph
from tests.conftest import EMOJI


@pytest.fixture
def network(tmp_path):
    """(Graph of relu(conv(x)) -> flat -> product, path, a run of it): x (1, 8, 8, 8) -> y (1,
    4).
    """
    rng = np.random.default_rng(0)
    held = {
        "w": rng.normal(size=(16, 8, 3, 3)) * 0.1,
        "b": rng.normal(size=16),
        "m": rng.normal(size=(1024, 4)) * 0.1,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Flatten", ["r"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "m"], ["y"], name="product"),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", (1, 8, 8, 8)), ("y", (1, 4)))
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        values[:1],
        values[1:],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in held.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        str(tmp_path / "m.onnx"),
    )
    return Graph.load(tmp_path / "m.onnx"), tmp_path / "m.onnx"


def ranges_of(graph, path, x, tmp_path):
    import onnxruntime as ort

    graph.outputs(["c", "f"]).save(tmp_path / "watched.onnx")
    session = ort.InferenceSession(
        str(tmp_path / "watched.onnx"), providers=["CPUExecutionProvider"]
    )
    seen = {
        **dict(
            zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True)
        ),
        "x": x,
    }
    return {k: (float(v.min()), float(v.max())) for k, v in seen.items()}, seen["y"]


def ratio(want, got):
    return 10 * np.log10((want**2).sum() / ((got - want) ** 2).sum())


def run(path, x):
    import onnxruntime as ort

    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[
        0
    ]


def test_integer_layers_are_near_and_a_wrong_scale_is_seen(network, tmp_path):
    graph, path = network
    x = np.random.default_rng(1).normal(size=(1, 8, 8, 8)).astype(np.float32)
    ranges, want = ranges_of(graph, path, x, tmp_path)
    a16w8.insert(graph, graph.layers(), ranges).save(tmp_path / "q.onnx")
    assert 35 < ratio(want, run(tmp_path / "q.onnx", x)) < 80  # 8-bit weights set it
    broken = a16w8.insert(
        graph, graph.layers(), {**ranges, "c": (ranges["c"][0], ranges["c"][1] / 8)}
    )
    broken.save(tmp_path / "broken.onnx")
    assert ratio(want, run(tmp_path / "broken.onnx", x)) < 10


@pytest.mark.parametrize(
    ("op", "inner", "half", "fused"),
    [("Div", 2**0.5, 0.5, 1), ("Mul", 2**-0.5, 0.5, 1), ("Div", 2**0.5, 0.6, 0)],
)
def test_gelu_written_out_is_one_operator_behind_an_integer_layer(tmp_path, op, inner, half, fused):
    """As text encoders of SD-2.x and SDXL have it; the HTP has no Erf."""
    rng = np.random.default_rng(0)
    held = {"m": rng.normal(size=(8, 8)), "root": inner, "one": 1.0, "half": half}
    nodes = [
        helper.make_node("MatMul", ["x", "m"], ["c"], name="product"),
        helper.make_node(op, ["c", "root"], ["i"], name="inner"),
        helper.make_node("Erf", ["i"], ["e"], name="erf"),
        helper.make_node("Add", ["e", "one"], ["a"], name="add"),
        helper.make_node("Mul", ["half", "a"], ["s"], name="scaled"),
        helper.make_node("Mul", ["c", "s"], ["f"], name="gelu"),
        helper.make_node("Identity", ["f"], ["y"], name="last"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (4, 8)) for n in "xy")
    constants = [numpy_helper.from_array(np.float32(v), k) for k, v in held.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(model, str(tmp_path / "m.onnx"))
    graph = Graph.load(tmp_path / "m.onnx")
    given = rng.normal(size=(4, 8)).astype(np.float32)
    ranges, want = ranges_of(graph, tmp_path / "m.onnx", given, tmp_path)
    made = a16w8.insert(graph, graph.layers(), ranges)
    kinds = [n.op_type for n in made.nodes]
    assert (kinds.count("Gelu"), kinds.count("Erf")) == (fused, 1 - fused)
    assert "root" in made.weights if not fused else "root" not in made.weights
    made.save(tmp_path / "q.onnx")
    assert 35 < ratio(want, run(tmp_path / "q.onnx", given)) < 80


def test_units_have_the_form_that_the_npu_takes(network, tmp_path):
    graph, path = network
    x = np.ones((1, 8, 8, 8), np.float32)
    ranges, _ = ranges_of(graph, path, x, tmp_path)
    made = a16w8.insert(graph, graph.layers(), ranges)
    made.save(tmp_path / "q.onnx")
    onnx.checker.check_model(str(tmp_path / "q.onnx"))
    producers, consumers = made.producers(), made.consumers()
    for layer in (n for n in made.nodes if n.op_type in ("Conv", "MatMul")):
        assert {producers[i].op_type for i in layer.input} == {"DequantizeLinear"}
        assert [n.op_type for n in consumers[layer.output[0]]] == ["QuantizeLinear"]
    kinds = {k: (w.dtype.name, w.shape) for k, w in made.weights.items()}
    assert kinds["x/zero"] == ("uint16", ())
    assert kinds["w/q"][0] == "int8"
    assert kinds["w/scale"][1] == (16,)  # a convolution: one for each output channel
    assert kinds["m/scale"][1] == ()  # a product: one
    assert kinds["conv/bias/q"] == ("int32", (16,))


def test_kept_layers_keep_their_names_through_folding(tmp_path):
    from sdlite.exporters.rewrites.fixed_shapes import fix

    original = Graph.load(EMOJI / "unet/model.onnx")
    shapes = {"sample": (1, 8, 8, 8), "timestep": (), "encoder_hidden_states": (1, 28, 192)}
    fixed = Graph.load(fix(original, shapes, tmp_path / "unet.onnx"))
    every = a16w8.choose(fixed, original, qnn.OPERATORS, [])
    assert set(every) == {layer.name for layer in original.layers()}
    some = a16w8.choose(fixed, original, ["Conv"], [r"^conv_in$", r"^up_blocks\.2\."])
    assert {x.op for x in some.values()} == {"Conv"}
    assert "conv_out" in some
    assert not {n for n in some if n == "conv_in" or n.startswith("up_blocks.2.")}


@pytest.mark.parametrize(("encoder", "calls"), [(False, 1), (True, 2)])
def test_ranges_are_those_of_an_edit_too(tmp_path, monkeypatch, emoji, encoder, calls):
    """The decoder is given the latents of an image, and those of its edit."""
    from sdlite.exporters.rewrites.fixed_shapes import fix

    latents = (1, 8, 8, 8)
    shapes = {
        "text_encoder": {"input_ids": (1, 28)},
        "unet": {"sample": latents, "timestep": (), "encoder_hidden_states": (1, 28, 192)},
        "vae_decoder": {"latent_sample": latents},
        **({"vae_encoder": {"sample": (1, 3, 64, 64)}} if encoder else {}),
    }
    seen = []

    class Seen(a16w8.Histogram):
        def add(self, x, step, name):
            seen.append((name, x.shape))
            super().add(x, step, name)

    monkeypatch.setattr(a16w8, "Histogram", Seen)
    original = {p: Graph.load(EMOJI / p / "model.onnx") for p in shapes}
    fixed = {p: Graph.load(fix(g, shapes[p], tmp_path / f"{p}.onnx")) for p, g in original.items()}
    layers = {p: {"first": g.layers()[0]} for p, g in fixed.items()}
    call = {"num_inference_steps": 2, "sampler": emoji.artifact.sampler_name}
    ranges = a16w8.observe(fixed, layers, emoji, ["a house"], tmp_path, 1, **call)
    assert set(ranges) == set(shapes)
    assert seen.count((f"vae_decoder/{layers['vae_decoder']['first'].input}", latents)) == calls


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"integer": {"vae": ["Conv"]}},
            "integer.vae.*accepted: 'text_encoder', .* or 'vae_encoder'",
        ),
        (
            {"integer": {"unet": ["Relu"]}},
            "integer.unet.0='Relu'; accepted: 'Conv', 'MatMul' or 'Gemm'",
        ),
        ({"samples": 0}, "samples=0; accepted: at least 1"),
    ],
)
def test_options_that_are_not_known(options, words):
    with pytest.raises(InputError, match=words):
        targets.of(profile.Profile("q", "qnn", precision="fp16", options=options))


def test_the_whole_graph_runs_on_the_simulator_or_it_is_an_error(network, tmp_path):
    pytest.importorskip("onnxruntime_qnn", reason="needs the qnn extra")
    graph, path = network
    x = np.random.default_rng(1).normal(size=(1, 8, 8, 8)).astype(np.float32)
    ranges, want = ranges_of(graph, path, x, tmp_path)
    a16w8.insert(graph, graph.layers(), ranges).save(tmp_path / "q.onnx")
    target = targets.of(profile.load("qnn"))
    (tmp_path / "out").mkdir()
    files = target.convert("vae_decoder", tmp_path / "q.onnx", tmp_path / "out")
    assert [n.op_type for n in onnx.load(str(files[0])).graph.node] == ["EPContext"]
    session = target.session(files[0], threads=1)
    assert ratio(want, session.run(None, {"x": x})[0]) > 35


def test_precisions_of_the_target(tmp_path):
    pytest.importorskip("onnxruntime_qnn", reason="needs the qnn extra")
    (tmp_path / "p.toml").write_text("target = 'qnn'\nprecision = 'fp32'")
    with pytest.raises(PrecisionError, match="makes fp16, a16w8, not fp32"):
        export(EMOJI, tmp_path / "out", target=tmp_path / "p.toml")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qnn", "qnn-fp16"])
def test_the_student_holds_its_gate_on_the_simulator(tmp_path, name):
    pytest.importorskip("onnxruntime_qnn", reason="needs the qnn extra")
    report = export(
        EMOJI,
        tmp_path / "out",
        target=name,
        prompts=["red apple"],
        num_inference_steps=1,
        threads=1,
    )
    assert report["checked_by"] == "the runtime itself"
    assert min(report["parity"]["psnr"]) >= report["profile"]["gate"]["psnr"]
    assert {"unet/model.onnx", "unet/model_qnn.bin"} <= set(report["files"])


@pytest.mark.slow
def test_a_broken_scale_fails_the_gate_on_the_simulator(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_qnn", reason="needs the qnn extra")
    right = a16w8.parameters

    def wrong(low, high):
        return right(low / 8, high / 8)

    monkeypatch.setattr(a16w8, "parameters", wrong)
    path = tmp_path / "p.toml"
    path.write_text(
        "target = 'qnn'\nprecision = 'a16w8'\n[gate]\npsnr = 32\nunet = 25\n[options]\nsamples"
        " = 1\n"
    )
    with pytest.raises(ExportError, match="the gate of p does not hold"):
        export(
            EMOJI,
            tmp_path / "out",
            target=path,
            prompts=["red apple"],
            num_inference_steps=1,
            threads=1,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["p.toml"]
