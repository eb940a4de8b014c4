"""Distillation losses: pure functions of tensors. Shape letters: B batch, C channels, h,w
spatial.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sdlite.errors import InputError


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two predictions: the KL of two Gaussians of one fixed variance, up to
    its scale (BK-SDM eq. 2).
    """
    return F.mse_loss(student.float(), teacher.float())


def feature_loss(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], weights: Mapping[str, float]
) -> Tensor:
    """Sum over taps of weight x MSE / mean square of the teacher's feature, so that taps of any
    scale count alike.

    The mean square is taken over the samples given: a batch in parts (accumulation, several
    processes) has slightly other weights than whole.

    Source: BK-SDM (arXiv:2305.15798) eq. 3; the normalization is ours: without it one deep tap
        outweighs all others (BK-SDM issue 21).

    Raises:
        InputError: the names or shapes of the two sides and of `weights` do not agree.
    """
    if not set(student) == set(teacher) == set(weights):
        raise InputError(
            f"feature taps differ: student {sorted(student)}, teacher {sorted(teacher)}, weights"
            f" {sorted(weights)}."
        )
    total = torch.zeros((), device=next(iter(student.values())).device)
    for name, weight in weights.items():
        s, t = student[name].float(), teacher[name].float()
        if s.shape != t.shape:
            raise InputError(
                f"feature tap {name!r}: student {tuple(s.shape)}, teacher {tuple(t.shape)}; add a"
                " projector."
            )
        total = total + weight * F.mse_loss(s, t) / t.pow(2).mean().clamp(min=1e-8)
    return total


def gaussian_kl(student: Tensor, teacher: Tensor, sigma: float | Tensor) -> Tensor:
    """KL(N(teacher, sigma^2) || N(student, sigma^2)) per sample (B,), summed over its elements: the
    soft loss of a regression model.

    It is a scaled squared error, so `output_loss` with weight 1 / (2 sigma^2) x elements is the
    same thing.
    """
    d = (student.float() - teacher.float()).pow(2).flatten(1).sum(1)
    return d / (2 * torch.as_tensor(sigma, device=d.device, dtype=d.dtype) ** 2)


def channel_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Channel-wise distillation of features (B, C, h, w): KL of softmax over positions, per
    channel, times temperature^2.

    Source: Shu et al. 2021, arXiv:2011.13256, eq. 4-5. It says where a channel is active, not how
        strongly: use it beside an MSE.

    Raises:
        InputError: shapes differ, or temperature is not positive.
    """
    if student.shape != teacher.shape or student.ndim != 4:
        raise InputError(
            f"channel_loss needs two (B, C, h, w) features of one shape, not {tuple(student.shape)}"
            f" and {tuple(teacher.shape)}."
        )
    if not temperature > 0:
        raise InputError(f"temperature={temperature}; accepted: above 0.")
    s = F.log_softmax(student.float().flatten(2) / temperature, dim=-1)
    t = F.log_softmax(teacher.float().flatten(2) / temperature, dim=-1)
    return F.kl_div(s, t, log_target=True, reduction="none").sum(-1).mean() * temperature**2


def multi_scale_loss(
    student: Tensor,
    teacher: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 0.25),
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Weighted mean over scales of the MSE between area-averaged maps (B, C, h, w), each divided by
    the teacher's variance at its scale.

    Args:
        scales: each in (0, 1]; a map is never made smaller than one pixel.
        weights: one for each scale; default equal.

    Raises:
        InputError: shapes differ; a scale is out of range; as many weights as scales are needed.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"multi_scale_loss: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}."
        )
    weights = [1.0] * len(scales) if weights is None else list(weights)
    if not scales or len(weights) != len(scales) or any(not 0 < s <= 1 for s in scales):
        raise InputError(
            f"scales={list(scales)}, weights={weights}; accepted: scales in (0, 1] and one weight"
            " for each."
        )
    total = torch.zeros((), device=student.device)
    for scale, weight in zip(scales, weights, strict=True):
        size = [max(1, round(n * scale)) for n in student.shape[-2:]]
        s, t = (F.adaptive_avg_pool2d(x.float(), size) for x in (student, teacher))
        total = total + weight * F.mse_loss(s, t) / t.var().clamp(min=1e-4)
    return total / sum(weights)


def confidence(
    teacher: Tensor,
    target: Tensor,
    t: Tensor,
    bins: int = 10,
    num_train_timesteps: int = 1000,
    tau: float = 1.0,
) -> Tensor:
    """How far to believe the teacher at each position: exp(-e / (tau mean e)), e its squared error
    to the true target, mean over channels.

    The mean is taken per timestep bin, so that early steps, where every error is large, are not
    masked out as a whole.

    Args:
        teacher, target: predictions (B, C, h, w) and what was to be predicted (noise, v or x_0:
            known in training).
        t: timesteps (B,).

    Returns:
        (B, 1, h, w) in (0, 1]; 1 where the teacher is exact.
    """
    e = (teacher.float() - target.float()).pow(2).mean(1, keepdim=True)
    index = (t.long() * bins // num_train_timesteps).clamp(max=bins - 1)
    sums = torch.zeros(bins, device=e.device).index_add_(0, index, e.mean((1, 2, 3)))
    counts = torch.zeros(bins, device=e.device).index_add_(
        0, index, torch.ones_like(t, dtype=torch.float32)
    )
    mean = (sums / counts.clamp(min=1))[index].view(-1, 1, 1, 1)
    return torch.exp(-e / (tau * mean).clamp(min=1e-8))


def masked_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared error weighted by `mask` (B, 1, h, w), divided by the mask's sum so that a strict
    mask does not lower the learning rate.
    """
    d = (student.float() - teacher.float()).pow(2).mean(1, keepdim=True)
    return (mask * d).sum() / mask.sum().clamp(min=1e-8)


