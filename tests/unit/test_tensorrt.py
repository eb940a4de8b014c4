"""What of TensorRT can be tested without a GPU: jobs, refusals, the engine's use of CUDA on a
recorded device.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the quantize extra")

from sdlite.artifact import Artifact
from sdlite.backends import tensorrt
from sdlite.errors import (
    ArtifactError,
    ExportError,
    MissingExtraError,
    PrecisionError,
    UnknownNameError,
)
from sdlite.exporters import targets
from sdlite.exporters.profile import Profile
from sdlite.exporters.targets import tensorrt as target


class Cuda:
    """A device whose memory is the host's: copies and launches really happen, and are written
    down.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self):
        self.log, self.memory, self.capturing, self.work = [], {}, False, None

    def cudaStreamCreate(self):
        return 0, 7

    def cudaMalloc(self, size):
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        self.log.append("malloc")
        return 0, ctypes.addressof(block)

    def cudaFree(self, address):
        del self.memory[address]
        return (0,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaStreamSynchronize(self, stream):
        return (0,)

    def cudaStreamDestroy(self, stream):
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing = True
        return (0,)

    def cudaStreamEndCapture(self, stream):
        self.capturing = False
        return 0, "captured"

    def cudaGraphInstantiate(self, graph, flags):
        return 0, "graph"

    def cudaGraphLaunch(self, graph, stream):
        self.log.append("replay")
        self.work()
        return (0,)

    def cudaGraphExecDestroy(self, graph):
        self.log.append("destroy")
        return (0,)


class Context:
    def __init__(self, cuda):
        self.cuda, self.shapes, self.addresses = cuda, {}, {}
        cuda.work = self.compute

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return not shape or shape[0] <= 4

    def get_tensor_shape(self, name):
        return self.shapes["latent_sample"]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def compute(self):
        n = int(np.prod(self.shapes["latent_sample"]))
        read, write = (
            np.ctypeslib.as_array((ctypes.c_float * n).from_address(self.addresses[k]))
            for k in ("latent_sample", "sample")
        )
        write[:] = read * 2

    def execute_async_v3(self, stream):
        self.cuda.log.append("capture" if self.cuda.capturing else "plain")
        if not self.cuda.capturing:
            self.compute()
        return True


def library(cuda, readable=True):
    held = SimpleNamespace(
        get_tensor_dtype=lambda name: "f32", create_execution_context=lambda: Context(cuda)
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: held if readable else None)
    logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(
        Logger=logger, Runtime=lambda log: runtime, nptype=lambda kind: np.float32, __version__="0"
    )


@pytest.fixture
def engine(tmp_path):
    cuda = Cuda()
    (tmp_path / "model.engine").write_bytes(b"x")
    return tensorrt.Engine(tmp_path / "model.engine", "vae_decoder", library(cuda), cuda), cuda


def test_plain_then_captured_then_replayed(engine):
    network, cuda = engine
    for i in range(4):
        x = np.full((1, 2, 3, 3), i, np.float32)
        np.testing.assert_array_equal(network(latent_sample=x)["sample"], 2 * x)
    assert [w for w in cuda.log if w != "malloc"] == [
        "plain",
        "capture",
        "replay",
        "replay",
        "replay",
    ]
    assert cuda.log.count("malloc") == 2


def test_new_shapes_begin_again_and_buffers_grow_only(engine):
    network, cuda = engine
    for batch in (2, 2, 1, 1, 3):
        x = np.random.default_rng(batch).normal(size=(batch, 2, 3, 3)).astype(np.float32)
        np.testing.assert_array_equal(network(latent_sample=x)["sample"], 2 * x)
    assert cuda.log.count("malloc") == 4  # two tensors for 2 rows, again for 3; none for 1
    assert [w for w in cuda.log if w != "malloc"] == [
        "plain",
        "capture",
        "replay",
        "destroy",
        "plain",
        "capture",
        "replay",
        "destroy",
        "plain",
    ]
    network.close()
    assert not cuda.memory


def test_one_thread_at_a_time_uses_an_engine(engine, monkeypatch):
    """Shapes, buffers and the graph are the engine's: without a lock threads read each other's
    images. On the stand-in for the device, not on TensorRT.
    """
    network, _ = engine
    copy = Cuda.cudaMemcpyAsync
    monkeypatch.setattr(
        Cuda, "cudaMemcpyAsync", lambda self, *a: time.sleep(1e-4) or copy(self, *a)
    )  # others get their turn

    def call(i):
        x = np.full((1 + i % 3, 2, 3, 3), i, np.float32)
        a, b = (network(latent_sample=x)["sample"] for _ in range(2))
        return a.shape == x.shape and (b == 2 * x).all()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(200)))


