"""What every stage of a recipe is made of: the kind (`StageKind`), what it is given (`Given`), and
the task that `fit` trains (`Denoising`).

Shape letters: B batch, C latent channels, h,w latent size, L tokens, D text width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sdlite.distill.encoders import STATES, CachedEncoder, TextEncoders
from sdlite.distill.preview import (
    USUAL,
    Config,
    Parts,
    Samples,
    guidance_width,
    preview,
    save_grid,
    save_pipeline,
)
from sdlite.distill.train import Batch, Modules, Task
from sdlite.families import unet_arguments
from sdlite.families.sd import guidance_embedding
from sdlite.sampling import Schedule
from sdlite.settings import At, settings

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

# Zero-terminal-SNR v-prediction with trailing spacing: stable at few steps (Salimans and Ho 2022;
# Lin et al. 2023, arXiv:2305.08891).
V_ZERO_SNR: dict[str, object] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}
Weight = Annotated[float, At(0, 1e6)]
Share = Annotated[float, At(0, 1)]
Scale = Annotated[float, At(0, 1000)]  # of guidance
Steps = Annotated[int, At(1, 1000)]
Count = Annotated[int, At(1, 10**12)]
Options = Mapping[str, object]  # what a recipe says of a stage besides its training
# Scales at which a UNet that is told its guidance learns: LCM's w from 2 to 14, plus 1 (Luo et al.
# 2023, arXiv:2310.04378).
TOLD_SCALES = (3.0, 15.0)
# What a UNet is told, (B, ...) each, by name: hidden states of the text, what else its family has
Conditions = Mapping[str, Tensor]
Told = Mapping[str, Tensor | dict[str, Tensor]]  # keywords of diffusers' UNets
IN_BATCHES = ("timestep_cond", "time_ids")  # conditions that no text encoder makes


class LatentSource(Protocol):
    """Encoded images with their captions."""

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """{"ids": sample ids, "latents": (B, C, h, w) scaled as the UNet sees them, "input_ids":
        int64 (B, L), of all tokenizers side by side}; and "time_ids" (B, 6) where the UNet is told
        sizes.
        """

    empty_ids: Tensor  # (L,), the tokens of ""


@dataclass(frozen=True)
class Given:
    """What a stage starts from.

    Attributes:
        student: the UNet as the stages before left it.
        teacher, text_encoder: the teacher's networks; several text encoders are one network.
        parts: the pipeline that is saved and shown; the task puts its own networks over them.
        scheduler: the noise schedule, as a scheduler_config.json says it.
        guided: an earlier stage has made the student its own teacher.
        timesteps: (N,), those at which the finished UNet is called; None is all.
    """

    student: UNet2DConditionModel
    teacher: UNet2DConditionModel
    text_encoder: CLIPTextModel | TextEncoders
    source: LatentSource
    parts: Parts
    scheduler: Config
    samples: Samples = USUAL
    guided: bool = False
    timesteps: Tensor | None = None


@settings
@dataclass(frozen=True)
class StageKind(ABC):
    """One kind of stage: a dataclass of its options, as a recipe says them, and what follows from
    them. A new kind is a subclass that `sdlite.distill.tasks.register` is given.

    Attributes:
        name: `kind` of the recipe's [[stage]].
        makes: the part of the pipeline that is trained: unet, text_encoder or vae.
        sampler: the sampler that its students need; None is the one for many steps.
        becomes_teacher: its student teaches later stages that have `keeps_to_student`.
        keeps_to_student: it is taught by the student as it was, once that has become a teacher.
    """

    name: ClassVar[str]
    makes: ClassVar[str] = "unet"
    sampler: ClassVar[str | None] = None
    becomes_teacher: ClassVar[bool] = False
    keeps_to_student: ClassVar[bool] = False

    @abstractmethod
    def task(self, given: Given) -> Task:
        """What `fit` trains."""

    @property
    def guidance(self) -> float:
        """The guidance that it puts into a student that has none; 1 is none."""
        return 1.0

    @property
    def more_guidance(self) -> float:
        """The guidance that it would put on top of a student that has it already; 1 is none."""
        return 1.0

    @property
    def sampling_steps(self) -> int | None:
        """Sampling steps that its students are made for; None is any number."""
        return None

    @property
    def draws(self) -> int | None:
        """How many draws are shown to the teacher once, before the training; None is none."""
        return None

    def timesteps(self, total: int) -> Tensor | None:
        """Timesteps (N,) out of 0 to `total` - 1 at which its students are called; None is all."""
        return None

    def conflict(self) -> str | None:
        """What is wrong with the options beyond types and ranges; None where nothing is."""
        return None

    def of_several(self, names: Collection[str]) -> str | None:
        """What stands against it where the teacher has several text encoders; None where nothing
        does.
        """
        return None

    def trainings(self, said: Options) -> list[tuple[str, StageKind, Options]]:
        """(name, kind, options) of each training that the stage is; `said` is what the recipe
        says of it.
        """
        return [(self.name, self, said)]

    def made_size(self, text_encoder: CLIPTextModel | TextEncoders, vae: nn.Module) -> str | None:
        """How large the part is that it makes of the teacher's, in words; None for UNets."""
        return None


