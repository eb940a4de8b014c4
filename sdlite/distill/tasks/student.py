"""Stage `output`: a student UNet from a teacher, by task, output and feature distillation; and the
task that trains a teacher from scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlite.distill import losses
from sdlite.distill.encoders import STATES, CachedEncoder, TextEncoders
from sdlite.distill.features import Taps, matched_taps, tap_channels
from sdlite.distill.losses import feature_loss, output_loss
from sdlite.distill.preview import USUAL, Config, Parts, Samples
from sdlite.distill.tasks.base import (
    V_ZERO_SNR,
    Count,
    Denoising,
    Given,
    LatentSource,
    Share,
    StageKind,
    Weight,
    carried,
    predict,
    told,
)
from sdlite.distill.train import Batch, Modules, step_generator
from sdlite.errors import InputError
from sdlite.settings import At, settings

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

Temperature = Annotated[float, At(1e-3, 1e3)]


class TeacherTask(Denoising):
    """Train a UNet, with its text encoder or on a frozen one: MSE to the schedule's target.

    Raises:
        InputError: `train_text_encoder` for a model of several text encoders.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel | TextEncoders,
        source: LatentSource,
        *,
        parts: Parts,
        samples: Samples = USUAL,
        scheduler: Config = V_ZERO_SNR,
        caption_dropout: float = 0.1,
        train_text_encoder: bool = True,
        timestep_power: float = 1.0,
    ):
        parts = {**parts, "text_encoder": text_encoder}
        super().__init__(source, scheduler, parts, samples, caption_dropout)
        self.modules = {"unet": unet}
        self.timestep_power = timestep_power
        self.tell(unet)
        if train_text_encoder:
            if isinstance(text_encoder, TextEncoders):
                raise InputError(
                    "train_text_encoder=True for a model of several text encoders; accepted: one."
                    " Give train_text_encoder=False: they stay as they are."
                )
            self.modules["text_encoder"] = text_encoder
        else:
            self.encode = CachedEncoder(text_encoder)

    def loss(self, modules: Modules, batch: Batch, step: int) -> dict[str, Tensor]:
        x, target = self.forward(batch["latents"], batch["noise"], batch["t"])
        if "text_encoder" in modules:
            embeds = modules["text_encoder"](batch["input_ids"])[0]
            conditions = {STATES: embeds, **carried(batch)}
        else:
            conditions = self.conditions(batch)
        out = predict(modules["unet"], x, batch["t"], conditions)
        return {"loss": F.mse_loss(out.float(), target)}


