"""Fully sharded training (FSDP2): each process keeps its share of weights, gradients, optimizer and
EMA of what is trained.

Asked for by Accelerate's own configuration, so that one flag of the launcher turns it on:

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 -m sdlite.cli distill
    recipe.toml --teacher T --data D --out DIR

Only `--use_fsdp` is read: what is sharded is decided here, block by block
(`torch.distributed.fsdp.fully_shard`), because a task may train several networks and its EMA must
be sharded alike. Frozen networks stay whole on every process. Checkpoints hold whole tensors: a run
can be resumed with another number of processes, or with one. One process alone is sharded too when
it is asked for: it holds all shares, and shows what gathering them costs.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from sdlite.errors import TrainingError


def asked() -> bool:
    """Whether the launcher said `--use_fsdp`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def join(device: torch.device) -> None:
    """One process that was started without a launcher becomes a group of its own."""
    group = torch.distributed
    if not group.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        group.init_process_group(backend, store=group.HashStore(), rank=0, world_size=1)


def blocks(network: nn.Module) -> list[nn.Module]:
    """Parts that are gathered one after the other: down, middle and up blocks of UNets, layers of
    text encoders.
    """
    out: list[nn.Module] = []
    for name, m in network.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(m, nn.ModuleList) and last in ("down_blocks", "up_blocks", "layers"):
            out += list(m)
        elif last == "mid_block":
            out.append(m)
    return out


def shard(network: nn.Module) -> None:
    """In place: the parameters become shares, `DTensor`s over all processes."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as e:
        raise TrainingError(
            f"--use_fsdp needs torch 2.6 or newer (fully_shard), not {torch.__version__}; train"
            " with DDP."
        ) from e

    for block in blocks(network):
        fully_shard(block)
    fully_shard(network)


def whole(t: Tensor) -> Tensor:
    """A share -> the whole tensor, on every process; all must call it. Other tensors as they
    are.
    """
    full = getattr(t, "full_tensor", None)
    out: Tensor = full() if full is not None else t
    return out


def local(t: Tensor) -> Tensor:
    """A share -> this process' part, in the same memory. Other tensors as they are."""
    to_local = getattr(t, "to_local", None)
    out: Tensor = to_local() if to_local is not None else t
    return out


def like(value: Tensor, target: Tensor | None) -> Tensor:
    """A whole tensor on `target`'s device, shared out as `target` is; whole when `target` is, or is
    of another shape (an optimizer's step).
    """
    if target is None:
        return value
    value = value.to(target.device)
    if not hasattr(target, "placements") or value.shape != target.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    out: Tensor = distribute_tensor(value, target.device_mesh, target.placements)
    return out