def test_an_engine_that_cannot_be_captured_runs_plainly(engine, monkeypatch):
    network, cuda = engine

    def invalid(self, stream):
        self.capturing = False
        return 901, None

    monkeypatch.setattr(Cuda, "cudaStreamEndCapture", invalid)
    for i in range(4):
        x = np.full((1, 2, 3, 3), i, np.float32)
        np.testing.assert_array_equal(network(latent_sample=x)["sample"], 2 * x)
    assert [w for w in cuda.log if w != "malloc"] == ["plain", "capture", "plain", "plain", "plain"]


def test_a_context_that_says_it_cannot_be_captured_is_not(engine):
    network, cuda = engine
    network.context.is_stream_capturable = lambda stream: stream != 7
    for _ in range(3):
        network(latent_sample=np.ones((1, 2, 3, 3), np.float32))
    assert [w for w in cuda.log if w != "malloc"] == ["plain"] * 3


def test_refused_shape_leaves_the_next_call_right(engine):
    network, _ = engine
    x = np.ones((1, 2, 3, 3), np.float32)
    network(latent_sample=x)
    with pytest.raises(UnknownNameError):
        network(latent_sample=np.zeros((5, 2, 3, 3), np.float32))
    np.testing.assert_array_equal(network(latent_sample=x)["sample"], 2 * x)


def test_shape_outside_the_engine_and_unreadable_engine(engine, tmp_path):
    network, cuda = engine
    with pytest.raises(UnknownNameError, match="not built for latent_sample of shape"):
        network(latent_sample=np.zeros((5, 2, 3, 3), np.float32))
    with pytest.raises(ArtifactError, match="build it here"):
        tensorrt.Engine(
            tmp_path / "model.engine", "vae_decoder", library(cuda, readable=False), cuda
        )


def test_cuda_errors_are_raised():
    with pytest.raises(RuntimeError, match="CUDA: 2"):
        tensorrt._ok((2, None))


def test_jobs_name_shapes(tmp_path):
    from tests.conftest import EMOJI

    graph = EMOJI / "text_encoder" / "model.onnx"
    made_for = targets.of(Profile("t", "tensorrt", options={"min": 1, "opt": 2, "max": 8}))
    job = made_for.job("text_encoder", graph, tmp_path / "e")
    assert job["ranges"] == {"input_ids": [[1, 28], [2, 28], [8, 28]]}


def test_options_reach_the_builder(tmp_path):
    """On the family's own library where it is installed: every option is one that a builder config
    takes.
    """
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config = builder.create_builder_config()
    options = {
        "workspace_mib": 64,
        "optimization_level": 2,
        "strip_weights": True,
        "compute_capabilities": ["SM89", "SM120"],
    }
    target.configure(
        trt, builder, config, {"ranges": {"x": [[1, 2], [2, 2], [4, 2]]}, "options": options}
    )
    assert config.get_flag(trt.BuilderFlag.STRIP_PLAN)
    assert config.builder_optimization_level == 2
    assert config.num_compute_capabilities == 2
    assert config.num_optimization_profiles == 1


