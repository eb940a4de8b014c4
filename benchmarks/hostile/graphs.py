"""ONNX graphs that lie: external data that leads elsewhere, and networks that are none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from benchmarks.hostile.folder import MODEL, Change, put

OUTSIDE = Path("../../../outside")  # as a part's folder sees it
Edit = Callable[[onnx.ModelProto], Any]


def edited(edit: Callable[[Path, onnx.ModelProto], Any], part: str = "unet") -> Change:
    """Change a graph; `edit` is given its folder too."""

    def change(folder: Path) -> None:
        model = onnx.load(str(folder / part / "model.onnx"), load_external_data=False)
        edit(folder / part, model)
        put(folder, f"{part}/model.onnx", model.SerializeToString())

    return change


def graph(edit: Edit, part: str = "unet") -> Change:
    return edited(lambda _, model: edit(model), part)


# --- external data


def external(model: onnx.ModelProto) -> list[TensorProto]:
    return [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]


def point(tensor: TensorProto, **values: Any) -> None:
    """Where a tensor's data is said to be; None removes a key."""
    have = {e.key: e.value for e in tensor.external_data} | values
    del tensor.external_data[:]
    for key, value in have.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


def pointed(**values: Any) -> Change:
    """All weights of the UNet."""
    return graph(lambda model: [point(t, **values) for t in external(model)])


def location(where: str) -> Change:
    return pointed(location=where, offset=0)


def _beside(make: Callable[[Path, Path], Any], where: str = "w.bin") -> Change:
    """`make` puts what leads to the secret into the UNet's folder, and the weights name it."""

    def edit(folder: Path, model: onnx.ModelProto) -> None:
        make(folder, (folder / OUTSIDE / "secret.bin").resolve())
        for tensor in external(model):
            point(tensor, location=where, offset=0)

    return edited(edit)


def _absolute(prefix: str) -> Change:
    def edit(folder: Path, model: onnx.ModelProto) -> None:
        where = prefix + str((folder / OUTSIDE / "secret.bin").resolve())
        for tensor in external(model):
            point(tensor, location=where, offset=0)

    return edited(edit)


EXTERNAL: dict[str, Change] = {
    "dotdot": location(f"{OUTSIDE}/secret.bin"),
    "absolute": _absolute(""),
    "dotdot-hidden": location(f"./sub/../{OUTSIDE}/secret.bin"),
    "sibling-part": location("../vae/diffusion_pytorch_model.safetensors"),
    "windows": location("..\\..\\..\\outside\\secret.bin"),
    "windows-drive": location("C:\\Windows\\win.ini"),
    "unc": location("\\\\127.0.0.1\\c\\x"),
    "url": location("http://127.0.0.1:9/x"),
    "fileurl": _absolute("file://"),
    "missing": location("nothing.bin"),
    "empty": location(""),
    "dot": location("."),
    "dir": location("../unet"),
    "devzero": location("/dev/zero"),
    "nul": location("diffusion_pytorch_model.safetensors\0.txt"),
    "long": location("a" * 5000),
    "ort-mem": location("*/_ORT_MEM_ADDR_/*"),
    "self": location("model.onnx"),
    "symlink": _beside(lambda folder, secret: os.symlink(secret, folder / "w.bin")),
    "hardlink": _beside(lambda folder, secret: os.link(secret, folder / "w.bin")),
    "symlink-dir": _beside(
        lambda folder, secret: os.symlink(secret.parent, folder / "sub"), "sub/secret.bin"
    ),
    "unlisted-file": _beside(
        lambda folder, secret: (folder / "w.bin").write_bytes(secret.read_bytes())
    ),
    "no-location": pointed(location=None),
    "long-length": pointed(length=10**12),
    "short-length": pointed(length=1),
    "negative-length": pointed(length=-5),
    "huge-offset": pointed(offset=10**13),
    "max-offset": pointed(offset=2**63 - 1),
    "overflow-offset": pointed(offset=2**64 + 8),
    "negative-offset": pointed(offset=-4096),
    "text-offset": pointed(offset="abc"),
    "nan-offset": pointed(offset="nan"),
    "no-length": pointed(length=None),
}
# other bytes of the same folder are other weights, where the manifest vouches for the graph
EXTERNAL_OTHER = {"no-length", "self", "hardlink", "sibling-part", "short-length", "unlisted-file"}


