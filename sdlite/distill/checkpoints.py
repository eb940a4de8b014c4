"""Checkpoints of a training: folders `checkpoint-<step>` with `state.safetensors` and `meta.json`,
which has its hash.

A folder gets its name when it is whole and on the disk. What is damaged all the same (a bad disk, a
half copy) is noticed before it is used, set aside as `damaged-checkpoint-<step>`, and the one
before it is taken.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdlite import arguments
from sdlite.distill.tensors import Damaged
from sdlite.errors import SdliteWarning, TrainingError
from sdlite.io import JSON_BYTES, parse_json, regular, write_json, writing

STATE, _META, _NAME = "state.safetensors", "meta.json", re.compile(r"checkpoint-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole one: `config` is that of the `TrainConfig` it was made with."""

    folder: Path
    step: int
    images: int
    config: dict[str, Any]


def folders(out: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, whole or not. Other folders of a similar name are not
    ours.
    """
    return sorted(
        (p for p in out.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()), key=_step
    )


def _step(folder: Path) -> int:
    found = _NAME.fullmatch(folder.name)
    assert found is not None
    return int(found[1])


def write(out: Path, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int) -> None:
    """Write one, if the step has none, and remove all but the newest `keep`.

    Raises:
        OSError: it cannot be written; those before it are kept.
    """
    final = out / f"checkpoint-{meta['step']:08d}"
    if final.exists():
        return
    with writing(final) as tmp:
        save_file(tensors, tmp / STATE)
        write_json(tmp / _META, {**meta, "sha256": _sha256(tmp / STATE)})
    for old in folders(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def newest(out: Path) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is no checkpoint. Those after it are set aside
    with a warning.

    Raises:
        TrainingError: there are checkpoints, and none is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(folders(out)):
        try:
            whole = _read(folder)
        except Damaged as e:
            damaged.append((folder, str(e)))
            continue
        for bad, why in damaged:
            _set_aside(bad, why, whole)
        return whole
    if damaged:
        said = "; ".join(f"{folder.name}: {why}" for folder, why in damaged)
        raise TrainingError(
            f"no checkpoint in {out} is whole ({said}); remove that folder to begin this stage"
            " anew."
        )
    return None


def _set_aside(folder: Path, why: str, whole: Checkpoint) -> None:
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    warnings.warn(
        f"{folder} is damaged ({why}): going on from {whole.folder.name}, {whole.images:,} images;"
        f" it is kept as {aside.name}.",
        SdliteWarning,
        stacklevel=4,
    )


def _read(folder: Path) -> Checkpoint:
    meta = _meta(folder / _META)
    state = folder / STATE
    try:
        if "sha256" not in meta:  # of an earlier version
            with safe_open(state, framework="pt"):
                pass
        elif _sha256(state) != meta["sha256"]:
            raise Damaged(f"{STATE} does not have the content that was written")
    except (OSError, SafetensorError) as e:
        raise Damaged(f"{STATE} {_why(e)}") from e
    return Checkpoint(folder, meta["step"], meta["images"], meta["config"])


def _meta(path: Path) -> dict[str, Any]:
    try:
        with regular(path) as f:
            meta = parse_json(f.read(JSON_BYTES).decode())
        if not isinstance(meta, dict) or not isinstance(meta.get("config"), dict):
            raise Damaged(f"{path.name} is not what was written")
        for name in ("step", "images"):
            arguments.integer(name, meta.get(name), 0)
        if meta["step"] != _step(path.parent):
            raise Damaged(f"{path.name} is of step {meta['step']}")
    except OSError as e:
        raise Damaged(f"{path.name} {_why(e)}") from e
    except ValueError as e:
        raise Damaged(f"{path.name} is not what was written ({e})") from e
    return meta


def _why(e: Exception) -> str:
    if isinstance(e, FileNotFoundError):
        return "is missing"
    return f"cannot be read ({getattr(e, 'strerror', None) or e})"


def _sha256(path: Path) -> str:
    with regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
