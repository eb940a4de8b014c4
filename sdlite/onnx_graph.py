"""An ONNX graph whose large weights stay on disk, and the rewrites that quantizing needs.

A `Graph` keeps weights as lazy arrays (memory-mapped file, optional transpose), so that a UNet of
over 2 GB is read, rewritten and written one tensor at a time. `Layer`s are the nodes that can
become integer: Conv, MatMul and Gemm with a constant weight, named by their torch module.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sdlite.backends.checked import words_of
from sdlite.errors import ArtifactError
from sdlite.graphs import check

_SAFETENSORS = {
    "float32": "F32",
    "float16": "F16",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
}
_SMALL = 1024  # bytes: smaller constants stay inside the graph file


@dataclass(frozen=True)
class Weight:
    """A constant that is read when it is used. `dtype` is what `array()` returns; `half` marks
    float16 storage.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    read: Callable[[], np.ndarray]
    half: bool = False
    origin: str = ""  # name of the stored tensor that it comes from

    def array(self) -> np.ndarray:
        """The values, contiguous, read now."""
        made = np.ascontiguousarray(self.read(), dtype=self.dtype)
        return made.reshape(self.shape)  # of a scalar it makes a vector

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.shape, dtype=np.int64))


def constant(array: np.ndarray, half: bool = False, origin: str = "") -> Weight:
    """A weight that is in memory."""
    return Weight(array.shape, array.dtype, lambda: array, half, origin)


@dataclass(frozen=True)
class Layer:
    """One node that can become integer."""

    name: str  # torch module, e.g. down_blocks.0.resnets.0.conv1
    node: str
    op: str  # Conv, MatMul or Gemm
    input: str  # activation tensor
    weight: str
    output: str
    parameters: int
    axis: int  # output channels of the weight


