"""What a call says of single steps: its own timesteps or noise levels, and the noise of a step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sdlite import arguments
from sdlite.errors import InputError


@dataclass(frozen=True)
class Control:
    """Timesteps, sigmas and eta of a call, under diffusers' names.

    Attributes:
        timesteps: what the network is given, one entry a step, descending; None: the sampler's own.
        sigmas: noise levels, descending: where each step starts, and where the last one ends (0 in
            most lists), so one entry more than steps. None: the sampler's own.
        eta: 0 to 1: how much noise is drawn again in each step. DDIM's eta (arXiv:2010.02502, eq.
            16) and TCD's gamma (arXiv:2402.19159).
    """

    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    eta: float = 0.0

    @classmethod
    def of(cls, timesteps: object = None, sigmas: object = None, eta: object = None) -> Control:
        """What a call was given; None asks for nothing.

        Raises:
            InputError: not lists of descending numbers from 0 up, both lists, or an eta outside 0
                to 1.
        """
        if timesteps is not None and sigmas is not None:
            raise InputError("timesteps and sigmas are both given; give one of them.")
        return cls(
            None if timesteps is None else _descending("timesteps", timesteps, 1),
            None if sigmas is None else _descending("sigmas", sigmas, 2),
            0.0 if eta is None else arguments.number("eta", eta, 0, 1),
        )

    @property
    def count(self) -> int | None:
        """How many steps the lists ask for; None where there is no list."""
        if self.timesteps is not None:
            return len(self.timesteps)
        return None if self.sigmas is None else len(self.sigmas) - 1

    def steps(self, asked: int | None, own: int) -> int:
        """The steps of a call that asks for so many, by a model that makes `own` of itself.

        Raises:
            InputError: a list of another number of steps.
        """
        count = self.count
        if count is None:
            return own if asked is None else asked
        if asked not in (None, count):
            many, what = (
                (count, "timesteps")
                if self.sigmas is None
                else (count + 1, "sigmas, the last of which ends the last step,")
            )
            raise InputError(
                f"num_inference_steps={asked}, but {many} {what} are {count} steps; leave"
                " num_inference_steps out."
            )
        return count

    def said(self) -> dict[str, str]:
        """What an image's file keeps of it: name -> value; nothing of what was not asked for."""
        given: dict[str, tuple[float, ...]] = {
            "timesteps": self.timesteps or (),
            "sigmas": self.sigmas or (),
            "eta": (self.eta,) if self.eta else (),
        }
        return {k: ",".join(f"{x:g}" for x in v) for k, v in given.items() if v}


def _descending(name: str, value: object, least: int) -> tuple[float, ...]:
    """Numbers from 0 up, at least so many of them."""
    out = arguments.numbers(name, value, 0)
    if len(out) < least:
        raise InputError(
            f"{name} has {len(out)} entry; accepted: at least {least}, the noise at the start of"
            " each step and at the end of the last."
        )
    for i, (before, after) in enumerate(itertools.pairwise(out)):
        if after >= before:
            raise InputError(
                f"{name}[{i + 1}]={after:g} comes after {before:g}; accepted: descending numbers,"
                " each smaller than the one before."
            )
    return tuple(out)


def within(timesteps: Sequence[float], total: int, whole: bool) -> None:
    """Refuse timesteps that a schedule of `total` training timesteps does not have.

    Raises:
        InputError: one of `total` or more, or a fraction where the sampler looks them up in a table
            (`whole`).
    """
    for i, t in enumerate(timesteps):
        if t > total - 1 or (whole and t != int(t)):
            kind = "whole numbers" if whole else "numbers"
            raise InputError(
                f"timesteps[{i}]={t:g}; accepted: descending {kind}, 0 to {total - 1}"
                " (num_train_timesteps of the model's scheduler less 1)."
            )
