"""Quantising: statistics, rewrites, integer graphs, the gate that can fail, and errors that lose
nothing.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

from sdlite import Pipeline, instrument, memory
from sdlite.artifact import Artifact
from sdlite.cli import main
from sdlite.errors import (
    ExportError,
    InputError,
    PrecisionError,
    QuantizationError,
    SdliteError,
    SdliteWarning,
    UnknownNameError,
)
from sdlite.exporters.export import export
from sdlite.images import to_uint8
from sdlite.instrument import NamedOutputs, let_go, on_demand
from sdlite.metrics import psnr, ssim, structure_distance
from sdlite.onnx_graph import Graph
from sdlite.quant import (
    Calibration,
    Gate,
    api,
    insert,
    observe,
    quantize,
    reports,
    rewrite,
    summaries,
    table,
)
from sdlite.quant.calibrate import read_prompts, walk
from sdlite.quant.gate import Comparison
from sdlite.quant.observe import ChannelMax, Histogram, choose_range, quantization_error
from tests.conftest import EMOJI

PROMPTS = [
    "red apple",
    "dog face on a blue background",
    "grinning face",
    "woman astronaut",
    "pizza",
    "green book on a yellow background",
]
CALIBRATION = EMOJI.parents[2] / "export" / "calibration" / "emoji.txt"
QUICK = {
    "calibration": Calibration(prompts=read_prompts(CALIBRATION), samples=4, num_inference_steps=3),
    "gate": Gate(
        prompts=PROMPTS[4:],
        seeds=(0,),
        num_inference_steps=3,
        psnr_mean=33,
        psnr_worst=30,
        ssim_mean=0.9,
        engines=["onnxruntime"],
    ),
    "threads": 1,
}


def quick(**changes):
    return {**QUICK, "gate": Gate(**{**vars(QUICK["gate"]), **changes})}


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    out = tmp_path_factory.mktemp("quantised") / "static"
    return out, quantize(EMOJI, "int8-static", out=out, **QUICK)


# --- statistics


def test_histogram_does_not_depend_on_order_and_does_not_grow():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=1000).astype(np.float32) * s for s in (0.01, 1, 30)]
    a, b = Histogram(), Histogram()
    for x in parts:
        a.add(x)
    for x in parts[::-1]:
        b.add(x)
    assert a.counts.sum() == 3000
    assert a.bound == b.bound == 128
    np.testing.assert_array_equal(a.counts.reshape(-1, 64).sum(1), b.counts.reshape(-1, 64).sum(1))
    size = len(pickle.dumps(a))
    for _ in range(50):
        a.add(parts[1])
    assert len(pickle.dumps(a)) == size


def test_histogram_refuses_what_is_not_finite():
    with pytest.raises(InputError, match=r"conv1.*not finite at step 3"):
        Histogram().add(np.array([1.0, np.nan], np.float32), 3, "conv1")


def test_ranges():
    h = Histogram()
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    x = np.maximum(x, -0.278)  # a short negative side, as SiLU has
    x[0] = 12.0  # one outlier
    h.add(x)
    assert choose_range(h, "min-max") == (pytest.approx(-0.278), 12.0)
    low, high = choose_range(h, "mse")
    assert low == pytest.approx(-0.278, abs=0.1)
    assert 3 < high < 12
    assert quantization_error(h, low, high) < quantization_error(h, -0.278, 12.0)
    low, high = choose_range(h, "percentile", 99.9)
    assert 2 < high < 6
    low, high = choose_range(h, "mse", symmetric=True)
    assert low == -high
    with pytest.raises(InputError, match="min-max, percentile, mse"):
        choose_range(h, "entropy")


def test_metrics_against_known_values():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (64, 64, 3))
    assert psnr(a, a) == float("inf")
    assert ssim(a, a) == pytest.approx(1)
    assert structure_distance(a, a) == pytest.approx(0)
    b = np.clip(a + 16, 0, 255)
    assert psnr(np.zeros((4, 4)), np.full((4, 4), 16)) == pytest.approx(20 * np.log10(255 / 16))
    assert 0.5 < ssim(a, b) < 1
    assert structure_distance(a, rng.integers(0, 256, a.shape)) > 0.5


# --- graphs


def unet_inputs(seed=0):
    rng = np.random.default_rng(seed)
    width = json.loads((EMOJI / "unet/config.json").read_text())["cross_attention_dim"]
    return {
        "sample": rng.normal(size=(2, 8, 8, 8)).astype(np.float32),
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": rng.normal(size=(2, 28, width)).astype(np.float32),
    }


def run(graph, tmp_path, inputs):
    return NamedOutputs(graph, tmp_path / "g.onnx", 1)(**inputs)


@pytest.fixture
def unet():
    return Graph.load(EMOJI / "unet/model.onnx")


def test_graph_round_trip_is_exact(emoji, unet, tmp_path):
    inputs = unet_inputs()
    out = run(unet, tmp_path, inputs)["out_sample"]
    np.testing.assert_allclose(out, emoji.networks.unet(**inputs)["out_sample"], atol=1e-5)
    again = run(Graph.load(tmp_path / "g.onnx"), tmp_path, inputs)["out_sample"]
    np.testing.assert_array_equal(out, again)
    names = {layer.name for layer in unet.layers()}
    assert {
        "conv_in",
        "down_blocks.0.resnets.0.conv1",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    } <= names
    assert len(names) == len(unet.layers())


def test_a_graph_says_what_numpy_would_of_its_tensors(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(summaries, "SAMPLE", 1000)
    monkeypatch.setattr(observe, "SAMPLE", 1000)
    inputs = unet_inputs()
    layers = [x for x in unet.layers() if re.search(r"conv1$|attn2|ff\.net\.2", x.name)]
    tensors = sorted({x.input for x in layers} | {x.output for x in layers})
    widths = {x.input: unet.weights[x.weight].shape[1 - x.axis] for x in layers if x.op == "MatMul"}
    assert "encoder_hidden_states" in widths
    wanted = run(unet.outputs(sorted(set(tensors) - set(inputs))), tmp_path, inputs) | inputs
    watched = summaries.shapes(summaries.channels(summaries.values(unet, tensors), widths), tensors)
    seen = run(summaries.tokens(watched, "encoder_hidden_states"), tmp_path, inputs)
    close = {"rtol": 1e-3, "atol": 1e-4}
    for name in tensors:
        x, said = wanted[name], seen[summaries.values_name(name)]
        np.testing.assert_allclose(said[:2], [x.min(), x.max()], **close)
        np.testing.assert_allclose(said[2:], observe.spread(x), **close)
        assert len(said) <= 1002
        assert tuple(seen[summaries.shape_name(name)]) == x.shape
    for name, width in widths.items():
        largest = np.abs(wanted[name]).reshape(-1, width).max(0)
        np.testing.assert_allclose(seen[summaries.channels_name(name)], largest, **close)
    texts = np.abs(inputs["encoder_hidden_states"]).max((0, 2))
    said = seen[summaries.tokens_name("encoder_hidden_states")]
    np.testing.assert_allclose(said, texts, **close)


def executed(session, inputs, folder, monkeypatch):
    """Names of the nodes that a call runs, in their order."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    monkeypatch.setattr(ort, "SessionOptions", lambda: options)
    session(**inputs)
    events = json.loads(Path(session._open[0].end_profiling()).read_text())
    end = "_kernel_time"
    return [e["name"].removesuffix(end) for e in events if e["name"].endswith(end)]


