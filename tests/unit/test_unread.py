"""Networks whose large weights are not read: the same graphs, without the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdlite.spec import SPECS
from sdlite.weights import weight_index
from tests import folders

torch = pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("diffusers", reason="needs the torch extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
ort = pytest.importorskip("onnxruntime", reason="needs the cpu extra")

import onnx_ir as ir  # noqa: E402

from sdlite import tracing, unread  # noqa: E402
from sdlite.backends.ort import once, session_options, sparing  # noqa: E402
from sdlite.torch_networks import open_network  # noqa: E402

SIDE = 100  # of a large matrix
WIDE = {
    "block_out_channels": (32, 64),
    "down_block_types": (folders.CROSS, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", folders.UP),
}


def test_large_tensors_keep_their_memory_and_get_a_corner_alone():
    ones, zeros = torch.ones(SIDE, SIDE), torch.zeros(SIDE, SIDE)
    with unread.Unread():
        zeros.copy_(ones)
        cast = ones.to(torch.float64)
        ones.mul_(3.0)
        across = torch.zeros(SIDE, SIDE).copy_(ones.t() * 2)
    assert zeros.sum() == unread.CORNER
    assert cast.dtype == torch.float64
    assert cast.reshape(-1)[: unread.CORNER].sum() == unread.CORNER
    assert (ones == 1).all()
    assert (across == 2).all()  # not contiguous, so really copied


def test_small_tensors_are_filled():
    with unread.Unread():
        linear = torch.nn.Linear(8, 8)
        linear.weight.data.fill_(2.0)
        half = linear.weight.half()
    assert (half == 2).all()


def test_weights_take_no_memory(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    def held():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS"))

    config = CLIPTextConfig(
        vocab_size=999, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4
    )
    CLIPTextModel(config).half().save_pretrained(tmp_path / "text_encoder")
    before = held()
    with unread.Unread():
        network = open_network(tmp_path / "text_encoder")
    assert sum(p.numel() for p in network.parameters()) * 4 > 200e6
    assert held() - before < 50


# --- which tensor is which


def network(**tensors):
    out = torch.nn.Module()
    for name, tensor in tensors.items():
        out.register_parameter(name, torch.nn.Parameter(tensor))
    return out


def model(**arrays):
    """A graph of initializers alone."""
    values = [
        ir.Value(name=k, const_value=ir.Tensor(v), shape=ir.Shape(v.shape))
        for k, v in arrays.items()
    ]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values), ir_version=10)


@pytest.fixture
def stored(tmp_path):
    """Two matrices in float16, and where they stand."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    arrays = {k: rng.standard_normal((SIDE, SIDE)).astype(np.float16) for k in ("one", "two")}
    save_file(arrays, tmp_path / "model.safetensors")
    return arrays, weight_index([tmp_path / "model.safetensors"])


def test_square_matrix_and_its_transpose_are_told_apart_unread(stored):
    _, index = stored
    net = network(one=torch.empty(SIDE, SIDE), two=torch.empty(SIDE, SIDE))
    one, two = net.one.detach().numpy(), net.two.detach().numpy()
    traced = model(**{"module.one": one, "val_7": two.T, "small": np.zeros(3, np.float32)})
    links = unread.links(traced, net, index, "")
    assert links == {"module.one": ("one", False), "val_7": ("two", True)}
    proto = ir.to_proto(traced)
    sizes = {i.name: len(i.raw_data) for i in proto.graph.initializer}
    assert sizes == {"module.one": 0, "val_7": 0, "small": 12}


def test_renamed_tensor_is_found_by_its_first_numbers(stored):
    arrays, index = stored
    net = network(other=torch.from_numpy(arrays["two"].astype(np.float32)))
    traced = model(x=net.other.detach().numpy())
    assert unread.links(traced, net, index, "") == {"x": ("two", False)}


def test_computed_or_unknown_tensor_is_refused(stored):
    _, index = stored
    net = network(one=torch.zeros(SIDE, SIDE), other=torch.zeros(SIDE, SIDE))
    one, other = net.one.detach().numpy(), net.other.detach().numpy()
    for array in (one * 2, one.reshape(SIDE * 2, -1), one.T[::-1], other):
        with pytest.raises(unread.UnknownTensorError):
            unread.links(model(x=array), net, index, "")


# --- the same model


def write_graph(root, part, *, unread):
    parts = {p: tracing.network(root, s, unread) for p, s in SPECS.items()}
    assert tracing.free_sizes(parts["unet"].module)
    examples = tracing.examples(parts, 1, ())
    tracing.write_graph(root, part, SPECS[part], parts[part], *examples[part])
    return (root / part / "model.onnx").read_bytes()


@pytest.fixture
def wide(tmp_path):
    """A model with large tensors, in float16."""
    return folders.write(tmp_path / "wide", unet=WIDE, dtype="float16")


def test_graph_is_that_of_a_network_that_was_read_whole(wide, monkeypatch):
    index = weight_index([wide / "unet" / folders.WEIGHTS["unet"]])
    assert sum(np.prod(s.shape) > unread.LARGE for s in index.values()) > 10
    graph = write_graph(wide, "unet", unread=True)
    monkeypatch.setattr(tracing, "links", lambda *_: {})  # found by their names and values
    assert graph == write_graph(wide, "unet", unread=False)


def test_network_whose_tensors_are_not_known_again_is_read_whole(wide, monkeypatch, caplog):
    def unknown(*_):
        raise unread.UnknownTensorError("val_1, (4, 4)")

    graph = write_graph(wide, "text_encoder", unread=True)
    monkeypatch.setattr(tracing, "links", unknown)
    with caplog.at_level("INFO", "sdlite"):
        assert graph == write_graph(wide, "text_encoder", unread=True)
    assert "text_encoder are read whole: val_1" in caplog.text


def test_sessions_that_save_memory_say_so_to_the_engine():
    usual = session_options(1)
    with once():
        lean = session_options(1)
    with sparing():
        less = session_options(1)
    assert lean.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert less.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    assert (lean.enable_cpu_mem_arena, less.enable_cpu_mem_arena) == (False, True)
    assert session_options(1).graph_optimization_level == usual.graph_optimization_level
