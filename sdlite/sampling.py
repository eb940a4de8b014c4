"""Noise schedules, samplers, the noise draw and classifier-free guidance, in numpy.

Data: `seeds -> latents (B, C, h, w) float32`, then per step `network output, latents -> latents`. Notation: `a` is
alpha-bar_t, a latent is x_t = sqrt(a) x_0 + sqrt(1-a) eps, `sigma = sqrt((1-a)/a)`, and v = sqrt(a) eps - sqrt(1-a) x_0
(Salimans and Ho 2022, arXiv:2202.00512). Every sampler equals diffusers' scheduler of the same name over whole loops
(tests/parity). Sources are named at each class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sdlite.errors import InputError, UnknownNameError

Array = np.ndarray
F32 = np.float32


# --- noise -----------------------------------------------------------------------------------------------------------


class Noise:
    """Standard normal draws equal to `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` to 1e-5.

    So a seed means the same picture here, in diffusers with a CPU generator, and on every backend and device.
    Source: pytorch `aten/src/ATen/core/MT19937RNGEngine.h`, `aten/src/ATen/native/cpu/DistributionTemplates.h` (normal_fill).
    """

    def __init__(self, seed: int):
        if not 0 <= seed < 2**64:
            raise InputError(f"seed={seed} is out of range; use 0 to 2**64 - 1.")
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed % 2**32)

    def _uniform(self, n: int) -> Array:
        return (self._bits.random_raw(n) & 0xFFFFFF).astype(F32) * F32(2**-24)

    def normal(self, shape: Sequence[int]) -> Array:
        """float32 of `shape`, which must have at least 16 elements (torch draws smaller ones another way)."""
        n = int(np.prod(shape))
        if n < 16:
            raise InputError(f"shape {tuple(shape)} has {n} elements; at least 16 are needed.")
        out = _box_muller(self._uniform(n)[: n - n % 16])
        if n % 16:  # torch redraws the last sixteen
            tail = _box_muller(self._uniform(16))
            out = np.concatenate([out, np.zeros(n % 16, F32)])
            out[-16:] = tail
        return out.reshape(shape)


def _box_muller(u: Array) -> Array:
    u = u.reshape(-1, 2, 8)
    radius = np.sqrt(F32(-2) * np.log(F32(1) - u[:, :1]))
    theta = F32(2 * np.pi) * u[:, 1:]
    return np.concatenate([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)


def guide(uncond: Array, cond: Array, guidance_scale: float) -> Array:
    """u + g (c - u): Ho and Salimans 2022, arXiv:2207.12598, in diffusers' convention (g = 1 is no guidance, g = 0 is `uncond`)."""
    return uncond + F32(guidance_scale) * (cond - uncond)


