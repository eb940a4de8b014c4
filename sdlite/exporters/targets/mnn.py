"""MNN (.mnn): float32 or float16 weights. The PyPI wheel runs on the CPU; its OPENCL and VULKAN
names fall back there in silence.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdlite.backends import Network
from sdlite.errors import ExportError
from sdlite.exporters.targets.base import NoOptions, Runtime, Target
from sdlite.io import scratch
from sdlite.spec import Arrays, IOSpec

CODE = """
import MNN
import MNN.numpy as mnp
import numpy as np

INPUTS = @INPUTS@
OUTPUTS = @OUTPUTS@
runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": 2},))


def load(part):
    module = MNN.nn.load_module_from_file(
        f"{part}/model.mnn", INPUTS[part], OUTPUTS[part], runtime_manager=runtime
    )

    def network(**inputs):
        given = []
        for name in INPUTS[part]:
            if name == "input_ids":
                given.append(mnp.array(inputs[name].tolist(), dtype=mnp.int32))
            else:
                given.append(mnp.array(np.array(inputs[name], np.float32)))
        made = module.forward(given)
        made = made if isinstance(made, (list, tuple)) else [made]
        return {name: np.array(x.read()) for name, x in zip(OUTPUTS[part], made)}

    return network
"""
# The library behind `mnnconvert`. That command itself installs a logging SDK by pip when it is
# missing, and sends what was converted to its maker.
CONVERTER = "import sys, _tools; _tools.mnnconvert(sys.argv)"
# The converter's --fp16 rounds all constants, scales of attention and frequencies of timesteps too:
# those of a model without it are put in their place. Its weights are of no interest, and small.
EXACT = """
import sys
import numpy as np
from MNN import expr

exact, halved, most, *outputs = sys.argv[1:]


def small(path):
    model = expr.load_as_dict(path)
    found = {k: v for k, v in model.items() if v.op_type == "Const" and v.size < int(most)}
    return model, {k: v for k, v in found.items() if v.dtype == expr.float}


_, right = small(exact)
model, rounded = small(halved)
for name in right.keys() & rounded.keys():
    values = np.array(right[name].read(), np.float32)
    new = expr.const(values.ravel().tolist(), list(values.shape), right[name].data_format)
    rounded[name].replace(new)
expr.save([model[name] for name in outputs], halved)
"""
_SMALL = 256  # numbers: constants of fewer stay float32, as in our own graphs


class MNN(Target[NoOptions]):
    """Alibaba's runtime for phones."""

    name = "mnn"
    extra = "mnn"
    packages = ("MNN",)
    precisions = ("fp32", "fp16")

    def runtime(self) -> Runtime:
        """MNN's Python package."""
        return Runtime("MNN", "MNN", self.named(CODE), narrow_ids=True)

    def convert(self, part: str, graph: Path, out: Path) -> list[Path]:
        """ONNX to .mnn.

        Raises:
            ExportError: the converter refuses it.
        """
        made = out / "model.mnn"
        if self.precision(part) == "fp32":
            return [_converted(part, graph, made)]
        with scratch("mnn") as aside:
            exact = _converted(part, graph, aside / "exact.mnn", "--weightQuantBits", "8")
            halved = _converted(part, graph, made, "--fp16")
            outputs = [t.name for t in self.specs[part].outputs]
            _ran(part, halved, EXACT, str(exact), str(halved.absolute()), str(_SMALL), *outputs)
        return [halved]

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """The network on this machine's CPU."""
        return _Network(files[0], self.specs[part], threads)


def _converted(part: str, graph: Path, made: Path, *options: str) -> Path:
    files = ["--modelFile", str(graph.absolute()), "--MNNModel", str(made.absolute())]
    _ran(part, made, CONVERTER, "-f", "ONNX", *files, "--bizCode", "sdlite", *options)
    return made


def _ran(part: str, made: Path, code: str, *words: str) -> None:
    """Run `code`, which makes `made`, in a process of its own.

    Raises:
        ExportError: it did not.
    """
    # It keeps weights in a file of the working folder: two conversions in one mix them up.
    with scratch("mnn") as own:
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=own)
    if done.returncode or not made.exists():
        said = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise ExportError(f"MNN's converter refused {part}: {' '.join(said)[:300]}")


class _Network:
    def __init__(self, path: Path, spec: IOSpec, threads: int | None):
        import MNN

        self.mnn, self.outputs = MNN, [t.name for t in spec.outputs]
        self.inputs = [t.name for t in spec.inputs]
        self.types = {t.name: t.dtype for t in spec.inputs}
        config = {"backend": "CPU", "precision": "high", "numThread": threads or 2}
        self.runtime = MNN.nn.create_runtime_manager((config,))
        self.module = MNN.nn.load_module_from_file(
            str(path), self.inputs, self.outputs, runtime_manager=self.runtime
        )

    def __call__(self, **inputs: np.ndarray) -> Arrays:
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
        made = out if isinstance(out, (list, tuple)) else [out]
        return {n: np.array(x.read()) for n, x in zip(self.outputs, made, strict=True)}
