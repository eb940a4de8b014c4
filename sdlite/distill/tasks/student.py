"""What can be trained: a text-to-image teacher from scratch, a student from a teacher.

Both see a `LatentSource` (images already encoded, captions already tokenized) and a `Recipe`d noise
schedule; both are `Task`s for `sdlite.distill.train.fit`. Shape letters: B batch, C latent
channels, h,w latent size, L tokens, D text width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sdlite.distill import losses
from sdlite.distill.features import Taps, matched_taps
from sdlite.distill.losses import feature_loss, output_loss
from sdlite.distill.train import Batch
from sdlite.errors import InputError
from sdlite.files import TOKENIZER_FILES, Files
from sdlite.images import grid, save, to_pil, to_uint8
from sdlite.sampling import Noise, Schedule, denoise, get_sampler
from sdlite.spec import latent_size

# Zero-terminal-SNR v-prediction with trailing spacing: stable at few steps (Salimans and Ho 2022;
# Lin et al. 2023, arXiv:2305.08891).
V_ZERO_SNR: dict[str, Any] = {
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


class LatentSource(Protocol):
    """Encoded pictures with their captions."""

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """{"ids": sample ids, "latents": (B, C, h, w) scaled as the UNet sees them, "input_ids":
        int64 (B, L)}.
        """

    empty_ids: Tensor  # (L,), the tokens of ""


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

    power 1 is uniform; below 1 favours noisy timesteps (density proportional to t^(1/power - 1)),
    where the caption decides.
    """
    u = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    return (u**power * total).long().clamp(max=total - 1)


class CachedEncoder:
    """A frozen text encoder that remembers what it said: (B, L) token ids -> (B, L, D).

    New captions are encoded `GROUP` at a time, filled up to that number: a matrix product may round
    differently in another batch size, and a resumed run must see the same numbers. At most
    `capacity` captions are kept (L D floats each); later ones are encoded every time.
    """

    GROUP = 8

    def __init__(self, text_encoder: nn.Module, capacity: int = 100_000):
        self.text_encoder, self.capacity = text_encoder.eval().requires_grad_(False), capacity
        self._seen: dict[bytes, Tensor] = {}

    def to(self, device: torch.device) -> None:
        """In place: the encoder and what it said go to `device`."""
        self.text_encoder.to(device)
        self._seen = {k: v.to(device) for k, v in self._seen.items()}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        keys = [row.numpy().tobytes() for row in input_ids.cpu()]
        rows = dict(zip(keys, input_ids, strict=True))
        known = {k: self._seen[k] for k in rows if k in self._seen}
        new = [k for k in rows if k not in known]
        for start in range(0, len(new), self.GROUP):
            part = new[start : start + self.GROUP]
            full = part + part[:1] * (self.GROUP - len(part))
            known |= zip(
                part,
                self.text_encoder(torch.stack([rows[k] for k in full]))[0].detach(),
                strict=False,
            )
        for k in new[: self.capacity - len(self._seen)]:
            self._seen[k] = known[k].clone()
        return torch.stack([known[k] for k in keys])


class _Denoising:
    """What the teacher's and the student's tasks share: the batch, the noise and the preview."""

    timestep_power = 1.0  # see `stratified_timesteps`

    def __init__(
        self,
        source: LatentSource,
        scheduler: dict[str, Any],
        parts: dict[str, Any],
        caption_dropout: float,
        preview: dict[str, Any],
    ):
        self.source, self.scheduler, self.parts, self.caption_dropout, self.preview = (
            source,
            scheduler,
            parts,
            caption_dropout,
            preview,
        )
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
        return batch

    def to(self, device: torch.device) -> None:
        """In place: the frozen networks, those of the preview among them, go to `device`; `fit`
        moves what it trains.
        """
        for network in (*vars(self).values(), *self.parts.values()):
            if isinstance(network, (nn.Module, CachedEncoder)):
                network.to(device)

    def targets(self, batch: Batch) -> Tensor:
        """What the frozen networks say about a batch, (B, C, h, w); what `targets.cache_targets`
        keeps.
        """
        raise NotImplementedError

    def not_cacheable(self) -> str | None:
        """Why `targets` is not all that the loss needs of the frozen networks; None when it is."""
        return f"a {type(self).__name__} has no target that could be kept"

    def settings(self) -> dict[str, Any]:
        """What `targets` depends on, besides weights and batch."""
        return {"scheduler": self.scheduler}

    def save(self, modules: dict[str, nn.Module], folder: Path) -> None:
        save_pipeline(folder, {**self.parts, **modules}, self.scheduler)

    def sample(self, modules: dict[str, nn.Module], path: Path) -> None:
        images = to_pil(preview({**self.parts, **modules}, self.schedule, **self.preview))
        picture = grid(images, min(8, len(images)))
        if picture.width < 1024:
            picture = picture.resize(
                (picture.width * 2, picture.height * 2), Image.Resampling.NEAREST
            )
        save(picture, path)


