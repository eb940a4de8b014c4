"""The sampling loop and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from sdlite.errors import InputError
from sdlite.sampling.noise import Draws
from sdlite.sampling.solvers import Sampler

T = TypeVar("T")
Array = np.ndarray


def guide(uncond: T, cond: T, guidance_scale: float) -> T:
    """u + g (c - u): Ho and Salimans 2022, arXiv:2207.12598, in diffusers' convention, where g = 1
    is c.

    Args:
        uncond, cond: network outputs without and with the prompt, float32 of one shape; arrays of
            numpy or of torch.
    """
    u: Any = uncond
    return cast(T, u + guidance_scale * (cast(Any, cond) - u))


def guided(guidance_scale: float) -> bool:
    """Whether g asks for guidance: above 1, as in diffusers.

    Raises:
        InputError: NaN, infinite or negative.
    """
    if not (0 <= guidance_scale < float("inf")):
        said = "is not a finite number from 0 up; 0 to 1 is no guidance"
        raise InputError(f"guidance_scale={guidance_scale} {said}.")
    return guidance_scale > 1


def denoise(
    unet: Callable[..., Array],
    latents: Array,
    conditions: Array | Mapping[str, Array],
    noise: Sequence[Draws],
    solver: Sampler,
    *,
    uncond: Array | Mapping[str, Array] | None = None,
    guidance_scale: float = 1.0,
    noised: bool = False,
    beside: Array | None = None,
    after: Callable[[int, Array], Array] | None = None,
    watch: Callable[[int, Array], None] | None = None,
) -> Iterator[Array]:
    """The sampling loop: unit normal latents (B, C, h, w) -> latents after each network call.

    Args:
        unet: called with the names of the U-Net's IOSpec; guided steps are one call with 2 B rows,
            the negative prompt's first.
        conditions: name -> array with a row for each image, all that the U-Net is given besides
            latents and timestep; an array alone is `encoder_hidden_states` (B, L, D).
        noise: the images' generators, for samplers that draw again.
        uncond: the same of the negative prompt; None runs without guidance.
        guidance_scale: 0 to 1 runs without guidance too.
        noised: `latents` are x at the solver's first call already.
        beside: (B, E, h, w), channels that the U-Net takes after the latents, in every call.
        after: (call that comes next, x) -> x, done after each call.
        watch: (call, clean latents that are predicted there).
    """
    x = latents if noised else latents * np.float32(solver.init_noise_sigma)
    cond, without = _named(conditions), None if uncond is None else _named(uncond)
    if without is None or not guided(guidance_scale):
        without, both = None, cond
    else:
        both = {k: np.concatenate([without[k], cond[k]]) for k in cond}
    for i, t in enumerate(solver.timesteps[solver.begin :], solver.begin):
        scaled = solver.scale_model_input(i, x)
        if beside is not None:
            scaled = np.concatenate([scaled, beside], axis=1)
        rows = scaled if without is None else np.concatenate([scaled, scaled])
        out = unet(sample=rows, timestep=np.array(t, np.float32), **both)
        if without is not None:
            without_prompt, with_prompt = np.split(out, 2)
            out = guide(without_prompt, with_prompt, guidance_scale)
        if watch is not None:
            watch(i, solver.predicted(i, out, x))
        x = solver.step(i, out, x, noise)
        if after is not None:
            x = after(i + 1, x)
        yield x


def _named(conditions: Array | Mapping[str, Array]) -> Mapping[str, Array]:
    if isinstance(conditions, Mapping):
        return conditions
    return {"encoder_hidden_states": conditions}
