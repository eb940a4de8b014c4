"""`doctor`: why would this distillation not converge? It looks at teacher, student and data, and
measures one batch.

Each finding is (level, check, text): "ok", "warn" (works, not well) or "fail" (cannot work), with
the figure and what to change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor, nn

from sdlite.distill.encoders import TextEncoders, Tokenizers, text_width
from sdlite.distill.features import Taps
from sdlite.distill.latent_cache import CachedLatents
from sdlite.distill.preview import Config, decode_scaled
from sdlite.distill.recipe import Recipe, Stage
from sdlite.distill.run import packages
from sdlite.distill.students import build, parameters
from sdlite.distill.tasks.base import TOLD_SCALES, Given, predict
from sdlite.distill.tasks.student import Output, StudentTask
from sdlite.distill.teacher import ONE_SIZE, Teacher
from sdlite.distill.train import step_generator
from sdlite.errors import InputError, MissingExtraError
from sdlite.families import LatentScale
from sdlite.sampling import Schedule, guided
from sdlite.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel


@dataclass(frozen=True)
class Finding:
    """One check's outcome: `level`, the check's name, and what was found."""

    level: Literal["ok", "warn", "fail"]
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4} {self.check}: {self.text}"


def architecture(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    text_encoder: CLIPTextModel | TextEncoders,
    vae: AutoencoderKL,
) -> list[Finding]:
    """Do the interfaces agree: latent channels, text width, sizes?"""
    s, t, out = student.config, teacher.config, []
    pairs = [
        ("latent channels in", s.in_channels, t.in_channels),
        ("latent channels out", s.out_channels, t.out_channels),
        ("cross_attention_dim", s.cross_attention_dim, t.cross_attention_dim),
        ("latent channels of the VAE", t.in_channels, vae.config.latent_channels),
        ("text encoder width", t.cross_attention_dim, text_width(text_encoder)),
    ]
    for name, a, b in pairs:
        out.append(
            Finding(
                "ok" if a == b else "fail",
                "architecture",
                f"{name} {a}" + ("" if a == b else f" against {b}: they must be equal"),
            )
        )
    ratio = parameters(student) / parameters(teacher)
    if ratio > 1:
        out.append(
            Finding(
                "warn", "architecture", f"the student is larger than the teacher ({ratio:.2f}x)"
            )
        )
    elif ratio < 0.05:
        out.append(
            Finding(
                "warn",
                "architecture",
                f"the student has {ratio:.1%} of the teacher's parameters: distill through a"
                " middle-sized one first",
            )
        )
    else:
        out.append(
            Finding(
                "ok", "architecture", f"the student has {ratio:.1%} of the teacher's parameters"
            )
        )
    return out


def conditions(
    recipe: Recipe, guidance_width: int | None, besides: Sequence[str] = ()
) -> list[Finding]:
    """What is the teacher told besides latents and timestep, and does the recipe go with it?

    Args:
        guidance_width: of its guidance embedding; None: it has none.
        besides: what else it is told, in words (`told_besides`).
    """
    more = [Finding("ok", "conditions", f"the teacher is also told {x}") for x in besides]
    if guidance_width is None:
        only = "" if besides else ", and nothing else"
        return [Finding("ok", "conditions", f"the teacher is told the text{only}"), *more]
    low, high = TOLD_SCALES
    text = (
        f"the teacher is told text and guidance (time_cond_proj_dim={guidance_width}): the student"
        f" is told the same, at scales from {low:g} to {high:g}, and no call has a second row"
    )
    out = [Finding("ok", "conditions", text), *more]
    try:
        recipe.refuse_guidance()
    except InputError as e:
        out.append(Finding("fail", "conditions", str(e)))
    for stage in recipe.stages:
        if isinstance(stage.kind, Output) and stage.kind.task_weight:
            text = (
                f"{stage.name}: task_weight={stage.kind.task_weight:g} pulls to the data without"
                " guidance, which is not what this teacher says; set task_weight = 0"
            )
            out.append(Finding("warn", "conditions", text))
    return out


def told_besides(taught: Teacher) -> list[str]:
    """What a teacher's UNet is told besides text and guidance, and what of it comes from where."""
    artifact = taught.artifact
    inputs = artifact.family.unet_inputs(artifact.config("unet"))
    sizes = artifact.family.size_conditions(ONE_SIZE)
    out = []
    for t in (t for t in inputs if t.name != "timestep_cond"):
        by = "the data: each image as it was, and how it was cropped and resized"
        by = by if t.name in sizes else ", ".join(taught.text_encoders)
        out.append(f"{t.name} ({t.range}) by {by}")
    if isinstance(taught.text_encoder, TextEncoders) and taught.text_encoder.zeros:
        out.append(
            "zeros for an empty caption, as its pipeline says (force_zeros_for_empty_prompt)"
        )
    return out