WATCHED = [(kind, part) for kind in ("values", "twin") for part in Artifact.open(EMOJI).parts]


@pytest.mark.parametrize(("kind", "part"), [*WATCHED, ("channels", "unet")])
def test_a_tensor_is_looked_at_as_soon_as_it_is_there(kind, part, tmp_path, monkeypatch):
    """Else all of a network's tensors are in memory until the last one is there."""
    artifact = Artifact.open(EMOJI)
    spec = artifact.spec(part)
    graph = Graph.load(artifact.graph("fp32", part)).answers([t.name for t in spec.outputs])
    layers, made = graph.layers(), graph.producers()
    tensors = {t for x in layers for t in (x.input, x.output)} & made.keys()
    if kind == "twin":
        ranges = {t: (-4.0, 4.0) for x in layers for t in (x.input, x.output)}
        watched = insert.insert(graph, layers, ranges, insert.CPU, twin=True)
        looks = {x.output: f"{x.output}/noise" for x in layers}
    elif kind == "channels":
        linear = [x for x in layers if x.op == "MatMul" and x.input in tensors]
        widths = {x.input: graph.weights[x.weight].shape[1 - x.axis] for x in linear}
        watched = summaries.channels(graph, widths)
        looks = {t: summaries.channels_name(t) for t in widths}
    else:
        watched = summaries.values(graph, sorted(tensors))
        looks = {t: summaries.values_name(t) for t in tensors}
    inputs = {
        "text_encoder": {"input_ids": np.ones((1, 28), np.int64)},
        "unet": unet_inputs(),
        "vae_decoder": {"latent_sample": np.ones((1, 8, 8, 8), np.float32)},
    }[part]
    session = NamedOutputs(watched, tmp_path / "watched.onnx", 1)
    at = {n: i for i, n in enumerate(executed(session, inputs, tmp_path, monkeypatch))}
    waits = [at[look] - at[made[t].name] for t, look in looks.items() if made[t].name in at]
    assert len(waits) >= 20
    assert max(waits) <= 10, "nodes between a tensor and what is seen of it"


