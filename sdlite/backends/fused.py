"""A UNet as three graphs on onnxruntime, made by `sdlite.exporters.hoist`: what depends on the timestep, on the prompt, and the rest.

Over a sampling loop the first is the same for every image, and the second in every step; each is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
GRAPHS = ("time", "prompt", "step")


class Hoisted:
    """The three graphs as one network. Prompts and timesteps are remembered: `keep` of the first, all of the second."""

    def __init__(self, time: Run, prompt: Run, step: Run, step_inputs: list[str], output: str, keep: int = 8):
        self.time, self.prompt, self.step, self.output, self.keep = time, prompt, step, output, keep
        self.direct = [n for n in ("timestep", "encoder_hidden_states") if n in step_inputs]
        self._times: dict[float, dict[str, np.ndarray]] = {}
        self._prompts: dict[bytes, dict[str, np.ndarray]] = {}

    def __call__(self, *, sample: np.ndarray, timestep: np.ndarray, encoder_hidden_states: np.ndarray) -> np.ndarray:
        t, key = float(timestep), encoder_hidden_states.tobytes()
        if t not in self._times:
            self._times[t] = self.time({"timestep": timestep})
        if key not in self._prompts:
            while len(self._prompts) >= self.keep:
                del self._prompts[next(iter(self._prompts))]
            self._prompts[key] = self.prompt({"encoder_hidden_states": encoder_hidden_states})
        given = {"timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        inputs = {
            "sample": sample,
            **{n: given[n] for n in self.direct},
            **self._times[t],
            **self._prompts[key],
        }
        return self.step(inputs)[self.output]


def session(path: str | Path, threads: int | None) -> tuple[Run, list[str]]:
    """A graph file on onnxruntime's CPU, and the names of its inputs."""
    import onnxruntime as ort

    from sdlite.backends.ort import session_options

    held = ort.InferenceSession(
        str(path),
        session_options(threads, sum(f.stat().st_size for f in Path(path).parent.glob(f"{Path(path).name}*"))),
        providers=["CPUExecutionProvider"],
    )
    names = [o.name for o in held.get_outputs()]
    return lambda inputs: dict(zip(names, held.run(names, inputs), strict=True)), [i.name for i in held.get_inputs()]


def load(folder: Path, threads: int | None, output: str) -> Hoisted:
    """The three graphs of `folder` as one network whose answer is called `output`."""
    (time, _), (prompt, _), (step, inputs) = (session(folder / f"{name}.onnx", threads) for name in GRAPHS)
    return Hoisted(time, prompt, step, inputs, output)
