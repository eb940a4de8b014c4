"""Graphs that no exporter of ours writes are refused in one line, before an engine opens them;
engines' own errors are one line too.
"""

from __future__ import annotations

import random
import time
from contextlib import suppress

import numpy as np
import pytest

import sdlite
from sdlite import graphs
from sdlite.errors import ArtifactError, EngineError
from tests import strangers
from tests.conftest import EMOJI

onnx = pytest.importorskip("onnx", reason="needs the export extra")
from onnx import TensorProto, helper  # noqa: E402

from sdlite.onnx_graph import Graph  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path):
    return strangers.copied(tmp_path / "model")


def edited(model, edit, part="unet"):
    """The model with another graph, hashes made to fit."""
    path = model / part / "model.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    edit(proto)
    path.write_bytes(proto.SerializeToString())
    return strangers.rehashed(model)


def external(proto):
    return [t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL]


def entries(**given):
    """Set keys of every external tensor; None removes one."""

    def edit(proto):
        for t in external(proto):
            held = {e.key: e.value for e in t.external_data} | given
            del t.external_data[:]
            for key, value in held.items():
                if value is not None:
                    t.external_data.add(key=key, value=str(value))

    return edit


def refused(model, says, backend="onnxruntime"):
    with pytest.raises(ArtifactError) as e:
        sdlite.Pipeline.from_pretrained(model, backend=backend, threads=1)
    assert says in str(e.value), str(e.value)
    assert "unet/model.onnx" in str(e.value)
    assert "\n" not in str(e.value)


# --- weights in other files

PLACES = [
    ("../../outside.bin", "accepted: the name of a file beside it"),
    ("./../outside.bin", "accepted: the name of a file beside it"),
    ("sub/weights.bin", "accepted: the name of a file beside it"),
    ("/etc/passwd", "accepted: the name of a file beside it"),
    ("..\\..\\outside.bin", "accepted: the name of a file beside it"),
    ("C:weights.bin", "accepted: the name of a file beside it"),
    ("file:///etc/passwd", "accepted: the name of a file beside it"),
    ("/dev/zero", "accepted: the name of a file beside it"),
    ("*/_ORT_MEM_ADDR_/*", "accepted: the name of a file beside it"),
    (WEIGHTS + "\0.txt", "accepted: the name of a file beside it"),
    ("..", "accepted: the name of a file beside it"),
    (".", "accepted: the name of a file beside it"),
    ("", "accepted: the name of a file beside it"),
    (None, "accepted: the name of a file beside it"),
    ("nothing.bin", "'nothing.bin', which"),
    ("model.onnx", "which is not one of its listed files"),
]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("place", "says"), PLACES)
def test_weights_stand_in_the_listed_files_alone(model, place, says, backend):
    pytest.importorskip(backend)
    refused(edited(model, entries(location=place)), says, backend)


@pytest.mark.parametrize(("place", "says"), [p for p in PLACES if p[0] != "model.onnx"])
def test_quantizing_opens_no_other_file_either(model, place, says):
    edited(model, entries(location=place))
    with pytest.raises(ArtifactError) as e:
        Graph.load(model / "unet" / "model.onnx")
    assert says in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["hard link", "link", "file", "folder"])
def test_a_file_that_nobody_listed_is_not_read(model, tmp_path, kind):
    outside, place = tmp_path / "outside.bin", model / "unet" / "w.bin"
    outside.write_bytes((model / "unet" / WEIGHTS).read_bytes())
    {
        "hard link": lambda: place.hardlink_to(outside),
        "link": lambda: place.symlink_to(outside),
        "file": lambda: place.write_bytes(outside.read_bytes()),
        "folder": place.mkdir,
    }[kind]()
    refused(edited(model, entries(location="w.bin")), "which is not one of its listed files")
    if kind in ("link", "folder"):
        with pytest.raises(ArtifactError, match=r"w\.bin', which is (a link|no plain file)"):
            Graph.load(model / "unet" / "model.onnx")


def test_a_manifest_that_leaves_the_weights_out_does_not_hide_them(model):
    def no_weights(manifest):
        for parts in manifest["variants"].values():
            parts["unet"]["weights"] = []

    refused(
        strangers.with_json(model, "sdlite.json", no_weights), "not one of its listed files (none)"
    )


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("length", 10**12, "1000000000000 bytes, its shape"),
        ("length", 1, "1 bytes, its shape"),
        ("length", -5, "the length '-5', which is no whole number from 0"),
        ("offset", 10**13, "which has 10850264 bytes: it is cut off"),
        ("offset", 2**63 - 1, "it is cut off"),
        ("offset", 2**64 + 8, "no whole number from 0"),
        ("offset", -4096, "the offset '-4096', which is no whole number from 0"),
        ("offset", "abc", "no whole number from 0"),
        ("offset", "nan", "no whole number from 0"),
        ("offset", "1e3", "no whole number from 0"),
        ("offset", "٣", "no whole number from 0"),
        ("offset", "", "no whole number from 0"),
    ],
)
def test_offsets_and_lengths_are_those_of_the_file(model, key, value, says):
    edited(model, entries(**{key: value}))
    refused(model, says)
    with pytest.raises(ArtifactError, match=r"unet/model\.onnx"):
        Graph.load(model / "unet" / "model.onnx")