def teacher_gradients(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel | TextEncoders,
    source: LatentSource,
    scheduler: Config,
    *,
    batches: int = 8,
    size: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Mean gradient of the teacher's own loss by parameter name, over `batches` x `size` draws:
    what a Taylor score of channels needs.
    """
    task = TeacherTask(
        unet, text_encoder, source, parts={}, scheduler=scheduler, train_text_encoder=False
    )
    before = [p.requires_grad for p in unet.parameters()]
    unet.requires_grad_(True)
    total = {k: torch.zeros_like(p) for k, p in unet.named_parameters()}
    for k in range(batches):
        loss = task.loss(task.modules, task.batch(size, step_generator(seed, k)), k)["loss"]
        gradients = torch.autograd.grad(loss, list(unet.parameters()), allow_unused=True)
        for name, g in zip(total, gradients, strict=True):
            if g is not None:
                total[name] += g / batches
    for p, needed in zip(unet.parameters(), before, strict=True):
        p.requires_grad_(needed)
    return total


class StudentForward(nn.Module):
    """Student and projectors as one module, so that DDP sees one forward: prediction and projected
    features.
    """

    def __init__(self, unet: nn.Module, projectors: nn.ModuleDict, taps: dict[str, str]):
        super().__init__()
        self.unet, self.projectors = unet, projectors
        self.tapped = Taps(unet, taps).attach()

    def forward(
        self, x: Tensor, t: Tensor, embeds: Tensor, **told: Tensor | dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.unet(x, t, embeds, **told).sample
        return out, {
            k: self.projectors[k](f) if k in self.projectors else f
            for k, f in self.tapped.features.items()
        }


@settings
@dataclass(frozen=True)
class Output(StageKind):
    """Train a student UNet by task, output and feature distillation (BK-SDM, arXiv:2305.15798, eq.
    4), and what may be added to them. A term of weight 0 is not computed; when no term needs the
    teacher it does not run at all.

    Attributes:
        task_weight, output_weight, feature_weight: of the MSE to the schedule's target, to the
            teacher's output, to its block outputs.
        multi_scale_weight: of `losses.multi_scale_loss` over the tapped features.
        channel_weight, temperature, temperature_steps: of `losses.channel_loss` over the tapped
            features, whose temperature goes from the first value to the second within that many
            steps.
        mask: the output term believes the teacher where it is near the target (`losses.masked_loss`
            with `losses.confidence`).
        article: the literal loss of the article (`losses.article.total`) instead of the task and
            output terms, for comparison.
        tap_weights: tap name -> its share of the feature terms; default equal shares.
        caption_dropout: share of the captions that are left empty, so that guidance works.
        timestep_power: below 1 favors noisy timesteps.
        cache_targets: the teacher runs once over so many draws (`sdlite.distill.teacher_cache`);
            only without features.
    """

    name = "output"

    task_weight: Weight = 1.0
    output_weight: Weight = 1.0
    feature_weight: Weight = 0.1
    multi_scale_weight: Weight = 0.0
    channel_weight: Weight = 0.0
    temperature: tuple[Temperature, Temperature] = (4.0, 1.0)
    temperature_steps: Count = 1000
    mask: bool = False
    article: bool = False
    tap_weights: dict[str, Weight] | None = None
    caption_dropout: Share = 0.1
    timestep_power: Annotated[float, At(0.01, 100)] = 1.0
    cache_targets: Count | None = None

    @property
    def draws(self) -> int | None:
        return self.cache_targets

    @property
    def feature_weights(self) -> dict[str, float]:
        """The weights above 0 of terms that need the teacher's features, by option."""
        names = ("feature_weight", "multi_scale_weight", "channel_weight")
        return {name: w for name in names if (w := getattr(self, name))}

    @property
    def needs_teacher(self) -> bool:
        return bool(self.output_weight or self.article or self.feature_weights)

    def conflict(self) -> str | None:
        if self.cache_targets is None or not self.feature_weights:
            return None
        return (
            "cache_targets keeps the teacher's output, not its features; set"
            f" {', '.join(self.feature_weights)} = 0, or leave cache_targets out"
        )

    def task(self, given: Given) -> StudentTask:
        return StudentTask(given, self)


class StudentTask(Denoising):
    """The task of the stage `output`.

    The text encoder is the teacher's and stays frozen. Where widths differ, a 1x1 projector
    (trained, not saved) maps the student's feature to the teacher's channels. Teacher and student
    see the same dropped captions.

    Raises:
        InputError: `tap_weights` names what is no tap.
    """

    teacher: UNet2DConditionModel

    def __init__(self, given: Given, options: Output):
        parts = {**given.parts, "text_encoder": given.text_encoder}
        super().__init__(
            given.source, given.scheduler, parts, given.samples, options.caption_dropout
        )
        self.options, self.timestep_power = options, options.timestep_power
        self.teacher = given.teacher.eval().requires_grad_(False)
        self.tell(self.teacher)
        self.encode = CachedEncoder(given.text_encoder)
        mine, theirs = matched_taps(given.student, self.teacher)
        self.tap_weights = _shares(options, list(mine))
        mine = {k: v for k, v in mine.items() if k in self.tap_weights}
        self.teacher_taps = {k: theirs[k] for k in mine}
        projectors = nn.ModuleDict()
        channels = tap_channels(given.student, self.teacher, mine, self.teacher_taps)
        for k, (c, d) in channels.items():
            if c != d:
                projectors[k] = nn.Conv2d(c, d, 1)
        self.modules = {"student": StudentForward(given.student, projectors, mine)}
        self.tapped = Taps(self.teacher, self.teacher_taps).attach()
        self.frozen = {"teacher": self.teacher} if options.needs_teacher else {}

    def not_cacheable(self) -> str | None:
        if self.options.feature_weights:
            return (
                "feature terms need the teacher's features, which are too large to keep; set"
                " feature_weight = 0"
            )
        return None if self.options.needs_teacher else "no term needs the teacher"

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """The teacher's output."""
        x, _ = self.forward(batch["latents"], batch["noise"], batch["t"])
        return predict(self.teacher, x, batch["t"], self.conditions(batch))

    def weights(self) -> dict[str, float]:
        """term -> its weight in the loss."""
        names = ("task", "output", "feature", "multi_scale", "channel")
        out: dict[str, float] = {k: getattr(self.options, f"{k}_weight") for k in names}
        return out | ({"task": 0.0, "output": 0.0, "article": 1.0} if self.options.article else {})

    def loss(self, modules: Modules, batch: Batch, step: int) -> dict[str, Tensor]:
        x, target = self.forward(batch["latents"], batch["noise"], batch["t"])
        with torch.no_grad():
            conditions = self.conditions(batch)
            wanted = self._wanted(batch)
        theirs = dict(self.tapped.features)
        out, mine = modules["student"](x, batch["t"], conditions[STATES], **told(conditions))
        terms = {"task": output_loss(out, target)}
        if wanted is not None:
            terms |= self._output_terms(out, wanted, target, batch["t"])
        terms |= self._feature_terms(mine, theirs, step)
        weights = self.weights()
        loss = sum((weights[k] * term for k, term in terms.items()), x.new_zeros(()))
        return {"loss": loss, **terms}

    def _wanted(self, batch: Batch) -> Tensor | None:
        if "wanted" in batch:
            return batch["wanted"]
        return self.targets(batch) if self.options.needs_teacher else None

    def _output_terms(
        self, out: Tensor, wanted: Tensor, target: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        if self.options.article:
            return {"article": losses.article.total(out, wanted, target)}
        if not self.options.output_weight:
            return {}
        if not self.options.mask:
            return {"output": output_loss(out, wanted)}
        total = self.schedule.num_train_timesteps
        believed = losses.confidence(wanted, target, t, num_train_timesteps=total)
        return {"output": losses.masked_loss(out, wanted, believed)}

    def _feature_terms(
        self, mine: dict[str, Tensor], theirs: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        o, terms = self.options, dict[str, Tensor]()

        def over_taps(one: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            shares = (w * one(mine[k], theirs[k]) for k, w in self.tap_weights.items())
            return sum(shares, torch.zeros((), device=next(iter(theirs.values())).device))

        if o.feature_weight:
            terms["feature"] = feature_loss(mine, theirs, self.tap_weights)
        if o.multi_scale_weight:
            terms["multi_scale"] = over_taps(losses.multi_scale_loss)
        if o.channel_weight:
            at = losses.temperature_at(step, o.temperature_steps, *o.temperature)
            terms["channel"] = over_taps(lambda s, t: losses.channel_loss(s, t, at))
        return terms

    def save(self, modules: Modules, folder: Path) -> None:
        super().save({"unet": modules["student"].unet}, folder)

    def sample(self, modules: Modules, path: Path) -> None:
        super().sample({"unet": modules["student"].unet}, path)


def _shares(options: Output, taps: list[str]) -> dict[str, float]:
    """tap -> its share of the feature terms."""
    taps = taps if options.feature_weights else []
    if options.tap_weights is None:
        return {k: 1.0 / len(taps) for k in taps}
    if unknown := sorted(set(options.tap_weights) - set(taps)):
        raise InputError(f"tap_weights: {unknown} are no taps; known: {sorted(taps)}.")
    return dict(options.tap_weights)
