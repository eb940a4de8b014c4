"""Files of tensors that a run keeps: written whole, and read back only as they were written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdlite.errors import printable
from sdlite.io import replacing

_HASH = "sha256"


class Damaged(Exception):
    """A file is not what was written."""


def update(digest: Any, tensors: dict[str, Tensor]) -> None:
    """In place: `digest` covers names, dtypes, shapes and bytes."""
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _hash(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    update(digest, tensors)
    return digest.hexdigest()


def save(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """One safetensors file with `about` in its header, beside its place and renamed.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as tmp:
        save_file(tensors, tmp, metadata={**about, _HASH: _hash(tensors, about)})


def load(path: Path, **expected: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What `save` wrote, memory-mapped: tensors and `about`; None where there is no file, or
    `about` is not as expected.

    Raises:
        Damaged: it is not as it was written; the message goes on after the file's name.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            about = dict(f.metadata() or {})
            if any(about.get(k) != v for k, v in expected.items()):
                return None
            tensors = {k: f.get_tensor(k) for k in list(f.keys())}
    except Exception as e:
        raise Damaged(f"cannot be read ({type(e).__name__}: {printable(e, 200)})") from e
    if about.pop(_HASH, None) != _hash(tensors, about):
        raise Damaged("does not have the content that was written")
    return tensors, about