class TeacherTask(_Denoising):
    """Train a UNet, with its text encoder or on a frozen one: MSE to the schedule's target."""

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        source: LatentSource,
        *,
        parts: dict[str, Any],
        preview: dict[str, Any],
        scheduler: dict[str, Any] = V_ZERO_SNR,
        caption_dropout: float = 0.1,
        train_text_encoder: bool = True,
        timestep_power: float = 1.0,
    ):
        super().__init__(
            source, scheduler, {**parts, "text_encoder": text_encoder}, caption_dropout, preview
        )
        self.modules: dict[str, nn.Module] = {"unet": unet}
        self.timestep_power = timestep_power
        if train_text_encoder:
            self.modules["text_encoder"] = text_encoder
        else:
            self.encode = CachedEncoder(text_encoder)

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        x, target = self.forward(batch["latents"], batch["noise"], batch["t"])
        embeds = (
            modules["text_encoder"](batch["input_ids"])[0]
            if "text_encoder" in modules
            else self.encode(batch["input_ids"])
        )
        out = modules["unet"](x, batch["t"], embeds).sample
        return {"loss": F.mse_loss(out.float(), target)}


def teacher_gradients(
    unet: Any,
    text_encoder: nn.Module,
    source: LatentSource,
    scheduler: dict[str, Any],
    *,
    batches: int = 8,
    size: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Mean gradient of the teacher's own loss by parameter name, over `batches` x `size` draws:
    what a Taylor score of channels needs.
    """
    from sdlite.distill.train import step_generator

    task = TeacherTask(
        unet,
        text_encoder,
        source,
        parts={},
        preview={},
        scheduler=scheduler,
        train_text_encoder=False,
    )
    before = [p.requires_grad for p in unet.parameters()]
    unet.requires_grad_(True)
    total = {k: torch.zeros_like(p) for k, p in unet.named_parameters()}
    for k in range(batches):
        loss = task.loss(task.modules, task.batch(size, step_generator(seed, k)), k)["loss"]
        for name, g in zip(
            total,
            torch.autograd.grad(loss, list(unet.parameters()), allow_unused=True),
            strict=True,
        ):
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

    def forward(self, x: Tensor, t: Tensor, embeds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.unet(x, t, embeds).sample
        return out, {
            k: self.projectors[k](f) if k in self.projectors else f
            for k, f in self.tapped.features.items()
        }


class StudentTask(_Denoising):
    """Train a student UNet by task, output and feature distillation (BK-SDM, arXiv:2305.15798, eq.
    4), and what may be added to them.

    The text encoder is the teacher's and stays frozen. Where widths differ, a 1x1 projector
    (trained, not saved) maps the student's feature to the teacher's channels. Teacher and student
    see the same dropped captions. A term of weight 0 is not computed; when no term needs the
    teacher it does not run at all.

    Args:
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
        tap_weights: tap name -> its share of the feature terms; default equal shares. A name that
            is no tap is an error.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        text_encoder: nn.Module,
        source: LatentSource,
        *,
        parts: dict[str, Any],
        preview: dict[str, Any],
        task_weight: float = 1.0,
        output_weight: float = 1.0,
        feature_weight: float = 0.1,
        multi_scale_weight: float = 0.0,
        channel_weight: float = 0.0,
        temperature: tuple[float, float] = (4.0, 1.0),
        temperature_steps: int = 1000,
        mask: bool = False,
        article: bool = False,
        tap_weights: dict[str, float] | None = None,
        scheduler: dict[str, Any] = V_ZERO_SNR,
        caption_dropout: float = 0.1,
        timestep_power: float = 1.0,
    ):
        super().__init__(
            source, scheduler, {**parts, "text_encoder": text_encoder}, caption_dropout, preview
        )
        self.timestep_power = timestep_power
        self.teacher, self.encode = (
            teacher.eval().requires_grad_(False),
            CachedEncoder(text_encoder),
        )
        self.task_weight, self.output_weight, self.feature_weight = (
            task_weight,
            output_weight,
            feature_weight,
        )
        self.multi_scale_weight, self.channel_weight = multi_scale_weight, channel_weight
        self.temperature, self.temperature_steps, self.mask, self.article = (
            temperature,
            temperature_steps,
            mask,
            article,
        )
        self.needs_features = bool(feature_weight or multi_scale_weight or channel_weight)
        mine, theirs = matched_taps(student, teacher)
        taps = mine if self.needs_features else {}
        if tap_weights is not None and set(tap_weights) - set(taps):
            raise InputError(
                f"tap_weights: {sorted(set(tap_weights) - set(taps))} are no taps; known:"
                f" {sorted(taps)}."
            )
        self.tap_weights = (
            dict(tap_weights)
            if tap_weights is not None
            else {k: 1.0 / max(len(taps), 1) for k in taps}
        )
        taps = {k: v for k, v in taps.items() if k in self.tap_weights}
        self.teacher_taps = {k: theirs[k] for k in taps}
        projectors = nn.ModuleDict()
        for k, (c, d) in tap_channels(student, teacher, taps, self.teacher_taps).items():
            if c != d:
                projectors[k] = nn.Conv2d(c, d, 1)
        self.modules: dict[str, nn.Module] = {"student": StudentForward(student, projectors, taps)}
        self.tapped = Taps(self.teacher, self.teacher_taps).attach()
        self.frozen: dict[str, nn.Module] = {"teacher": self.teacher} if self.needs_teacher else {}

    @property
    def needs_teacher(self) -> bool:
        return bool(self.output_weight or self.article or self.needs_features)

    def not_cacheable(self) -> str | None:
        if self.needs_features:
            return (
                "feature terms need the teacher's features, which are too large to keep; set"
                " feature_weight = 0"
            )
        return None if self.needs_teacher else "no term needs the teacher"

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """The teacher's output."""
        x, _ = self.forward(batch["latents"], batch["noise"], batch["t"])
        out: Tensor = self.teacher(x, batch["t"], self.encode(batch["input_ids"])).sample
        return out

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        x, target = self.forward(batch["latents"], batch["noise"], batch["t"])
        with torch.no_grad():
            embeds = self.encode(batch["input_ids"])
            wanted = (
                batch["wanted"]
                if "wanted" in batch
                else self.targets(batch)
                if self.needs_teacher
                else None
            )
        theirs = dict(self.tapped.features)
        out, mine = modules["student"](x, batch["t"], embeds)
        terms = {"task": output_loss(out, target)}
        weighted = [] if self.article else [(self.task_weight, terms["task"])]
        if self.article:
            assert wanted is not None
            terms["article"] = losses.article.total(out, wanted, target)
            weighted.append((1.0, terms["article"]))
        elif self.output_weight:
            assert wanted is not None
            total = self.schedule.num_train_timesteps
            terms["output"] = (
                losses.masked_loss(
                    out,
                    wanted,
                    losses.confidence(wanted, target, batch["t"], num_train_timesteps=total),
                )
                if self.mask
                else output_loss(out, wanted)
            )
            weighted.append((self.output_weight, terms["output"]))
        if self.feature_weight:
            terms["feature"] = feature_loss(mine, theirs, self.tap_weights)
            weighted.append((self.feature_weight, terms["feature"]))
        if self.multi_scale_weight:
            terms["multi_scale"] = sum(
                (
                    w * losses.multi_scale_loss(mine[k], theirs[k])
                    for k, w in self.tap_weights.items()
                ),
                x.new_zeros(()),
            )
            weighted.append((self.multi_scale_weight, terms["multi_scale"]))
        if self.channel_weight:
            at = losses.temperature_at(step, self.temperature_steps, *self.temperature)
            terms["channel"] = sum(
                (
                    w * losses.channel_loss(mine[k], theirs[k], at)
                    for k, w in self.tap_weights.items()
                ),
                x.new_zeros(()),
            )
            weighted.append((self.channel_weight, terms["channel"]))
        return {"loss": sum((w * term for w, term in weighted), x.new_zeros(())), **terms}

    def save(self, modules: dict[str, nn.Module], folder: Path) -> None:
        super().save({"unet": modules["student"].unet}, folder)

    def sample(self, modules: dict[str, nn.Module], path: Path) -> None:
        super().sample({"unet": modules["student"].unet}, path)