# --- networks


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def _huge(model: onnx.ModelProto) -> None:
    external(model)[0].dims[0] = 2**40


def _added(model: onnx.ModelProto, scalar: str) -> None:
    """The answer is what it was plus a scalar."""
    last = model.graph.output[0].name
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            if name == last:
                node.output[i] = "before"
    model.graph.node.append(helper.make_node("Add", ["before", scalar], [last], name="added"))


def memory_bomb(model: onnx.ModelProto, numbers: int = 2**33) -> None:
    """A constant of so many numbers."""
    model.graph.initializer.append(helper.make_tensor("many", TensorProto.INT64, [1], [numbers]))
    nodes = [
        helper.make_node("ConstantOfShape", ["many"], ["bomb"], name="bomb"),
        helper.make_node("ReduceSum", ["bomb"], ["bomb_sum"], name="bomb_sum", keepdims=0),
    ]
    model.graph.node.extend(nodes)
    _added(model, "bomb_sum")


def endless(model: onnx.ModelProto, trips: int = 2**62) -> None:
    """A loop of so many trips."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["c_in"], ["c_out"]),
            helper.make_node("Add", ["v_in", "v_in"], ["v_out"]),
        ],
        "body",
        [
            value("trip", TensorProto.INT64, []),
            value("c_in", TensorProto.BOOL, []),
            value("v_in", TensorProto.FLOAT, []),
        ],
        [value("c_out", TensorProto.BOOL, []), value("v_out", TensorProto.FLOAT, [])],
    )
    model.graph.initializer.extend(
        [
            helper.make_tensor("trips", TensorProto.INT64, [], [trips]),
            helper.make_tensor("going", TensorProto.BOOL, [], [True]),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        ]
    )
    loop = helper.make_node("Loop", ["trips", "going", "zero"], ["looped"], name="loop", body=body)
    model.graph.node.append(loop)
    _added(model, "looped")


def _custom(model: onnx.ModelProto) -> None:
    model.graph.node[5].domain, model.graph.node[5].op_type = "evil.ops", "PyOp"


def rename_input(model: onnx.ModelProto, index: int = 0) -> None:
    old = model.graph.input[index].name
    model.graph.input[index].name = "other"
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = "other"


def _opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 999


def _version(model: onnx.ModelProto) -> None:
    model.ir_version = 999


def _bytes(data: bytes) -> Change:
    return lambda folder: put(folder, "unet/model.onnx", data)


PICKLE = b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x0btouch x"
NETWORKS: dict[str, Change] = {
    "cycle": graph(_cycle),
    "huge-dims": graph(_huge),
    "memory-bomb": graph(memory_bomb),
    "endless-loop": graph(endless),
    "custom-op": graph(_custom),
    "renamed-input": graph(rename_input),
    "no-outputs": graph(lambda model: model.graph.ClearField("output")),
    "no-nodes": graph(lambda model: model.graph.ClearField("node")),
    "opset-999": graph(_opset),
    "ir-999": graph(_version),
    "empty-model": _bytes(b""),
    "other-part": lambda folder: put(
        folder, "unet/model.onnx", (MODEL / "vae_decoder/model.onnx").read_bytes()
    ),
    "pickle-as-onnx": _bytes(PICKLE + b"\x94\x85\x94R\x94."),
    "zip-as-onnx": lambda folder: put(folder, "unet/model.onnx", b"PK\x03\x04" + os.urandom(1000)),
}