def text_encoders(recipe: Recipe, names: Sequence[str]) -> list[Finding]:
    """Does the recipe go with a teacher of several text encoders?"""
    try:
        recipe.refuse_text_encoders(names)
    except InputError as e:
        return [Finding("fail", "conditions", str(e))]
    return []


def target(scheduler: Config, few_steps: bool) -> list[Finding]:
    """Prediction type, terminal signal-to-noise ratio and spacing: what few-step students trip
    over.
    """
    schedule, out = Schedule.from_config(scheduler), []
    kind, last = schedule.prediction_type, float(schedule.alphas_cumprod()[-1])
    snr = last / max(1 - last, 1e-12)
    if kind == "epsilon" and snr < 1e-6:
        out.append(
            Finding(
                "fail",
                "target",
                "epsilon prediction with zero terminal SNR says nothing about the image at the"
                " last timestep; use v_prediction",
            )
        )
    elif few_steps and kind == "epsilon":
        out.append(
            Finding(
                "warn",
                "target",
                f"epsilon prediction, terminal SNR {snr:.2g}: with 1-2 steps prefer v_prediction"
                " (arXiv:2202.00512)",
            )
        )
    else:
        out.append(Finding("ok", "target", f"{kind}, terminal SNR {snr:.2g}"))
    spacing = scheduler.get("timestep_spacing", "leading")
    if few_steps and spacing != "trailing":
        out.append(
            Finding(
                "warn",
                "target",
                f"timestep_spacing={spacing!r} never visits the last timestep; the stages switch to"
                " trailing (arXiv:2305.08891)",
            )
        )
    return out


@torch.no_grad()
def prediction(
    task: StudentTask, teacher: nn.Module, batch_size: int, seed: int = 0
) -> list[Finding]:
    """Does the teacher predict what its scheduler says? Its mean squared error against each kind of
    target, each over that target's mean square.

    A wrong prediction_type is silent otherwise: the student learns the teacher's output and a
    target that contradict each other.
    """
    batch = task.batch(batch_size, step_generator(seed, 2))
    # the middle half: all kinds differ there
    batch["t"] = task.schedule.num_train_timesteps // 4 + batch["t"] // 2
    x, _ = task.forward(batch["latents"], batch["noise"], batch["t"])
    out = predict(teacher, x, batch["t"], task.conditions(batch)).float()
    alpha, sigma = task.forward.coefficients(batch["t"])
    kinds = {
        "epsilon": batch["noise"],
        "sample": batch["latents"],
        "v_prediction": alpha * batch["noise"] - sigma * batch["latents"],
    }
    errors = {k: float((out - y).pow(2).mean() / y.pow(2).mean()) for k, y in kinds.items()}
    said, best = task.schedule.prediction_type, min(errors, key=errors.__getitem__)
    text = ", ".join(f"{k} {e:.2f}" for k, e in errors.items())
    if best != said and errors[best] < 0.5 * min(errors[said], 1.0):
        return [
            Finding(
                "fail",
                "prediction",
                f"the scheduler says {said}, but the teacher's output is nearest to {best}"
                f" (relative errors: {text}); set prediction_type to {best}",
            )
        ]
    if errors[said] > 0.9:
        return [
            Finding(
                "warn",
                "prediction",
                f"the teacher is no better than predicting zero (relative errors: {text}): is it"
                " trained, are these its latents and its text encoder?",
            )
        ]
    return [Finding("ok", "prediction", f"the teacher predicts {said} (relative errors: {text})")]