def temperature_at(
    step: int, total: int, start: float = 4.0, end: float = 1.0, kind: str = "linear"
) -> float:
    """Temperature at a step: from `start` to `end`, constant afterwards. A pure function: asking
    does not change it.

    Raises:
        InputError: kind is not "linear" or "cosine".
    """
    phase = min(max(step / max(total, 1), 0.0), 1.0)
    if kind == "cosine":
        phase = 0.5 * (1 - math.cos(math.pi * phase))
    elif kind != "linear":
        raise InputError(f"kind={kind!r}; choose linear or cosine.")
    return start + (end - start) * phase


def min_snr_weight(
    alpha_bar: Tensor, prediction_type: str, gamma: float = 5.0, floor: float = 0.1
) -> Tensor:
    """Min-SNR-gamma weight (B,) of the MSE at signal share alpha_bar (B,) in [0, 1].

    min(SNR, g) / SNR for epsilon, / (SNR + 1) for v, min(SNR, g) for sample prediction (Hang et al.
    2023, arXiv:2303.09556). The trap: for v it is 0 where SNR is 0, and the terminal step of a
    zero-SNR schedule, from which a few-step sampler starts, would never be trained; for epsilon it
    is 0/0. So the weight is at least `floor`.

    Raises:
        InputError: prediction_type is not known.
    """
    a = alpha_bar.double()
    snr = a / (1 - a).clamp(min=1e-12)
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        w = torch.where(snr > 0, capped / snr.clamp(min=1e-12), torch.ones_like(snr))
    elif prediction_type == "v_prediction":
        w = capped / (snr + 1)
    elif prediction_type == "sample":
        w = capped
    else:
        raise InputError(
            f"prediction_type={prediction_type!r}; choose epsilon, v_prediction or sample."
        )
    return w.clamp(min=floor).float()


def huber_loss(student: Tensor, teacher: Tensor, c: float = 1e-3) -> Tensor:
    """Pseudo-Huber, sqrt(d^2 + c^2) - c, mean over elements: LCM's loss (Luo et al. 2023,
    arXiv:2310.04378; diffusers' training example).
    """
    return (torch.sqrt((student.float() - teacher.float()).pow(2) + c * c) - c).mean()


class article:
    """The literal formulas of the article that the project began from, for comparison only. Each
    docstring says what is wrong with it.
    """

    @staticmethod
    def soft_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
        """Softmax over channels and `batchmean`: channels of a noise prediction are not classes, so
        an offset that is common to the channels of a pixel is invisible (KL 0), and the sum over C,
        H, W makes it about H W / 2 times the MSE: the 0.3 of "0.3 soft" is 99%.
        """
        s = F.log_softmax(student / temperature, dim=1)
        t = F.softmax(teacher / temperature, dim=1)
        return F.kl_div(s, t, reduction="batchmean") * temperature**2

    @staticmethod
    def total(
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        temperature: float = 4.0,
        hard: float = 0.7,
    ) -> Tensor:
        """0.7 hard + 0.3 soft, as the article's code has it (its text says cross-entropy and other
        weights).
        """
        return hard * F.mse_loss(student, target) + (1 - hard) * article.soft_loss(
            student, teacher, temperature
        )

    @staticmethod
    def consistency_mask(teacher: Tensor, threshold: float = 0.7) -> Tensor:
        """max of softmax over channels > 0.7: on unit noise that keeps a random tenth of the
        pixels; it does not look at errors at all.
        """
        return (F.softmax(teacher, dim=1).amax(1, keepdim=True) > threshold).float()
