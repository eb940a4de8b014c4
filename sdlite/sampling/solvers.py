"""Samplers: one solver over one schedule.

Notation: `a` is alpha-bar_t, a latent is x_t = sqrt(a) x_0 + sqrt(1-a) eps, sigma = sqrt((1-a)/a),
lambda = -log(sigma), and v = sqrt(a) eps - sqrt(1-a) x_0 (Salimans and Ho 2022, arXiv:2202.00512).
Every sampler equals diffusers' scheduler class over whole loops (tests/parity).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from sdlite.errors import InputError
from sdlite.sampling.control import Control, within
from sdlite.sampling.noise import Draws
from sdlite.sampling.schedule import DEFAULTS, STEPS_OFFSET, Schedule

Array = np.ndarray
F32 = np.float32


class Sampler:
    """One solver over one schedule: a subclass fills in `_prepare` and `step`.

    Attributes:
        diffusers: the scheduler class that it equals, and whose defaults hold.
        takes: what of `Control` it accepts: "timesteps", "sigmas", "eta".
        whole: its timesteps are indices of the schedule's table.
        control: what the call says of single steps.
        timesteps: what the network is given, one entry a network call.
        init_noise_sigma: scale of the first draw.
        calls: network calls of a step.
        begin: the first call that is made, see `begin_at`.
    """

    diffusers: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[bool] = True
    calls: ClassVar[int] = 1
    init_noise_sigma: float = 1.0
    begin: int = 0

    def __init__(
        self, schedule: Schedule, num_inference_steps: int, control: Control | None = None
    ):
        total = schedule.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise InputError(f"num_inference_steps={num_inference_steps}; accepted: 1 to {total}.")
        self.schedule, self.n, self.total = schedule, num_inference_steps, total
        self.control = control or Control()
        self.alpha_bar = schedule.alphas_cumprod()
        self.timesteps: Array = np.zeros(0)
        self._prepare()

    def _prepare(self) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.timesteps)

    def first_call(self, strength: float) -> int:
        """The call that image to image begins with: the last `strength` of the steps is made, as in
        diffusers' `get_timesteps`. The number of calls where none is.

        Args:
            strength: 0 to 1.
        """
        steps = min(int(self.n * strength), self.n)
        return (self.n - steps) * self.calls if steps else len(self)

    def begin_at(self, call: int) -> None:
        """Make the calls from this one on; x is then `add_noise` of it.

        Raises:
            InputError: this solver begins with its first call alone.
        """
        self.begin = call

    def add_noise(self, i: int, x0: Array, noise: Array) -> Array:
        """x at call i of clean latents.

        Args:
            x0, noise: (B, C, h, w), noise unit normal.
        """
        a = self.alpha_bar[int(self.timesteps[i])]
        return np.sqrt(a) * x0 + np.sqrt(F32(1) - a) * noise

    def predicted(self, i: int, output: Array, x: Array) -> Array:
        """The clean latents x_0 that the network's output at call i stands for."""
        return self._x0_eps(self.alpha_bar[int(self.timesteps[i])], output, x)[0]

    def scale_model_input(self, i: int, x: Array) -> Array:
        """x (B, C, h, w) as the network takes it at call i."""
        return x

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        """x at call i and the network's output there -> x at call i + 1.

        Args:
            noise: one generator per image.
        """
        raise NotImplementedError

    def _setting(self, key: str, accepted: Sequence[Any] | None = None) -> Any:
        """What the file says, else the class's default in diffusers.

        Raises:
            InputError: not one of `accepted`.
        """
        value = self.schedule.settings.get(key)
        value = DEFAULTS[self.diffusers][key] if value is None else value
        if accepted is not None and value not in accepted:
            shown = ", ".join(map(repr, accepted))
            raise InputError(
                f"scheduler config: {key}={value!r}; accepted: {shown}. Correct the file, or take "
                "a sampler that does not read it, such as sampler='ddim' (--sampler ddim)."
            )
        return value

    @property
    def timestep_spacing(self) -> str:
        """How timesteps are spread: "linspace", "leading" or "trailing" (arXiv:2305.08891)."""
        return str(self._setting("timestep_spacing"))

    def _asked(self) -> Array | None:
        """The call's own timesteps, float64.

        Raises:
            InputError: not of this schedule.
        """
        if self.control.timesteps is None:
            return None
        within(self.control.timesteps, self.total, self.whole)
        return np.array(self.control.timesteps)

    def _grid(self) -> Array:
        """Descending int64 timesteps, each an index of the schedule's table."""
        if (asked := self._asked()) is not None:
            return asked.astype(np.int64)
        t = np.round(_spaced(self.timestep_spacing, self.n, self.total)).astype(np.int64)
        if t[0] >= self.total:
            raise InputError(
                f"num_inference_steps={self.n}; accepted: 1 to {self.total - 1} with "
                f"timestep_spacing 'leading', whose last timestep is {STEPS_OFFSET}."
            )
        return t

    def _final_alpha(self) -> F32:
        return F32(1) if self._setting("set_alpha_to_one") else self.alpha_bar[0]

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
    def _draw(noise: Sequence[Draws], x: Array) -> Array:
        return np.stack([n.normal(x.shape[1:]) for n in noise])