# --- schedule --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """The training noise schedule: diffusers' scheduler config under diffusers' names."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None  # None: the sampler's own default, as in diffusers
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    clip_sample: bool | None = None
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False
    original_inference_steps: int = 50  # LCM only
    timestep_scaling: float = 10.0  # LCM only

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        known = {f.name for f in dataclasses.fields(cls)}
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
        out = cls(**settings)
        for field, accepted in (
            ("prediction_type", ("epsilon", "v_prediction", "sample")),
            ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2")),
            ("timestep_spacing", ("leading", "trailing", "linspace", None)),
        ):
            if getattr(out, field) not in accepted:
                raise UnknownNameError(f"scheduler config: {field}={getattr(out, field)!r}; accepted: {', '.join(map(repr, accepted))}.")
        if config.get("thresholding"):
            raise InputError("scheduler config: thresholding=True is for pixel-space models; set it to false.")
        return out

    def alphas_cumprod(self) -> Array:
        """(T,) float32, decreasing; the last one is 0 with `rescale_betas_zero_snr`.

        Source of the rescaling: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
        """
        n = self.num_train_timesteps
        one = F32(1)
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, F32)
        elif self.beta_schedule == "linear":
            betas = _linspace32(self.beta_start, self.beta_end, n)
        elif self.beta_schedule == "scaled_linear":
            betas = _linspace32(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
        else:
            bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(F32)
        if self.rescale_betas_zero_snr:
            root = np.sqrt(_cumprod32(one - betas))
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            bar32 = root**2
            betas = one - np.concatenate([bar32[:1], bar32[1:] / bar32[:-1]])
        return _cumprod32(one - betas)


def _linspace32(start: float, end: float, n: int) -> Array:
    """torch.linspace in float32, to the last bit: from both ends, with fused multiply-add (here: by way of float64)."""
    i = np.arange(n)
    step = np.float64((F32(end) - F32(start)) / F32(n - 1))
    return np.where(i < n // 2, np.float64(F32(start)) + step * i, np.float64(F32(end)) - step * (n - 1 - i)).astype(F32)


def _cumprod32(x: Array) -> Array:
    """torch.cumprod of float32 on the CPU: accumulated in float64."""
    return np.cumprod(x.astype(np.float64)).astype(F32)


def _spaced(spacing: str, n: int, total: int, offset: int) -> Array:
    """Descending float64 timesteps, unrounded for linspace: arXiv:2305.08891, table 2."""
    if spacing == "linspace":
        return np.linspace(0, total - 1, n)[::-1]
    if spacing == "leading":
        return np.arange(0, n)[::-1] * float(total // n) + offset
    return np.round(np.arange(total, 0, -total / n)) - 1


# --- samplers --------------------------------------------------------------------------------------------------------


class Sampler:
    """One solver over one schedule. `timesteps` are what the network is given, `init_noise_sigma` scales the first draw."""

    spacing: ClassVar[str] = "linspace"  # diffusers' default for this scheduler class
    init_noise_sigma: float = 1.0

    def __init__(self, schedule: Schedule, num_inference_steps: int):
        total = schedule.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise InputError(f"num_inference_steps={num_inference_steps}; accepted: 1 to {total}.")
        self.schedule, self.n, self.total = schedule, num_inference_steps, total
        self.alpha_bar = schedule.alphas_cumprod()
        self.timestep_spacing = schedule.timestep_spacing or self.spacing
        self.timesteps: Array = np.zeros(0)
        self._prepare()

    def _prepare(self) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.timesteps)

    def scale_model_input(self, i: int, x: Array) -> Array:
        return x

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Noise]) -> Array:
        """x at step i and the network's output there -> x at step i + 1. `noise` has one generator per image."""
        raise NotImplementedError

    def _x0_eps(self, a: F32, output: Array, x: Array) -> tuple[Array, Array]:
        """The network's output as (x_0, eps), for the three prediction types."""
        alpha, sigma = np.sqrt(a), np.sqrt(F32(1) - a)
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            return (x - sigma * output) / alpha, output
        if kind == "sample":
            return output, (x - alpha * output) / sigma
        return alpha * x - sigma * output, alpha * output + sigma * x

    @staticmethod
    def _draw(noise: Sequence[Noise], x: Array) -> Array:
        return np.stack([n.normal(x.shape[1:]) for n in noise])


