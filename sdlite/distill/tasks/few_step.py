"""Fewer steps and no guidance pass: guidance, progressive, consistency and adversarial
distillation, as `Task`s for `fit`.

All of them start from a student that already makes pictures (see `tasks.StudentTask`), use a frozen
teacher and text encoder, and work in x_0 and noise, so that epsilon, v and sample prediction are
one code. Shape letters: B batch, C channels, h,w latent size.

`guidance_scale` g means u + g (c - u) everywhere, as in the pipeline; LCM's own w is g - 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlite.distill.features import Taps
from sdlite.distill.losses import huber_loss, output_loss
from sdlite.distill.tasks.student import (
    V_ZERO_SNR,
    CachedEncoder,
    Forward,
    LatentSource,
    _Denoising,
    probe,
)
from sdlite.distill.train import Batch
from sdlite.errors import InputError
from sdlite.sampling import guided


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


class _FromTeacher(_Denoising):
    """A student UNet of the teacher's interface, and a frozen teacher that may be guided."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        text_encoder: nn.Module,
        source: LatentSource,
        *,
        parts: dict[str, Any],
        preview: dict[str, Any],
        guidance_scale: float = 1.0,
        scheduler: dict[str, Any] = V_ZERO_SNR,
        caption_dropout: float = 0.0,
    ):
        super().__init__(
            source, scheduler, {**parts, "text_encoder": text_encoder}, caption_dropout, preview
        )
        self.teacher, self.encode = (
            teacher.eval().requires_grad_(False),
            CachedEncoder(text_encoder),
        )
        self.guidance_scale, self.solver = guidance_scale, Solver(self.schedule)
        self.modules: dict[str, nn.Module] = {"unet": student}
        self.frozen: dict[str, nn.Module] = {"teacher": self.teacher}

    def not_cacheable(self) -> str | None:
        return None

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "guidance_scale": self.guidance_scale,
            "empty": self.source.empty_ids.tolist(),
        }

    @torch.no_grad()
    def embeds(self, ids: Tensor) -> Tensor:
        out: Tensor = self.encode(ids)
        return out

    @torch.no_grad()
    def teach(self, x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        """The teacher's output (B, C, h, w), guided by `guidance_scale`."""
        if not guided(self.guidance_scale):
            out: Tensor = self.teacher(x, t, embeds).sample
            return out
        empty = self.embeds(self.source.empty_ids[None].to(x.device)).expand_as(embeds)
        both = self.teacher(torch.cat([x, x]), torch.cat([t, t]), torch.cat([empty, embeds])).sample
        without, with_prompt = both.chunk(2)
        return without + self.guidance_scale * (with_prompt - without)

    def save(self, modules: dict[str, nn.Module], folder: Any) -> None:
        super().save({"unet": modules["unet"]}, folder)

    def sample(self, modules: dict[str, nn.Module], path: Any) -> None:
        super().sample({"unet": modules["unet"]}, path)


class GuidanceTask(_FromTeacher):
    """One network call instead of two: the student learns the guided output at one scale.

    Source: Meng et al. 2023, arXiv:2210.03142, stage 1, with a fixed scale instead of an embedded
        one: the student keeps the plain SD interface and runs at guidance_scale=1.
    """

    def targets(self, batch: Batch) -> Tensor:
        """The teacher's guided output."""
        x, _ = self.forward(batch["latents"], batch["noise"], batch["t"])
        return self.teach(x, batch["t"], self.embeds(batch["input_ids"]))

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        x, _ = self.forward(batch["latents"], batch["noise"], batch["t"])
        wanted = batch["wanted"] if "wanted" in batch else self.targets(batch)
        out = modules["unet"](x, batch["t"], self.embeds(batch["input_ids"])).sample
        return {"loss": output_loss(out, wanted)}


class ProgressiveTask(_FromTeacher):
    """A student of N steps from a teacher of 2N (Salimans and Ho 2022, arXiv:2202.00512). Start it
    from the teacher's weights.

    Args:
        num_inference_steps: N; the teacher takes two DDIM steps in each.
        loss_type: "v" (MSE of v: max(SNR, 1)-like at every step, and finite at zero SNR) or "x0"
            (MSE of x_0).
    """

    def __init__(self, *args: Any, num_inference_steps: int, loss_type: str = "v", **kwargs: Any):
        super().__init__(*args, **kwargs)
        if loss_type not in ("v", "x0"):
            raise InputError(f"loss_type={loss_type!r}; choose v or x0.")
        if num_inference_steps < 1:
            raise InputError(f"num_inference_steps={num_inference_steps}; at least 1.")
        total = self.schedule.num_train_timesteps
        self.num_inference_steps, self.loss_type = num_inference_steps, loss_type
        self.fine = trailing_timesteps(2 * num_inference_steps, total)

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

    def settings(self) -> dict[str, Any]:
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
        embeds = self.embeds(batch["input_ids"])
        z = self.solver.ddim(self.teach(x, t, embeds), x, t, half)
        z = self.solver.ddim(self.teach(z, half, embeds), z, half, end)
        return self.solver.halved_target(x, z, t, end)

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        x, t, _, _ = self._point(batch)
        x0 = batch["wanted"] if "wanted" in batch else self.targets(batch)
        out = modules["unet"](x, t, self.embeds(batch["input_ids"])).sample
        if self.loss_type == "x0":
            return {"loss": output_loss(self.solver.x0_noise(out, x, t)[0], x0)}
        if self.solver.kind == "v_prediction":
            return {"loss": output_loss(out, self.solver.target(x0, x, t))}
        mine, noise = self.solver.x0_noise(out, x, t)
        a, s = self.solver.alpha_sigma(t)
        wanted = (x - a * x0) / s.clamp(min=1e-4)
        return {"loss": output_loss(a * noise - s * mine, a * wanted - s * x0)}


class ConsistencyTask(_FromTeacher):
    """Latent consistency (Luo et al. 2023, arXiv:2310.04378): f(x_t) = f(x_s) for s one teacher
    DDIM step of 1000/`grid` below t.

    The target network is the student itself without gradient, as in diffusers' LoRA example; with
    `fit`'s EMA the shipped weights are averaged. Sample it with the `lcm` sampler. As nothing but
    the last step to the clean latent anchors it, a high learning rate makes it drift to a mean
    picture (embedded student: 2e-4 did within 200 steps of batch 32 while the loss rose from 0.01
    to 0.04; 2e-5 did not).

    Args:
        grid: steps of the teacher's solver over the whole range (LCM: 50).
        sigma_data, timestep_scaling: of the boundary condition f(x, 0) = x (LCM: 0.5 and 10).
    """

    def __init__(
        self,
        *args: Any,
        grid: int = 50,
        sigma_data: float = 0.5,
        timestep_scaling: float = 10.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.points = trailing_timesteps(grid, self.schedule.num_train_timesteps)
        self.sigma_data, self.timestep_scaling = sigma_data, timestep_scaling

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        out = super().batch(size, generator)
        out["index"] = torch.randint(0, len(self.points) - 1, (size,), generator=generator)
        return out

    def consistency(self, unet: nn.Module, x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        """f(x, t) = c_skip x + c_out x_0; exactly x at the clean timestep."""
        x0, _ = self.solver.x0_noise(unet(x, t.clamp(min=0), embeds).sample, x, t)
        scaled = (t.clamp(min=0).float() * self.timestep_scaling).view(-1, 1, 1, 1)
        skip = self.sigma_data**2 / (scaled**2 + self.sigma_data**2)
        out = scaled / (scaled**2 + self.sigma_data**2).sqrt()
        clean = (t < 0).view(-1, 1, 1, 1)
        return torch.where(clean, x, skip * x + out * x0)

    def settings(self) -> dict[str, Any]:
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
        return self.solver.ddim(self.teach(x, t, self.embeds(batch["input_ids"])), x, t, end)

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        x, t, end = self._point(batch)
        embeds = self.embeds(batch["input_ids"])
        with torch.no_grad():
            lower = batch["wanted"] if "wanted" in batch else self.targets(batch)
            wanted = self.consistency(modules["unet"], lower, end, embeds)
        return {"loss": huber_loss(self.consistency(modules["unet"], x, t, embeds), wanted)}


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


class AdversarialTask(_FromTeacher):
    """Few steps with a discriminator in latent space; one optimizer for both, each term reaching
    only its own network.

    The student maps noise at one of its N sampling timesteps to x_0; it and the real latent are
    noised again to a level drawn from `discriminator_timesteps` and judged by heads on the frozen
    teacher's features. Hinge loss; the student also keeps near its start by `reconstruction` x MSE
    to the (guided) teacher's x_0 at that point.

    Args:
        num_inference_steps: N.
        taps: tap name -> teacher module whose output is judged; default: its down blocks.
        weight, ramp: adversarial weight, and the steps over which it rises to it.
        start: what the reconstruction term keeps to, when that is not the (guided) teacher: a
            frozen copy of a few-step student, whose guess is sharper than the one-step guess of a
            teacher that was made for many.
    """

    def __init__(
        self,
        *args: Any,
        num_inference_steps: int = 4,
        taps: dict[str, str] | None = None,
        weight: float = 0.1,
        ramp: int = 500,
        reconstruction: float = 1.0,
        discriminator_timesteps: tuple[int, ...] = (10, 250, 500, 750),
        start: Any = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.start = None if start is None else start.eval().requires_grad_(False)
        self.frozen = {}  # its hooks come and go: not for torch.compile
        self.shardable = False  # the discriminator runs with other weights in one term
        self.points = trailing_timesteps(num_inference_steps, self.schedule.num_train_timesteps)
        self.weight, self.ramp, self.reconstruction = weight, ramp, reconstruction
        self.judged_at = torch.tensor(discriminator_timesteps)
        self.taps = taps or {
            f"down{i}": f"down_blocks.{i}" for i in range(len(self.teacher.down_blocks))
        }
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
        out["judged_at"] = self.judged_at[
            torch.randint(0, len(self.judged_at), (size,), generator=generator)
        ]
        out["judge_noise"] = torch.randn(out["latents"].shape, generator=generator)
        return out

    def features(self, x0: Tensor, batch: Batch, embeds: Tensor) -> dict[str, Tensor]:
        """The teacher's features of x_0 noised again; gradients reach x_0 but no teacher weight."""
        x, _ = self.forward(x0, batch["judge_noise"], batch["judged_at"])
        with Taps(self.teacher, self.taps) as tapped:
            self.teacher(x, batch["judged_at"], embeds)
        return dict(tapped.features)

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        points = self.points.to(batch["index"].device)
        t = points[batch["index"]]
        x, _ = self.forward(batch["latents"], batch["noise"], t)
        embeds = self.embeds(batch["input_ids"])
        made, _ = self.solver.x0_noise(modules["unet"](x, t, embeds).sample, x, t)
        with torch.no_grad():
            kept = (
                self.teach(x, t, embeds) if self.start is None else self.start(x, t, embeds).sample
            )
            wanted, _ = self.solver.x0_noise(kept, x, t)
            real = self.features(batch["latents"], batch, embeds)
        judge = modules["discriminator"]
        fake = self.features(made, batch, embeds)
        frozen = {k: p.detach() for k, p in judge.named_parameters()}
        fooled: Tensor = torch.func.functional_call(judge, frozen, (fake,))
        seen_fake = judge({k: f.detach() for k, f in fake.items()})
        terms = {
            "reconstruction": output_loss(made, wanted),
            "generator": -fooled.mean(),
            "discriminator": F.relu(1 - judge(real)).mean() + F.relu(1 + seen_fake).mean(),
        }
        ramp = min(1.0, step / self.ramp) if self.ramp else 1.0
        loss = (
            self.reconstruction * terms["reconstruction"]
            + self.weight * ramp * terms["generator"]
            + terms["discriminator"]
        )
        return {"loss": loss, **terms}