@torch.no_grad()
def probe(unet: Any) -> None:
    """One forward of zeros at the network's own size, where it is: for what hooks want to see."""
    c, device = unet.config, next(unet.parameters()).device
    unet(
        torch.zeros(1, c.in_channels, *latent_size(c), device=device),
        0,
        torch.zeros(1, 2, c.cross_attention_dim, device=device),
    )


@torch.no_grad()
def tap_channels(
    student: Any, teacher: Any, mine: dict[str, str], theirs: dict[str, str]
) -> dict[str, tuple[int, int]]:
    """tap -> (student channels, teacher channels), found by one forward of each."""
    shapes = []
    for network, taps in ((student, mine), (teacher, theirs)):
        with Taps(network, taps) as tapped:
            probe(network)
        shapes.append({k: f.shape for k, f in tapped.features.items()})
    if bad := [k for k in mine if shapes[0][k][2:] != shapes[1][k][2:]]:
        raise InputError(
            f"feature taps {bad} have different resolutions in student and teacher; choose other"
            " taps."
        )
    return {k: (shapes[0][k][1], shapes[1][k][1]) for k in mine}


@torch.no_grad()
def paint(
    parts: dict[str, Any],
    schedule: Schedule,
    *,
    prompts: list[str],
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
    sampler: str = "ddim",
) -> Tensor:
    """Scaled latents (B, C, h, w) from torch networks, such as are still in training; prompt i gets
    seed + i.
    """
    unet, text_encoder, tokenizer = parts["unet"], parts["text_encoder"], parts["tokenizer"]
    device = next(unet.parameters()).device
    config = unet.config
    ids = torch.from_numpy(tokenizer([*prompts, ""])).to(device)
    embeds = text_encoder(ids)[0].cpu().numpy()
    cond, uncond = embeds[:-1], np.repeat(embeds[-1:], len(prompts), axis=0)
    noise = [Noise(seed + i) for i in range(len(prompts))]
    x = np.stack([n.normal((config.in_channels, *latent_size(config))) for n in noise])
    solver = get_sampler(sampler, schedule, num_inference_steps)

    def network(**inputs: np.ndarray) -> np.ndarray:
        given = {k: torch.from_numpy(v).to(device) for k, v in inputs.items()}
        out: np.ndarray = unet(**given).sample.cpu().numpy()
        return out

    for latents in denoise(
        network, x, cond, noise, solver, uncond=uncond, guidance_scale=guidance_scale
    ):
        x = latents
    return torch.from_numpy(x).to(device)


