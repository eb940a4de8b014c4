"""Pickled weights -> safetensors, only where asked for, by torch's reader that runs no code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdlite.errors import ArtifactError, printable
from sdlite.io import plain


def to_safetensors(path: Path, out: Path) -> Path:
    """Write the tensors of a pickled checkpoint to `out`. `state_dict` in it is opened; what is no
    tensor (step counts, configurations) is left out.

    Raises:
        ArtifactError: it holds something that is more than data, or no tensors, or is damaged.
    """
    plain(path)  # no pipe, no device
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, BadZipFile, KeyError) as e:
        raise ArtifactError(
            f"{path} is not read: {printable(_first(e), 300)}. Accepted: weights that torch loads"
            " with weights_only=True, which runs no code; ask for a safetensors file."
        ) from e
    tensors = _tensors(content)
    if not tensors:
        raise ArtifactError(
            f"{path} holds no tensors by name; accepted: a checkpoint, or its state_dict."
        )
    save_file(tensors, out, metadata={"format": "pt"})
    return out


def _tensors(content: Any) -> dict[str, Tensor]:
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        return {}
    named = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    seen: set[int] = set()
    out = {}
    for name, value in named.items():  # safetensors stores no memory twice
        shared = value.untyped_storage().data_ptr() in seen
        seen.add(value.untyped_storage().data_ptr())
        out[name] = value.clone().contiguous() if shared else value.contiguous()
    return out


def _first(error: Exception) -> str:
    """torch explains at length how to run the code all the same; its first sentence is the fact."""
    text = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
    first = text.splitlines()[0].split(". ")[0].rstrip(".")
    if "inline_container" in first:  # where in torch's source it is
        return "it is a zip archive, and not one of torch's"
    if "central directory" in first:
        return f"it is cut off, or damaged ({first})"
    if first.startswith("Unsupported operand"):
        return f"it is a pickle of more than tensors, or none of torch's ({first})"
    return first
