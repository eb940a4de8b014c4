"""safetensors headers that lie: name -> change, of the UNet's weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from benchmarks.hostile.folder import Change, edit_bytes

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
Header = dict[str, Any]


def split(data: bytes) -> tuple[Header, bytes]:
    """A safetensors file's header and its data."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(header: Any, data: bytes) -> bytes:
    """The other way round; a header of bytes is written as it is."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def claimed(length: int) -> Change:
    """The header's length is said to be this."""
    return edit_bytes(WEIGHTS, lambda data: struct.pack("<Q", length) + data[8:])


def instead(raw: bytes) -> Change:
    """Other bytes where the header stands."""
    return edit_bytes(WEIGHTS, lambda data: packed(raw, split(data)[1]))


def edited(edit: Callable[[Header], Any], file: str = WEIGHTS) -> Change:
    def change(data: bytes) -> bytes:
        header, rest = split(data)
        edit(header)
        return packed(header, rest)

    return edit_bytes(file, change)


def _first(header: Header) -> dict[str, Any]:
    return next(v for k, v in header.items() if k != "__metadata__")


def _row(**values: Any) -> Change:
    return edited(lambda header: _first(header).update(values))


def _overlap(header: Header) -> None:
    row = _first(header)
    start, end = row["data_offsets"]
    row["data_offsets"] = [100, 100 + end - start]


def _twice(data: bytes) -> bytes:
    header, rest = split(data)
    raw = json.dumps(header).encode()
    return packed(raw[:-1] + b"," + raw[1:], rest)


HEADERS: dict[str, Change] = {
    "huge-length": claimed(2**63),
    "max-length": claimed(2**64 - 1),
    "1gb-claim": claimed(1 << 30),
    "zero-length": claimed(0),
    "overlap": edited(_overlap),
    "negative": _row(data_offsets=[-8, 8]),
    "reversed": edited(lambda h: _first(h)["data_offsets"].reverse()),
    "beyond": _row(data_offsets=[10**12, 10**12 + 8]),
    "float-offset": _row(data_offsets=[0.5, 8.5]),
    "negative-shape": _row(shape=[-1, -1]),
    "huge-shape": _row(shape=[2**40, 2**40]),
    "unknown-dtype": _row(dtype="F13"),
    "not-json": instead(b"hello world!"),
    "array-json": instead(b"[1,2,3]"),
    "deep-json": instead(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "dup-keys": edit_bytes(WEIGHTS, _twice),
    "no-offsets": edited(lambda h: _first(h).pop("data_offsets")),
    "empty-header": instead(b"{}"),
    "not-utf8": instead(b'{"\xff\xfe": 1}'),
    "metadata-number": edited(lambda h: h.update(__metadata__={"a": 1})),
}
