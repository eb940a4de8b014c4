"""Bad models that are drawn: as many of each kind as the fixed corpus has, and combinations."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx

from benchmarks.hostile import disk, graphs, headers, mutate, values
from benchmarks.hostile.folder import (
    FILES,
    MANIFEST,
    MODEL,
    OTHER,
    SAME,
    UNHARMED,
    Case,
    Change,
    edit_bytes,
    put,
    slug,
)

Rng = random.Random
Draw = Callable[[Rng], tuple[str, Change]]  # what was changed, and how
JSONS: dict[str, tuple[str, ...]] = {
    "model_index": (values.INDEX,),
    "scheduler": (values.SCHEDULER,),
    "tokenizer": (values.VOCAB, values.TOKENIZER, values.SPECIAL),
    "network config": (values.UNET, values.VAE, values.TEXT),
}


def cases(seed: int) -> list[Case]:
    """See the module; one seed makes the same cases on every machine."""
    rng = Rng(seed)
    out: list[Case] = []
    for kind, draw, count in (
        ("truncated", _cut, 78),
        ("flipped byte", _flips, 55),
        ("swapped block", _block, 12),
    ):
        for i in range(count):
            out += _pair(rng, kind, draw, i)
    for i in range(20):
        out += _pair(rng, "safetensors header", _header, i, torch=True)
    for i in range(33):
        out += _pair(rng, "onnx external data", _external, i, onnx=True)
    out += [_vouched(rng, "onnx graph", _graph, i, onnx=True) for i in range(40)]
    out += [_manifest(rng, i) for i in range(121)]
    for kind, count in (
        ("model_index", 13),
        ("scheduler", 46),
        ("tokenizer", 47),
        ("network config", 30),
    ):
        out += [
            _vouched(rng, kind, lambda r, k=kind: _json(r, JSONS[k]), i, torch=i % 8 == 0)
            for i in range(count)
        ]
    out += [_disk(rng, i) for i in range(88)]
    out += [_extra(rng, i) for i in range(10)]
    return out + [_vouched(rng, "two at once", _two, i) for i in range(60)]


def _pair(rng: Rng, kind: str, draw: Draw, i: int, **more: bool) -> list[Case]:
    what, change = draw(rng)
    name = f"{slug(kind)}-{i}-{what}"
    return [
        Case(
            name,
            kind,
            change,
            listed=not what.startswith(slug(MANIFEST)),
            expect=OTHER if what.startswith(slug(MANIFEST)) else UNHARMED,
            **more,
        ),
        Case(f"{name}+rehash", kind, change, rehash=True, expect=OTHER, **more),
    ]


def _vouched(rng: Rng, kind: str, draw: Draw, i: int, **more: bool) -> Case:
    what, change = draw(rng)
    return Case(f"{slug(kind)}-{i}-{what}+rehash", kind, change, rehash=True, expect=OTHER, **more)


def _bytes(file: str) -> bytes:
    return (MODEL / file).read_bytes()


def _file(rng: Rng) -> str:
    return rng.choice([f for f in FILES if f != MANIFEST])


def _cut(rng: Rng) -> tuple[str, Change]:
    file = _file(rng)
    size = len(_bytes(file))
    end = rng.choice(
        (rng.randrange(size), rng.randrange(min(size, 300)), size - 1 - rng.randrange(9))
    )
    return f"{slug(file)}-{end}", edit_bytes(file, lambda data: data[:end])


def _flips(rng: Rng) -> tuple[str, Change]:
    file = _file(rng)
    size = len(_bytes(file))
    flips = [(rng.randrange(size), rng.randrange(1, 256)) for _ in range(rng.choice((1, 1, 2, 4)))]

    def edit(data: bytes) -> bytes:
        for at, mask in flips:
            data = mutate.flip(data, at, mask)
        return data

    return f"{slug(file)}-{flips[0][0]}-{flips[0][1]}", edit_bytes(file, edit)


def _block(rng: Rng) -> tuple[str, Change]:
    """A block of a large file is noise, zeros, 0xff, or another block of it."""
    file = rng.choice([f for f in FILES if f.endswith((".safetensors", ".data", ".onnx"))])
    data = _bytes(file)
    length = rng.choice((512, 4096, 65536))
    at, other = rng.randrange(len(data) - length), rng.randrange(len(data) - length)
    new = rng.choice(
        (rng.randbytes(length), b"\0" * length, b"\xff" * length, data[other : other + length])
    )
    return f"{slug(file)}-{at}", edit_bytes(file, lambda d: d[:at] + new + d[at + length :])


def _header(rng: Rng) -> tuple[str, Change]:
    """One tensor's row, or the whole header, of one of the torch backend's files."""
    file = rng.choice([f for f in FILES if f.endswith(".safetensors")])
    header, rest = headers.split(_bytes(file))
    if rng.random() < 0.3:
        raw = mutate.as_text(rng, json.dumps(header).encode())
        return f"{slug(file)}-text", lambda folder: put(folder, file, headers.packed(raw, rest))
    changed = mutate.edit(rng, header)
    raw = json.dumps(changed).encode()
    return f"{slug(file)}-values", lambda folder: put(folder, file, headers.packed(raw, rest))


def _external(rng: Rng) -> tuple[str, Change]:
    """Some weights' places."""
    part = rng.choice(("unet", "vae_decoder", "text_encoder"))
    share = rng.choice((0.02, 0.3, 1.0))
    size = len(_bytes("vae/diffusion_pytorch_model.safetensors"))
    far = (0, 1, 2, 8, 511, -1, -(2**40), size - 1, 10**13, 2**63 - 1, 2**64 + 8, "x", "", None)
    where = (
        *mutate.TEXTS,
        str(graphs.OUTSIDE / "secret.bin"),
        "config.json",
        "../sdlite.json",
        "/proc/self/mem",
        "/dev/zero",
        "model.onnx.data/x",
    )
    where = tuple(w for w in where if "\ud800" not in w)
    key = rng.choice(("location", "offset", "length"))
    given = rng.choice(where) if key == "location" else rng.choice(far)
    chosen = Rng(rng.random())

    def edit(model: onnx.ModelProto) -> None:
        every = graphs.external(model)
        for tensor in [t for t in every if chosen.random() < share] or every[:1]:
            graphs.point(tensor, **{key: given})

    shown = "".join(c for c in str(given)[:20] if c.isalnum())
    return f"{part}-{key}-{shown}", graphs.graph(edit, part)


