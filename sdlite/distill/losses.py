"""Distillation losses: pure functions of tensors. Shape letters: B batch, C channels, h,w spatial."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sdlite.errors import InputError


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two predictions: the KL of two Gaussians of one fixed variance, up to its scale (BK-SDM eq. 2)."""
    return F.mse_loss(student.float(), teacher.float())


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum over taps of weight x MSE / mean square of the teacher's feature, so that taps of any scale count alike.

    Source: BK-SDM (arXiv:2305.15798) eq. 3; the normalisation is ours: without it one deep tap outweighs all others (BK-SDM issue 21).

    Raises:
        InputError: the names or shapes of the two sides and of `weights` do not agree.
    """
    if not set(student) == set(teacher) == set(weights):
        raise InputError(f"feature taps differ: student {sorted(student)}, teacher {sorted(teacher)}, weights {sorted(weights)}.")
    total = torch.zeros((), device=next(iter(student.values())).device)
    for name, weight in weights.items():
        s, t = student[name].float(), teacher[name].float()
        if s.shape != t.shape:
            raise InputError(f"feature tap {name!r}: student {tuple(s.shape)}, teacher {tuple(t.shape)}; add a projector.")
        total = total + weight * F.mse_loss(s, t) / t.pow(2).mean().clamp(min=1e-8)
    return total
