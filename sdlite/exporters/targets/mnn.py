"""MNN (.mnn): float32 or float16 weights. The PyPI wheel runs on the CPU; its OPENCL and VULKAN
names fall back there in silence.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sdlite.errors import ExportError
from sdlite.exporters.profile import Profile
from sdlite.io import scratch
from sdlite.spec import SPECS

PACKAGES = ("MNN",)
PRECISIONS = ("fp32", "fp16")
DYNAMIC = False
# The library behind `mnnconvert`. That command itself installs a logging SDK by pip when it is
# missing, and sends what was converted to its maker.
CONVERTER = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def convert(part: str, graph: Path, out: Path, profile: Profile) -> list[Path]:
    target = (out / "model.mnn").absolute()
    files = [
        "-f",
        "ONNX",
        "--modelFile",
        str(graph.absolute()),
        "--MNNModel",
        str(target),
        "--bizCode",
        "sdlite",
    ]
    command = [sys.executable, "-c", CONVERTER, *files]
    with scratch(
        "mnn"
    ) as own:  # it keeps weights in a file of the working folder: two at once mix them up
        done = subprocess.run(
            [*command, *(["--fp16"] if profile.precision == "fp16" else [])],
            capture_output=True,
            text=True,
            cwd=own,
        )
    if done.returncode or not target.exists():
        words = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise ExportError(f"MNN's converter refused {part}: {' '.join(words)[:300]}")
    return [out / target.name]


class _Network:
    def __init__(self, path: Path, part: str, threads: int | None):
        import MNN

        self.mnn, spec = MNN, SPECS[part]
        self.inputs = [t.name for t in spec.inputs]
        self.types = {t.name: t.dtype for t in spec.inputs}
        config = {"backend": "CPU", "precision": "high", "numThread": threads or 2}
        self.runtime = MNN.nn.create_runtime_manager((config,))
        self.module = MNN.nn.load_module_from_file(
            str(path), self.inputs, [spec.output.name], runtime_manager=self.runtime
        )

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        np_of = self.mnn.numpy
        given = []
        for name in self.inputs:
            x = np.array(inputs[name], np.int32 if self.types[name] == "int64" else np.float32)
            given.append(
                np_of.array(x.tolist(), dtype=np_of.int32)
                if x.dtype == np.int32
                else np_of.array(x)
            )
        out = self.module.forward(given)
        return np.array((out[0] if isinstance(out, (list, tuple)) else out).read())


def run(
    part: str, files: list[Path], profile: Profile, threads: int | None
) -> Callable[..., np.ndarray]:
    return _Network(files[0], part, threads)