class DDIM(Sampler):
    """Song et al. 2020, arXiv:2010.02502, eq. 12 with eta = 0."""

    spacing = "leading"

    def _prepare(self) -> None:
        self.timesteps = np.round(_spaced(self.timestep_spacing, self.n, self.total, self.schedule.steps_offset)).astype(np.int64)
        self.final = F32(1) if self.schedule.set_alpha_to_one in (None, True) else self.alpha_bar[0]

    def _alpha_before(self, t: int) -> F32:
        return self.alpha_bar[t] if t >= 0 else self.final

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Noise]) -> Array:
        t = int(self.timesteps[i])
        x0, eps = self._x0_eps(self.alpha_bar[t], output, x)
        if self.schedule.clip_sample in (None, True):
            x0 = np.clip(x0, -self.schedule.clip_sample_range, self.schedule.clip_sample_range)
        a = self._alpha_before(t - self.total // self.n)
        return np.sqrt(a) * x0 + np.sqrt(F32(1) - a) * eps


class PNDM(Sampler):
    """Pseudo linear multistep: Liu et al. 2022, arXiv:2202.09778, eq. 12, without Runge-Kutta steps, as SD-1.x ships it."""

    spacing = "leading"

    def _prepare(self) -> None:
        if self.schedule.rescale_betas_zero_snr:
            raise InputError(
                "sampler 'pndm' divides by the signal's share, which is 0 at zero terminal SNR; choose ddim, euler or dpm++2m."
            )
        s = np.round(_spaced(self.timestep_spacing, self.n, self.total, self.schedule.steps_offset)).astype(np.int64)
        # The second step is taken twice: its first result only improves the estimate of the slope.
        self.timesteps = np.concatenate([s[:1], s[1:2], s[1:]]) if self.n > 1 else s
        self.final = F32(1) if self.schedule.set_alpha_to_one is True else self.alpha_bar[0]
        self._slopes: list[Array] = []
        self._held: Array | None = None

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Noise]) -> Array:
        if i == 0:
            self._slopes, self._held = [], None
        stride = self.total // self.n
        t = int(self.timesteps[i])
        before = t - stride
        if i == 1:
            before, t = t, t + stride
        else:
            self._slopes = [*self._slopes[-3:], output]
        e = self._slopes
        if i == 0:
            self._held = x
        elif i == 1:
            assert self._held is not None
            output, x, self._held = (output + e[-1]) / F32(2), self._held, None
        elif len(e) == 2:
            output = (3 * e[-1] - e[-2]) / F32(2)
        elif len(e) == 3:
            output = (23 * e[-1] - 16 * e[-2] + 5 * e[-3]) / F32(12)
        else:
            output = F32(1 / 24) * (55 * e[-1] - 59 * e[-2] + 37 * e[-3] - 9 * e[-4])
        a, b = self.alpha_bar[t], self.alpha_bar[before] if before >= 0 else self.final
        if self.schedule.prediction_type == "v_prediction":
            output = np.sqrt(a) * output + np.sqrt(F32(1) - a) * x
        scale = a * np.sqrt(F32(1) - b) + np.sqrt(a * (F32(1) - a) * b)
        return np.sqrt(b / a) * x - (b - a) * output / scale


class _SigmaSampler(Sampler):
    """Samplers that live in sigma space. With zero terminal SNR the largest sigma is 4096 instead of infinity, as in diffusers."""

    karras: ClassVar[bool] = False

    def _table(self) -> Array:
        """sigma at each training timestep, (T,) float32, rising."""
        with np.errstate(divide="ignore"):
            sigmas = np.sqrt((F32(1) - self.alpha_bar) / self.alpha_bar)
        if self.schedule.rescale_betas_zero_snr:
            sigmas[-1] = 4096
        return sigmas

    def _sigma_to_t(self, sigmas: Array, table: Array) -> Array:
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(table), np.arange(len(table)))

    def _karras(self, high: float, low: float, rho: float = 7.0) -> Array:
        """Karras et al. 2022, arXiv:2206.00364, eq. 5."""
        ramp = np.linspace(0, 1, self.n)
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


class Euler(_SigmaSampler):
    """Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn; k-diffusion `sample_euler`."""

    def _prepare(self) -> None:
        table = self._table()
        t = _spaced(self.timestep_spacing, self.n, self.total, self.schedule.steps_offset).astype(F32)
        sigmas = np.interp(t, np.arange(len(table)), table)
        if self.karras:
            sigmas = self._karras(sigmas[0], sigmas[-1])
            t = self._sigma_to_t(sigmas, table).astype(F32)
        self.timesteps = t
        self.sigmas = np.append(sigmas, 0.0).astype(F32)
        top = self.sigmas.max()
        self.init_noise_sigma = float(top if self.timestep_spacing in ("linspace", "trailing") else np.sqrt(top**2 + 1))

    def scale_model_input(self, i: int, x: Array) -> Array:
        return x / np.sqrt(self.sigmas[i] ** 2 + F32(1))

    def _x0(self, i: int, output: Array, x: Array) -> Array:
        s, kind = self.sigmas[i], self.schedule.prediction_type
        if kind == "epsilon":
            return x - s * output
        if kind == "sample":
            return output
        return output * (-s / np.sqrt(s**2 + F32(1))) + x / (s**2 + F32(1))

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Noise]) -> Array:
        slope = (x - self._x0(i, output, x)) / self.sigmas[i]
        return x + slope * (self.sigmas[i + 1] - self.sigmas[i])