@torch.no_grad()
def round_trip(latents: Tensor, vae: AutoencoderKL) -> list[Finding]:
    """Latents (B, C, h, w) decoded and encoded again: the same, if scale, shift and pixel range are
    one convention.
    """
    if not hasattr(vae, "quant_conv"):
        return [
            Finding(
                "ok",
                "preprocessing",
                f"{type(vae).__name__}: no round trip, its encoder need not be trained",
            )
        ]
    z = latents.float()
    pixels = decode_scaled(vae, z).clamp(-1, 1)
    again = LatentScale.of(vae.config).from_encoder(vae.encode(pixels).latent_dist.mean)
    error = float((again - z).pow(2).mean() / z.pow(2).mean())
    text = f"latents decoded and encoded again differ by {error:.0%} of their mean square"
    return [
        Finding(
            "ok" if error < 0.5 else "warn",
            "preprocessing",
            text + ("" if error < 0.5 else ": other latents than this VAE's, or another scale"),
        )
    ]


def settings(recipe: Recipe, samples: int) -> list[Finding]:
    """What a recipe says that works against itself."""
    out = []
    for n, stage in enumerate(recipe.stages):
        later = recipe.stages[n + 1 :]
        out += [*_training(stage), *_options(stage, samples, later)]
    return out or [Finding("ok", "settings", "nothing works against itself")]


def _training(stage: Stage) -> Iterator[Finding]:
    c = stage.config
    if c.mixed_precision == "fp16" and not torch.cuda.is_available():
        text = f"{stage.name}: fp16 needs CUDA; use mixed_precision = 'bf16'"
        yield Finding("fail", "settings", text)
    if c.micro_batch_size and c.batch_size % min(c.micro_batch_size, c.batch_size):
        text = (
            f"{stage.name}: batch_size={c.batch_size} does not split into parts of"
            f" {c.micro_batch_size}"
        )
        yield Finding("fail", "settings", text)


def _options(stage: Stage, samples: int, later: Sequence[Stage]) -> Iterator[Finding]:
    draws = stage.kind.draws
    if draws and draws < 2 * samples:
        text = (
            f"{stage.name}: cache_targets={draws} for {samples} samples: each is seen at one or"
            " two noise levels only"
        )
        yield Finding("warn", "settings", text)
    if not isinstance(stage.kind, Output):
        return
    if stage.kind.article:
        text = (
            f"{stage.name}: article = true is for comparison; its soft term does not see an"
            " offset that all channels share"
        )
        yield Finding("warn", "settings", text)
    if stage.kind.caption_dropout == 0 and not any(guided(s.kind.guidance) for s in later):
        text = (
            f"{stage.name}: caption_dropout = 0, so the student knows no empty caption, and"
            " guidance needs one"
        )
        yield Finding("warn", "settings", text)


def preprocessing(latents: Tensor, used: int, skipped: int, truncated: int) -> list[Finding]:
    """Do the latents look like what the teacher was trained on: about zero mean, unit variance,
    finite?
    """
    mean, std = float(latents.float().mean()), float(latents.float().std())
    out = []
    top = float(latents.float().abs().max())
    if not torch.isfinite(latents.float()).all():
        out.append(
            Finding(
                "fail",
                "preprocessing",
                "latents hold NaN or infinity: the VAE overflows (fp16?) or an image is damaged",
            )
        )
    elif not 0.5 < std < 2 or abs(mean) > 0.5:
        out.append(
            Finding(
                "fail",
                "preprocessing",
                f"latents have mean {mean:.2f}, deviation {std:.2f}, not about 0 and 1: is"
                " scaling_factor applied, are pixels in [-1, 1]?",
            )
        )
    elif top <= 1:
        text = (
            f"no latent is beyond {top:.2f}, although their deviation is {std:.2f}: they were"
            " clipped to ±1, as schedulers for pixels do"
        )
        out.append(
            Finding("fail", "preprocessing", text + " (clip_sample); make the data again without")
        )
    else:
        out.append(
            Finding("ok", "preprocessing", f"latents have mean {mean:.2f}, deviation {std:.2f}")
        )
    share = skipped / max(used + skipped, 1)
    out.append(
        Finding("warn" if share > 0.01 else "ok", "data", f"{used} samples, {skipped} left out")
    )
    if truncated > 0.05 * used:
        out.append(
            Finding(
                "warn",
                "data",
                f"{truncated} of {used} captions are longer than the text encoder reads",
            )
        )
    return out