def test_rewrites_leave_the_function(unet, tmp_path):
    inputs = unet_inputs()
    layers, makers = unet.layers(), unet.producers()
    linear = {layer.input for layer in layers if layer.op == "MatMul"} - {"encoder_hidden_states"}
    skips = [
        makers[layer.input] for layer in layers if layer.op == "Conv" and layer.input in makers
    ]
    before = run(
        unet.outputs(sorted(linear | {x for n in skips if n.op_type == "Concat" for x in n.input})),
        tmp_path,
        inputs,
    )
    seen = {k: ChannelMax() for k in before}
    for k, v in before.items():
        seen[k].add(v)
    split = rewrite.split_concat(unet, {k: v.shape for k, v in before.items()})
    assert split
    assert all(name.endswith("conv_shortcut") for name in split)
    assert len(rewrite.split_first_token(unet, "encoder_hidden_states")) % 2 == 0
    assert "layer norm" in rewrite.smooth(unet, seen, 0.5).values()
    after = run(unet, tmp_path, inputs)["out_sample"]
    scale = np.abs(before["out_sample"]).max()
    np.testing.assert_allclose(after / scale, before["out_sample"] / scale, atol=1e-5)
    assert any("@1" in layer.name for layer in unet.layers())


def test_smooth_multiplies_where_no_layer_norm_makes_the_input(unet, tmp_path):
    inputs = unet_inputs()
    target = next(layer for layer in unet.layers() if layer.name.endswith("attn1.to_out.0"))
    before = run(unet.outputs([target.input]), tmp_path, inputs)
    seen = ChannelMax()
    seen.add(before[target.input])
    seen.values[3] *= 1000
    assert rewrite.smooth(unet, {target.input: seen}, keep=[r"attn1\.to_out\.0$"]) == {}, (
        "a layer that stays float is left as it is"
    )
    assert rewrite.smooth(unet, {target.input: seen}) == {target.input: "multiplied"}
    np.testing.assert_allclose(
        run(unet, tmp_path, inputs)["out_sample"], before["out_sample"], atol=1e-4
    )


def test_embeddings_become_int8_rows(tmp_path):
    graph = Graph.load(EMOJI / "text_encoder/model.onnx")
    ids = {"input_ids": np.arange(28, dtype=np.int64)[None]}
    before, size = run(graph, tmp_path, ids)["last_hidden_state"], graph.total_bytes()
    assert any("token_embedding" in k for k in rewrite.integer_embeddings(graph))
    after = run(graph, tmp_path, ids)["last_hidden_state"]
    assert 20 * np.log10(np.abs(before).max() / np.abs(after - before).max()) > 25
    assert graph.total_bytes() < size


@pytest.mark.parametrize("name", list(insert.SCHEMES))
def test_schemes(name):
    scheme = insert.SCHEMES[name]
    scale, zero = scheme.parameters(-0.5, 2.0)
    if scheme.activation == "uint8":
        assert scale == pytest.approx(2.5 / 255)
        assert zero == 51
        assert zero.dtype == np.uint8
    else:
        assert scale == pytest.approx(2 / 127)
        assert zero == 0
        assert zero.dtype == np.int8
    assert scheme.parameters(1.0, 2.0)[1] == 0  # the range always includes zero


# --- the whole call


def test_static_artefact_loads_and_is_close(static, emoji):
    out, _ = static
    pipe = Pipeline.from_pretrained(out, precision="int8-static", threads=1)
    pipe.artifact.verify()
    a = np.asarray(emoji("red apple", seed=3, num_inference_steps=3).images[0])
    b = np.asarray(pipe("red apple", seed=3, num_inference_steps=3).images[0])
    assert 20 < psnr(a, b) < 100
    assert pipe.report.networks[1].storage == "int8"
    assert "int8" in str(pipe.report)
    assert Pipeline.from_pretrained(out, threads=1).report.precision == "int8-static"
    for backend in ("auto", "onnxruntime", "torch"):
        with pytest.raises(
            PrecisionError,
            match=r"emoji was quantized and holds int8-static, not fp16; leave precision out",
        ):
            Pipeline.from_pretrained(out, precision="fp16", backend=backend)


def test_static_report(static):
    out, report = static
    assert json.loads((out / "quantize-report.json").read_text())["precision"] == "int8-static"
    assert (out / "quantize-grid.png").stat().st_size > 1000
    unet = report["networks"]["unet"]
    names = {row["name"] for row in unet["layers"]}
    assert not names & {"conv_in", "conv_out", "time_embedding.linear_1"}
    assert (
        "up_blocks.0.resnets.0.conv_shortcut@0" in names
    )  # the halves of a skip have a scale each
    assert all(row["sqnr"] is None or row["sqnr"] > 5 for row in unet["layers"])
    assert all(len(row["input_seen_per_step"]) in (1, 3) for row in unet["layers"])
    assert "PSNR" in table(report)
    assert "unet" in table(report)
    for n in report["networks"].values():
        assert n["bytes"] < 0.75 * n["float_bytes"]
    fp32 = 4 * json.loads((EMOJI / "sdlite.json").read_text())["student"]["unet_parameters"]
    assert 0.25 <= unet["bytes"] / fp32 <= 0.32


