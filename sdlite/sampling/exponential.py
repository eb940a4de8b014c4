"""Samplers that integrate exponentially in lambda: DPM-Solver++, DEIS, UniPC.

Notation as in `solvers`: x = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, and
lambda = log(alpha / sigma).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from sdlite.sampling.noise import Draws
from sdlite.sampling.schedule import DEFAULTS, STEPS_OFFSET
from sdlite.sampling.solvers import F32, Array, SigmaSampler


class _Exponential(SigmaSampler):
    """What DPM-Solver++, DEIS and UniPC share."""

    def _prepare(self) -> None:
        table, asked = self._table(), self._asked()
        t = self._times(table) if asked is None else asked
        if self.karras:
            sigmas = self._karras(table[-1], table[0])
            t = self._whole(self._sigma_to_t(sigmas, table))
        else:
            sigmas = np.interp(t, np.arange(len(table)), table)
        self.timesteps, self.n = t.astype(np.int64), len(t)
        self.sigmas = np.append(sigmas, self._end(sigmas, table)).astype(F32)
        self._distinct()
        s = self.sigmas.astype(np.float64)
        self.alpha = 1 / np.sqrt(s**2 + 1)
        self.sigma = s * self.alpha
        with np.errstate(divide="ignore"):
            self.lam = np.log(self.alpha) - np.log(self.sigma)
        self._past: list[Array] = []

    def _whole(self, t: Array) -> Array:
        return t.round()

    def _end(self, sigmas: Array, table: Array) -> float:
        return self._last_sigma(table)

    def _clipped(self, table: Array) -> int:
        """How many of the noisiest timesteps have a lambda below `lambda_min_clipped`."""
        known = "lambda_min_clipped" in DEFAULTS[self.diffusers]
        least = self._setting("lambda_min_clipped") if known else -np.inf
        return int(np.searchsorted(-np.log(table[::-1]), least))

    def _times(self, table: Array) -> Array:
        """Descending whole timesteps; the last step ends below the last of them."""
        n, last = self.n, self.total - self._clipped(table)
        if self.timestep_spacing == "linspace":
            return np.linspace(0, last - 1, n + 1).round()[::-1][:-1]
        if self.timestep_spacing == "leading":
            return (np.arange(0, n + 1) * float(last // (n + 1)))[::-1][:-1] + STEPS_OFFSET
        return np.arange(last, 0, -self.total / n).round() - 1

    def add_noise(self, i: int, x0: Array, noise: Array) -> Array:
        return F32(self.alpha[i]) * x0 + F32(self.sigma[i]) * noise

    def predicted(self, i: int, output: Array, x: Array) -> Array:
        return self._x0(i, output, x)

    def _x0(self, i: int, output: Array, x: Array) -> Array:
        alpha, sigma = F32(self.alpha[i]), F32(self.sigma[i])
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            return (x - sigma * output) / alpha
        return output if kind == "sample" else alpha * x - sigma * output

    def _remember(self, i: int, value: Array) -> list[Array]:
        """The last three values, newest last; the first step begins anew."""
        self._past = [*([] if i == self.begin else self._past[-2:]), value]
        return self._past


class DPMSolverPP2M(_Exponential):
    """DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095, algorithm 2."""

    diffusers = "DPMSolverMultistepScheduler"
    takes = ("timesteps",)
    order: ClassVar[int] = 2
    sde: ClassVar[bool] = False

    def _prepare(self) -> None:
        super()._prepare()
        self.heun = self._setting("solver_type") == "heun"

    def _whole(self, t: Array) -> Array:
        return t if self.schedule.beta_schedule == "squaredcos_cap_v2" else t.round()

    def _order(self, i: int) -> int:
        """Of step i: rising from 1; falling at the end where steps are few or it ends at 0."""
        left, few = self.n - i, self._setting("lower_order_final") and self.n < 15
        if left == 1 and (few or self._setting("euler_at_final") or self.sigmas[-1] == 0):
            return 1
        return min(self.order, i - self.begin + 1, 2 if left == 2 and few else 3)

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        past, order = self._remember(i, self._x0(i, output, x)), self._order(i)
        h, alpha = self.lam[i + 1] - self.lam[i], self.alpha[i + 1]
        ratio = self.sigma[i + 1] / self.sigma[i] * (np.exp(-h) if self.sde else 1.0)
        twice = 2 * h if self.sde else h
        gain = -alpha * np.expm1(-twice)
        out = F32(ratio) * x + F32(gain) * past[-1]
        if order == 2:
            r = (self.lam[i] - self.lam[i - 1]) / h
            weight = alpha * (np.expm1(-twice) / twice + 1) if self.heun else 0.5 * gain
            out = out + F32(weight / r) * (past[-1] - past[-2])
        elif order == 3:
            out = out + self._third(i, h, past)
        if self.sde:
            out = out + F32(self.sigma[i + 1] * np.sqrt(-np.expm1(-2 * h))) * self._draw(noise, x)
        return out

    def _third(self, i: int, h: float, past: list[Array]) -> Array:
        """What the third order adds to the first."""
        lam, alpha = self.lam, self.alpha[i + 1]
        r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
        d0, d1 = (past[-1] - past[-2]) / F32(r0), (past[-2] - past[-3]) / F32(r1)
        first, second = d0 + F32(r0 / (r0 + r1)) * (d0 - d1), (d0 - d1) / F32(r0 + r1)
        phi = np.expm1(-h) / h + 1
        return F32(alpha * phi) * first - F32(alpha * (phi / h - 0.5)) * second


class DPMSolverPP2MSDE(DPMSolverPP2M):
    """SDE-DPM-Solver++(2M): arXiv:2211.01095, appendix; noise is drawn in every step."""

    sde = True


class DPMSolverPP3M(DPMSolverPP2M):
    """DPM-Solver++ of third order, multistep."""

    order = 3


class DPMSolverPP2S(_Exponential):
    """DPM-Solver++(2S), singlestep: arXiv:2211.01095, algorithm 1; every other step has order 2."""

    diffusers = "DPMSolverSinglestepScheduler"
    takes = ("timesteps",)
    looks_back = 2

    def _prepare(self) -> None:
        super()._prepare()
        self.heun = self._setting("solver_type") == "heun"
        # diffusers turns lower_order_final on where the steps are odd, or end at 0
        self.orders = [1, 2] * (self.n // 2) + [1] * (self.n % 2)
        if self._setting("lower_order_final") or self.n % 2 or self.sigmas[-1] == 0:
            self.orders[-1] = 1

    def _times(self, table: Array) -> Array:
        return np.linspace(0, self.total - 1 - self._clipped(table), self.n + 1).round()[::-1][:-1]

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        past = self._remember(i, self._x0(i, output, x))
        two = self.orders[i] == 2 and i > self.begin
        start = i - 1 if two else i
        if not two:
            self._start = x
        h, alpha = self.lam[i + 1] - self.lam[start], self.alpha[i + 1]
        gain = -alpha * np.expm1(-h)
        out: Array = F32(self.sigma[i + 1] / self.sigma[start]) * self._start
        out = out + F32(gain) * past[-2 if two else -1]
        if two:
            r = (self.lam[i] - self.lam[i - 1]) / h
            weight = alpha * (np.expm1(-h) / h + 1) if self.heun else 0.5 * gain
            out = out + F32(weight / r) * (past[-1] - past[-2])
        return out


class DEIS(_Exponential):
    """DEIS, log-rho multistep of second order: Zhang and Chen 2022, arXiv:2204.13902, eq. 15."""

    diffusers = "DEISMultistepScheduler"

    def _end(self, sigmas: Array, table: Array) -> float:
        return float(sigmas[-1] if self.karras else table[0])

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        alpha, sigma = self.alpha, self.sigma
        eps = (x - F32(alpha[i]) * self._x0(i, output, x)) / F32(sigma[i])
        past = self._remember(i, eps)
        if i == self.begin or (
            i == self.n - 1 and self.n < 15 and self._setting("lower_order_final")
        ):
            gain = sigma[i + 1] * np.expm1(self.lam[i + 1] - self.lam[i])
            return F32(alpha[i + 1] / alpha[i]) * x - F32(gain) * eps
        to, s0, s1 = (float(self.sigmas[k]) for k in (i + 1, i, i - 1))
        first = _log_linear(to, s0, s1) - _log_linear(s0, s0, s1)
        second = _log_linear(to, s1, s0) - _log_linear(s0, s1, s0)
        out = x / F32(alpha[i]) + F32(first) * past[-1] + F32(second) * past[-2]
        return F32(alpha[i + 1]) * out


def _log_linear(t: float, b: float, c: float) -> float:
    """Antiderivative in t of the function of log t that is 1 at b and 0 at c."""
    return float(t * (np.log(t) - np.log(c) - 1) / (np.log(b) - np.log(c)))


class UniPC(_Exponential):
    """UniPC, B(h) = exp(h) - 1 ("bh2"): Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 5."""

    diffusers = "UniPCMultistepScheduler"

    def _prepare(self) -> None:
        super()._prepare()
        self.order = self._setting("solver_order", (1, 2, 3))

    def _end(self, sigmas: Array, table: Array) -> float:
        last = self._last_sigma(table)
        return float(sigmas[-1]) if self.karras and last else last

    def step(self, i: int, output: Array, x: Array, noise: Sequence[Draws]) -> Array:
        x0 = self._x0(i, output, x)
        if i > self.begin:
            x = self._correct(i - 1, x0)
        self._remember(i, x0)
        self._start, self._used = x, min(self.order, self.n - i, i - self.begin + 1)
        return self._move(i, *self._predictor(i))

    def _correct(self, i: int, now: Array) -> Array:
        """x at the end of step i again, now that x_0 there is known."""
        rows, right, differences = self._system(i)
        weights = np.array([0.5]) if self._used == 1 else np.linalg.solve(rows, right)
        return self._move(i, weights, [*differences, now - self._past[-1]])

    def _predictor(self, i: int) -> tuple[Array, list[Array]]:
        rows, right, differences = self._system(i)
        if self._used == 2:
            return np.array([0.5]), differences
        return np.linalg.solve(rows[:-1, :-1], right[:-1]), differences

    def _move(self, i: int, weights: Array, differences: list[Array]) -> Array:
        """x at the end of step i."""
        alpha, phi = self.alpha[i + 1], np.expm1(self.lam[i] - self.lam[i + 1])
        ratio = F32(self.sigma[i + 1] / self.sigma[i])
        out = ratio * self._start - F32(alpha * phi) * self._past[-1]
        for weight, difference in zip(weights, differences, strict=True):
            out = out - F32(alpha * phi * weight) * difference
        return out

    def _system(self, i: int) -> tuple[Array, Array, list[Array]]:
        """R and b of eq. 10 for step i, and the differences D of earlier x_0."""
        order, h = self._used, self.lam[i + 1] - self.lam[i]
        r = np.array([(self.lam[i - k] - self.lam[i]) / h for k in range(1, order)] + [1.0])
        past = self._past
        differences = [(past[-1 - k] - past[-1]) / F32(r[k - 1]) for k in range(1, order)]
        rows = np.stack([r**k for k in range(order)])
        phi, factorial, right = np.expm1(-h) / -h - 1, 1.0, []
        for k in range(1, order + 1):
            right.append(phi * factorial / np.expm1(-h))
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        return rows, np.array(right), differences
