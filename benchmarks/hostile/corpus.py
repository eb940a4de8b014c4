"""The corpus: `cases(0)` are the 763 fixed bad models, `cases(n)` as many others, drawn.

Drawn cases cut at other offsets, flip other bytes with other masks, put other values at other
places and change several things at once.
"""

from __future__ import annotations

import os

import numpy as np

from benchmarks.hostile import disk, drawn, graphs, headers, values
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
    slug,
    text,
)
from benchmarks.hostile.mutate import flip


def cases(seed: int = 0) -> list[Case]:
    """All cases of a seed; those that only root can make are left out for others."""
    made = drawn.cases(seed) if seed else fixed()
    return [c for c in made if os.getuid() == 0 or not c.root]


def _pair(name: str, kind: str, change: Change, expect: str = OTHER, **more: bool) -> list[Case]:
    """As it is, and vouched for."""
    return [
        Case(name, kind, change, listed=True, **more),
        Case(f"{name}+rehash", kind, change, rehash=True, expect=expect, **more),
    ]


def fixed() -> list[Case]:
    return [
        *truncated(),
        *flipped(),
        *swapped(),
        *(
            c
            for n, go in headers.HEADERS.items()
            for c in _pair(f"st-{n}", "safetensors header", go, torch=True)
        ),
        *external(),
        *(
            Case(f"graph-{n}+rehash", "onnx graph", go, rehash=True, onnx=True)
            for n, go in graphs.NETWORKS.items()
        ),
        *(
            Case(f"manifest-{n}", "manifest", go, expect=_other(n, values.OTHER_MODEL))
            for n, go in values.MANIFESTS.items()
        ),
        *(
            Case(f"index-{n}+rehash", "model_index", go, rehash=True, torch=n in values.INDEX_TORCH)
            for n, go in values.INDEXES.items()
        ),
        *(
            Case(f"{short}-{n}+rehash", kind, go, rehash=True, expect=_other(n, other))
            for short, (kind, table, other) in values.TABLES.items()
            for n, go in table.items()
        ),
        *file_system(),
        *(
            Case(n, "extra files", go, torch=True, listed=n == "torch-index-only")
            for n, go in disk.EXTRA.items()
        ),
        *(
            Case(n, "extra files", go, rehash=True, expect=OTHER, torch=True)
            for n, go in disk.VOUCHED.items()
        ),
    ]


def _other(name: str, names: set[str]) -> str:
    return OTHER if name in names else UNHARMED


def truncated() -> list[Case]:
    out = []
    for file in FILES:
        size = (MODEL / file).stat().st_size
        ends = {0, 1, size // 2, size - 1}
        more = {8, 4096, size - size // 100} if size > 100_000 else set()
        for end in sorted(ends | more):
            name, go = f"trunc-{slug(file)}-{end}", edit_bytes(file, lambda data, n=end: data[:n])
            out.append(Case(name, "truncated", go, listed=file != MANIFEST))
            if file != MANIFEST and end in ends:
                out.append(Case(f"{name}+rehash", "truncated", go, rehash=True, expect=OTHER))
    return out


def flipped() -> list[Case]:
    kind, out = "flipped byte", []
    for file in FILES:
        size, own = (MODEL / file).stat().st_size, file == MANIFEST
        for label, at in (("first", 0), ("mid", size // 2), ("last", size - 1), ("q", size // 3)):
            name, go = (
                f"flip-{slug(file)}-{label}",
                edit_bytes(file, lambda d, n=at: flip(d, n, 65)),
            )
            out.append(Case(name, kind, go, listed=not own, expect=OTHER if own else UNHARMED))
            if not own and label in ("mid", "q"):
                out.append(Case(f"{name}+rehash", kind, go, rehash=True, expect=OTHER))
    return out + [Case(n, kind, go, listed=True) for n, go in values.VALID.items()]


def swapped() -> list[Case]:
    """Files of the same size: noise, zeros, and 0xff, which is NaN in float16."""
    out = []
    for file in (
        headers.WEIGHTS,
        "vae_decoder/model.onnx.data",
        "text_encoder/model.safetensors",
        "unet/model.onnx",
    ):
        size = (MODEL / file).stat().st_size
        noise = np.random.default_rng(0).bytes(size)
        for name, data in (("random", noise), ("zero", b"\0" * size), ("nan", b"\xff" * size)):
            go = text(file, data)
            expect = UNHARMED if name == "nan" else OTHER
            out += _pair(f"swap-{name}-{slug(file)}", "swapped equal size", go, expect)
    return out


def external() -> list[Case]:
    kind = "onnx external data"
    return [
        case
        for n, go in graphs.EXTERNAL.items()
        for case in _pair(f"ext-{n}", kind, go, _other(n, graphs.EXTERNAL_OTHER), onnx=True)
    ]


def file_system() -> list[Case]:
    kind = "file system"
    out = [
        Case(
            f"fs-{what}-{slug(file)}",
            kind,
            disk.replaced(file, what),
            root=what == "mknod",
            stranger=what == "perm",
            listed=file != MANIFEST or what == "missing",
        )
        for file in disk.USED
        for what in disk.INSTEAD
    ]
    out += [Case(n, kind, go, stranger="perm" in n, listed=True) for n, go in disk.FOLDERS.items()]
    torch = ("fs-extra-pickle", "fs-extra-code")
    return out + [Case(n, kind, go, expect=SAME, torch=n in torch) for n, go in disk.WHOLE.items()]