def integer_kernels(path, tmp_path):
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [
        n.op_type
        for n in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    ]
    return {
        k: kinds.count(k)
        for k in (
            "QLinearConv",
            "MatMulIntegerToFloat",
            "QLinearMatMul",
            "DynamicQuantizeMatMul",
            "Conv",
            "MatMul",
            "FusedConv",
        )
    }


def test_int8_runs_as_integer_kernels(static, tmp_path):
    out, report = static
    layers = [row for row in report["networks"]["unet"]["layers"] if row["scheme"] != "float"]
    kernels = integer_kernels(out / "unet/model.int8-static.onnx", tmp_path)
    assert kernels["QLinearConv"] == sum(row["op"] == "Conv" for row in layers)
    assert kernels["MatMulIntegerToFloat"] == sum(row["op"] == "MatMul" for row in layers)
    patterns = json.loads((EMOJI / "sdlite.json").read_text())["calibration"]["keep_float"]["unet"]
    kept = [
        x.name for x in Graph.load(out / "unet/model.int8-static.onnx").layers() if x.op == "Conv"
    ]
    assert (
        kernels["Conv"] + kernels["FusedConv"] == len(kept) >= 2
    )  # conv_in, conv_out and what the student's manifest names
    assert all(any(re.search(p, name.split(".weight")[0]) for p in patterns) for name in kept), kept


def assert_rows_alone(pipe):
    """Image i of a batch is that seed's image alone, bit by bit, with and without guidance,
    whatever came before.
    """
    prompts, call = ["dog face", "pizza", ""], {"num_inference_steps": 2}
    for more in ({"guidance_scale": 1.0}, {"guidance_scale": 1.5, "negative_prompt": "blue"}):
        first = np.asarray(pipe(prompts[0], seed=5, **call, **more).images[0])
        batch = [np.asarray(i) for i in pipe(prompts, seed=5, **call, **more).images]
        alone = [
            np.asarray(pipe(p, seed=5 + i, **call, **more).images[0]) for i, p in enumerate(prompts)
        ]
        np.testing.assert_array_equal(alone, batch)
        np.testing.assert_array_equal(first, batch[0])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_image_of_a_static_batch_is_that_seed_alone(static, backend):
    pytest.importorskip(backend)
    assert_rows_alone(Pipeline.from_pretrained(static[0], backend=backend, threads=1))


@pytest.mark.parametrize(("scheme", "name", "most"), [("u8s7", "", 63), ("u8s8", " u8s8", 127)])
def test_bits_of_dynamic_weights(tmp_path, monkeypatch, scheme, name, most):
    monkeypatch.setattr(api, "until_it_holds", lambda work, builder, *_: builder.build([]))
    parts = quantize(EMOJI, "int8-dynamic", out=tmp_path / "d", scheme=scheme, **QUICK)
    part = parts["text_encoder"]
    integers = [w for k, w in part.graph.weights.items() if k.endswith("/int8")]
    assert len(integers) > 20
    assert {int(np.abs(w.array().astype(int)).max()) for w in integers} == {most}
    assert {part.scheme, *(x["scheme"] for x in part.layers)} == {f"dynamic{name}"}


def test_dynamic(tmp_path, emoji):
    report = quantize(EMOJI, "int8-dynamic", out=tmp_path / "d", **QUICK)
    assert all(n["bytes"] <= n["float_bytes"] for n in report["networks"].values()), (
        "what stays float keeps its float16 storage"
    )
    assert report["warnings"] == []
    assert report["engines"][0]["networks"]["vae_decoder"] is None, "no Linear layer: equal"
    for name in ("quantize-report.json", "sdlite.json"):
        json.loads(
            (tmp_path / "d" / name).read_text(), parse_constant=pytest.fail
        )  # Infinity is not JSON
    assert 0 < report["networks"]["unet"]["float_share"] < 0.9
    assert report["networks"]["vae_decoder"]["float_share"] == 1
    pipe = Pipeline.from_pretrained(tmp_path / "d", precision="int8-dynamic", threads=1)
    a, b = (
        np.asarray(p("dog face", seed=1, num_inference_steps=3).images[0]) for p in (emoji, pipe)
    )
    assert 20 < psnr(a, b) < 100
    assert_rows_alone(pipe)
    assert any("one by one" in n for n in pipe.report.notes)
    kernels = integer_kernels(tmp_path / "d/unet/model.int8-dynamic.onnx", tmp_path)
    assert kernels["DynamicQuantizeMatMul"] > 20
    assert kernels["QLinearConv"] == 0


def test_an_image_of_a_dynamic_batch_is_that_seed_alone_on_torch():
    pytest.importorskip("torchao", reason="needs the torchao extra")
    pipe = Pipeline.from_pretrained(EMOJI, precision="int8-dynamic", backend="torch", threads=1)
    assert_rows_alone(pipe)
    assert any("one by one" in n for n in pipe.report.notes)


