"""Check what an ONNX file holds, from its bytes, before an engine opens it.

An engine follows what a graph says: other files, loops, operators of its own. So the file is walked
as protobuf here, without the onnx package, and refused where it holds what no exporter of ours
writes: weights outside the listed files, or of another length than their shape; graphs in graphs
(If, Loop, Scan); local functions; sparse tensors; operators of unknown domains. Fields that
protobuf merges or repeats are checked each time that they occur. Source of the numbers: onnx.proto.

How much a graph computes is not bounded: its shapes may ask for any memory and time.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlite.errors import ArtifactError, printable
from sdlite.io import read_bytes

GRAPH_BYTES = 2**31 - 1  # protobuf takes no more
DOMAINS = ("", "ai.onnx", "com.microsoft")  # the last: 16-bit quantization in onnxruntime
_VARINT, _BYTES, _FIXED = 0, 2, {1: 8, 5: 4}  # wire types; of those of fixed length the bytes
# TensorProto.DataType -> bits of an element
_BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
}
_INT64 = 7
_FILLED = {
    b"ConstantOfShape": 0,
    b"Expand": 1,
    b"Tile": 1,
}  # operator -> the input that says a size
# Operator of ONNX -> inputs that it has at least, in versions 13 to 24; 1 where it stands in none.
# Engines ask for them without looking.
_NONE = "Constant Optional OptionalHasElement RandomNormal RandomUniform SequenceEmpty"
_TWO = (
    "Add AffineGrid And BitShift BitwiseAnd BitwiseOr BitwiseXor CastLike CenterCropPad Compress"
    " Conv ConvInteger ConvTranspose CumSum DequantizeLinear Div Equal Expand Gather GatherElements"
    " GatherND Gemm Greater GreaterOrEqual GridSample LayerNormalization Less LessOrEqual MatMul"
    " MatMulInteger MaxRoiPool MaxUnpool Mod Mul NegativeLogLikelihoodLoss NonMaxSuppression Or"
    " PRelu Pad Pow QuantizeLinear RMSNormalization Reshape ReverseSequence STFT SequenceAt"
    " SequenceInsert SoftmaxCrossEntropyLoss StringConcat Sub TensorScatter Tile TopK Unsqueeze"
    " Upsample Xor"
)
_THREE = (
    "Attention Col2Im DeformConv GRU GroupNormalization InstanceNormalization LSTM OneHot RNN Range"
    " RoiAlign RotaryEmbedding Scatter ScatterElements ScatterND Slice Where"
)
_LEAST = {
    op.encode(): least
    for least, ops in {
        0: _NONE,
        2: _TWO,
        3: _THREE,
        5: "BatchNormalization MelWeightMatrix",
        8: "QLinearConv QLinearMatMul",
    }.items()
    for op in ops.split()
}
_OPSETS = 100  # ONNX has come to 28
_MOST = 1 << 28  # elements: 1 GiB of float32

# An attribute without these bytes has no tag of a tensor or a graph: 5, 6, 10, 11, 22, 23.
_HOLDS = re.compile(rb"[\x2a\x32\x52\x5a\xaa\xb2\xba\xd2\xda]")
_KNOWN = {d.encode() for d in DOMAINS}
_NESTED = (
    "holds a graph in a graph (If, Loop, Scan), which no exporter of sdlite writes: it may"
    " never end"
)
_SPARSE = "holds sparse tensors, which no exporter of sdlite writes"

Field = tuple[int, int, Any]  # number, wire type, value: an int, or the bytes


@dataclass
class _Tensor:
    """TensorProto. `info` is external_data; `written` the bytes of values of other types."""

    name: str = ""
    shape: list[int] = field(default_factory=list)
    kind: int = 0
    info: dict[str, str] = field(default_factory=dict)
    outside: bool = False
    raw: bytes | None = None  # the values, where they are raw_data or int64
    written: int = 0


@dataclass
class _Found:
    tensors: list[_Tensor] = field(default_factory=list)
    sizes: set[str] = field(default_factory=set)  # tensors that say how large another is


def check(path: Path, listed: Collection[Path] | None = None) -> None:
    """Refuse an ONNX file that an engine may not open.

    Args:
        path: the file.
        listed: the files that its weights may be in; None: plain files in its folder.

    Raises:
        ArtifactError: it is not ONNX, or holds what the module's docstring lists.
    """
    sizes: dict[str, int] = {}
    try:
        for tensor in _read(read_bytes(path, GRAPH_BYTES)):
            if not (tensor.outside or tensor.info):
                _check_inside(tensor)
                continue
            if (place := tensor.info.get("location", "")) not in sizes:
                sizes[place] = _size(place, tensor.name, path, listed)
            _check_outside(tensor, sizes[place])
    except ValueError as e:
        raise ArtifactError(
            f"{path} {printable(e, 300)}; fetch the model again, from a source that you trust."
        ) from None


def check_row(folder: Path, files: Sequence[str]) -> None:
    """`check` each graph of a network. An engine that is given OpenVINO's `x.xml` reads `x.bin`
    beside it.

    Args:
        folder: of the model.
        files: names of the network's files: what the engine is given, then what that reads.

    Raises:
        ArtifactError: see `check`; or a file of another kind, which an engine would
            open too.
    """
    paths = [folder / f for f in files]
    if paths[0].suffix not in (".onnx", ".xml"):
        raise ArtifactError(
            f"{paths[0]} is no graph that sdlite opens; accepted: .onnx, and OpenVINO's .xml."
        )
    if paths[0].suffix == ".xml" and (beside := paths[0].with_suffix(".bin")) not in paths:
        raise ArtifactError(
            f"{paths[0]} reads {beside.name}, which is not one of its listed files; export the"
            " model again."
        )
    for path in paths:
        if path.suffix == ".onnx":
            check(path, [p for p in paths[1:] if p.suffix != ".onnx"])


def _read(data: bytes) -> list[_Tensor]:
    found, graphs = _Found(), 0
    for number, wire, value in _fields(data):
        if number == 7:
            graphs += 1
            _graph(_inner(wire, value), found)
        elif number == 8:
            _opset(_inner(wire, value))
        elif number in (20, 25):
            raise ValueError(
                "holds local functions or training steps, which no exporter of sdlite writes"
            )
    if not graphs:
        raise ValueError("is not an ONNX file: it has no graph")
    _check_sizes(found)
    return found.tensors


def _opset(data: bytes) -> None:
    """OperatorSetIdProto. OpenVINO 2026.4 counts from the version that a file gives down to its
    own.
    """
    for number, wire, value in _fields(data):
        if number == 2 and not (wire == _VARINT and 0 < value <= _OPSETS):
            raise ValueError(f"has operators of version {value!r}; known: 1 to {_OPSETS}")


def _graph(data: bytes, found: _Found) -> None:
    for number, wire, value in _fields(data):
        if number == 1:
            _node(_inner(wire, value), found)
        elif number == 5:
            found.tensors.append(_tensor(_inner(wire, value)))
        elif number in (11, 12):
            _port(_inner(wire, value))
        elif number == 15:
            raise ValueError(_SPARSE)


def _port(data: bytes) -> None:
    """ValueInfoProto of an input or output: what onnxruntime gives Python of it is text."""
    for name in _below(data, 1):
        _text(_BYTES, name)
    for side in _below(data, 2, 1, 2, 1, 2):  # type, tensor_type, shape, dim, dim_param
        _text(_BYTES, side)


def _below(data: bytes, *path: int) -> Iterator[bytes]:
    """What stands in messages in one another under these field numbers."""
    for number, wire, value in _fields(data):
        if number == path[0] and wire == _BYTES:
            yield from _below(value, *path[1:]) if path[1:] else (value,)


def _node(data: bytes, found: _Found) -> None:
    op, domain, inputs, outputs, constants = b"", b"", list[bytes](), list[bytes](), list[_Tensor]()
    for number, wire, value in _fields(data):
        if number == 1:
            inputs.append(_inner(wire, value))
        elif number == 2:
            outputs.append(_inner(wire, value))
        elif number == 4:
            op = _inner(wire, value)
        elif number == 3:
            _text(wire, value)
        elif number == 5 and _HOLDS.search(_inner(wire, value)):
            constants += _attribute(value)
        elif number == 7 and (domain := _inner(wire, value)) not in _KNOWN:
            raise ValueError(
                f"has an operator of the domain {_text(wire, value)!r}; known:"
                f" {', '.join(DOMAINS[1:])}"
            )
    _text(_BYTES, b" ".join((*inputs, *outputs, op)))
    least = 0 if domain == b"com.microsoft" else _LEAST.get(op, 1)
    if not outputs or len(inputs) < least or not all(inputs[:least]):
        raise ValueError(
            f"has a {_text(_BYTES, op)!r} of {len(inputs)} inputs and {len(outputs)} outputs; it"
            f" needs {least} and 1"
        )
    found.tensors += constants
    if op == b"Constant" and constants and outputs:
        constants[-1].name = _text(_BYTES, outputs[0])
    if (place := _FILLED.get(op)) is not None and len(inputs) > place:
        found.sizes.add(_text(_BYTES, inputs[place]))


def _attribute(data: bytes) -> list[_Tensor]:
    out = []
    for number, wire, value in _fields(data):
        if number in (5, 10):
            out.append(_tensor(_inner(wire, value)))
        elif number in (6, 11):
            raise ValueError(_NESTED)
        elif number in (22, 23):
            raise ValueError(_SPARSE)
    return out


def _tensor(data: bytes) -> _Tensor:
    out = _Tensor()
    for number, wire, value in _fields(data):
        if number == 1:
            out.shape += [value] if wire == _VARINT else _packed(_inner(wire, value))
        elif number == 2 and wire == _VARINT:
            out.kind = value
        elif number == 8:
            out.name = _text(wire, value)
        elif number == 9:
            out.raw = _inner(wire, value)
        elif number == 13:
            _entry(_inner(wire, value), out.info)
        elif number == 14:
            out.outside |= value != 0
        elif number in (4, 5, 6, 7, 10, 11):  # values by type, packed or one by one
            out.written += len(value) if wire == _BYTES else 8
            if number == 7 and wire == _BYTES:
                out.raw = (out.raw or b"") + b"".join(
                    v.to_bytes(8, "little") for v in _packed(value)
                )
    return out


def _entry(data: bytes, info: dict[str, str]) -> None:
    """StringStringEntryProto."""
    pair = {number: _text(wire, value) for number, wire, value in _fields(data) if number in (1, 2)}
    key = pair.get(1, "")
    if key in info:
        raise ValueError(f"gives {key} of external data twice")
    info[key] = pair.get(2, "")


# --- rules


def _bytes_of(tensor: _Tensor) -> int:
    """Bytes of its values.

    Raises:
        ValueError: an element type or a shape that ONNX does not have.
    """
    if (bits := _BITS.get(tensor.kind)) is None:
        raise ValueError(f"has weights {tensor.name!r} of the unknown type {tensor.kind}")
    if any(d >= 2**63 for d in tensor.shape):
        raise ValueError(f"has weights {tensor.name!r} of a negative shape")
    return -(-math.prod(tensor.shape) * bits // 8)


def _check_inside(tensor: _Tensor) -> None:
    """The values are there: an engine would reserve memory for them first. Texts have no fixed
    length.
    """
    if tensor.kind == 8:
        return
    need, has = _bytes_of(tensor), tensor.written if tensor.raw is None else len(tensor.raw)
    if (has != need) if tensor.raw is not None else (need > 16 * has):
        raise ValueError(
            f"has {has} bytes of {tensor.name!r}, its shape {tensor.shape} asks for {need}"
        )


def _check_outside(tensor: _Tensor, size: int) -> None:
    """Offset and length, in a file of `size` bytes."""
    name = tensor.name
    offset, length = (_count(tensor.info.get(key), key, name) for key in ("offset", "length"))
    need, start = _bytes_of(tensor), offset or 0
    if length is not None and length != need:
        raise ValueError(f"gives {name!r} {length} bytes, its shape {tensor.shape} asks for {need}")
    if start + need > size:
        at = f"{start} to {start + need} of {tensor.info['location']!r}"
        raise ValueError(f"reads {name!r} at {at}, which has {size} bytes: it is cut off")


def _size(place: str, name: str, graph: Path, listed: Collection[Path] | None) -> int:
    """Bytes of the file with weights: a plain one, or a link as the graph is (a hub's cache)."""
    if not place or place in (".", "..") or set(place) & set("/\\:\0"):
        raise ValueError(
            f"has weights {name!r} in {place!r}; accepted: the name of a file beside it"
        )
    file = graph.parent / place
    if listed is not None and file not in listed:
        names = ", ".join(f.name for f in listed) or "none"
        raise ValueError(f"reads {place!r}, which is not one of its listed files ({names})")
    try:
        about = file.lstat()
        if stat.S_ISLNK(about.st_mode):
            if not graph.is_symlink() or file.resolve().parent != graph.resolve().parent:
                raise ValueError(f"reads {place!r}, which is a link")
            about = file.stat()
    except OSError as e:
        raise ValueError(f"reads {place!r}, which cannot be read ({e.strerror})") from None
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"reads {place!r}, which is no plain file")
    return about.st_size


