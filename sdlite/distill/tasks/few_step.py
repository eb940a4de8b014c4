"""Fewer steps and no guidance pass: the stages `guidance`, `progressive`, `consistency` and
`adversarial`.

All of them start from a student that already makes images (see `student.StudentTask`), use a frozen
teacher and text encoder, and work in x_0 and noise, so that epsilon, v and sample prediction are
one code. Shape letters: B batch, C channels, h,w latent size.

`guidance_scale` g means u + g (c - u) everywhere, as in the pipeline; LCM's own w is g - 1. A
teacher that is told its guidance (LCM) needs no second row, and its student is told the same.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlite.distill.encoders import CachedEncoder
from sdlite.distill.features import Taps, probe
from sdlite.distill.losses import huber_loss, output_loss
from sdlite.distill.preview import USUAL, guidance_width
from sdlite.distill.tasks.base import (
    Conditions,
    Count,
    Denoising,
    Forward,
    Given,
    Options,
    Scale,
    StageKind,
    Steps,
    Weight,
    predict,
)
from sdlite.distill.train import Batch, Modules
from sdlite.sampling import guide, guided
from sdlite.settings import At, settings

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

GUIDANCE = 4.0  # the scale that a stage puts into its student unless its recipe says another
LCM_STEPS = 4  # of a consistency student
JUDGED_AT = (10, 250, 500, 750)  # timesteps at which a discriminator looks


class Solver(Forward):
    """Predictions to x_0 and noise, and DDIM between timesteps; timestep -1 is the clean latent."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a), sqrt(1 - a) at integer timesteps (B,), 1 and 0 at -1; each (B, 1, 1, 1)."""
        clean = (t < 0).view(-1, 1, 1, 1)
        a, s = self.coefficients(t.clamp(min=0))
        return torch.where(clean, torch.ones_like(a), a), torch.where(clean, torch.zeros_like(s), s)

    def x0_noise(self, out: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Network output at (x, t) -> (x_0, noise)."""
        a, s = self.alpha_sigma(t)
        if self.kind == "v_prediction":
            return a * x - s * out, s * x + a * out
        if self.kind == "epsilon":
            return (x - s * out) / a.clamp(min=1e-4), out
        return out, (x - a * out) / s.clamp(min=1e-4)

    def target(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What the network should have said at (x, t) for this x_0."""
        a, s = self.alpha_sigma(t)
        noise = (x - a * x0) / s.clamp(min=1e-4)
        return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0}[self.kind]

    def ddim(self, out: Tensor, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """One deterministic step from timestep t to `to` (Song et al. 2021, arXiv:2010.02502, eq.
        12 with eta = 0).
        """
        x0, noise = self.x0_noise(out, x, t)
        a, s = self.alpha_sigma(to)
        return a * x0 + s * noise

    def halved_target(self, x: Tensor, middle: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """The x_0 whose single DDIM step from (x, t) to `end` arrives where two teacher steps
        arrived (`middle`, at timestep `end`).

        Source: Salimans and Ho 2022, arXiv:2202.00512, algorithm 2 and appendix G.
        """
        a_t, s_t = self.alpha_sigma(t)
        a_e, s_e = self.alpha_sigma(end)
        ratio = s_e / s_t
        return (middle - ratio * x) / (a_e - ratio * a_t)


def trailing_timesteps(steps: int, total: int) -> Tensor:
    """Integer timesteps of a `steps`-step sampler with trailing spacing, from total - 1 down, then
    -1 (the clean latent).
    """
    t = torch.arange(total, 0, -total / steps, dtype=torch.float64).round().long() - 1
    return torch.cat([t[:steps], torch.tensor([-1])])


@settings
@dataclass(frozen=True)
class FewStep(StageKind):
    """A kind whose students run without a guidance pass, most of them in few steps."""

    def for_few_steps(self, given: Given) -> Given:
        """With a schedule that begins at the last timestep (arXiv:2305.08891), and samples as its
        students are sampled.
        """
        samples = given.samples
        if guidance_width(given.student) is None:
            samples = replace(samples, guidance_scale=1.0)
        usual = samples if self.sampling_steps is None else USUAL
        samples = replace(
            samples,
            sampler=self.sampler or usual.sampler,
            num_inference_steps=self.sampling_steps or samples.num_inference_steps,
        )
        scheduler = {**given.scheduler, "timestep_spacing": "trailing"}
        return replace(given, scheduler=scheduler, samples=samples)


class FromTeacher(Denoising):
    """A student UNet of the teacher's interface, and a frozen teacher that may be guided."""

    teacher: UNet2DConditionModel

    def __init__(self, given: Given, guidance_scale: float):
        parts = {**given.parts, "text_encoder": given.text_encoder}
        super().__init__(given.source, given.scheduler, parts, given.samples)
        self.teacher = given.teacher.eval().requires_grad_(False)
        self.tell(self.teacher)
        self.encode = CachedEncoder(given.text_encoder)
        self.guidance_scale, self.solver = guidance_scale, Solver(self.schedule)
        self.modules = {"unet": given.student}
        self.frozen = {"teacher": self.teacher}

    def not_cacheable(self) -> str | None:
        return None

    def settings(self) -> dict[str, object]:
        return {
            **super().settings(),
            "guidance_scale": self.guidance_scale,
            "empty": self.source.empty_ids.tolist(),
        }

    def embeds(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> hidden states (B, l, D), without what else a UNet may be told."""
        return self.encode(ids)

    @torch.no_grad()
    def teach(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The teacher's output (B, C, h, w), guided by `guidance_scale`, or by what it is told."""
        if self.guidance_width is not None or not guided(self.guidance_scale):
            return predict(self.teacher, x, t, conditions)
        empty = self.encode.conditions(self.source.empty_ids[None].to(x.device))
        both = {
            k: torch.cat([empty[k].expand_as(c) if k in empty else c, c])
            for k, c in conditions.items()
        }
        out = predict(self.teacher, torch.cat([x, x]), torch.cat([t, t]), both)
        without, with_prompt = out.chunk(2)
        return guide(without, with_prompt, self.guidance_scale)

    def save(self, modules: Modules, folder: Path) -> None:
        super().save({"unet": modules["unet"]}, folder)

    def sample(self, modules: Modules, path: Path) -> None:
        super().sample({"unet": modules["unet"]}, path)


def frozen_copy(network: UNet2DConditionModel) -> UNet2DConditionModel:
    """The network as it is now, on its own weights."""
    out = type(network).from_config(network.config)
    out.load_state_dict(network.state_dict())
    return out.eval().requires_grad_(False)


@settings
@dataclass(frozen=True)
class Guidance(FewStep):
    """One network call instead of two: the student learns the guided output at one scale.

    Source: Meng et al. 2023, arXiv:2210.03142, stage 1, with a fixed scale instead of an embedded
        one: the student keeps the plain SD interface and runs at guidance_scale=1.
    """

    name = "guidance"
    becomes_teacher = True

    guidance_scale: Scale = GUIDANCE
    cache_targets: Count | None = None

    @property
    def guidance(self) -> float:
        return self.guidance_scale

    @property
    def draws(self) -> int | None:
        return self.cache_targets

    def task(self, given: Given) -> GuidanceTask:
        return GuidanceTask(self.for_few_steps(given), self.guidance_scale)


class GuidanceTask(FromTeacher):
    """The task of the stage `guidance`."""

    def targets(self, batch: Batch) -> Tensor:
        """The teacher's guided output."""
        x, _ = self.forward(batch["latents"], batch["noise"], batch["t"])
        return self.teach(x, batch["t"], self.conditions(batch))

    def loss(self, modules: Modules, batch: Batch, step: int) -> dict[str, Tensor]:
        x, _ = self.forward(batch["latents"], batch["noise"], batch["t"])
        wanted = batch["wanted"] if "wanted" in batch else self.targets(batch)
        told = self.conditions(batch)
        out = predict(modules["unet"], x, batch["t"], told)
        return {"loss": output_loss(out, wanted)}


@settings
@dataclass(frozen=True)
class Progressive(FewStep):
    """Students of N steps from a teacher of 2N, one training for each halving (Salimans and Ho
    2022, arXiv:2202.00512).

    Attributes:
        steps: N of each training; the teacher takes two DDIM steps in each.
        loss_type: "v" (MSE of v: max(SNR, 1)-like at every step, and finite at zero SNR) or "x0"
            (MSE of x_0).
        guidance_scale: of the teacher; None is 4, or none where the student has it already.
    """

    name = "progressive"
    becomes_teacher = True
    keeps_to_student = True

    steps: tuple[Steps, ...] = (4,)
    loss_type: Literal["v", "x0"] = "v"
    guidance_scale: Scale | None = None
    cache_targets: Count | None = None

    @property
    def guidance(self) -> float:
        return GUIDANCE if self.guidance_scale is None else self.guidance_scale

    @property
    def more_guidance(self) -> float:
        return 1.0 if self.guidance_scale is None else self.guidance_scale

    @property
    def sampling_steps(self) -> int:
        return self.steps[-1]

    @property
    def draws(self) -> int | None:
        return self.cache_targets

    def timesteps(self, total: int) -> Tensor:
        return trailing_timesteps(self.sampling_steps, total)[:-1]

    def conflict(self) -> str | None:
        if self.steps and all(a == 2 * b for a, b in itertools.pairwise(self.steps)):
            return None
        return (
            f"steps={list(self.steps)}; accepted: a list that halves each time, such as [16, 8, 4]"
        )

    def trainings(self, said: Options) -> list[tuple[str, StageKind, Options]]:
        rest = {k: v for k, v in said.items() if k != "steps"}
        return [
            (f"{self.name}-{n}", replace(self, steps=(n,)), {**rest, "num_inference_steps": n})
            for n in self.steps
        ]

    def task(self, given: Given) -> ProgressiveTask:
        given = self.for_few_steps(given)
        if given.guided:
            given = replace(given, teacher=frozen_copy(given.student))
        return ProgressiveTask(given, self, 1.0 if given.guided else self.guidance)


class ProgressiveTask(FromTeacher):
    """One training of the stage `progressive`. Start it from the teacher's weights."""

    def __init__(self, given: Given, options: Progressive, guidance_scale: float):
        super().__init__(given, guidance_scale)
        total = self.schedule.num_train_timesteps
        self.num_inference_steps, self.loss_type = options.sampling_steps, options.loss_type
        self.fine = trailing_timesteps(2 * self.num_inference_steps, total)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        out = super().batch(size, generator)
        # stratified over the student's steps, in random order
        order = torch.randperm(size, generator=generator)
        step = (
            (torch.arange(size) + torch.rand(size, generator=generator))
            * (self.num_inference_steps / size)
        ).long()
        out["index"] = step.clamp(max=self.num_inference_steps - 1)[order] * 2
        return out

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "num_inference_steps": self.num_inference_steps}

    def _point(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, and the timesteps (B,) of the student's step: its begin, middle and end."""
        fine = self.fine.to(batch["index"].device)
        t, half, end = (fine[batch["index"] + k] for k in range(3))
        return self.forward(batch["latents"], batch["noise"], t)[0], t, half, end

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """The x_0 that leads where the teacher's two steps lead."""
        x, t, half, end = self._point(batch)
        told = self.conditions(batch)
        z = self.solver.ddim(self.teach(x, t, told), x, t, half)
        z = self.solver.ddim(self.teach(z, half, told), z, half, end)
        return self.solver.halved_target(x, z, t, end)

    def loss(self, modules: Modules, batch: Batch, step: int) -> dict[str, Tensor]:
        x, t, _, _ = self._point(batch)
        x0 = batch["wanted"] if "wanted" in batch else self.targets(batch)
        out = predict(modules["unet"], x, t, self.conditions(batch))
        if self.loss_type == "x0":
            return {"loss": output_loss(self.solver.x0_noise(out, x, t)[0], x0)}
        if self.solver.kind == "v_prediction":
            return {"loss": output_loss(out, self.solver.target(x0, x, t))}
        mine, noise = self.solver.x0_noise(out, x, t)
        a, s = self.solver.alpha_sigma(t)
        wanted = (x - a * x0) / s.clamp(min=1e-4)
        return {"loss": output_loss(a * noise - s * mine, a * wanted - s * x0)}


@settings
@dataclass(frozen=True)
class Consistency(FewStep):
    """Latent consistency (Luo et al. 2023, arXiv:2310.04378): f(x_t) = f(x_s) for s one teacher
    DDIM step of 1000/`grid` below t.

    The target network is the student itself without gradient, as in diffusers' LoRA example; with
    `fit`'s EMA the shipped weights are averaged. Sample it with the `lcm` sampler. As nothing but
    the last step to the clean latent anchors it, a high learning rate makes it drift to a mean
    image (embedded student: 2e-4 did within 200 steps of batch 32 while the loss rose from 0.01
    to 0.04; 2e-5 did not).

    Attributes:
        grid: steps of the teacher's solver over the whole range (LCM: 50).
        sigma_data, timestep_scaling: of the boundary condition f(x, 0) = x (LCM: 0.5 and 10).
    """

    name = "consistency"
    sampler = "lcm"
    becomes_teacher = True

    grid: Steps = 50
    sigma_data: Annotated[float, At(1e-6, 1e6)] = 0.5
    timestep_scaling: Weight = 10.0
    guidance_scale: Scale = GUIDANCE
    cache_targets: Count | None = None

    @property
    def guidance(self) -> float:
        return self.guidance_scale

    @property
    def sampling_steps(self) -> int:
        return LCM_STEPS

    @property
    def draws(self) -> int | None:
        return self.cache_targets

    def task(self, given: Given) -> ConsistencyTask:
        return ConsistencyTask(self.for_few_steps(given), self)


class ConsistencyTask(FromTeacher):
    """The task of the stage `consistency`."""

    def __init__(self, given: Given, options: Consistency):
        super().__init__(given, options.guidance_scale)
        self.points = trailing_timesteps(options.grid, self.schedule.num_train_timesteps)
        self.options = options

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        out = super().batch(size, generator)
        out["index"] = torch.randint(0, len(self.points) - 1, (size,), generator=generator)
        return out

    def consistency(self, unet: nn.Module, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """f(x, t) = c_skip x + c_out x_0; exactly x at the clean timestep."""
        x0, _ = self.solver.x0_noise(predict(unet, x, t.clamp(min=0), conditions), x, t)
        sigma = self.options.sigma_data
        scaled = (t.clamp(min=0).float() * self.options.timestep_scaling).view(-1, 1, 1, 1)
        skip = sigma**2 / (scaled**2 + sigma**2)
        out = scaled / (scaled**2 + sigma**2).sqrt()
        clean = (t < 0).view(-1, 1, 1, 1)
        return torch.where(clean, x, skip * x + out * x0)

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "points": self.points.tolist()}

    def _point(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """x, and the timesteps (B,) at the begin and the end of the solver's step."""
        points = self.points.to(batch["index"].device)
        t, end = points[batch["index"]], points[batch["index"] + 1]
        return self.forward(batch["latents"], batch["noise"], t)[0], t, end

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """x after the teacher's step."""
        x, t, end = self._point(batch)
        out = self.teach(x, t, self.conditions(batch))
        return self.solver.ddim(out, x, t, end)

    def loss(self, modules: Modules, batch: Batch, step: int) -> dict[str, Tensor]:
        x, t, end = self._point(batch)
        told = self.conditions(batch)
        with torch.no_grad():
            lower = batch["wanted"] if "wanted" in batch else self.targets(batch)
            wanted = self.consistency(modules["unet"], lower, end, told)
        made = self.consistency(modules["unet"], x, t, told)
        return {"loss": huber_loss(made, wanted)}


class Discriminator(nn.Module):
    """Real or made, from the frozen teacher's features: one small convolutional head for each
    tapped block.

    Source: latent adversarial diffusion distillation (Sauer et al. 2024, arXiv:2403.12015) and AMD
        Nitro's UNet form of it.
    """

    def __init__(self, channels: dict[str, int], width: int = 64):
        super().__init__()
        self.heads = nn.ModuleDict(
            {
                k: nn.Sequential(
                    nn.Conv2d(c, width, 1),
                    nn.GroupNorm(8, width),
                    nn.SiLU(),
                    nn.Conv2d(width, width, 3, padding=1),
                    nn.SiLU(),
                    nn.Conv2d(width, 1, 1),
                )
                for k, c in channels.items()
            }
        )

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(B, logits): positive is real."""
        return torch.cat([head(features[k]).flatten(1) for k, head in self.heads.items()], 1)


@settings
@dataclass(frozen=True)
class Adversarial(FewStep):
    """Few steps with a discriminator in latent space; one optimizer for both, each term reaching
    only its own network.

    The student maps noise at one of its N sampling timesteps to x_0; it and the real latent are
    noised again to one of the timesteps `JUDGED_AT` and judged by heads on the frozen teacher's
    features. Hinge loss; the student also keeps near its start by `reconstruction` x MSE to the
    (guided) teacher's x_0 at that point, or to the student as it was, once guidance is in it: its
    guess is sharper than the one-step guess of a teacher that was made for many.

    Attributes:
        num_inference_steps: N.
        weight, ramp: adversarial weight, and the steps over which it rises to it.
    """

    name = "adversarial"
    keeps_to_student = True

    num_inference_steps: Steps = 4
    weight: Weight = 0.1
    ramp: Annotated[int, At(0, 10**12)] = 500
    reconstruction: Weight = 1.0
    guidance_scale: Scale = 1.0

    @property
    def guidance(self) -> float:
        return self.guidance_scale

    @property
    def more_guidance(self) -> float:
        return self.guidance_scale

    @property
    def sampling_steps(self) -> int:
        return self.num_inference_steps

    def timesteps(self, total: int) -> Tensor:
        return trailing_timesteps(self.num_inference_steps, total)[:-1]

    def task(self, given: Given) -> AdversarialTask:
        given = self.for_few_steps(given)
        if not given.guided:
            return AdversarialTask(given, self, self.guidance)
        return AdversarialTask(given, self, 1.0, frozen_copy(given.student))


class AdversarialTask(FromTeacher):
    """The task of the stage `adversarial`.

    Args:
        start: what the reconstruction term keeps to, when that is not the (guided) teacher: a
            frozen copy of a few-step student.
    """

    shardable = False  # the discriminator runs with other weights in one term

    def __init__(
        self,
        given: Given,
        options: Adversarial,
        guidance_scale: float = 1.0,
        start: UNet2DConditionModel | None = None,
    ):
        super().__init__(given, guidance_scale)
        self.options, self.start = options, start
        self.frozen = {}  # its hooks come and go: not for torch.compile
        total = self.schedule.num_train_timesteps
        self.points = trailing_timesteps(options.num_inference_steps, total)
        self.judged_at = torch.tensor(JUDGED_AT)
        self.taps = {f"down{i}": f"down_blocks.{i}" for i in range(len(self.teacher.down_blocks))}
        self.modules["discriminator"] = Discriminator(self._channels())

    def not_cacheable(self) -> str | None:
        return "the adversarial stage shows the teacher what the student makes"

    @torch.no_grad()
    def _channels(self) -> dict[str, int]:
        with Taps(self.teacher, self.taps) as tapped:
            probe(self.teacher)
        return {k: f.shape[1] for k, f in tapped.features.items()}

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        out = super().batch(size, generator)
        out["index"] = torch.randint(0, len(self.points) - 1, (size,), generator=generator)
        levels = torch.randint(0, len(self.judged_at), (size,), generator=generator)
        out["judged_at"] = self.judged_at[levels]
        out["judge_noise"] = torch.randn(out["latents"].shape, generator=generator)
        return out

    def features(self, x0: Tensor, batch: Batch, conditions: Conditions) -> dict[str, Tensor]:
        """The teacher's features of x_0 noised again; gradients reach x_0 but no teacher weight."""
        x, _ = self.forward(x0, batch["judge_noise"], batch["judged_at"])
        with Taps(self.teacher, self.taps) as tapped:
            predict(self.teacher, x, batch["judged_at"], conditions)
        return dict(tapped.features)

    def loss(self, modules: Modules, batch: Batch, step: int) -> dict[str, Tensor]:
        t = self.points.to(batch["index"].device)[batch["index"]]
        x, _ = self.forward(batch["latents"], batch["noise"], t)
        told = self.conditions(batch)
        made, _ = self.solver.x0_noise(predict(modules["unet"], x, t, told), x, t)
        with torch.no_grad():
            wanted, _ = self.solver.x0_noise(self._kept(x, t, told), x, t)
            real = self.features(batch["latents"], batch, told)
        judge = modules["discriminator"]
        fake = self.features(made, batch, told)
        frozen = {k: p.detach() for k, p in judge.named_parameters()}
        fooled: Tensor = torch.func.functional_call(judge, frozen, (fake,))
        seen_fake = judge({k: f.detach() for k, f in fake.items()})
        terms = {
            "reconstruction": output_loss(made, wanted),
            "generator": -fooled.mean(),
            "discriminator": F.relu(1 - judge(real)).mean() + F.relu(1 + seen_fake).mean(),
        }
        o = self.options
        ramp = min(1.0, step / o.ramp) if o.ramp else 1.0
        loss = (
            o.reconstruction * terms["reconstruction"]
            + o.weight * ramp * terms["generator"]
            + terms["discriminator"]
        )
        return {"loss": loss, **terms}

    def _kept(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The output that the student keeps near to."""
        if self.start is None:
            return self.teach(x, t, conditions)
        return predict(self.start, x, t, conditions)