def _graph(rng: Rng) -> tuple[str, Change]:
    """Fields of the protobuf message, or one of the fixed attacks with another number."""
    part = rng.choice(("unet", "vae_decoder", "text_encoder"))
    how = rng.randrange(8)
    if how == 0:
        number = 2 ** rng.randrange(28, 62)
        return f"{part}-bomb-{number}", graphs.graph(lambda m: graphs.memory_bomb(m, number), part)
    if how == 1:
        trips = 2 ** rng.randrange(40, 62)
        return f"{part}-loop-{trips}", graphs.graph(lambda m: graphs.endless(m, trips), part)
    file = f"{part}/model.onnx"
    raw = mutate.as_protobuf(rng, _bytes(file))
    return f"{part}-fields", lambda folder: put(folder, file, raw)


def _json(rng: Rng, files: tuple[str, ...]) -> tuple[str, Change]:
    file = rng.choice(files)
    raw = mutate.as_json(rng, _bytes(file))
    return slug(file), lambda folder: put(folder, file, raw)


def _manifest(rng: Rng, i: int) -> Case:
    raw = mutate.as_json(rng, _bytes(MANIFEST))
    name = f"manifest-{i}"
    return Case(name, "manifest", lambda folder: put(folder, MANIFEST, raw), expect=OTHER)


def _two(rng: Rng) -> tuple[str, Change]:
    draws: list[Draw] = [_cut, _flips, _block, _header, _external, _graph]
    draws += [lambda r, k=k: _json(r, JSONS[k]) for k in JSONS for _ in range(2)]
    (first, one), (second, other) = rng.choice(draws)(rng), rng.choice(draws)(rng)

    def change(folder: Path) -> None:
        one(folder)
        with suppress(Exception):  # the first left nothing that the second can read
            other(folder)

    return f"{first}--{second}", change


def _disk(rng: Rng, i: int) -> Case:
    file, what = rng.choice(FILES), rng.choice(list(disk.INSTEAD))
    return Case(
        f"fs-{i}-{what}-{slug(file)}",
        "file system",
        disk.replaced(file, what),
        listed=file != MANIFEST or what == "missing",
        root=what in disk.ROOT_ONLY,
        stranger=what == "perm",
    )


def _extra(rng: Rng, i: int) -> Case:
    """A file that no manifest lists and nothing reads."""
    place = rng.choice(("", "unet/", "vae/", "text_encoder/", "tokenizer/", "scheduler/", "new/"))
    name = rng.choice(("notes.txt", "run.py", "a.bin", "x.ckpt", "a.md", "\x1b[31mred", "ä\n"))
    data: Any = rng.choice((os.urandom(100), b"", b"\x80\x04."))
    return Case(f"extra-{i}", "extra files", lambda f: put(f, place + name, data), expect=SAME)
