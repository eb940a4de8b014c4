"""What a frozen teacher says about a fixed pool of draws, computed once and read in every epoch.

A draw is everything that `task.batch` makes of one sample: latent, noise, timestep, caption. The
teacher's answer to it (its output, with guidance where the stage has guidance; two solver steps in
a progressive stage) depends on nothing that trains, so a pool of draws needs the teacher once,
however often the student sees it. Which stages allow it: `output` without feature terms (features
are too large to keep), `guidance`, `progressive` and `consistency`. The price: noise and timesteps
repeat too. Take a pool several times as large as the data.

The file is one safetensors, written beside and renamed, with a key of everything that determines
it: the weights of the frozen networks, the draws themselves (data, captions, noise, timesteps) and
the task's settings. It is read back memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sdlite.distill import tensors
from sdlite.distill.tasks.base import Denoising
from sdlite.distill.train import Batch, step_generator
from sdlite.errors import InputError, SdliteWarning

TARGET = "wanted"
_POOL_SEED = 2**31  # its draws are not those of any training step


class Pool:
    """Draws with their targets; `draw` takes the place of `task.batch`."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[TARGET])

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """One row from each of `size` equal slices of the pool, which is ordered by noise level: as
        stratified as fresh draws, with one random number each.
        """
        u = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        i = (u * len(self)).long().clamp(max=len(self) - 1)
        i = i[torch.randperm(size, generator=generator)]
        return {k: v[i] for k, v in self.tensors.items()}


def cache_targets(
    task: Denoising,
    size: int,
    path: str | Path,
    *,
    seed: int = 0,
    batch: int = 16,
    progress: bool = False,
) -> Pool:
    """In place: `task.batch` draws from a pool of `size`, whose targets are read from `path` or
    computed (float32) and written there.

    Args:
        task: one whose `targets` are all that it needs of its teacher (`not_cacheable`).
        size: number of draws, at least 1; a float32 row is three latents: 0.2 MB for SD at 512 px,
            6 KB for the emoji student.
        batch: draws that the teacher sees at once.

    Raises:
        InputError: the task's loss needs more of its teacher than one target; size is below 1.
    """
    if size < 1:
        raise InputError(
            f"cache_targets={size}; accepted: at least 1 draw, better several for each image."
        )
    if (why := task.not_cacheable()) is not None:
        raise InputError(f"cache_targets: {why}; leave cache_targets out.")
    path, drawn = Path(path), _draws(task, size, seed, batch)
    stamp = _stamp(task, drawn)
    pool = _read(path, stamp) or _write(
        path, stamp, {**drawn, TARGET: _answers(task, drawn, batch, progress)}
    )
    task.batch = pool.draw  # type: ignore[method-assign]
    return pool


def _draws(task: Denoising, size: int, seed: int, batch: int) -> dict[str, Tensor]:
    """`size` rows of `task.batch`, ordered by noise level."""
    parts = [
        task.batch(min(batch, size - i), step_generator(_POOL_SEED + seed, i))
        for i in range(0, size, batch)
    ]
    out = {
        k: torch.cat([p[k] for p in parts]) for k, v in parts[0].items() if isinstance(v, Tensor)
    }
    order = (out["index"] if "index" in out else out["t"]).argsort(stable=True)
    return {k: v[order].contiguous() for k, v in out.items()}


@torch.no_grad()
def _answers(task: Denoising, drawn: dict[str, Tensor], batch: int, progress: bool) -> Tensor:
    device, out = next(task.teacher.parameters()).device, []
    for i in tqdm(
        range(0, len(drawn["t"]), batch), desc="teacher targets", unit="batch", disable=not progress
    ):
        out.append(
            task.targets({k: v[i : i + batch].to(device) for k, v in drawn.items()}).float().cpu()
        )
    return torch.cat(out)


def _stamp(task: Denoising, drawn: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(
        json.dumps([type(task).__name__, task.settings()], sort_keys=True, default=str).encode()
    )
    for network in (task.teacher, task.encode.text_encoder):
        tensors.update(digest, network.state_dict())
    tensors.update(digest, drawn)
    return digest.hexdigest()


def _read(path: Path, stamp: str) -> Pool | None:
    try:
        found = tensors.load(path, stamp=stamp)
    except tensors.Damaged as e:
        warnings.warn(f"{path} {e}; it is made anew.", SdliteWarning, stacklevel=3)
        return None
    return None if found is None else Pool(found[0])


def _write(path: Path, stamp: str, made: dict[str, Tensor]) -> Pool:
    tensors.save(path, made, {"stamp": stamp})
    return Pool(made)