def test_a_key_that_is_given_twice_is_refused(model):
    def twice(proto):
        external(proto)[0].external_data.add(key="location", value="/etc/passwd")

    refused(edited(model, twice), "gives location of external data twice")


# --- what a graph may hold


def appended(*nodes, constants=()):
    def edit(proto):
        proto.graph.initializer.extend(constants)
        proto.graph.node.extend(nodes)

    return edit


def body():
    info = helper.make_tensor_value_info
    done = [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["w"])]
    return helper.make_graph(
        done,
        "body",
        [info("i", 7, []), info("c", 9, []), info("v", 1, [])],
        [info("d", 9, []), info("w", 1, [])],
    )


def number(name, *values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def sparse(proto):
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, number("at", 0), [5]))


def function(proto):
    made = helper.make_function(
        "",
        "Mine",
        ["x"],
        ["y"],
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_opsetid("", 18)],
    )
    proto.functions.append(made)


def wide(proto):
    next(t for t in proto.graph.initializer if t.data_location != TensorProto.EXTERNAL).dims[:] = [
        2**40
    ]


def wider(proto):
    external(proto)[0].dims[0] = 2**40


def unknown(proto):
    external(proto)[0].data_type = 99


def outside_attribute(proto):
    tensor = TensorProto(name="t", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    proto.graph.node.append(helper.make_node("Constant", [], ["x"], value=tensor))


def renamed(proto):
    old = proto.graph.input[0].name
    proto.graph.input[0].name = "other"
    for node in proto.graph.node:
        node.input[:] = ["other" if x == old else x for x in node.input]


def half(proto):
    proto.graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT16
    proto.graph.node.insert(0, helper.make_node("Cast", ["timestep"], ["timestep32"], to=1))
    for node in proto.graph.node[1:]:
        node.input[:] = ["timestep32" if x == "timestep" else x for x in node.input]


HELD = {
    "loop": (
        appended(
            helper.make_node("Loop", ["n", "", "v0"], ["out"], body=body()),
            constants=[number("n", 2**62)],
        ),
        "If, Loop, Scan",
    ),
    "function": (function, "local functions"),
    "sparse": (sparse, "sparse tensors"),
    "domain": (
        appended(helper.make_node("PyOp", ["sample"], ["x"], domain="evil.ops")),
        "the domain 'evil.ops'",
    ),
    "bomb": (
        appended(
            helper.make_node("ConstantOfShape", ["huge"], ["x"]), constants=[number("huge", 2**33)]
        ),
        "fills a tensor of shape [8589934592]",
    ),
    "bomb in a node": (
        appended(
            helper.make_node("Constant", [], ["huge"], value=number("", 2**20, 2**20)),
            helper.make_node("ConstantOfShape", ["huge"], ["x"]),
        ),
        "fills a tensor of shape",
    ),
    "huge constant": (wide, "its shape [1099511627776] asks for"),
    "huge weights": (wider, "its shape [1099511627776, 8, 3, 3] asks for"),
    "unknown type": (unknown, "of the unknown type 99"),
    "outside in a node": (outside_attribute, "weights 'x' in '/etc/passwd'"),
    "renamed": (
        renamed,
        (
            "takes other, timestep, encoder_hidden_states; a unet takes sample, timestep,"
            " encoder_hidden_states"
        ),
    ),
    "no output": (lambda p: p.graph.ClearField("output"), "unet/model.onnx"),
    "another type": (half, "has timestep as f"),
}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", HELD)
def test_what_no_exporter_of_ours_writes_is_refused(model, name, backend):
    pytest.importorskip(backend)
    edit, says = HELD[name]
    begin = time.perf_counter()
    refused(edited(model, edit), says, backend)
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04" + bytes(range(256)) * 4, b"\x80\x04\x95\x1e\x00\x00", b"\x08\x08"]
)
def test_what_is_no_graph_is_refused(model, data):
    (model / "unet" / "model.onnx").write_bytes(data)
    refused(strangers.rehashed(model), "ONNX file")


