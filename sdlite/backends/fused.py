"""A UNet as three graphs on onnxruntime, made by `sdlite.exporters.rewrites.hoist`: what depends on
the timestep, on the prompt, and the rest.

Over a sampling loop the first is the same for every image, and the second in every step; each is
computed once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
GRAPHS = ("time", "prompt", "step")
TIMES = 1024  # that are remembered: as many as a schedule has


class Hoisted:
    """The three graphs as one network. Prompts and timesteps are remembered: `keep` of the first,
    `TIMES` of the second.
    """

    def __init__(
        self, time: Run, prompt: Run, step: Run, step_inputs: list[str], output: str, keep: int = 8
    ):
        self.step, self.output = step, output
        self.direct = [n for n in ("timestep", "encoder_hidden_states") if n in step_inputs]
        self._time, self._prompt = _Remembered(time, TIMES), _Remembered(prompt, keep)

    def __call__(
        self, *, sample: np.ndarray, timestep: np.ndarray, encoder_hidden_states: np.ndarray
    ) -> np.ndarray:
        given = {"timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        inputs = {
            "sample": sample,
            **{n: given[n] for n in self.direct},
            **self._time(float(timestep), {"timestep": timestep}),
            **self._prompt(
                (encoder_hidden_states.shape, encoder_hidden_states.tobytes()),
                {"encoder_hidden_states": encoder_hidden_states},
            ),
        }
        return self.step(inputs)[self.output]


class _Remembered:
    """A graph whose `keep` answers made last are kept. Two threads that ask for the same new one
    both compute it.
    """

    def __init__(self, run: Run, keep: int):
        self.run, self.keep = run, keep
        self._held: dict[Any, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __call__(self, key: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
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
