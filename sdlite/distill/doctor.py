"""`doctor`: why would this distillation not converge? Looks at teacher, student and data, and measures one batch.

Each finding is (level, check, text): "ok", "warn" (works, not well) or "fail" (cannot work), with the figure and what to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlite.distill.recipe import Recipe, Teacher
from sdlite.distill.students import build, parameters
from sdlite.distill.tasks import StudentTask
from sdlite.distill.train import step_generator
from sdlite.sampling import Schedule


@dataclass(frozen=True)
class Finding:
    level: str
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4} {self.check}: {self.text}"


def architecture(student: Any, teacher: Any, text_encoder: Any, vae: Any) -> list[Finding]:
    """Do the interfaces agree: latent channels, text width, sizes?"""
    s, t, out = student.config, teacher.config, []
    pairs = [
        ("latent channels in", s.in_channels, t.in_channels),
        ("latent channels out", s.out_channels, t.out_channels),
        ("cross_attention_dim", s.cross_attention_dim, t.cross_attention_dim),
        ("latent channels of the VAE", t.in_channels, vae.config.latent_channels),
        ("text encoder width", t.cross_attention_dim, text_encoder.config.hidden_size),
    ]
    for name, a, b in pairs:
        out.append(
            Finding("ok" if a == b else "fail", "architecture", f"{name} {a}" + ("" if a == b else f" against {b}: they must be equal"))
        )
    ratio = parameters(student) / parameters(teacher)
    if ratio > 1:
        out.append(Finding("warn", "architecture", f"the student is larger than the teacher ({ratio:.2f}x)"))
    elif ratio < 0.05:
        out.append(
            Finding(
                "warn", "architecture", f"the student has {ratio:.1%} of the teacher's parameters: distil through a middle-sized one first"
            )
        )
    else:
        out.append(Finding("ok", "architecture", f"the student has {ratio:.1%} of the teacher's parameters"))
    return out


def target(scheduler: dict[str, Any], few_steps: bool) -> list[Finding]:
    """Prediction type, terminal signal-to-noise ratio and spacing: what few-step students trip over."""
    schedule, out = Schedule.from_config(scheduler), []
    kind, last = schedule.prediction_type, float(schedule.alphas_cumprod()[-1])
    snr = last / max(1 - last, 1e-12)
    if kind == "epsilon" and snr < 1e-6:
        out.append(
            Finding(
                "fail",
                "target",
                "epsilon prediction with zero terminal SNR says nothing about the picture at the last timestep; use v_prediction",
            )
        )
    elif few_steps and kind == "epsilon":
        out.append(
            Finding("warn", "target", f"epsilon prediction, terminal SNR {snr:.2g}: with 1-2 steps prefer v_prediction (arXiv:2202.00512)")
        )
    else:
        out.append(Finding("ok", "target", f"{kind}, terminal SNR {snr:.2g}"))
    spacing = scheduler.get("timestep_spacing", "leading")
    if few_steps and spacing != "trailing":
        out.append(
            Finding(
                "warn",
                "target",
                f"timestep_spacing={spacing!r} never visits the last timestep; the stages switch to trailing (arXiv:2305.08891)",
            )
        )
    return out


def preprocessing(latents: Tensor, used: int, skipped: int, truncated: int) -> list[Finding]:
    """Do the latents look like what the teacher was trained on: about zero mean, unit variance, finite?"""
    mean, std = float(latents.float().mean()), float(latents.float().std())
    out = []
    if not torch.isfinite(latents.float()).all():
        out.append(Finding("fail", "preprocessing", "latents hold NaN or infinity: the VAE overflows (fp16?) or a picture is damaged"))
    elif not 0.5 < std < 2 or abs(mean) > 0.5:
        out.append(Finding("fail", "preprocessing", f"latents have mean {mean:.2f}, deviation {std:.2f}, not about 0 and 1: is scaling_factor applied, "
                           "are pixels in [-1, 1]?"))  # fmt: skip
    else:
        out.append(Finding("ok", "preprocessing", f"latents have mean {mean:.2f}, deviation {std:.2f}"))
    share = skipped / max(used + skipped, 1)
    out.append(Finding("warn" if share > 0.01 else "ok", "data", f"{used} samples, {skipped} left out"))
    if truncated > 0.05 * used:
        out.append(Finding("warn", "data", f"{truncated} of {used} captions are longer than the text encoder reads"))
    return out


def gradients(task: StudentTask, batch_size: int, seed: int = 0) -> tuple[list[Finding], dict[str, dict[str, float]]]:
    """Loss and gradient norm of each term at the start, on one batch, and the weight that would make feature and output terms equal."""
    batch = task.batch(batch_size, step_generator(seed, 0))
    modules = task.modules
    student = [p for p in modules["student"].unet.parameters() if p.requires_grad]
    measured: dict[str, dict[str, float]] = {}
    terms = {k: v for k, v in task.loss(modules, batch, 0).items() if k != "loss"}
    for name, value in terms.items():
        grads = torch.autograd.grad(value, student, retain_graph=True, allow_unused=True)
        measured[name] = {
            "loss": float(value),
            "gradient": float(torch.sqrt(sum((g.float().pow(2).sum() for g in grads if g is not None), torch.zeros(())))),
        }
    out = []
    weights = {"task": task.task_weight, "output": task.output_weight, "feature": task.feature_weight}
    bad = [k for k, m in measured.items() if not all(map(torch.isfinite, map(torch.tensor, m.values())))]
    if bad:
        out.append(Finding("fail", "gradients", f"{', '.join(bad)} not finite at the first batch; check the teacher and the dtype"))
    for k, m in measured.items():
        out.append(Finding("ok", "gradients", f"{k}: loss {m['loss']:.4g}, gradient norm {m['gradient']:.4g}, weight {weights[k]:g}"))
    if "feature" in measured and not bad and measured["feature"]["gradient"] > 0:
        share = weights["feature"] * measured["feature"]["gradient"] / max(weights["output"] * measured["output"]["gradient"], 1e-12)
        equal = weights["output"] * measured["output"]["gradient"] / measured["feature"]["gradient"]
        level = "warn" if share > 3 or share < 1 / 30 else "ok"
        out.append(Finding(level, "loss scales", f"the feature term pulls {share:.2g} times as hard as the output term; equal at feature_weight={equal:.2g} "
                           "(BK-SDM's unweighted feature loss outgrew the others: Nota-NetsPresso/BK-SDM issue 21)"))  # fmt: skip
    return out, measured


def temperature(features: Tensor) -> list[Finding]:
    """How peaked a teacher's feature map (B, C, h, w) is under a softmax over positions: too sharp or too flat gives channel_loss no gradient."""
    flat, out = features.float().flatten(2), []
    top = float(torch.tensor(flat.shape[-1]).log())
    for t in (1.0, 2.0, 4.0):
        log = torch.log_softmax(flat / t, -1)
        share = float(-(log.exp() * log).sum(-1).mean()) / max(top, 1e-9)
        level = "ok" if 0.3 < share < 0.98 else "warn"
        out.append(
            Finding(
                level,
                "temperature",
                f"T={t:g}: entropy {share:.0%} of uniform" + ("" if level == "ok" else "; the channel loss teaches little here"),
            )
        )
    return out