@pytest.mark.parametrize("hide", ["second graph", "long tag", "long length"])
def test_other_spellings_of_protobuf_hide_nothing(tmp_path, hide):
    """A message that is given twice is merged, and numbers may have more bytes than they need."""
    proto = onnx.ModelProto()
    proto.graph.initializer.append(
        TensorProto(name="w", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    )
    proto.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    whole = proto.SerializeToString()
    assert whole[0] == 7 << 3 | 2
    data = {
        "second graph": b"\x3a\x00" + whole,
        "long tag": b"\xba\x80\x80\x00" + whole[1:],
        "long length": whole[:1] + bytes([whole[1] | 128, 0]) + whole[2:],
    }[hide]
    assert onnx.load_from_string(data).graph.initializer[0].name == "w"
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="'/etc/passwd'"):
        graphs.check(path)


def test_any_bytes_are_a_graph_or_one_line(tmp_path):
    seeds, path = random.Random(0), tmp_path / "model.onnx"
    whole = (EMOJI / "text_encoder" / "model.onnx").read_bytes()
    (tmp_path / "model.safetensors").symlink_to(EMOJI / "text_encoder" / "model.safetensors")
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(seeds.choice([1, 3, 30])):
            data[seeds.randrange(len(data))] = seeds.randrange(256)
        path.write_bytes(data[: seeds.choice([len(data), seeds.randrange(len(data))])])
        with suppress(ArtifactError):
            graphs.check(path)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_decoder"])
def test_our_own_graphs_are_read_in_milliseconds(part):
    path = EMOJI / part / "model.onnx"
    weights = [p for p in path.parent.iterdir() if p.suffix != ".json" and p != path]
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        graphs.check(path, weights)
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.1  # 8 ms for the largest on two slow cores


# --- while it runs


def averaging(proto):
    """A UNet that declares what it must, and gives one number for each channel: numpy would
    broadcast it.
    """
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["sample"], ["out_sample"], axes=[2, 3], keepdims=1)],
        "g",
        [
            helper.make_tensor_value_info("sample", 1, ["b", "c", "h", "w"]),
            helper.make_tensor_value_info("timestep", 1, []),
            helper.make_tensor_value_info("encoder_hidden_states", 1, ["b", "l", "d"]),
        ],
        [helper.make_tensor_value_info("out_sample", 1, ["b", "c", "y", "x"])],
    )
    proto.CopyFrom(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_answer_of_another_shape_is_an_error(model, backend):
    pytest.importorskip(backend)
    edited(model, averaging)
    with pytest.raises(
        EngineError,
        match=(
            r"unet with sample \[1, 8, 8, 8\].* gave float32 \[1, 8, 1, 1\], not float32 \[B, C,"
            r" h, w\]"
        ),
    ):
        sdlite.Pipeline.from_pretrained(model, backend=backend, threads=1)("x")


def test_memory_that_is_not_there_is_one_line_and_the_pipeline_lives_on(capfd):
    pipe = sdlite.Pipeline.from_pretrained("emoji", backend="onnxruntime", threads=1)
    before = np.asarray(pipe("x", seed=1).images[0])
    with pytest.raises(
        EngineError,
        match=r"unet with sample \[1, 8, 1024, 1024\].*Failed to allocate memory.*make smaller",
    ) as e:
        pipe.networks.unet(
            sample=np.zeros((1, 8, 1024, 1024), np.float32),
            timestep=np.array(1, np.float32),
            encoder_hidden_states=np.zeros((1, 28, 192), np.float32),
        )
    assert "\n" not in str(e.value)
    assert capfd.readouterr().err == ""
    assert np.array_equal(before, np.asarray(pipe("x", seed=1).images[0]))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("version", [2**31 - 1, 2**62, 0, -1])
def test_operators_of_a_version_that_there_is_not(model, version, backend):
    """OpenVINO counts down from it, for years."""
    pytest.importorskip(backend)
    refused(
        edited(model, lambda p: setattr(p.opset_import[0], "version", version)),
        "has operators of version",
        backend,
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("field", ["input", "output"])
def test_an_operator_that_lacks_what_it_needs(model, field, backend):
    """OpenVINO looks for it without looking, and takes the process with it."""
    pytest.importorskip(backend)

    def lacking(proto):
        node = next(n for n in proto.graph.node if n.op_type == "Conv")
        del getattr(node, field)[1 if field == "input" else 0 :]

    refused(edited(model, lacking), "outputs; it needs 2 and 1", backend)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_names_that_are_no_text(model, backend):
    """Of a side of an input: onnxruntime says them to Python, which cannot read them."""
    pytest.importorskip(backend)
    path = model / "unet" / "model.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "sideways"
    path.write_bytes(proto.SerializeToString().replace(b"sideways", b"side\xec\xffys"))
    refused(strangers.rehashed(model), "no UTF-8 text", backend)