class Constants(UserDict[str, Weight]):
    """A graph's constants by name. One that several inputs read cannot be changed in place: equal
    tensors are stored once by torch's exporter, so a change that is meant for one node would reach
    the others. `Graph.own` gives a node a copy of its own.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Weight]):
        self._graph = graph
        super().__init__()
        self.data.update(weights)

    def __setitem__(self, name: str, weight: Weight) -> None:
        if name in self.data and (readers := self._graph.readers(name)) > 1:
            raise ValueError(
                f"constant {name} is read by {readers} inputs; take a copy with Graph.own(node,"
                " index) before you change it."
            )
        self.data[name] = weight


class Graph:
    """An ONNX model as nodes and lazy weights."""

    def __init__(self, proto: onnx.ModelProto, weights: Mapping[str, Weight]):
        self.proto = proto
        self._weights = Constants(self, weights)

    @property
    def weights(self) -> Constants:
        """Constants by name."""
        return self._weights

    def readers(self, name: str) -> int:
        """How many inputs of nodes read this tensor."""
        return sum(x == name for n in self.nodes for x in n.input)

    def own(self, node: NodeProto, index: int) -> str:
        """The constant at this input of a node of the graph, as one that nothing else reads.

        Returns:
            Its name: the old one, or that of a copy where other inputs read it too.
        """
        name: str = node.input[index]
        if self.readers(name) > 1:
            copy = f"{name}@{node.name}.{index}"
            self._weights[copy] = self._weights[name]
            node.input[index] = copy
        return str(node.input[index])

    def store_as_half(self) -> None:
        """Every float32 constant goes to the file in float16."""
        halved = {
            k: dataclasses.replace(w, half=w.dtype == np.float32) for k, w in self._weights.items()
        }
        self._weights = Constants(self, halved)

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Read a graph; Cast, Transpose and Identity of constants are folded into the (lazy)
        constants.

        Raises:
            ArtifactError: not ONNX, or its external data is missing, too short, or no plain file in
                its folder.
        """
        path = Path(path)
        check(path)
        try:
            proto = onnx.load(str(path), load_external_data=False)
            weights = {i.name: _lazy(i, path.parent) for i in proto.graph.initializer}
            kept = []
            for node in proto.graph.node:
                source = weights.get(node.input[0]) if node.input else None
                if source is not None and node.op_type in ("Cast", "Transpose", "Identity"):
                    weights[node.output[0]] = _folded(node, source)
                else:
                    kept.append(node)
        except (
            Exception
        ) as e:  # protobuf's errors have no common type, and onnx's helpers raise any
            raise ArtifactError(
                f"{path} is not a readable ONNX file ({words_of(e)}); fetch or export the model"
                " again."
            ) from e
        del proto.graph.node[:], proto.graph.initializer[:]
        proto.graph.node.extend(kept)
        graph = cls(proto, weights)
        graph.prune()
        return graph

    def copy(self) -> Graph:
        """The same graph with nodes of its own; constants are shared."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        return Graph(proto, self.weights)

    @property
    def nodes(self) -> Sequence[NodeProto]:
        """The nodes, in order."""
        nodes: Sequence[NodeProto] = self.proto.graph.node
        return nodes

    def replace(self, nodes: Iterable[NodeProto]) -> None:
        """In place: other nodes, in order."""
        nodes = list(nodes)
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(nodes)

    def insert(self, extra: Mapping[str, Sequence[NodeProto]]) -> None:
        """In place: nodes after the one that makes a tensor; first, where it is an input."""
        made = {o for n in self.nodes for o in n.output}
        out = [n for x, more in extra.items() if x not in made for n in more]
        for n in self.nodes:
            out.append(n)
            out += [more for o in n.output for more in extra.get(o, ())]
        self.replace(out)

    def ends(self) -> list[NodeProto]:
        """The nodes that no node reads."""
        read = {x for n in self.nodes for x in n.input}
        return [n for n in self.nodes if read.isdisjoint(n.output)]

    def earliest_first(self) -> Graph:
        """A copy in which onnxruntime computes each output as soon as it can, and holds no tensor
        longer than its readers need it.

        onnxruntime orders the nodes from those that nothing reads, the last in the file first. Of a
        graph with further outputs along the way that is the network's own answer, and whatever the
        others read is held until it is there: of SSD-1B's UNet with an integer copy of each layer,
        2 GB at 256 px. So nodes that nothing reads go to the end, the last of them first.
        """
        ends = self.ends()
        last = {x for n in ends for x in n.output}
        out = self.copy()
        out.replace([*(n for n in self.nodes if last.isdisjoint(n.output)), *ends[::-1]])
        return out

    def drop_unread(self) -> None:
        """In place: without nodes that no output needs, and their constants."""
        needed, kept = {o.name for o in self.proto.graph.output}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.replace(kept[::-1])
        self.prune()

    def prune(self) -> None:
        """Drop constants that no node uses."""
        used = {x for n in self.nodes for x in n.input}
        self._weights = Constants(self, {k: v for k, v in self.weights.items() if k in used})

    def answers(self, names: Iterable[str]) -> Graph:
        """A copy that returns these of its outputs alone, in this order, without what only the
        others need.
        """
        out, wanted = self.copy(), list(names)
        known = {o.name: o for o in self.proto.graph.output}
        if wanted == list(known):
            return out
        del out.proto.graph.output[:]
        out.proto.graph.output.extend(known[n] for n in wanted)
        out.drop_unread()
        return out

    def outputs(self, names: Iterable[str]) -> Graph:
        """A copy that also returns these float tensors."""
        out = self.copy()
        have = {o.name for o in out.proto.graph.output}
        for name in names:
            if name not in have:
                out.proto.graph.output.append(
                    helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                )
        return out

    def save(self, path: Path, whole: bool = False) -> list[Path]:
        """Write `path` and its weights beside it (safetensors bytes as ONNX external data). Returns
        the files.

        Args:
            whole: weights that are stored in float16 are written in float32, which is what they are
                computed in.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        data = path.with_name(path.name + ".data")
        large: dict[str, tuple[Weight, np.dtype[np.generic]]] = {}
        casts = []
        for name, w in self.weights.items():
            half = w.half and w.dtype == np.float32 and not whole
            if w.size * w.dtype.itemsize < _SMALL:
                proto.graph.initializer.append(numpy_helper.from_array(w.array(), name))
                continue
            stored = name + ".f16" if half else name
            large[stored] = (w, np.dtype(np.float16) if half else w.dtype)
            if half:
                casts.append(
                    helper.make_node(
                        "Cast", [stored], [name], name=name + "/cast", to=TensorProto.FLOAT
                    )
                )
        nodes = casts + list(proto.graph.node)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        if large:
            for tensor in _write_safetensors(data, large):
                proto.graph.initializer.append(tensor)
        onnx.save_model(proto, str(path))
        return [path, data] if large else [path]

    def layers(self) -> list[Layer]:
        """Conv, MatMul and Gemm with a constant float weight of rank 2 or 4, in graph order. A name
        that is taken (equal weights are stored once) gets a number: `conv1`, `conv1#2`.
        """
        out: list[Layer] = []
        taken: dict[str, int] = {}
        for n in self.nodes:
            if (
                n.op_type not in ("Conv", "MatMul", "Gemm")
                or len(n.input) < 2
                or n.input[0] in self.weights
            ):
                continue
            w = self.weights.get(n.input[1])
            if w is None or w.dtype != np.float32 or len(w.shape) not in (2, 4):
                continue
            turned = n.op_type == "Gemm" and any(a.name == "transB" and a.i for a in n.attribute)
            axis = 0 if n.op_type == "Conv" or turned else 1
            name = _module_name(n, w)
            taken[name] = taken.get(name, 0) + 1
            name += f"#{taken[name]}" if taken[name] > 1 else ""
            out.append(
                Layer(name, n.name, n.op_type, n.input[0], n.input[1], n.output[0], w.size, axis)
            )
        return out

    def producers(self) -> dict[str, NodeProto]:
        """Tensor -> the node that makes it."""
        return {o: n for n in self.nodes for o in n.output}

    def consumers(self) -> dict[str, list[NodeProto]]:
        """Tensor -> the nodes that read it."""
        out: dict[str, list[NodeProto]] = {}
        for n in self.nodes:
            for x in n.input:
                out.setdefault(x, []).append(n)
        return out

    def total_bytes(self) -> int:
        """Bytes of the constants as they are stored."""
        return sum(w.size * (2 if w.half else w.dtype.itemsize) for w in self.weights.values())


