"""The header of a safetensors file, held to every rule of the format: 8-byte length, JSON, data.

As strict as safetensors' own reader: offsets that leave no gap and end with the file, lengths that
are the shapes', names given once. Only what the file has is read. Source of the rules:
safetensors 0.8 `tensor.rs`, `SafeTensors::read_metadata` and `Metadata::validate`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Never, NoReturn

from sdlite.errors import ArtifactError, printable
from sdlite.io import opened
from sdlite.schema import Json

HEADER_BYTES = 100_000_000  # safetensors' own bound
LFS = b"version https://git-lfs"
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
    ),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_MOST = 2**64 - 1

Entry = tuple[
    str, tuple[int, ...], int, int
]  # dtype, shape, offset and length in bytes of the file


def read(path: Path) -> dict[str, Entry]:
    """Tensor name -> where it stands, in the order of the file.

    Raises:
        ArtifactError: it is not a whole safetensors file.
    """
    with opened(path) as f:
        size = f.seek(0, 2)
        f.seek(0)
        head = f.read(8)
        if (head + f.read(len(LFS))).startswith(LFS):
            raise ArtifactError(
                f"{path} is a git-lfs pointer of {size} bytes, not the weights; run `git lfs pull`,"
                " or fetch the model again."
            )
        length = int.from_bytes(head, "little")
        f.seek(8)
        raw = f.read(length) if 2 <= length <= min(size - 8, HEADER_BYTES) else b""
    try:
        if len(raw) < 2:
            raise ValueError(
                f"its first 8 bytes say that the header has {length}, which it cannot have"
            )
        out = _entries(_json(raw), 8 + length)
    except ValueError as e:
        raise ArtifactError(
            f"{path} is not a safetensors file, or is cut off in its header ({printable(e, 200)});"
            " fetch the model again."
        ) from None
    end = max((8 + length, *(start + n for _, _, start, n in out.values())))
    if size != end:
        what = "it is cut off" if size < end else "the rest belongs to no tensor"
        raise ArtifactError(
            f"{path} has {size} bytes, its header says {end}: {what}. Fetch the model again."
        )
    return out


def _json(raw: bytes) -> Json:
    """The object, with names given once, no numbers but counts, and no surrogates."""
    if raw[:1] != b"{":
        raise ValueError("its header does not begin with {")
    try:
        header: Json = json.loads(
            raw.decode(),
            object_pairs_hook=_once,
            parse_int=_count,
            parse_float=_refuse,
            parse_constant=_refuse,
        )
    except RecursionError:
        raise ValueError("its header is nested too deep") from None
    return header


def _once(pairs: list[tuple[str, Any]]) -> Json:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("its header gives a name twice")
    for name in out:
        name.encode()  # UnicodeEncodeError is a ValueError
    return out


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) > _MOST:
        raise ValueError(f"its header has the number {text[:40]}")
    return int(text)


def _refuse(text: str) -> Never:
    raise ValueError(f"its header has the number {text[:40]}")


def _entries(header: Json, base: int) -> dict[str, Entry]:
    about = header.pop("__metadata__", None) or {}
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise ValueError("its __metadata__ is no object of texts")
    found = [(name, *_entry(name, given)) for name, given in header.items()]
    out, at = dict[str, Entry](), 0
    for name, dtype, shape, start, end in sorted(found, key=lambda f: (f[3], f[4])):
        if start != at:
            raise ValueError(f"{name} begins at {start}, the tensor before it ends at {at}")
        out[name] = (dtype, shape, base + start, end - start)
        at = end
    return out


def _entry(name: str, given: object) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(given, dict):
        _wrong(name, "no object")
    dtype, shape, offsets = (given.get(k) for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        _wrong(name, f"dtype {dtype!r}")
    if not (isinstance(shape, list) and all(type(s) is int for s in shape)):
        _wrong(name, f"shape {shape!r}")
    if not (
        isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)
    ):
        _wrong(name, f"data_offsets {offsets!r}")
    start, end = offsets
    if start > end or (end - start) * 8 != math.prod(shape) * BITS[dtype]:
        _wrong(name, f"{dtype} {shape} at {start} to {end}")
    return dtype, tuple(shape), start, end


def _wrong(name: str, what: str) -> NoReturn:
    raise ValueError(f"{printable(name, 80)} has {printable(what, 80)}")
