"""safetensors headers: whatever safetensors' own reader refuses is refused, in one line, from what
the file has.
"""

from __future__ import annotations

import json
import random
import struct
from contextlib import suppress

import numpy as np
import pytest

from sdlite import headers
from sdlite.errors import ArtifactError
from sdlite.weights import weight_index

st = pytest.importorskip("safetensors", reason="needs the torch extra")

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}
DATA = b"".join(t.tobytes() for t in TENSORS.values())


def pack(header, data=DATA, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def with_a(**changed):
    return pack({"a": {**A, **changed}, "b": B})


BAD = {
    "length 2**63": (pack({"a": A, "b": B}, length=2**63), "cannot have"),
    "length 2**64 - 1": (pack({"a": A, "b": B}, length=2**64 - 1), "cannot have"),
    "length 1 GiB": (pack({"a": A, "b": B}, length=1 << 30), "cannot have"),
    "length 0": (pack({"a": A, "b": B}, length=0), "cannot have"),
    "empty": (b"", "cannot have"),
    "7 bytes": (b"\x02\0\0\0\0\0\0", "cannot have"),
    "not JSON": (pack(b"hello world!"), "does not begin with {"),
    "a space first": (pack(b' {"a": 1}'), "does not begin with {"),
    "a list": (pack(b"[1,2,3]"), "does not begin with {"),
    "deep": (pack(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "nested too deep"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "utf-8"),
    "half of a surrogate": (pack(b'{"\\ud800": 1}'), "surrogates not allowed"),
    "a name twice": (pack(b'{"a": %s, "a": %s}' % ((json.dumps(A).encode(),) * 2)), "a name twice"),
    "NaN": (pack(b'{"a": NaN}'), "the number NaN"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}, "a": A, "b": B}), "__metadata__"),
    "metadata a list": (pack({"__metadata__": ["a"], "a": A, "b": B}), "__metadata__"),
    "no object": (pack({"a": 3, "b": B}), "a has no object"),
    "no offsets": (pack({"a": {"dtype": "F32", "shape": [6]}, "b": B}), "a has data_offsets None"),
    "unknown dtype": (with_a(dtype="F13"), "a has dtype 'F13'"),
    "dtype a list": (with_a(dtype=["F32"]), "a has dtype"),
    "negative offset": (with_a(data_offsets=[-8, 16]), "the number -8"),
    "reversed": (with_a(data_offsets=[24, 0]), "at 24 to 0"),
    "beyond": (with_a(data_offsets=[10**12, 10**12 + 24]), "begins at 24"),
    "overlap": (with_a(data_offsets=[16, 40]), "begins at"),
    "three offsets": (with_a(data_offsets=[0, 12, 24]), "a has data_offsets"),
    "floats": (with_a(data_offsets=[0.0, 24.0]), "the number 0.0"),
    "an exponent": (
        pack(b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 1e999]}}'),
        "1e999",
    ),
    "texts": (with_a(data_offsets=["0", "24"]), "a has data_offsets"),
    "true": (with_a(shape=[True, 6]), "a has shape"),
    "negative shape": (with_a(shape=[-2, -3]), "the number -2"),
    "huge shape": (with_a(shape=[2**40, 2**40]), "a has F32"),
    "longer number": (with_a(shape=[2**64]), "the number 18446744073709551616"),
    "thousands of digits": (with_a(shape=[int("9" * 4000)]), "the number 9999"),
    "another length": (with_a(data_offsets=[0, 20]), "a has F32"),
    "cut off": (pack({"a": A, "b": B}, DATA[:-1]), "it is cut off"),
    "a rest": (pack({"a": A, "b": B}, DATA + b"x"), "belongs to no tensor"),
    "no tensors, but data": (pack({}), "belongs to no tensor"),
    "half a byte": (
        pack({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"ab"),
        "a has F4",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_format_does_not_allow_is_one_line(tmp_path, name):
    data, says = BAD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as e:
        weight_index([path])
    assert says in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 700
    with pytest.raises(st.SafetensorError):
        st.safe_open(path, "np")


def test_whole_files_are_read(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    index = weight_index([path])
    for name, want in TENSORS.items():
        assert np.array_equal(index[name].read(), want.astype(np.float32))
    path.write_bytes(
        pack(
            {"__metadata__": None, "e": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b""
        )
    )
    assert headers.read(path)["e"][1] == (0,)


def test_ours_is_as_strict_as_safetensors_own_reader(tmp_path):
    """Drawn headers, of bytes and of values: none that safetensors refuses is taken."""
    draw, path = random.Random(7), tmp_path / "model.safetensors"
    whole = pack({"__metadata__": {"k": "v"}, "a": A, "b": B})
    odd = [
        0,
        1,
        -1,
        24,
        2**32,
        2**64,
        0.5,
        "F32",
        "BF16",
        None,
        True,
        [],
        {},
        [2, 3],
        [0, 24],
        [24, 32],
        "\x00",
    ]
    taken = 0
    for turn in range(1500):
        if turn % 2:
            data = bytearray(whole)
            for _ in range(draw.choice([1, 2, 6])):
                data[draw.randrange(len(data))] = draw.randrange(256)
            data = data[: draw.choice([len(data), len(data), draw.randrange(len(data))])]
        else:
            entries = {"a": dict(A), "b": dict(B)}
            entries[draw.choice("ab")][draw.choice(["dtype", "shape", "data_offsets"])] = (
                draw.choice(odd)
            )
            if draw.random() < 0.3:
                entries[draw.choice(["__metadata__", "c"])] = draw.choice(odd)
            data = pack(entries)
        path.write_bytes(data)
        with suppress(ArtifactError):
            headers.read(path)
            taken += 1
            st.safe_open(path, "np")  # raises where safetensors refuses it
    assert taken > 20


def test_no_more_is_read_than_the_file_has(tmp_path):
    """A sparse file that claims a header of 90 MB: safetensors' bound holds, and a FIFO is not
    opened.
    """
    import os

    path = tmp_path / "pipe.safetensors"
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match="a named pipe"):
        weight_index([path])
    big = tmp_path / "big.safetensors"
    big.write_bytes(struct.pack("<Q", 200_000_000) + b"{")
    os.truncate(big, 200_000_100)
    with pytest.raises(ArtifactError, match="200000000, which it cannot have"):
        weight_index([big])