class EulerKarras(Euler):
    """Euler on Karras sigmas."""

    karras = True


class EulerAncestral(Euler):
    """k-diffusion `sample_euler_ancestral`, eta = 1."""

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Noise]) -> Array:
        s, to = self.sigmas[i], self.sigmas[i + 1]
        up = np.sqrt(to**2 * (s**2 - to**2) / s**2)
        down = np.sqrt(to**2 - up**2)
        slope = (x - self._x0(i, output, x)) / s
        return x + slope * (down - s) + self._draw(noise, x) * up


class DPMSolverPP2M(_SigmaSampler):
    """DPM-Solver++(2M), midpoint: Lu et al. 2022, arXiv:2211.01095, algorithm 2; first order in the last step below 15 steps."""

    def _prepare(self) -> None:
        table = self._table()
        n, total = self.n, self.total
        t: Array
        if self.timestep_spacing == "linspace":
            t = np.linspace(0, total - 1, n + 1).round()[::-1][:-1]
        elif self.timestep_spacing == "leading":
            t = (np.arange(0, n + 1) * float(total // (n + 1)))[::-1][:-1] + self.schedule.steps_offset
        else:
            t = _spaced("trailing", n, total, 0)
        if self.karras:
            sigmas = self._karras(table[-1], table[0])
            t = self._sigma_to_t(sigmas, table).round()
        else:
            sigmas = np.interp(t, np.arange(len(table)), table)
        self.timesteps = t.astype(np.int64)
        self.sigmas = np.append(sigmas, 0.0).astype(F32)
        self._before: Array | None = None

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Noise]) -> Array:
        s = self.sigmas.astype(np.float64)
        alpha = 1 / np.sqrt(s**2 + 1)
        sigma = s * alpha
        a = F32(alpha[i] ** 2)
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            x0 = (x - F32(sigma[i]) * output) / np.sqrt(a)
        else:
            x0, _ = self._x0_eps(a, output, x)
        before, self._before = (None if i == 0 else self._before), x0
        last = i == self.n - 1
        if last:  # sigma = 0: h is infinite, exp(-h) = 0
            ratio, gain = 0.0, 1.0
        else:
            h = np.log(alpha[i + 1] / sigma[i + 1]) - np.log(alpha[i] / sigma[i])
            ratio, gain = sigma[i + 1] / sigma[i], -alpha[i + 1] * np.expm1(-h)
        out = F32(ratio) * x + F32(gain) * x0
        if before is not None and not last:
            r = (np.log(alpha[i] / sigma[i]) - np.log(alpha[i - 1] / sigma[i - 1])) / h
            out = out + F32(0.5 * gain / r) * (x0 - before)
        return out


class DPMSolverPP2MKarras(DPMSolverPP2M):
    """DPM-Solver++(2M) on Karras sigmas."""

    karras = True


class LCM(Sampler):
    """Multistep latent consistency sampling: Luo et al. 2023, arXiv:2310.04378, algorithm 3."""

    def _prepare(self) -> None:
        origin = self.schedule.original_inference_steps
        if self.n > origin:
            raise InputError(f"num_inference_steps={self.n}; the lcm sampler takes 1 to original_inference_steps={origin}.")
        grid = (np.arange(1, origin + 1) * (self.total // origin) - 1)[::-1]
        self.timesteps = grid[np.floor(np.linspace(0, len(grid), self.n, endpoint=False)).astype(np.int64)].astype(np.int64)

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Noise]) -> Array:
        t = int(self.timesteps[i])
        x0, _ = self._x0_eps(self.alpha_bar[t], output, x)
        if self.schedule.clip_sample is True:
            x0 = np.clip(x0, -self.schedule.clip_sample_range, self.schedule.clip_sample_range)
        scaled = t * self.schedule.timestep_scaling
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        x0 = F32(out) * x0 + F32(skip) * x
        if i == self.n - 1:
            return x0
        a = self.alpha_bar[int(self.timesteps[i + 1])]
        return np.sqrt(a) * x0 + np.sqrt(F32(1) - a) * self._draw(noise, x)


SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIM,
    "pndm": PNDM,
    "euler": Euler,
    "euler-karras": EulerKarras,
    "euler-ancestral": EulerAncestral,
    "dpm++2m": DPMSolverPP2M,
    "dpm++2m-karras": DPMSolverPP2MKarras,
    "lcm": LCM,
}
_DIFFUSERS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "LCMScheduler": "lcm",
}


def sampler_of(config: dict[str, Any]) -> str:
    """diffusers' scheduler config -> our sampler's name; a setting that we do not have is an error, never a stand-in."""
    name = config.get("_class_name")
    if name not in _DIFFUSERS:
        raise UnknownNameError(f"scheduler {name!r} is not supported; choose one with sampler=: {', '.join(SAMPLERS)}.")
    unsupported = {
        "use_exponential_sigmas": (None, False), "use_beta_sigmas": (None, False), "use_flow_sigmas": (None, False),
        "use_lu_lambdas": (None, False), "interpolation_type": (None, "linear"), "final_sigmas_type": (None, "zero"),
        "algorithm_type": (None, "dpmsolver++"), "solver_order": (None, 2), "solver_type": (None, "midpoint"),
        "timestep_type": (None, "discrete"), "euler_at_final": (None, False), "lower_order_final": (None, True),
        "sigma_min": (None,), "sigma_max": (None,),
    }  # fmt: skip
    for k, accepted in unsupported.items():
        if config.get(k) not in accepted:
            raise InputError(
                f"scheduler config: {k}={config[k]!r} is not supported (only {accepted[-1]!r}); choose a sampler with sampler=."
            )
    if name == "PNDMScheduler" and not config.get("skip_prk_steps", False):
        raise InputError("scheduler config: PNDMScheduler with skip_prk_steps=False is not supported; set it to true or pass sampler=.")
    karras = "-karras" if config.get("use_karras_sigmas") else ""
    return _DIFFUSERS[name] + karras


def get_sampler(name: str, schedule: Schedule, num_inference_steps: int) -> Sampler:
    if name not in SAMPLERS:
        raise UnknownNameError(f"sampler={name!r} is not known; choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name](schedule, num_inference_steps)


def denoise(unet: Callable[..., np.ndarray], latents: np.ndarray, embeds: np.ndarray, noise: Sequence[Noise], solver: Sampler, *,
            uncond: np.ndarray | None = None, guidance_scale: float = 1.0) -> Iterator[np.ndarray]:  # fmt: skip
    """The sampling loop: unit normal latents (B, C, h, w) and embeds (B, L, D) -> latents after each step of `solver`.

    Args:
        unet: called with the names of the U-Net's IOSpec; guided steps are one call with 2 B rows, the negative prompt's first.
        noise: the images' generators, for samplers that draw again.
        uncond: embeds (B, L, D) of the negative prompt; None runs without guidance.
    """
    x = latents * np.float32(solver.init_noise_sigma)
    both = embeds if uncond is None else np.concatenate([uncond, embeds])
    for i, t in enumerate(solver.timesteps):
        scaled = solver.scale_model_input(i, x)
        rows = scaled if uncond is None else np.concatenate([scaled, scaled])
        out = unet(sample=rows, timestep=np.array(t, np.float32), encoder_hidden_states=both)
        if uncond is not None:
            without, with_prompt = np.split(out, 2)
            out = guide(without, with_prompt, guidance_scale)
        x = solver.step(i, out, x, noise)
        yield x