class Forward:
    """q(x_t | x_0) and the network's target, for one `Schedule`."""

    def __init__(self, schedule: Schedule):
        self.kind = schedule.prediction_type
        self.alpha_bar = torch.from_numpy(schedule.alphas_cumprod().astype(np.float64))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a), sqrt(1 - a) at integer timesteps t (B,), each (B, 1, 1, 1) float32."""
        a = self.alpha_bar.to(t.device)[t].clamp(min=0).view(-1, 1, 1, 1)
        return a.sqrt().float(), (1 - a).sqrt().float()

    def __call__(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the target at t: noise, x_0, or v = sqrt(a) eps - sqrt(1 - a) x_0."""
        alpha, sigma = self.coefficients(t)
        target = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[
            self.kind
        ]
        return alpha * x0 + sigma * noise, target


def stratified_timesteps(
    size: int, total: int, generator: torch.Generator, power: float = 1.0
) -> Tensor:
    """total x u^power, with one u from each of `size` equal slices of [0, 1): less variance than
    independent draws.

    Power 1 is uniform; below 1 favors noisy timesteps (density proportional to t^(1/power - 1)),
    where the caption decides.
    """
    u = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    return (u**power * total).long().clamp(max=total - 1)


def carried(batch: Batch) -> dict[str, Tensor]:
    """The conditions that a batch has besides those of its captions: the guidance, the sizes."""
    return {k: batch[k] for k in IN_BATCHES if k in batch}


def told(conditions: Conditions) -> Told:
    """What UNets are called with besides latents, timesteps and hidden states, as diffusers names
    it: nothing, or the guidance's embedding, or pooled text and sizes.
    """
    return {k: v for k, v in unet_arguments(conditions).items() if k != STATES}


def predict(unet: nn.Module, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """A UNet's output (B, C, h, w) at latents x and timesteps (B,)."""
    out: Tensor = unet(x, t, conditions[STATES], **told(conditions)).sample
    return out


def drawn_guidance(size: int, width: int, generator: torch.Generator) -> Tensor:
    """Guidance embeddings (B, `width`) of scales drawn evenly from `TOLD_SCALES`."""
    low, high = TOLD_SCALES
    scales = low + (high - low) * torch.rand(size, generator=generator)
    return torch.from_numpy(np.concatenate([guidance_embedding(float(g), width) for g in scales]))


class Denoising(Task):
    """A task on noised latents: it draws them, saves a whole pipeline, and shows its images.

    A subclass has `modules` and `loss`; `targets` and `not_cacheable`, too, where its teacher's
    answers can be kept (`sdlite.distill.teacher_cache`). Where its UNets are told their guidance it
    calls `tell`, and calls them with `conditions(batch)`.
    """

    timestep_power = 1.0  # see `stratified_timesteps`
    guidance_width: int | None = None  # of the embedding that the UNets are told
    teacher: nn.Module
    encode: CachedEncoder

    def __init__(
        self,
        source: LatentSource,
        scheduler: Config,
        parts: Parts,
        samples: Samples,
        caption_dropout: float = 0.0,
    ):
        self.source, self.scheduler, self.parts = source, scheduler, parts
        self.samples, self.caption_dropout = samples, caption_dropout
        self.schedule = Schedule.from_config(scheduler)
        self.forward = Forward(self.schedule)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        batch = self.source.draw(size, generator)
        drop = torch.rand(size, generator=generator) < self.caption_dropout
        batch["input_ids"] = torch.where(drop[:, None], self.source.empty_ids, batch["input_ids"])
        batch["noise"] = torch.randn(batch["latents"].shape, generator=generator)
        batch["t"] = stratified_timesteps(
            size, self.schedule.num_train_timesteps, generator, self.timestep_power
        )
        if self.guidance_width is not None:
            batch["timestep_cond"] = drawn_guidance(size, self.guidance_width, generator)
        return batch

    def tell(self, unet: nn.Module) -> None:
        """Draw a guidance for each sample, if `unet` and those of its interface are told one."""
        self.guidance_width = guidance_width(unet)

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """What the UNets are told of a batch, by name: of its captions by the frozen text encoder
        `encode`, and what it carries besides.
        """
        return {**self.encode.conditions(batch["input_ids"]), **carried(batch)}

    def to(self, device: torch.device) -> None:
        for network in (*vars(self).values(), *self.parts.values()):
            if isinstance(network, (nn.Module, CachedEncoder)):
                network.to(device)

    def targets(self, batch: Batch) -> Tensor:
        """What the frozen networks say about a batch, (B, C, h, w)."""
        raise NotImplementedError

    def not_cacheable(self) -> str | None:
        """Why `targets` is not all that the loss needs of the frozen networks; None when it is."""
        return f"a {type(self).__name__} has no target that could be kept"

    def settings(self) -> dict[str, object]:
        """What `targets` depends on, besides weights and batch."""
        return {"scheduler": self.scheduler, **self.encode.settings()}

    def save(self, modules: Modules, folder: Path) -> None:
        save_pipeline(folder, {**self.parts, **modules}, self.scheduler)

    def sample(self, modules: Modules, path: Path) -> None:
        save_grid(preview({**self.parts, **modules}, self.schedule, self.samples), path)