def test_openvino_runs_the_same_file_in_integer(static, emoji):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    out, _ = static
    pipe = Pipeline.from_pretrained(out, precision="int8-static", backend="openvino", threads=1)
    a, b = (
        np.asarray(p("red apple", seed=3, num_inference_steps=3).images[0]) for p in (emoji, pipe)
    )
    assert 25 < psnr(a, b) < 100
    kinds = [
        (
            str(n.get_rt_info()["layerType"].astype(str)),
            str(n.get_rt_info()["runtimePrecision"].astype(str)),
        )
        for n in pipe.networks.unet.model.get_runtime_model().get_ops()
        if "layerType" in n.get_rt_info()
    ]
    assert (
        sum(kind == "Convolution" and precision in ("u8", "i8") for kind, precision in kinds) > 20
    )


def test_running_int8_needs_no_torch_and_no_onnx(static):
    import subprocess

    code = (
        "import sys, sdlite; sdlite.Pipeline.from_pretrained(sys.argv[1], threads=1)('red apple',"
        " seed=0, num_inference_steps=1);print(sorted({'torch', 'onnx', 'diffusers',"
        " 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(static[0])], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- the gate


def _double_scale(monkeypatch):
    right = insert.Scheme.parameters
    monkeypatch.setattr(
        insert.Scheme, "parameters", lambda self, low, high: right(self, low / 2, high / 2)
    )


def _wrong_zero(monkeypatch):
    right = insert.Scheme.parameters

    def wrong(self, low, high):
        scale, zero = right(self, low, high)
        return scale, (zero + 120).astype(zero.dtype)

    monkeypatch.setattr(insert.Scheme, "parameters", wrong)


def _shuffled(monkeypatch, only="up_blocks.1.resnets.1.conv2"):
    right = insert._weight

    def wrong(graph, layer, scheme, bias, scale):
        weight, scales = right(graph, layer, scheme, bias, scale)
        if layer.name != only:
            return weight, scales
        order = np.random.default_rng(0).permutation(weight.shape[0])
        return insert.Weight(weight.shape, weight.dtype, lambda: weight.read()[order]), scales

    monkeypatch.setattr(insert, "_weight", wrong)


@pytest.mark.parametrize("damage", [_double_scale, _wrong_zero, _shuffled])
def test_gate_fails_on_purpose_and_nothing_is_written(damage, tmp_path, monkeypatch):
    damage(monkeypatch)
    with pytest.raises(
        QuantizationError,
        match=(
            r"gate does not hold.*worst network.*max_float=0 allows.*No model was written; its"
            r" report and images are in .*bad\.failed"
        ),
    ):
        quantize(EMOJI, "int8-static", out=tmp_path / "bad", **quick(max_float=0))
    assert [p.name for p in tmp_path.iterdir()] == ["bad.failed"]
    assert sorted(p.name for p in (tmp_path / "bad.failed").iterdir()) == [
        "quantize-grid.png",
        "quantize-report.json",
    ]
    report = json.loads((tmp_path / "bad.failed/quantize-report.json").read_text())
    assert report["holds"] is False
    assert report["search"][-1]["failures"]
    assert len(report["networks"]["unet"]["layers"]) > 50


def test_a_later_failure_takes_the_place_of_the_former(tmp_path):
    failed = tmp_path / "q.failed"
    failed.mkdir()
    (failed / "mine.txt").write_text("a user's file")
    for wanted in (90.0, 80.0):
        with pytest.raises(QuantizationError, match=r"keep_float\), try int8-static") as e:
            quantize(EMOJI, "int8-dynamic", out=tmp_path / "q", **quick(psnr_mean=wanted))
        assert not re.search("sample|observer|max_float", str(e.value)), "this mode has none"
        assert (
            json.loads((failed / "quantize-report.json").read_text())["gate"]["psnr_mean"] == wanted
        )
    assert sorted(p.name for p in failed.iterdir()) == [
        "mine.txt",
        "quantize-grid.png",
        "quantize-report.json",
    ]
    assert not (tmp_path / "q").exists()
    with pytest.raises(SdliteError):
        Pipeline.from_pretrained(failed)
    (tmp_path / "r.failed").write_text("a file where the folder should be")
    with pytest.raises(
        QuantizationError, match=r"gate does not hold.*report could not be written either"
    ):
        quantize(EMOJI, "int8-dynamic", out=tmp_path / "r", **quick(psnr_mean=90))


def test_prompts_that_show_little_are_said_to(tmp_path):
    one = {
        "calibration": Calibration(prompts=["pizza"], samples=2, num_inference_steps=1),
        "gate": Gate(
            seeds=(0,),
            num_inference_steps=1,
            psnr_mean=0,
            psnr_worst=0,
            ssim_mean=-1,
            engines=["onnxruntime"],
        ),
        "threads": 1,
    }
    with pytest.warns(SdliteWarning) as seen:
        report = quantize(EMOJI, "int8-static", out=tmp_path / "one", **one)
    assert [str(w.message) for w in seen if w.category is SdliteWarning] == report["warnings"]
    assert re.search("single prompt .*'pizza'", report["warnings"][0])
    assert re.search("1 of the gate's 1 prompts were calibrated on too", report["warnings"][1])
    assert f"warning: {report['warnings'][0]}" in table(report)
    assert (
        json.loads((tmp_path / "one/quantize-report.json").read_text())["warnings"]
        == report["warnings"]
    )


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_figures_that_json_does_not_hold_are_none(value):
    found = Comparison("e", 1, 1.0, value, 1.0, 0.0, "w", {"vae_decoder": value}).to_dict()
    assert (found["psnr_worst"], found["networks"]) == (None, {"vae_decoder": None})


def test_a_model_that_does_not_get_smaller_is_said_to(static):
    parts = static[1]["networks"]
    assert static[1]["warnings"] == []
    assert static[1]["holds"] is True
    assert reports._growth("int8-dynamic", parts) == []
    larger = {p: {**n, "bytes": n["float_bytes"]} for p, n in parts.items()}
    assert re.match(
        "int8-dynamic has 20.8 MB of weights, the float model 20.8 MB: ",
        reports._growth("int8-dynamic", larger)[0],
    )


def test_the_grid_names_what_it_shows(static, tmp_path):
    from PIL import Image

    out, report = static
    assert report["grid"]["columns"] == ["float", "int8-static"]
    assert report["grid"]["engines"] == ["onnxruntime", "onnxruntime"]
    assert report["grid"]["pairs"] == [{"prompt": p, "seed": 0} for p in PROMPTS[4:]]
    with Image.open(out / "quantize-grid.png") as image:
        assert image.text["columns"] == " | ".join(report["grid"]["columns"])
    white = np.full((2, 64, 64, 3), 255, np.uint8)
    plain = np.asarray(reports.grid(white, white, ["", ""], [("", 0), ("", 0)]))
    named = np.asarray(
        reports.grid(white, white, ["float", "int8"], [("a fox", 0), ("word " * 99, 0)])
    )
    assert plain.shape == named.shape
    assert (named[:18] != plain[:18]).any(), "the columns' names"
    assert all((named != plain)[18:40, x : x + 256].any() for x in (0, 270)), (
        "a prompt over each pair"
    )
    assert (named[:, 270 + 258 :] == 255).all(), "a long prompt is cut"


def test_search_puts_the_bad_layer_back_to_float(tmp_path, monkeypatch):
    _shuffled(monkeypatch)
    report = quantize(EMOJI, "int8-static", out=tmp_path / "mended", **quick(max_float=0.3))
    assert "unet/up_blocks.1.resnets.1.conv2" in report["back_to_float"]
    assert len(report["search"]) == 2
    assert report["networks"]["unet"]["float_share"] > 0.05


# --- errors


def test_errors(tmp_path, emoji, plain):
    with pytest.raises(UnknownNameError, match="int8-static, int8-dynamic"):
        quantize(EMOJI, "int4", out=tmp_path / "x")
    with pytest.raises(UnknownNameError, match="u8s7, u8s8, s8s8"):
        quantize(EMOJI, "int8-static", out=tmp_path / "x", scheme="u4")
    with pytest.raises(InputError, match="observer"):
        quantize(EMOJI, "int8-static", out=tmp_path / "x", calibration=Calibration(observer="max"))
    with pytest.raises(InputError, match="samples=0"):
        quantize(EMOJI, "int8-static", out=tmp_path / "x", calibration=Calibration(samples=0))
    with pytest.raises(InputError, match="prompts are empty"):
        quantize(EMOJI, "int8-static", out=tmp_path / "x", calibration=Calibration(prompts=[" "]))
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        quantize(EMOJI, "int8-dynamic", out=tmp_path / "full", **QUICK)
    assert (tmp_path / "full/file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": None}, r"model=None \(NoneType\); accepted: a name that"),
        ({"precision": 8}, "precision=8; accepted: a string"),
        ({"out": 3}, "out=3; accepted: a path"),
        ({"precision": "int8-dynamic", "scheme": "s8s8"}, "one of u8s7, u8s8, or int8-static"),
        ({"scheme": ["u8s7"]}, r"scheme=\['u8s7'\] \(list\); accepted: a string"),
        ({"threads": 0}, "threads=0; accepted: a whole number, 1 to"),
        ({"keep_float": {"vae": ["conv"]}}, "'vae'; the networks of emoji are text_encoder"),
        (
            {"keep_float": {"unet": "conv"}},
            r"keep_float\['unet'\]='conv' \(str\); accepted: a list of strings",
        ),
        ({"keep_float": {"unet": ["("]}}, "is not a regular expression"),
        ({"calibration": Calibration(samples=1.5)}, "calibration samples=1.5"),
        (
            {"calibration": Calibration(prompts="a fox")},
            r"calibration prompts='a fox' \(str\); accepted: a list of strings",
        ),
        ({"calibration": Calibration(num_inference_steps=0)}, "calibration num_inference_steps=0"),
        ({"calibration": Calibration(guidance_scale="7")}, "calibration guidance_scale='7'"),
        ({"calibration": Calibration(percentile="99")}, "percentile='99'"),
        ({"calibration": Calibration(observer=None)}, "observer=None"),
        (
            {"calibration": Calibration(smooth_alpha=2)},
            "smooth_alpha=2; accepted: a finite number, 0 to 1",
        ),
        ({"calibration": Calibration(size=64)}, "calibration size=64; accepted: two whole numbers"),
        ({"calibration": Calibration(seed=-1)}, "calibration seed=-1"),
        ({"gate": Gate(psnr_mean=float("nan"))}, "psnr_mean=nan; accepted: a finite number"),
        ({"gate": Gate(ssim_mean="1")}, "ssim_mean='1'"),
        ({"gate": Gate(max_float=2)}, "max_float=2; accepted: a finite number, 0 to 1"),
        ({"gate": Gate(num_prompts=0)}, "num_prompts=0"),
        ({"gate": Gate(seeds=[])}, "gate seeds is an empty list"),
        ({"gate": Gate(prompts=[3])}, r"gate prompts\[0\]=3"),
        ({"gate": Gate(engines="onnxruntime")}, "engines='onnxruntime'"),
    ],
)
def test_argument_that_is_not_accepted_is_one_line_before_any_work(tmp_path, arguments, text):
    given = {"model": "emoji", "precision": "int8-static", "out": tmp_path / "x", **arguments}
    with pytest.raises(InputError, match=text) as e:
        quantize(given.pop("model"), given.pop("precision"), **given)
    assert "\n" not in str(e.value)