@torch.no_grad()
def preview(parts: dict[str, Any], schedule: Schedule, **arguments: Any) -> np.ndarray:
    """uint8 (B, H, W, 3): `paint`, decoded."""
    return to_uint8(decode_scaled(parts["vae"], paint(parts, schedule, **arguments)).cpu().numpy())


def decode_scaled(vae: Any, z: Tensor) -> Tensor:
    """Latents (B, C, h, w) scaled as the UNet sees them -> pixels (B, 3, H, W), about -1 to 1, by
    any of diffusers' autoencoders.
    """
    out: Tensor = vae.decode(
        z / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    ).sample
    return out


def save_pipeline(folder: Path, parts: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Write a diffusers `StableDiffusionPipeline` folder (safetensors) with a DDIM scheduler.

    The tokenizer's files are the teacher's own, byte for byte: each transformers saves others.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    # the schedule that was trained on: DDIM's defaults and keys may be others than those of the
    # file's class
    noise = {k: v for k, v in vars(Schedule.from_config(scheduler)).items() if k != "settings"}
    pipe = StableDiffusionPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=None,
        unet=parts["unet"],
        scheduler=DDIMScheduler.from_config({**scheduler, **noise}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe._optional_components = [*pipe._optional_components, "tokenizer"]  # no warning of it
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "tokenizer").mkdir(exist_ok=True)
    own = Files.of(parts["tokenizer_folder"])
    for name in (n for n in TOKENIZER_FILES if own.has(n)):
        (folder / "tokenizer" / name).write_bytes(own.read(name))
    index = folder / "model_index.json"
    about = json.loads(index.read_text(encoding="utf-8"))
    about["tokenizer"] = ["transformers", "CLIPTokenizer"]
    index.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