def _spaced(spacing: str, n: int, total: int) -> Array:
    """Descending float64 timesteps, unrounded for linspace: arXiv:2305.08891, table 2."""
    if spacing == "linspace":
        return np.linspace(0, total - 1, n)[::-1]
    if spacing == "leading":
        return np.arange(0, n)[::-1] * float(total // n) + STEPS_OFFSET
    return np.round(np.arange(total, 0, -total / n)) - 1


class DDIM(Sampler):
    """Song et al. 2020, arXiv:2010.02502, eq. 12; with an eta noise is drawn in every step."""

    diffusers = "DDIMScheduler"
    takes = ("eta",)

    def _prepare(self) -> None:
        self.timesteps, self.final = self._grid(), self._final_alpha()

    def _alpha_before(self, t: int) -> F32:
        return self.alpha_bar[t] if t >= 0 else self.final

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        t = int(self.timesteps[i])
        x0, eps = self._x0_eps(self.alpha_bar[t], output, x)
        a = self._alpha_before(t - self.total // self.n)
        if not self.control.eta:
            return np.sqrt(a) * x0 + np.sqrt(F32(1) - a) * eps
        variance = (F32(1) - a) / (F32(1) - self.alpha_bar[t]) * (F32(1) - self.alpha_bar[t] / a)
        spread = F32(self.control.eta) * np.sqrt(np.maximum(variance, F32(0)))
        along = np.sqrt(np.maximum(F32(1) - a - spread**2, F32(0)))
        return np.sqrt(a) * x0 + along * eps + spread * self._draw(noise, x)


class DDPM(Sampler):
    """Ho et al. 2020, arXiv:2006.11239, eq. 7, with the posterior's variance ("fixed_small")."""

    diffusers = "DDPMScheduler"
    takes = ("timesteps",)

    def _prepare(self) -> None:
        self.timesteps = self._grid()

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        a, one = self.alpha_bar[self.timesteps[i]], F32(1)
        to = one if i == self.n - 1 else self.alpha_bar[self.timesteps[i + 1]]
        x0, _ = self._x0_eps(a, output, x)
        alpha = a / to
        left = (one - to) / (one - a)
        x = np.sqrt(to) * (one - alpha) / (one - a) * x0 + np.sqrt(alpha) * left * x
        if self.timesteps[i] == 0:
            return x
        return x + np.sqrt(np.maximum(left * (one - alpha), F32(1e-20))) * self._draw(noise, x)


class PNDM(Sampler):
    """Pseudo linear multistep: Liu et al. 2022, arXiv:2202.09778, eq. 12, as SD-1.x ships it.

    Without Runge-Kutta steps the second step is taken twice: its first result only improves the
    estimate of the slope.
    """

    diffusers = "PNDMScheduler"
    runge_kutta: ClassVar[bool] = False

    def _prepare(self) -> None:
        if self.schedule.rescale_betas_zero_snr:
            raise InputError(
                "sampler 'pndm' divides by the signal's share, which is 0 at zero terminal SNR; "
                "choose one of ddim, euler, heun, dpm++2m and unipc (sampler=, --sampler)."
            )
        if self.runge_kutta and self.n < 4:
            raise InputError(
                f"num_inference_steps={self.n}; sampler 'pndm-rk' takes 4 or more (its first three "
                "steps are Runge-Kutta's); with fewer choose 'pndm'."
            )
        s = self._grid()
        self.final, self.half = self._final_alpha(), self.total // self.n // 2
        if self.runge_kutta:  # each of the first three steps has four calls, two of them half way
            first = [(a, b + self.half, b + self.half, b) for a, b in itertools.pairwise(s[:4])]
            self.timesteps = np.concatenate([np.ravel(first), s[3:]])
        else:
            self.timesteps = np.concatenate([s[:1], s[1:2], s[1:]]) if self.n > 1 else s
        self._reset()

    def begin_at(self, call: int) -> None:
        if self.runge_kutta and call:
            raise InputError(
                "sampler 'pndm-rk' begins with its Runge-Kutta steps, so it makes no part of a"
                " schedule; choose another one, such as 'pndm' (sampler=, --sampler)."
            )
        super().begin_at(call)

    def _reset(self) -> None:
        self._slopes: list[Array] = []
        self._held: Array | None = None
        self._mean: Array | F32 = F32(0)

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        made = i - self.begin
        if made == 0:
            self._reset()
        if self.runge_kutta and i < 12:
            return self._runge_kutta(i, output, x)
        stride, t = self.total // self.n, int(self.timesteps[i])
        before = t - stride
        if made == 1:
            before, t = t, t + stride
        else:
            self._slopes = [*self._slopes[-3:], output]
        if made == 0:
            self._held = x
        elif made == 1:
            assert self._held is not None
            output, x, self._held = (output + self._slopes[-1]) / F32(2), self._held, None
        else:
            output = self._extrapolated()
        return self._transfer(t, before, output, x)

    def _extrapolated(self) -> Array:
        """The slope from the last two to four: Adams and Bashforth."""
        e = self._slopes
        if len(e) == 2:
            return (3 * e[-1] - e[-2]) / F32(2)
        if len(e) == 3:
            return (23 * e[-1] - 16 * e[-2] + 5 * e[-3]) / F32(12)
        return F32(1 / 24) * (55 * e[-1] - 59 * e[-2] + 37 * e[-3] - 9 * e[-4])

    def _runge_kutta(self, i: int, output: Array, x: Array) -> Array:
        """One of four calls of a Runge-Kutta step: eq. 13."""
        call = i % 4
        if call == 0:
            self._slopes, self._held = [*self._slopes, output], x
        if call == 3:
            output, self._mean = self._mean + F32(1 / 6) * output, F32(0)
        else:
            self._mean = self._mean + F32(1 / 3 if call else 1 / 6) * output
        assert self._held is not None
        before = int(self.timesteps[i]) - (0 if i % 2 else self.half)
        return self._transfer(int(self.timesteps[i - call]), before, output, self._held)

    def _transfer(self, t: int, before: int, output: Array, x: Array) -> Array:
        """eq. 11: x at t -> x at `before` along `output`."""
        a, b = self.alpha_bar[t], self.alpha_bar[before] if before >= 0 else self.final
        if self.schedule.prediction_type == "v_prediction":
            output = np.sqrt(a) * output + np.sqrt(F32(1) - a) * x
        scale = a * np.sqrt(F32(1) - b) + np.sqrt(a * (F32(1) - a) * b)
        return np.sqrt(b / a) * x - (b - a) * output / scale


class PNDMRungeKutta(PNDM):
    """The whole of arXiv:2202.09778: diffusers' default where the file lacks `skip_prk_steps`."""

    runge_kutta = True


class Consistency(Sampler):
    """Samplers on the grid of consistency distillation, Luo et al. 2023, arXiv:2310.04378."""

    takes: ClassVar[tuple[str, ...]] = ("timesteps",)
    strength: float = 1.0  # the share of the noise that the steps are spread over

    def spread_over(self, strength: float) -> None:
        """Make all steps on the less noisy part of the grid, as diffusers'
        LatentConsistencyModelImg2ImgPipeline does, in place of a part of the steps.

        Raises:
            InputError: that part has fewer timesteps than there are steps.
        """
        self.strength = strength
        self._prepare()

    def _prepare(self) -> None:
        if (asked := self._asked()) is not None:
            self.timesteps = asked.astype(np.int64)
            return
        origin = self._setting("original_inference_steps")
        most = int(origin * self.strength)
        if self.n > most:
            said = f"this sampler takes 1 to original_inference_steps={origin}"
            said += f" times strength={self.strength:g}" if self.strength < 1 else ""
            raise InputError(f"num_inference_steps={self.n}; {said}.")
        grid = (np.arange(1, most + 1) * (self.total // origin) - 1)[::-1]
        chosen = np.floor(np.linspace(0, len(grid), self.n, endpoint=False)).astype(np.int64)
        self.timesteps = grid[chosen].astype(np.int64)


class LCM(Consistency):
    """Multistep latent consistency sampling: arXiv:2310.04378, algorithm 3."""

    diffusers = "LCMScheduler"

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        t = int(self.timesteps[i])
        x0, _ = self._x0_eps(self.alpha_bar[t], output, x)
        scaled = t * self._setting("timestep_scaling")
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        x0 = F32(out) * x0 + F32(skip) * x
        if i == self.n - 1:
            return x0
        a = self.alpha_bar[int(self.timesteps[i + 1])]
        return np.sqrt(a) * x0 + np.sqrt(F32(1) - a) * self._draw(noise, x)


class TCD(Consistency):
    """Trajectory consistency sampling, Zheng et al. 2024, arXiv:2402.19159, algorithm 4.

    gamma (`eta`) is 0 as in diffusers' pipeline, whose default it is: no noise is drawn again. With
    another each step goes down to (1 - gamma) of the next timestep, and noise brings it back.
    """

    diffusers = "TCDScheduler"
    takes = ("timesteps", "eta")

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        x0, eps = self._x0_eps(self.alpha_bar[int(self.timesteps[i])], output, x)
        to = 0 if i == self.n - 1 else int(self.timesteps[i + 1])
        eta = self.control.eta
        s = self.alpha_bar[int(np.floor(F32(1 - eta) * F32(to)))]
        x = np.sqrt(s) * x0 + np.sqrt(F32(1) - s) * eps
        if not eta or i == self.n - 1:
            return x
        back = self.alpha_bar[to] / s
        return np.sqrt(back) * x + np.sqrt(F32(1) - back) * self._draw(noise, x)


# --- samplers in sigma space


class SigmaSampler(Sampler):
    """Samplers in sigma space: `sigmas` (n + 1,) float32 are where each step starts and ends.

    With zero terminal SNR the largest sigma is 4096 instead of infinity, as in diffusers.
    """

    karras: ClassVar[bool] = False
    looks_back: ClassVar[int] = 1  # at the step before: in every step, or in every other one
    sigmas: Array

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
        """Karras et al. 2022, arXiv:2206.00364, eq. 5; the file's sigma_min and sigma_max win."""
        given = self.schedule.settings
        high, low = given.get("sigma_max", high), given.get("sigma_min", low)
        ramp = np.linspace(0, 1, self.n)
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho

    def _last_sigma(self, table: Array) -> float:
        """Where the last step ends: 0, or the table's smallest."""
        kind = self._setting("final_sigmas_type", ("zero", "sigma_min"))
        return 0.0 if kind == "zero" else float(table[0])

    def _distinct(self) -> None:
        """Refuse as many steps as repeat a timestep, which a multistep solver cannot divide by."""
        at = np.arange(1, self.n, self.looks_back)
        if (self.sigmas[at - 1] <= self.sigmas[at]).any():
            said = f"accepted: 1 to {self.total - 2}; more repeat a timestep"
            raise InputError(f"num_inference_steps={self.n}; {said}.")


class _KDiffusion(SigmaSampler):
    """k-diffusion's view: x = x_0 + sigma eps, and its slope in sigma."""

    whole = False

    def _prepare(self) -> None:
        table = self._table()
        if self.control.sigmas is None:
            self._space(table)
        else:
            self.sigmas = self._given_sigmas(table)
            self.timesteps = self._sigma_to_t(self.sigmas[:-1], table).astype(F32)
        top, unscaled = self.sigmas.max(), self.timestep_spacing in ("linspace", "trailing")
        self.init_noise_sigma = float(top if unscaled else np.sqrt(top**2 + 1))

    def _space(self, table: Array) -> None:
        """Timesteps and sigmas from the file's spacing, or from the call's timesteps."""
        asked = self._asked()
        spaced = _spaced(self.timestep_spacing, self.n, self.total) if asked is None else asked
        t = spaced.astype(F32)
        sigmas = self._levels(t, table)
        if self.karras:
            sigmas = self._karras(sigmas[0], sigmas[-1])
            t = self._sigma_to_t(sigmas, table).astype(F32)
        self.timesteps = t
        self.sigmas = np.append(sigmas, self._last_sigma(table)).astype(F32)

    def _given_sigmas(self, table: Array) -> Array:
        """The call's own sigmas. Published lists are rounded, so the first may be 1% above the
        table.

        Raises:
            InputError: noise that the model was not trained on.
        """
        sigmas, most = np.array(self.control.sigmas, F32), float(table[-1])
        if sigmas[0] > 1.01 * most:
            raise InputError(
                f"sigmas[0]={sigmas[0]:g}; accepted: up to {most:.4g}, the noise at the last"
                " training timestep of the model's scheduler."
            )
        return sigmas

    def _levels(self, t: Array, table: Array) -> Array:
        return np.interp(t, np.arange(len(table)), table)

    def _last_sigma(self, table: Array) -> float:
        return 0.0

    def add_noise(self, i: int, x0: Array, noise: Array) -> Array:
        return x0 + self.sigmas[i] * noise

    def predicted(self, i: int, output: Array, x: Array) -> Array:
        return self._x0(self.sigmas[i], output, x)

    def scale_model_input(self, i: int, x: Array) -> Array:
        """x (B, C, h, w) as the network takes it at call i."""
        return x / np.sqrt(self.sigmas[i] ** 2 + F32(1))

    def _x0(self, s: F32, output: Array, x: Array) -> Array:
        """The network's output at sigma = `s` as x_0."""
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            return x - s * output
        if kind == "sample":
            return output
        return output * (-s / np.sqrt(s**2 + F32(1))) + x / (s**2 + F32(1))

    def _slope(self, s: F32, output: Array, x: Array) -> Array:
        """dx / d sigma at sigma = `s`."""
        return (x - self._x0(s, output, x)) / s


class Euler(_KDiffusion):
    """Karras et al. 2022, arXiv:2206.00364, algorithm 1, no churn; k-diffusion `sample_euler`."""

    diffusers = "EulerDiscreteScheduler"
    takes = ("timesteps", "sigmas")

    def _levels(self, t: Array, table: Array) -> Array:
        if self._setting("interpolation_type", ("linear", "log_linear")) == "linear":
            return super()._levels(t, table)
        return np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), self.n + 1))

    def _last_sigma(self, table: Array) -> float:
        return SigmaSampler._last_sigma(self, table)

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        slope = self._slope(self.sigmas[i], output, x)
        return x + slope * (self.sigmas[i + 1] - self.sigmas[i])


class EulerAncestral(_KDiffusion):
    """k-diffusion `sample_euler_ancestral`, eta = 1."""

    diffusers = "EulerAncestralDiscreteScheduler"

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        s, to = self.sigmas[i], self.sigmas[i + 1]
        up = np.sqrt(to**2 * (s**2 - to**2) / s**2)
        down = np.sqrt(to**2 - up**2)
        slope = self._slope(s, output, x)
        return x + slope * (down - s) + self._draw(noise, x) * up


class Heun(_KDiffusion):
    """Karras et al. 2022, arXiv:2206.00364, algorithm 1: two calls a step, one in the last."""

    diffusers = "HeunDiscreteScheduler"
    takes = ("timesteps",)
    calls = 2
    _start: Array
    _first: Array

    def _prepare(self) -> None:
        super()._prepare()
        s = self.sigmas
        self.timesteps = np.concatenate([self.timesteps[:1], np.repeat(self.timesteps[1:], 2)])
        self.sigmas = np.concatenate([s[:1], np.repeat(s[1:-1], 2), s[-1:]])

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        slope = self._slope(self.sigmas[i], output, x)
        if i % 2 == 0:  # Euler's step
            self._start, self._first = x, slope
            return x + slope * (self.sigmas[i + 1] - self.sigmas[i])
        mean = (self._first + slope) / F32(2)
        return self._start + mean * (self.sigmas[i] - self.sigmas[i - 1])


class DPMSolverPPSDE(_KDiffusion):
    """SDE-DPM-Solver++ of second order, singlestep; k-diffusion `sample_dpmpp_sde`: two calls a
    step, one in the last.

    diffusers takes the noise from torchsde's Brownian tree, whose draws are its own; here the two
    increments of a step are drawn one after the other, which is the same distribution. So a seed's
    image is another one, and equal where the draws are.
    """

    diffusers = "DPMSolverSDEScheduler"
    calls = 2
    _start: Array
    _drawn: Array

    def _prepare(self) -> None:
        super()._prepare()
        if self.schedule.prediction_type == "sample":
            raise InputError(
                "sampler 'dpm++sde' has no prediction_type 'sample', as in diffusers; choose"
                " 'dpm++2m-sde' (sampler=, --sampler)."
            )
        self._distinct()
        s = self.sigmas.astype(np.float64)
        middle = np.sqrt(s[:-2] * s[1:-1])
        self._ends = s
        self.timesteps = np.insert(
            self.timesteps, np.arange(1, self.n), self._sigma_to_t(middle, self._table())
        ).astype(F32)
        # where each call is: start of a step, its middle in log sigma, start of the next, ...
        self.sigmas = np.append(np.insert(s[:-1], np.arange(1, self.n), middle), 0).astype(F32)

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        at, second = i // 2, i % 2
        x0 = self._x0(self.sigmas[i], output, x)
        if i == len(self) - 1:
            return x0
        start, end = self._ends[at], self._ends[at + 1]
        middle = np.sqrt(start * end)
        draw = self._draw(noise, x)
        if second:
            begun, left = np.sqrt(start - middle), np.sqrt(middle - end)
            draw = (F32(begun) * self._drawn + F32(left) * draw) / F32(np.sqrt(start - end))
            return self._move(start, end, self._start, x0, draw)
        self._start, self._drawn = x, draw
        return self._move(start, middle, x, x0, draw)

    def _move(self, s: float, to: float, x: Array, x0: Array, draw: Array) -> Array:
        """x at sigma `s` -> x at `to`, by the ancestral split of its noise."""
        up = min(to, float(np.sqrt(to**2 * (s**2 - to**2) / s**2)))
        down = np.sqrt(to**2 - up**2)
        return F32(down / s) * x + F32(1 - down / s) * x0 + F32(up) * draw


class LMS(_KDiffusion):
    """Linear multistep of order 4; k-diffusion `sample_lms`.

    In a part of a schedule the order rises from 1 again. diffusers weighs slopes there that it does
    not have, and its first steps are too short.
    """

    diffusers = "LMSDiscreteScheduler"
    _slopes: list[Array]

    def _prepare(self) -> None:
        super()._prepare()
        self._distinct()

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        past = [] if i == self.begin else self._slopes
        self._slopes = [*past[-3:], self._slope(self.sigmas[i], output, x)]
        for k, slope in enumerate(reversed(self._slopes)):
            x = x + F32(self._weight(i, k, len(self._slopes))) * slope
        return x

    def _weight(self, i: int, k: int, order: int) -> float:
        """The integral of Lagrange's k-th polynomial over step i, exact by two Gauss points."""
        s = self.sigmas.astype(np.float64)
        points, weights = np.polynomial.legendre.leggauss(2)
        half = (s[i + 1] - s[i]) / 2
        tau = s[i] + half * (points + 1)
        others = [s[i - j] for j in range(order) if j != k]
        values = np.prod([(tau - o) / (s[i - k] - o) for o in others], axis=0)
        return float(half * (weights * values).sum())