def _count(given: str | None, key: str, name: str) -> int | None:
    if given is None:
        return None
    if not (given.isascii() and given.isdecimal() and len(given) < 20):
        raise ValueError(f"gives {name!r} the {key} {given!r}, which is no whole number from 0")
    return int(given)


def _check_sizes(found: _Found) -> None:
    """Constants that are only a size: a few bytes of file for any amount of memory."""
    for tensor in found.tensors:
        if tensor.name in found.sizes and tensor.kind == _INT64 and tensor.raw is not None:
            sides = [
                int.from_bytes(tensor.raw[i : i + 8], "little", signed=True)
                for i in range(0, len(tensor.raw) & ~7, 8)
            ]
            if math.prod(max(abs(s), 1) for s in sides) > _MOST:
                raise ValueError(
                    f"fills a tensor of shape {sides}, which no network of sdlite needs"
                )


# --- protobuf's wire format


def _fields(data: bytes) -> list[Field]:
    """The fields of a message, in the order in which they stand.

    Raises:
        ValueError: it is cut off, or is not protobuf.
    """
    out, at, end = list[Field](), 0, len(data)
    while at < end:
        tag, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 2**29:
            raise ValueError(_DAMAGED)
        if wire == _BYTES:
            start = at + 1
            length = data[at] if at < end else 128
            if length > 127:
                length, start = _varint(data, at)
        elif wire == _VARINT:
            value, at = _varint(data, at)
            out.append((number, wire, value))
            continue
        elif wire in _FIXED:
            length, start = _FIXED[wire], at
        else:  # groups: none are in onnx.proto
            raise ValueError(_DAMAGED)
        at = start + length
        if at > end:
            raise ValueError(_DAMAGED)
        out.append((number, wire, data[start:at]))
    return out


_DAMAGED = "is not a readable ONNX file: it is damaged or cut off"


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 64 bits at `at`, and where it ends."""
    out = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        out |= (byte & 127) << shift
        if byte < 128:
            return out & (2**64 - 1), at
        shift += 7
    raise ValueError(_DAMAGED)


def _packed(data: bytes) -> list[int]:
    out, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        out.append(value)
    return out


def _inner(wire: int, value: Any) -> bytes:
    if wire != _BYTES:
        raise ValueError(_DAMAGED)
    out: bytes = value
    return out


def _text(wire: int, value: Any) -> str:
    try:
        return _inner(wire, value).decode()
    except UnicodeDecodeError:
        raise ValueError("holds a name that is no UTF-8 text") from None
