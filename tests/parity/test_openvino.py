"""OpenVINO: arithmetic as asked and reported, and the same picture from the graph of one shape and
of any.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import sdlite
from sdlite.errors import ArtifactError, PrecisionError
from tests.conftest import EMOJI
from tests.helpers import psnr

pytest.importorskip("onnxruntime", reason="needs the cpu extra")
pytest.importorskip("openvino", reason="needs the openvino extra")
pytestmark = pytest.mark.parity

CALL = {"num_inference_steps": 4, "guidance_scale": 1.0, "seed": 0}
NATIVE = pytest.mark.skipif(
    "__import__('sdlite.backends.openvino_network').backends.openvino_network.half() != 'bfloat16'",
    reason="CPU without bfloat16",
)


def load(**arguments):
    return sdlite.Pipeline.from_pretrained("emoji", backend="openvino", threads=1, **arguments)


def pixels(out):
    return np.stack([np.asarray(i) for i in out.images])


def float_types(network):
    """Types that the compiled graph computes convolutions in."""
    nodes = (n.get_rt_info() for n in network.model.get_runtime_model().get_ops())
    return {
        str(i["runtimePrecision"].astype(str))
        for i in nodes
        if i["layerType"].astype(str) == "Convolution"
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_answer_depends_on_nothing_else_in_the_call_or_before_it(precision, emoji):
    pipe, prompts = load(precision=precision), ["pizza", "ghost", "a fox"]
    before = pixels(pipe("pizza", **CALL))
    batch = pixels(pipe(prompts, **CALL))
    pipe("pizza", height=128, width=64, **CALL)
    for i, prompt in enumerate(prompts):
        alone = pixels(pipe(prompt, **{**CALL, "seed": i}))
        np.testing.assert_array_equal(alone, batch[i : i + 1])
    np.testing.assert_array_equal(before, batch[:1])
    assert psnr(batch, pixels(emoji(prompts, **CALL))) > (55 if precision == "fp32" else 40)
    assert any("first call" in n for n in pipe.report.notes)
    assert any("alone" in n for n in pipe.report.notes)


def test_large_networks_compute_rows_one_by_one(monkeypatch):
    from sdlite.backends import openvino

    together = pixels(load(precision="fp16")(["pizza", "ghost"], **CALL))
    monkeypatch.setattr(openvino, "LARGE", 0)
    pipe = load(precision="fp16")
    np.testing.assert_array_equal(pixels(pipe(["pizza", "ghost"], **CALL)), together)
    assert len(pipe.networks.unet.network.requests) == 1, "compiled for one row"


def test_compiled_shapes_are_few_and_the_last_ones(monkeypatch):
    from sdlite.backends import openvino, openvino_network

    monkeypatch.setattr(openvino_network, "SHAPES", 2)
    pipe = load(precision="fp32")
    first = pixels(pipe("pizza", **CALL))
    for count in (2, 3):
        pipe(["pizza"] * count, **CALL)
    assert [k[1][0] for k in pipe.networks.unet.requests] == [2, 3]
    np.testing.assert_array_equal(pixels(pipe("pizza", **CALL)), first)
    assert [k[1][0] for k in pipe.networks.unet.requests] == [3, 1]
    monkeypatch.setattr(openvino, "KEPT", 1 << 20)  # less than the weights of one
    assert load(precision="fp32").networks.unet.keep == 1


def test_threads_that_share_a_pipeline_get_their_own_images():
    pipe, other = load(precision="fp16"), load(precision="fp16")
    sizes = [64, 128]

    def call(made, i):
        return pixels(
            made(
                f"a {['red', 'green', 'blue'][i % 3]} apple",
                **{**CALL, "seed": i},
                height=64,
                width=sizes[i % 2],
            )
        )

    wanted = [call(other, i) for i in range(16)]
    with ThreadPoolExecutor(4) as executor:
        got = list(executor.map(lambda i: call(pipe, i), range(16)))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_fp32_stays_float32_on_every_cpu():
    pipe = load(precision="fp32")
    pipe("pizza", **CALL)
    assert float_types(pipe.networks.unet) == {"f32"}
    assert {n.arithmetic for n in pipe.report.networks} == {"float32"}
    assert not any("bfloat16" in n for n in pipe.report.notes)


@NATIVE
def test_fp16_is_bfloat16_where_the_cpu_has_it_and_says_so():
    pipe, exact = load(precision="fp16"), load(precision="fp16", arithmetic="float32")
    a, b = pixels(pipe("pizza", **CALL)), pixels(exact("pizza", **CALL))
    assert float_types(pipe.networks.unet) == {"bf16"}
    assert float_types(exact.networks.unet) == {"f32"}
    assert {n.arithmetic for n in pipe.report.networks} == {"bfloat16"}
    assert {n.arithmetic for n in exact.report.networks} == {"float32"}
    assert any("bfloat16" in n for n in pipe.report.notes)
    assert 45 < psnr(a, b) < 90  # measured 52 to 54 dB over 16 prompts, 4 and 25 steps


def unet_error(network, exact, px):
    """SQNR in dB of the embedded UNet on noise of `px` latent pixels."""
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((1, 8, px, px), np.float32),
        "timestep": np.float32(500),
        "encoder_hidden_states": rng.standard_normal((1, 28, 192), np.float32),
    }
    want, got = (n(**inputs)["out_sample"].astype(float) for n in (exact, network))
    return 10 * np.log10((want**2).sum() / ((got - want) ** 2).sum())


@NATIVE
@pytest.mark.parametrize("px", [8, 12, 16])  # deepest feature map: 2, 3 and 4 pixels
def test_half_precision_of_fixed_shapes_is_right_at_narrow_feature_maps(px, monkeypatch):
    from sdlite.backends import openvino_network as openvino

    def load(arithmetic):
        return openvino.CompiledNetwork(
            str(EMOJI / "unet/model.onnx"), "unet", "cpu", 1, "fp32", arithmetic
        )

    exact = load("float32")
    assert unet_error(load("bfloat16"), exact, px) > 25  # measured 30 to 35
    monkeypatch.setattr(openvino, "NARROW", 0)  # all fused, as OpenVINO does by itself
    fused = unet_error(load("bfloat16"), exact, px)
    if px == 8:
        assert fused < 15, "OpenVINO is right here now: NARROW is not needed"
    else:
        assert fused > 25


@NATIVE
@pytest.mark.parametrize("kept", [True, False])
def test_half_precision_tells_timesteps_apart(kept, tmp_path):
    """And does not by itself: of a timestep's embedding, as UNets compute it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from sdlite.backends import openvino_network as openvino

    rng = np.random.default_rng(0)
    frequencies = np.exp(-np.log(10000) * np.arange(64) / 64).astype(np.float32)
    weights = rng.normal(size=(128, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Unsqueeze", ["t", "axis"], ["time"]),
        helper.make_node("Mul", ["time", "f"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["sine"]),
        helper.make_node("Cos", ["angle"], ["cosine"]),
        helper.make_node("Concat", ["cosine", "sine"], ["waves"], axis=1),
        helper.make_node("MatMul", ["waves", "w"], ["out"]),
    ]
    constants = {"axis": np.array([1]), "f": frequencies[None], "w": weights}
    initializer = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("t", [1]), ("out", [1, 64]))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    read = openvino.core().read_model(str(tmp_path / "m.onnx"))
    if kept:
        openvino._keep_angles(read)
    network = openvino.core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    found = []
    for t in (1, 601, 951.3, 999):
        angles = np.float32(t) * frequencies
        want = np.concatenate([np.cos(angles), np.sin(angles)]) @ weights
        got = network([np.array([t], np.float32)])["out"][0]
        found.append(10 * np.log10(np.square(want).sum() / np.square(got - want).sum()))
    assert found[0] > 40
    assert min(found) > 40 if kept else min(found) < 20


HELD = """
import sys
from pathlib import Path
import numpy as np
from sdlite.backends import openvino_network as openvino

path, marked = sys.argv[1:]
held = lambda: int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) >> 10
core = openvino.core()
before, graph = held(), core.read_model(path)
if marked == "True":
    openvino._mark_stored(graph)
options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
network = core.compile_model(graph, "CPU", options)
del graph
network(np.ones((16, 4096), np.float32))
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: not Linux")
@pytest.mark.parametrize("marked", [True, False])
def test_float16_weights_are_held_once_in_float32(marked, tmp_path):
    """And twice by OpenVINO itself: of 64 MiB in float32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.ones((4096, 4096), np.float16)
    nodes = [
        helper.make_node("Cast", ["w.f16"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [16, 4096]) for n in "xy"]
    initializer = [numpy_helper.from_array(weights, "w.f16")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "m.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="m.data")
    command = [sys.executable, "-c", HELD, str(path), str(marked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held = int(done.stdout.split()[-1])
    assert 64 <= held < 110 if marked else held >= 120


def test_pages_of_weights_are_let_go_and_read_again(tmp_path):
    import mmap

    from sdlite import memory

    (tmp_path / "w").write_bytes(b"x" * (1 << 24))

    def resident():
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(str(tmp_path / "w")))
        return int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1]) << 10

    if not Path("/proc/self/smaps").exists():
        pytest.skip("no /proc: not Linux")
    with open(tmp_path / "w", "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
        assert sum(m[:: 1 << 12]) > 0
        assert resident() == 1 << 24
        assert memory.release(tmp_path / "other") == 0
        assert resident() == 1 << 24
        assert memory.release(tmp_path) == 1 << 24
        assert resident() == 0
        assert m[:] == b"x" * (1 << 24)


@pytest.mark.parametrize(("worth", "during"), [(1 << 23, 0), (1 << 40, 1 << 24)])
def test_pages_are_let_go_while_compiling_only_where_there_are_many(
    tmp_path, monkeypatch, worth, during
):
    """What is let go is read from the disk again: letting go of everything all the time made a
    compilation ten times slower on a slow disk.
    """
    import mmap
    import time

    from sdlite import memory

    if not Path("/proc/self/smaps").exists():
        pytest.skip("no /proc: not Linux")
    monkeypatch.setattr(memory, "_WORTH", worth)
    (tmp_path / "w").write_bytes(b"x" * (1 << 24))
    with open(tmp_path / "w", "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:

        def resident():
            lines = Path("/proc/self/smaps").read_text().splitlines()
            at = next(i for i, line in enumerate(lines) if line.endswith(str(tmp_path / "w")))
            return (
                int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1]) << 10
            )

        with memory.released(tmp_path):
            assert sum(m[:: 1 << 12]) > 0
            time.sleep(0.5)
            assert resident() == during
        assert resident() == 0


def test_fp16_without_half_instructions_is_said_to_be_storage(monkeypatch):
    from sdlite.backends import openvino_network as openvino

    monkeypatch.setattr(openvino, "half", lambda: "float32")
    assert openvino.arithmetic_of("fp16", "cpu") == "float32"
    from sdlite.backends import get_backend

    assert any("storage" in n for n in get_backend("openvino").notes("fp16", "cpu"))


def test_arithmetic_that_a_backend_has_not_is_refused():
    with pytest.raises(PrecisionError, match="float32, bfloat16, float16"):
        load(arithmetic="int4")
    with pytest.raises(PrecisionError, match="openvino"):
        sdlite.Pipeline.from_pretrained("emoji", backend="onnxruntime", arithmetic="bfloat16")


def test_graph_that_cannot_be_read_fails_while_loading(tmp_path):
    from sdlite.backends.openvino_network import CompiledNetwork

    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="sdlite verify"):
        CompiledNetwork(str(tmp_path / "model.onnx"), "unet", "cpu", 1, "fp32")