def test_quantised_model_cannot_be_quantised_again(static, tmp_path):
    with pytest.raises(PrecisionError, match="no float ONNX graphs"):
        quantize(static[0], "int8-static", out=tmp_path / "x", **QUICK)


def test_an_export_whose_model_is_further_from_float_than_its_gate_says_so(static, tmp_path):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    asked = {"prompts": PROMPTS[:1], "num_inference_steps": 1, "threads": 1}
    profile = tmp_path / "p.toml"
    for psnr_wanted, said in ((99, True), (None, False)):
        gate = "unet = 99" if psnr_wanted is None else f"psnr = {psnr_wanted}"
        profile.write_text(f"target = 'openvino'\nprecision = 'int8-static'\n[gate]\n{gate}\n")
        with pytest.raises(ExportError, match="gate of p does not hold") as e:
            export(static[0], tmp_path / "out", target=profile, **asked)
        own = min(x["psnr_mean"] for x in static[1]["engines"])
        assert (f"quality check found images {own:.1f} dB from" in str(e.value)) == said


def test_artefacts_own_float_layers_are_kept_unless_the_caller_says(static, tmp_path):
    def last_stage(report):
        return {
            r["name"]
            for r in report["networks"]["vae_decoder"]["layers"]
            if r["name"].startswith("decoder.up_blocks.3.")
        }

    assert not last_stage(static[1])  # sdlite/models/emoji/sdlite.json asks for it
    report = quantize(
        EMOJI, "int8-static", out=tmp_path / "all", keep_float={"vae_decoder": []}, **QUICK
    )
    assert last_stage(report)


