"""Noise schedules, samplers, the noise draw and classifier-free guidance, in numpy.

Data: `seeds -> latents (B, C, h, w) float32`, then per step `network output, latents -> latents`.
`noise` draws, `schedule` reads diffusers' scheduler configs, `control` holds what a call says of
single steps, `solvers` and `exponential` integrate, `names` finds one of them, `loop` runs it.
Each sampler equals diffusers' scheduler class over whole loops (tests/parity).
"""

from sdlite.sampling.control import Control
from sdlite.sampling.loop import denoise, guide, guided
from sdlite.sampling.names import SAMPLERS, get_sampler, known_sampler, sampler_of
from sdlite.sampling.noise import Draws, Noise
from sdlite.sampling.schedule import Schedule
from sdlite.sampling.solvers import Consistency, Sampler

__all__ = [
    "SAMPLERS",
    "Consistency",
    "Control",
    "Draws",
    "Noise",
    "Sampler",
    "Schedule",
    "denoise",
    "get_sampler",
    "guide",
    "guided",
    "known_sampler",
    "sampler_of",
]