def _module_name(node: NodeProto, weight: Weight) -> str:
    """down_blocks.0.resnets.0.conv1, plus what a rewrite has appended to the node's name after
    '@'.
    """
    module = weight.origin.removeprefix("weights.").removeprefix("module.").removesuffix(".weight")
    part = node.name.partition("@")[2]
    return (module or node.name) + (f"@{part}" if part else "")


def _lazy(init: TensorProto, folder: Path) -> Weight:
    shape = tuple(init.dims)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(init.data_type))
    if init.data_location != TensorProto.EXTERNAL:
        return constant(numpy_helper.to_array(init), origin=init.name)
    info = {e.key: e.value for e in init.external_data}
    file, offset = folder / info["location"], int(info.get("offset", 0))
    return Weight(
        shape,
        dtype,
        lambda: np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape),
        dtype == np.float16,
        init.name,
    )


def _folded(node: NodeProto, source: Weight) -> Weight:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Identity":
        return source
    if node.op_type == "Cast":
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(attributes["to"]))
        return Weight(
            source.shape, dtype, lambda: source.read().astype(dtype), source.half, source.origin
        )
    order = tuple(attributes.get("perm", range(len(source.shape))[::-1]))
    return Weight(
        tuple(source.shape[i] for i in order),
        source.dtype,
        lambda: source.read().transpose(order),
        source.half,
        source.origin,
    )


def _write_safetensors(
    path: Path, tensors: dict[str, tuple[Weight, np.dtype[np.generic]]]
) -> list[TensorProto]:
    """One tensor in memory at a time. Returns the initializers that point into the file."""
    header: dict[str, dict[str, Any]] = {}
    position = 0
    for name, (w, dtype) in tensors.items():
        length = w.size * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS[dtype.name],
            "shape": list(w.shape),
            "data_offsets": [position, position + length],
        }
        position += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out = []
    beside = path.with_name(path.name + ".tmp")  # the weights may be read from this very file
    with open(beside, "wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        base = f.tell()
        for name, (w, dtype) in tensors.items():
            values = w.read()
            if dtype == np.float16:
                values = np.clip(values, -65504, 65504)  # attention masks hold the least float32
            f.write(np.ascontiguousarray(values, dtype=dtype).tobytes())
            begin, end = header[name]["data_offsets"]
            tensor = TensorProto(
                name=name,
                dims=w.shape,
                data_type=helper.np_dtype_to_tensor_dtype(dtype),
                data_location=TensorProto.EXTERNAL,
            )
            for k, v in (
                ("location", path.name),
                ("offset", base + begin),
                ("length", end - begin),
            ):
                tensor.external_data.add(key=k, value=str(v))
            out.append(tensor)
    os.replace(beside, path)
    return out
