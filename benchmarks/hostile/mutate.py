"""Seeded mutation of real files: bytes, texts, JSON and TOML values, protobuf fields."""

from __future__ import annotations

import copy
import json
import random
import re
import tomllib
from collections.abc import Callable
from typing import Any

Rng = random.Random
NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    7,
    63,
    64,
    65,
    255,
    256,
    1000,
    65535,
    10**6,
    2**31 - 1,
    2**31,
    2**32,
    10**9,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    0.0,
    -0.0,
    0.5,
    -1.5,
    1e-45,
    1e-300,
    1e30,
    1.5e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    False,
)
TEXTS: tuple[str, ...] = (
    "",
    " ",
    "x",
    "0",
    "-1",
    "1e999",
    "NaN",
    "null",
    "../x",
    "/etc/passwd",
    "a/b",
    "..",
    ".",
    "~",
    "C:\\x",
    "\\\\h\\s",
    "http://127.0.0.1:9/x",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "\ud800",
    "\u202e",
    "\U0001f600",
    "\xe9",
    "A" * 300,
    "A" * 5000,
    "os.system",
    "%s%n",
    "{0}",
    "ddim",
    "fp32",
)
VALUES: tuple[Any, ...] = (
    None,
    [],
    {},
    [[]],
    [None],
    [0],
    ["x"],
    {"x": 1},
    [1, 2, 3],
    [[1, 2], [3, 4]],
    [0.1] * 1000,
)


def value(rng: Rng, old: Any) -> Any:
    """Something else than `old`: of another type, out of range, or a little off."""
    kind = rng.randrange(6)
    if kind == 0 and isinstance(old, (int, float)) and not isinstance(old, bool):
        fits = abs(old) < 1e300  # a whole number that a float holds
        near = (-old, old + 1, old - 1, old * 10, str(old), [old], old * 10**9)
        return rng.choice((*near, old / 7, old + 0.5) if fits else near)
    if kind == 0 and isinstance(old, str):
        return rng.choice((old.upper(), old[:-1], old + "x", old * 2, [old], {"content": old}))
    if kind == 0 and isinstance(old, list) and old:
        return rng.choice(
            (old[:-1], old * 2, old[::-1], [old], old[0], dict(enumerate(map(str, old))))
        )
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return copy.deepcopy(rng.choice(VALUES))
    if kind == 3:
        return nested(rng.choice((3, 70, 200)), rng.random() < 0.5)
    return rng.choice(NUMBERS)


def nested(depth: int, lists: bool) -> Any:
    out: Any = 1
    for _ in range(depth):
        out = [out] if lists else {"a": out}
    return out


def _holder(rng: Rng, data: Any) -> tuple[Any, Any]:
    """A random place in nested data: (holder, key)."""
    holder, key = data, _key(rng, data)
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.75:
        holder = holder[key]
        key = _key(rng, holder)
    return holder, key


def _key(rng: Rng, holder: Any) -> Any:
    return rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))


def edit(rng: Rng, data: Any) -> Any:
    """JSON-like data with one to three places changed; the data itself may be changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not isinstance(data, (dict, list)) or not data:
            return value(rng, data)
        holder, key = _holder(rng, data)
        how = rng.randrange(8)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder[key]
        elif how == 2:
            other, at = _holder(rng, data)
            holder[key] = copy.deepcopy(other[at])
        elif how == 3 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = value(rng, None)
        else:
            holder[key] = value(rng, holder[key])
    return data if rng.random() < 0.98 else value(rng, data)


def as_json(rng: Rng, raw: bytes) -> bytes:
    """A JSON file with other values; seldom with damaged bytes."""
    if rng.random() < 0.2:
        return as_text(rng, raw)
    changed = edit(rng, json.loads(raw))
    return json.dumps(changed, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")


def as_text(rng: Rng, raw: bytes) -> bytes:
    """A text with numbers, words, lines or bytes changed."""
    how = rng.randrange(6)
    if how == 0:
        return _replaced(rng, raw, rb"-?\d+(\.\d+)?", lambda _: repr(rng.choice(NUMBERS)).encode())
    if how == 1:
        new = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        return _replaced(rng, raw, rb"[A-Za-z_]+", lambda _: new)
    if how == 2:
        lines = raw.split(b"\n")
        at = rng.randrange(len(lines))
        lines[at:at] = rng.choice(([], lines[:1], [b""], [lines[-1]] * 3, [rng.randbytes(20)]))
        del lines[rng.randrange(len(lines))]
        return b"\n".join(lines)
    if how == 3:
        depth = rng.choice((100, 1000, 100_000))
        return rng.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
    if how == 4:
        head = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"// x\n", b"\0", b"<html>"))
        return head + raw
    return as_bytes(rng, raw)


def as_toml(rng: Rng, raw: bytes) -> bytes:
    """A TOML file with other values."""
    changed = edit(rng, tomllib.loads(raw.decode()))
    if not isinstance(changed, dict):
        return as_text(rng, raw)
    lines = [f"{_toml(str(k))} = {_toml(v)}" for k, v in changed.items()]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _toml(data: Any) -> str:
    """A value in TOML's words; what TOML does not have is an empty text."""
    if isinstance(data, dict):
        return "{" + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in data.items()) + "}"
    if isinstance(data, list):
        return "[" + ", ".join(map(_toml, data)) + "]"
    if isinstance(data, bool):
        return str(data).lower()
    if isinstance(data, float):
        return repr(data).replace("1e", "1.0e")
    return str(data) if isinstance(data, int) else json.dumps("" if data is None else data)