def left_out(skipped: dict[str, str], shown: int = 5) -> list[Finding]:
    """The first samples that were left out, and why."""
    out = [
        Finding("warn", "data", f"left out: {key}: {why}")
        for key, why in list(skipped.items())[:shown]
    ]
    if len(skipped) > shown:
        out.append(
            Finding(
                "warn",
                "data",
                f"left out: {len(skipped) - shown} more; a run lists all in skipped.json",
            )
        )
    return out


class Pull(TypedDict):
    """A term of the loss at the start, and the norm of its gradient."""

    loss: float
    gradient: float


def gradients(
    task: StudentTask, batch_size: int, seed: int = 0
) -> tuple[list[Finding], dict[str, Pull]]:
    """Loss and gradient norm of each term at the start, on one batch; how hard each pulls, and the
    weight at which it would pull as the output.
    """
    measured, weights = _pulls(task, batch_size, seed), task.weights()
    out = [
        Finding(
            "ok",
            "gradients",
            f"{k}: loss {m['loss']:.4g}, gradient norm {m['gradient']:.4g}, weight {weights[k]:g}",
        )
        for k, m in measured.items()
    ]
    bad = [k for k, m in measured.items() if not all(math.isfinite(v) for v in _figures(m))]
    if bad:
        text = f"{', '.join(bad)} not finite at the first batch; check the teacher and the dtype"
        return [Finding("fail", "gradients", text), *out], measured
    return out + _scales(measured, weights), measured


def _figures(pull: Pull) -> tuple[float, float]:
    return pull["loss"], pull["gradient"]


def _pulls(task: StudentTask, batch_size: int, seed: int) -> dict[str, Pull]:
    """term -> what it pulls at the student's own weights."""
    batch = task.batch(batch_size, step_generator(seed, 0))
    student = [p for p in task.modules["student"].unet.parameters() if p.requires_grad]
    terms = task.loss(task.modules, batch, 0)
    del terms["loss"]
    out: dict[str, Pull] = {}
    for name, value in terms.items():
        grads = torch.autograd.grad(value, student, retain_graph=True, allow_unused=True)
        squares = (g.float().pow(2).sum() for g in grads if g is not None)
        norm = torch.sqrt(sum(squares, torch.zeros(())))
        out[name] = {"loss": value.item(), "gradient": norm.item()}
    return out


def _scales(measured: dict[str, Pull], weights: dict[str, float]) -> list[Finding]:
    """How hard each term pulls against the first of output, article and task."""
    pulling = {k: weights[k] * m["gradient"] for k, m in measured.items()}
    pulling = {k: pull for k, pull in pulling.items() if pull > 0}
    first = next((k for k in ("output", "article", "task") if k in pulling), None)
    if first is None:
        return []
    out = []
    for k in ("task", "feature", "multi_scale", "channel"):
        if k == first or k not in pulling:
            continue
        share, equal = pulling[k] / pulling[first], pulling[first] / measured[k]["gradient"]
        text = (
            f"the {k} term pulls {share:.2g} times as hard as the {first} term; equal at"
            f" {k}_weight={equal:.2g}"
        )
        if k == "feature":
            text += (
                " (BK-SDM's unweighted feature loss outgrew the others: Nota-NetsPresso/BK-SDM"
                " issue 21)"
            )
        out.append(Finding("warn" if share > 3 or share < 1 / 30 else "ok", "loss scales", text))
    return out


def first_step(task: StudentTask, lr: float, batch_size: int, seed: int = 0) -> list[Finding]:
    """Does one step at this learning rate lower the loss on the very batch it was taken on? AdamW's
    first step is lr times the gradient's sign.

    In place: the task's student is moved by that step and back.
    """
    batch = task.batch(batch_size, step_generator(seed, 0))
    modules, student = (
        task.modules,
        [p for p in task.modules["student"].parameters() if p.requires_grad],
    )
    before = task.loss(modules, batch, 0)["loss"]
    steps = [
        None if g is None else lr * g.sign()
        for g in torch.autograd.grad(before, student, allow_unused=True)
    ]
    with torch.no_grad():
        for sign in (-1, 1):
            for p, step in zip(student, steps, strict=True):
                if step is not None:
                    p.add_(step, alpha=sign)
            if sign == -1:
                after = task.loss(modules, batch, 0)["loss"].item()
    text = f"one step at lr {lr:g} on one batch: loss {before.item():.4g} to {after:.4g}"
    if after < before.item():
        return [Finding("ok", "learning rate", text)]
    return [Finding("warn", "learning rate", text + "; lower lr, or lengthen warmup_images")]