def graph_of(tmp_path, op="MatMul", domain=""):
    """x (4, 32) -> op -> y, as a file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    node = helper.make_node(
        op, ["x", "w"] if op == "MatMul" else ["x"], ["y"], name="the_node", domain=domain
    )
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (4, 32)) for n in "xy")
    graph = helper.make_graph(
        [node], "g", [x], [y], [numpy_helper.from_array(weight, "w")] if op == "MatMul" else []
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("custom", 1)]
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=9), str(tmp_path / "m.onnx")
    )
    return tmp_path / "m.onnx"


def rtx(precision="fp32", **options):
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra")
    return targets.of(Profile("p", "tensorrt-rtx", precision, options=options))


def test_an_unsupported_operator_is_named_with_the_parsers_words(tmp_path):
    made_for = rtx()
    with pytest.raises(
        ExportError, match=r"does not take unet: node the_node \(Mystery\): .*[Pp]lugin"
    ) as e:
        made_for.convert("unet", graph_of(tmp_path, "Mystery", "custom"), tmp_path)
    assert "Traceback" not in str(e.value)
    assert not (tmp_path / "model.engine").exists()


def test_the_verdict_lists_every_error():
    errors = [
        SimpleNamespace(node_name=lambda: "a", node_operator=lambda: "Det", desc=lambda: "no Det"),
        SimpleNamespace(node_name=lambda: "", node_operator=lambda: "", desc=lambda: "bad"),
    ]
    parser = SimpleNamespace(
        supports_model_v2=lambda data, path: False, num_errors=2, get_error=lambda i: errors[i]
    )
    with pytest.raises(
        ExportError,
        match=(
            r"lib does not take unet: node a \(Det\): no Det; node \(unnamed\) \(no operator\): bad"
        ),
    ):
        target.supported(parser, {"graph": __file__, "library": "lib", "part": "unet"})
    parser.supports_model_v2 = lambda data, path: True
    target.supported(parser, {"graph": __file__, "library": "lib", "part": "unet"})


def test_a_build_that_gives_nothing_carries_the_loggers_words(tmp_path):
    made_for = rtx(compute_capabilities=["SM75"])
    with pytest.raises(ExportError, match=r"could not build unet: .*Turing"):
        made_for.convert("unet", graph_of(tmp_path), tmp_path)


def test_a_build_that_gives_nothing_on_any_library(tmp_path, monkeypatch):
    """The same with a stand-in for the library: it is an error without a GPU and without the
    extra.
    """

    class Logger:
        ERROR, INTERNAL_ERROR, WARNING, INFO = "e", "i", "w", "n"

        def __init__(self):
            pass

    class Builder:
        def __init__(self, log):
            self.words = log

        def create_network(self, flags):
            return SimpleNamespace()

        def create_builder_config(self):
            return SimpleNamespace()

        def build_serialized_network(self, network, config):
            self.words.log(Logger.INFO, "all is well")
            self.words.log(Logger.ERROR, "no tactic for node_7")

    parser = SimpleNamespace(
        supports_model_v2=lambda data, path: True, parse_from_file=lambda path: True
    )
    fake = SimpleNamespace(
        ILogger=Logger,
        Builder=Builder,
        OnnxParser=lambda n, log: parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "fake_trt", fake)
    (tmp_path / "m.onnx").write_bytes(b"")
    job = {
        "library": "fake_trt",
        "part": "unet",
        "graph": str(tmp_path / "m.onnx"),
        "engine": str(tmp_path / "e"),
        "ranges": {},
        "options": {},
    }
    with pytest.raises(ExportError, match=r"fake_trt could not build unet: no tactic for node_7$"):
        target.build(job)
    assert not (tmp_path / "e").exists()


def test_unknown_compute_capability_is_named(tmp_path):
    made_for = rtx(compute_capabilities=["SM90"])
    with pytest.raises(ExportError, match=r"names 'SM90'; this library knows .*SM89"):
        made_for.convert("unet", graph_of(tmp_path), tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_real_engines_for_chosen_compute_capabilities(tmp_path, precision):
    made_for = rtx(precision, compute_capabilities=["SM89", "SM120"])
    given = made_for.prepare("unet", graph_of(tmp_path))
    files = made_for.convert("unet", given, tmp_path)
    assert files[0].stat().st_size > 1000
    if precision == "bf16":
        assert made_for.judged("unet", given) != given
    else:
        assert made_for.judged("unet", given) == given


def test_unsigned_int8_is_refused(tmp_path):
    from sdlite.onnx_graph import Graph
    from sdlite.quant import insert

    made_for = targets.of(Profile("p", "tensorrt", precision="int8-static"))
    graph = Graph.load(graph_of(tmp_path))
    for scheme, works in ((insert.CPU, False), (insert.TENSORRT, True)):
        path = tmp_path / f"{scheme.name}.onnx"
        insert.insert(graph, graph.layers(), {"x": (-1.0, 2.0), "y": (-3.0, 3.0)}, scheme).save(
            path
        )
        if works:
            assert made_for.prepare("unet", path) == path
        else:
            with pytest.raises(PrecisionError, match="--scheme s8s8"):
                made_for.prepare("unet", path)


def test_int8_tables_become_float_with_the_same_numbers(tmp_path):
    import onnxruntime as ort

    from sdlite.exporters.rewrites.fixed_shapes import fix
    from sdlite.onnx_graph import Graph
    from sdlite.quant import rewrite
    from tests.conftest import EMOJI

    graph = Graph.load(EMOJI / "text_encoder" / "model.onnx")
    assert rewrite.integer_embeddings(graph)
    given = fix(graph, {"input_ids": (1, 28)}, tmp_path / "text_encoder.onnx")
    made_for = targets.of(Profile("p", "tensorrt", precision="int8-static"))
    out = made_for.prepare("text_encoder", given)
    assert out != given
    assert not any(w.dtype == np.int8 for w in Graph.load(out).weights.values())
    ids = np.arange(28)[None]
    want, got = (
        ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(
            None, {"input_ids": ids}
        )[0]
        for p in (given, out)
    )
    np.testing.assert_array_equal(got, want)


def test_a_killed_build_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(
        target.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=-9, stderr="")
    )
    with pytest.raises(ExportError, match="ended by signal 9; 9 is most often too little memory"):
        targets.of(Profile("t", "tensorrt")).convert("unet", graph_of(tmp_path), tmp_path)


def _configs(folder):
    """What names the parts of an exported folder."""
    import shutil

    from tests.conftest import EMOJI

    for part in ("text_encoder", "unet", "vae"):
        (folder / part).mkdir()
        shutil.copy(EMOJI / part / "config.json", folder / part / "config.json")
    shutil.copy(EMOJI / "model_index.json", folder / "model_index.json")


def _listed(folder):
    """Its files as a report lists them."""
    from sdlite.io import sha256

    every = [p for p in folder.rglob("*") if p.is_file()]
    return {
        p.relative_to(folder).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size}
        for p in every
    }


def test_backend_refuses_what_it_cannot_load(tmp_path):
    from tests.conftest import EMOJI

    with pytest.raises(ArtifactError, match="sdlite export MODEL --target tensorrt"):
        tensorrt.TensorRT().load_part(Artifact.open(EMOJI), "unet", "fp16", "cuda", None)
    _configs(tmp_path)
    (tmp_path / "unet" / "model.engine").write_bytes(b"x")
    report = {
        "profile": {"precision": "fp16", "target": "tensorrt"},
        "files": {**_listed(tmp_path), "unet/model.engine": {"sha256": "0" * 64, "bytes": 1}},
    }
    (tmp_path / "export-report.json").write_text(json.dumps(report))
    with pytest.raises(PrecisionError, match="are fp16, not fp32"):
        tensorrt.TensorRT().load_part(Artifact.open(tmp_path), "unet", "fp32", "cuda", None)
    with pytest.raises(ArtifactError, match=r"model\.engine has SHA-256"):
        tensorrt.TensorRT().load_part(Artifact.open(tmp_path), "unet", "fp16", "cuda", None)


def test_the_missing_library_is_named(monkeypatch):
    from sdlite import Pipeline
    from tests.conftest import EMOJI

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sdlite\[tensorrt\]'"):
        Pipeline.from_pretrained(EMOJI, backend="tensorrt", device="cuda")


def test_pipeline_takes_the_precision_of_the_engines(tmp_path):
    """Without `precision` it is what was exported, bf16 too; the refusal is about the engine, not
    about the precision.
    """
    import shutil

    from sdlite import Pipeline
    from tests.conftest import EMOJI

    for name in ("tokenizer", "scheduler"):
        shutil.copytree(EMOJI / name, tmp_path / name)
    _configs(tmp_path)
    assert Artifact.open(tmp_path).export is None
    report = {"profile": {"precision": "bf16", "target": "tensorrt"}, "files": _listed(tmp_path)}
    (tmp_path / "export-report.json").write_text(json.dumps(report))
    assert Artifact.open(tmp_path).export.precision == "bf16"
    with pytest.raises(PrecisionError, match="'onnxruntime' has no bf16"):
        Pipeline.from_pretrained(EMOJI, backend="onnxruntime", precision="bf16")
    with pytest.raises(
        ArtifactError,
        match=(
            r"exported for tensorrt \(bf16\), which backend 'onnxruntime' does not open; use"
            r" backend='tensorrt'"
        ),
    ):
        Pipeline.from_pretrained(tmp_path, backend="onnxruntime")
    seen = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tensorrt.TensorRT, "engine", lambda self: "t")
        m.setattr(tensorrt.TensorRT, "load_part", lambda self, *a: seen.append(a) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Pipeline.from_pretrained(tmp_path, backend="tensorrt", device="cuda")
    assert seen[0][2] == "bf16"