_PEAK = """
import re, sys
from sdlite.quant import Calibration
from sdlite.quant.calibrate import read_prompts
import sdlite.quant.api as api

keep = sys.argv[2] == "keep"  # a broken observer that keeps what it sees
if keep:
    from sdlite.quant.observe import Histogram
    kept, right = [], Histogram.add_some
    def add(self, low, high, some, *rest):
        kept.append(some.copy())
        return right(self, low, high, some, *rest)
    Histogram.add_some = add
prompts = read_prompts(sys.argv[3])
api.quantize(
    sys.argv[4], "int8-static", out=sys.argv[5], threads=1,
    calibration=Calibration(prompts=prompts, samples=int(sys.argv[1]), num_inference_steps=2),
    gate=api.Gate(
        prompts=prompts[-1:], seeds=(0,), num_inference_steps=1, psnr_mean=0, psnr_worst=0,
        ssim_mean=-1, engines=["onnxruntime"], max_float=0,
    ),
)
# ru_maxrss would hold the parent's
print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024)
"""


def test_peak_memory_does_not_grow_with_samples(tmp_path):
    """Resident set of whole runs, in processes of their own; the last one keeps its samples, to
    show that the measure sees it.
    """

    def peak(samples, mode):
        command = [
            sys.executable,
            "-c",
            _PEAK,
            str(samples),
            mode,
            str(CALIBRATION),
            str(EMOJI),
            str(tmp_path / f"{mode}{samples}"),
        ]
        return float(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        )

    few, many, leaking = peak(2, "stream"), peak(10, "stream"), peak(10, "keep")
    assert many < few + 40, (few, many)
    assert leaking > many + 40, (many, leaking)