def temperature(features: Tensor, of_recipe: Sequence[float] = (1.0, 2.0, 4.0)) -> list[Finding]:
    """How peaked a teacher's feature map (B, C, h, w) is under a softmax over positions: too sharp
    or too flat gives channel_loss no gradient.
    """
    flat, out = features.float().flatten(2), []
    top = float(torch.tensor(flat.shape[-1]).log())
    for t in sorted(set(of_recipe)):
        log = torch.log_softmax(flat / t, -1)
        share = float(-(log.exp() * log).sum(-1).mean()) / max(top, 1e-9)
        good = 0.3 < share < 0.98
        text = f"T={t:g}: entropy {share:.0%} of uniform"
        text += "" if good else "; the channel loss teaches little here"
        out.append(Finding("ok" if good else "warn", "temperature", text))
    return out


def installed(export: bool) -> list[Finding]:
    """Is all there that the run comes to at its end?"""
    try:
        packages(export)
    except MissingExtraError as e:
        return [Finding("fail", "packages", str(e))]
    return [Finding("ok", "packages", "all that the run comes to is installed")]


def examine(
    recipe: Recipe,
    teacher: str | Path,
    data: str | Path,
    cache: Path,
    batch_size: int = 8,
    progress: bool = True,
    export: bool = True,
) -> list[Finding]:
    """All checks, on the recipe's student, this teacher and this data; `export` as the run will be
    given it.

    Raises:
        InputError, ArtifactError: the folders or the data cannot be read at all.
    """
    taught = Teacher(teacher)
    # which channels stay changes none of these checks
    student = build(taught.unet, dataclasses.replace(recipe.student, score="l1"))
    few = any(s.kind.sampling_steps is not None for s in recipe.stages)
    out = architecture(student, taught.unet, taught.text_encoder, taught.vae)
    out += conditions(recipe, taught.guidance_width, told_besides(taught))
    if len(taught.text_encoders) > 1:
        out += text_encoders(recipe, taught.text_encoders)
    out += target(taught.scheduler, few)
    if any(f.level == "fail" for f in out):
        return out
    out += installed(export)
    source = taught.source(data, cache, progress)
    out += settings(recipe, len(source))
    truncated = _truncated(source.ids, taught.tokenizer)
    out += preprocessing(source.latents[:512], len(source), len(source.skipped), truncated)
    out += left_out(source.skipped)
    for stage in recipe.stages:
        if isinstance(stage.kind, Output):
            given = Given(
                student,
                taught.unet,
                taught.text_encoder,
                source,
                parts={"vae": taught.vae, "tokenizer": taught.tokenizer},
                scheduler=taught.scheduler,
            )
            task = stage.kind.task(given)
            return [*out, *_batch(task, source, stage.config.lr, batch_size)]
    return out


def _truncated(ids: Tensor, tokenizer: ClipTokenizer | Tokenizers) -> int:
    """How many captions (rows of ids, int64 (B, L)) fill the window of the first tokenizer."""
    first = tokenizer.first if isinstance(tokenizer, Tokenizers) else tokenizer
    ids = ids[:, : first([""]).shape[1]]
    ends = (ids == first.eos).int().argmax(1)
    return int((ends == ids.shape[1] - 1).sum())


def _batch(task: StudentTask, source: CachedLatents, lr: float, batch_size: int) -> list[Finding]:
    """The checks that measure one batch of an output stage."""
    out: list[Finding] = prediction(task, task.teacher, batch_size)
    out += round_trip(source.latents[:2], task.parts["vae"])
    out += gradients(task, batch_size)[0]
    out += first_step(task, lr, batch_size)
    if task.teacher_taps:
        o = task.options
        at = o.temperature if o.channel_weight else (1.0, 2.0, 4.0)
        out += temperature(_one_feature(task), at)
    return out


@torch.no_grad()
def _one_feature(task: StudentTask) -> Tensor:
    name, module = next(iter(task.teacher_taps.items()))
    batch = task.batch(2, step_generator(0, 1))
    with Taps(task.teacher, {name: module}) as tapped:
        predict(task.teacher, batch["latents"], batch["t"], task.conditions(batch))
    return tapped.features[name]