def as_safetensors(rng: Rng, raw: bytes) -> bytes:
    """A safetensors file with another header; its length is that of the header, or is not."""
    length = int.from_bytes(raw[:8], "little")
    header = as_json(rng, raw[8 : 8 + length])
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    return said.to_bytes(8, "little") + header + raw[8 + length :]


def _replaced(rng: Rng, raw: bytes, pattern: bytes, new: Callable[[bytes], bytes]) -> bytes:
    found = list(re.finditer(pattern, raw))
    if not found:
        return as_bytes(rng, raw)
    m = rng.choice(found)
    return raw[: m.start()] + new(m[0]) + raw[m.end() :]


def flip(data: bytes, at: int, mask: int) -> bytes:
    """One byte changed."""
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def as_bytes(rng: Rng, raw: bytes) -> bytes:
    """Bytes flipped, cut, doubled, moved or overwritten."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out)) if out else 0
        length = min(rng.choice((1, 2, 8, 100, 5000)), len(out) - at)
        how = rng.randrange(7)
        if how <= 1 and out:
            out[at] ^= rng.randrange(1, 256)
        elif how == 2:
            del out[at:]
        elif how == 3:
            del out[at : at + length]
        elif how == 4:
            out[at:at] = out[at : at + length]
        elif how == 5:
            out[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
        else:
            start = rng.randrange(len(out)) if out else 0
            out[at : at + length] = out[start : start + length]
    return bytes(out)


# --- protobuf

Field = tuple[int, int, Any]  # number, wire type, value


def as_protobuf(rng: Rng, raw: bytes) -> bytes:
    """A message with fields changed at random places, lengths in order; seldom damaged bytes."""
    if rng.random() < 0.15:
        return as_bytes(rng, raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        raw = _message(rng, raw)
    return raw


def _message(rng: Rng, raw: bytes) -> bytes:
    fields = _fields(raw)
    if not fields:
        return as_bytes(rng, raw)
    at = rng.randrange(len(fields))
    number, wire, content = fields[at]
    if wire == 2 and rng.random() < 0.8 and len(content) > 1 and _fields(content):
        fields[at] = (number, 2, _message(rng, content))
        return _packed(fields)
    how = rng.randrange(8)
    if how == 0:
        del fields[at]
    elif how == 1:
        fields.insert(at, fields[rng.randrange(len(fields))])
    elif how == 2:
        fields[at] = (rng.choice((1, 2, 3, 5, 7, 13, 14, 20, 100)), wire, content)
    elif how == 3:
        other = rng.randrange(len(fields))
        fields[at], fields[other] = fields[other], fields[at]
    else:
        fields[at] = (number, wire, _content(rng, wire, content))
    return _packed(fields)


def _content(rng: Rng, wire: int, content: Any) -> Any:
    if wire == 0:
        far = (0, 1, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1, content + 1)
        return rng.choice((*far, rng.randrange(32), rng.randrange(2**64)))
    if wire != 2:
        return rng.randbytes(len(content))
    text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    return rng.choice((b"", text, rng.randbytes(8), content * 2, as_bytes(rng, content)))


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    out = shift = 0
    while True:
        byte = raw[at]
        out |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return out & (2**64 - 1), at
        if shift > 63:
            raise IndexError


def _fields(raw: bytes) -> list[Field]:
    """The fields of a message; [] where the bytes are none."""
    out: list[Field] = []
    at = 0
    try:
        while at < len(raw):
            key, at = _varint(raw, at)
            number, wire = key >> 3, key & 7
            if not number or wire not in (0, 1, 2, 5):
                return []
            if wire == 0:
                content, at = _varint(raw, at)
                out.append((number, wire, content))
                continue
            length = {1: 8, 5: 4}.get(wire, 0)
            if wire == 2:
                length, at = _varint(raw, at)
            if at + length > len(raw):
                return []
            out.append((number, wire, raw[at : at + length]))
            at += length
    except IndexError:
        return []
    return out


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _packed(fields: list[Field]) -> bytes:
    out = bytearray()
    for number, wire, content in fields:
        out += _number(number << 3 | wire)
        out += _number(content) if wire == 0 else b""
        out += _number(len(content)) + content if wire == 2 else b""
        out += content if wire in (1, 5) else b""
    return bytes(out)