def examine(
    recipe: Recipe, teacher: str | Path, data: str | Path, cache: Path, batch_size: int = 8, progress: bool = True
) -> list[Finding]:
    """All checks, on the recipe's student, this teacher and this data.

    Raises:
        InputError, ArtifactError: the folders or the data cannot be read at all.
    """
    taught = Teacher(teacher)
    student = build(taught.unet, recipe.student)
    few = any(s.kind in ("progressive", "consistency", "adversarial") for s in recipe.stages)
    out = architecture(student, taught.unet, taught.text_encoder, taught.vae) + target(taught.scheduler, few)
    if any(f.level == "fail" for f in out):
        return out
    source = taught.source(data, cache, progress)
    ends = (source.ids == taught.tokenizer.eos).int().argmax(1)
    out += preprocessing(source.latents[:512], len(source), len(source.skipped), int((ends == source.ids.shape[1] - 1).sum()))
    first = next((s for s in recipe.stages if s.kind == "output"), None)
    if first is not None:
        parts = {"vae": taught.vae, "tokenizer": taught.tokenizer}
        task = StudentTask(
            student,
            taught.unet,
            taught.text_encoder,
            source,
            parts=parts,
            preview={},
            scheduler=taught.scheduler,
            **{k: v for k, v in first.options.items() if k != "cache_targets"},
        )
        found, _ = gradients(task, batch_size)
        out += found
        if task.teacher_taps:
            out += temperature(_one_feature(task, taught.unet))
    return out


@torch.no_grad()
def _one_feature(task: StudentTask, teacher: nn.Module) -> Tensor:
    from sdlite.distill.features import Taps

    name, module = next(iter(task.teacher_taps.items()))
    batch = task.batch(2, step_generator(0, 1))
    with Taps(teacher, {name: module}) as tapped:
        teacher(batch["latents"], batch["t"], task.encode(batch["input_ids"]))
    return tapped.features[name]
