"""A UNet as three graphs on onnxruntime, made by `sdlite.exporters.rewrites.hoist`: what depends on
the timestep, on the prompt, and the rest.

Over a sampling loop the first is the same for every image, and the second in every step; each is
computed once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import numpy as np

from sdlite.spec import Arrays

Run = Callable[[Arrays], Arrays]
GRAPHS = ("time", "prompt", "step")
TIMES = 1024  # that are remembered: as many as a schedule has


class Hoisted:
    """The three graphs as one network. Prompts and timesteps are remembered: `keep` of the first,
    `TIMES` of the second.
    """

    def __init__(
        self,
        time: Run,
        prompt: Run,
        step: Run,
        step_inputs: list[str],
        output: str,
        keep: int = 8,
        tokens: int | None = None,
    ):
        self.step, self.output, self.tokens = step, output, tokens
        self.direct = [n for n in ("timestep", "encoder_hidden_states") if n in step_inputs]
        self._time, self._prompt = _Remembered(time, TIMES), _Remembered(prompt, keep)

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        """sample (B, C, h, w), timestep () and encoder_hidden_states (B, L, D) -> (B, C, h, w)."""
        time, text = inputs["timestep"], inputs["encoder_hidden_states"]
        given = {
            "sample": inputs["sample"],
            **{n: inputs[n] for n in self.direct},
            **self._time(float(time), {"timestep": time}),
            **self._prompt((text.shape, text.tobytes()), {"encoder_hidden_states": text}),
        }
        return {self.output: self.step(given)[self.output]}


class _Remembered:
    """A graph whose `keep` answers made last are kept. Two threads that ask for the same new one
    both compute it.
    """

    def __init__(self, run: Run, keep: int):
        self.run, self.keep = run, keep
        self._held: dict[Hashable, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __call__(self, key: Hashable, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._lock:
            found = self._held.get(key)
        if found is not None:
            return found
        made = self.run(inputs)
        with self._lock:
            while len(self._held) >= self.keep:
                del self._held[next(iter(self._held))]
            self._held[key] = made
        return made