def test_disk_full_half_way_loses_nothing(tmp_path, monkeypatch):
    def full(self, path, **more):
        if (
            "scratch" not in str(path)
            and path.name == "model.int8-static.onnx"
            and path.parent.name == "unet"
        ):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return right(self, path, **more)

    right = Graph.save
    monkeypatch.setattr(Graph, "save", full)
    with pytest.raises(OSError, match="No space left"):
        quantize(EMOJI, "int8-static", out=tmp_path / "x", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [
        "quantize",
        str(EMOJI),
        "--precision",
        "int8-static",
        "--out",
        str(tmp_path / "q"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--samples",
        "2",
        "--steps",
        "2",
        "--psnr-mean",
        "20",
        "--psnr-worst",
        "15",
        "--ssim-mean",
        "0.7",
        "--engine",
        "onnxruntime",
        "--threads",
        "1",
    ]
    assert main(command) == 0
    assert "PSNR" in capsys.readouterr().out
    assert (
        main(
            [
                "generate",
                "red apple",
                "--model",
                str(tmp_path / "q"),
                "--steps",
                "1",
                "--out",
                str(tmp_path / "a.png"),
                "--quiet",
            ]
        )
        == 0
    )
    assert main(command) == 1  # the folder exists
    assert "not an empty folder" in capsys.readouterr().err


def test_networks_of_a_large_model_are_not_all_open_at_once(monkeypatch):
    artifact = Artifact.open(EMOJI)
    call = {"seed": 1, "num_inference_steps": 1, "guidance_scale": 1.0}

    def made():
        pipe = on_demand(artifact, 1)
        image = np.asarray(pipe("pizza", **call).images[0])
        return image, [p for p in artifact.parts if pipe.networks.parts[p].is_open]

    image, held = made()
    assert held == list(artifact.parts)
    monkeypatch.setattr(instrument, "LARGE", 0)
    again, held = made()
    assert psnr(image, again) >= 60
    assert held == ["vae_decoder"]


def test_a_large_model_in_float16_is_opened_from_a_copy_in_float32(tmp_path, monkeypatch):
    artifact = Artifact.open(EMOJI)
    assert artifact.network("fp32", "unet")["storage"] == "float16"
    call = {"seed": 1, "num_inference_steps": 1, "guidance_scale": 1.0}

    def made():
        pipe = on_demand(artifact, 1, aside=tmp_path / "float32")
        return np.asarray(pipe("pizza", **call).images[0])

    image = made()
    assert not (tmp_path / "float32").exists(), "a small one is not"
    monkeypatch.setattr(instrument, "LARGE", 0)
    assert psnr(image, made()) >= 60
    copies = {p: (tmp_path / "float32" / f"{p}.onnx.data").stat().st_size for p in artifact.parts}
    for part, size in copies.items():
        stored = artifact.bytes_of(artifact.network_files("fp32", part))
        assert size == pytest.approx(2 * stored, rel=0.15)
    saved = []
    monkeypatch.setattr(Graph, "save", lambda *_, **__: saved.append(1))
    assert psnr(image, made()) >= 60
    assert not saved, "copies are made once"


def test_networks_are_never_open_together_while_calibrating(tmp_path, monkeypatch):
    artifact = Artifact.open(EMOJI)
    pipe, prompts = on_demand(artifact, 1), ["pizza", "red apple"]
    sessions = {
        p: NamedOutputs(
            Graph.load(EMOJI / artifact.manifest.variants["fp32"][p]["file"]),
            tmp_path / f"{p}.onnx",
            1,
        )
        for p in artifact.parts
    }
    decoded = []

    def visit(part, _step, name, values):
        others = [p for p in sessions if p != part]
        assert [p for p in others if sessions[p]._open is not None] == []
        if part == "vae_decoder":
            decoded.append(values)

    calibration = Calibration(
        prompts=prompts, samples=3, seed=5, num_inference_steps=1, guidance_scale=1.0
    )
    assert len(list(walk(pipe, calibration, sessions, visit, 3))) == 6
    assert all(s._open is None for s in sessions.values())
    for i, pixels in enumerate(decoded):
        picture = pipe(
            prompts[i % 2], seed=5 + i, num_inference_steps=1, guidance_scale=1.0
        ).images[0]
        assert (to_uint8(pixels)[0] == np.asarray(picture)).all()
    trimmed = []
    monkeypatch.setattr(memory, "trim", lambda: trimmed.append(1))
    let_go(pipe)
    assert all(n._network is None for n in pipe.networks.parts.values())
    assert (
        len(trimmed) == 3
    )  # each network was open: what onnxruntime freed goes back to the system
    let_go(pipe)
    assert len(trimmed) == 3
