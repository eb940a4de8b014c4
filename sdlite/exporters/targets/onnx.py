"""ONNX for onnxruntime (CPU, CUDA, mobile): fixed or free shapes; float32, float16 weights with
float32 arithmetic, or QDQ int8.

With free shapes the folder opens as a model: `Pipeline.from_pretrained`. With the option
`fuse_schedule` the UNet comes as three graphs, see `sdlite.exporters.rewrites.hoist`. The option
`opset` writes the graphs in another version of ONNX than the model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnx.version_converter

from sdlite.artifact import Artifact
from sdlite.backends import Network
from sdlite.backends.ort import hoisted, runner
from sdlite.errors import ExportError, InputError
from sdlite.exporters.rewrites.fixed_shapes import input_shapes, opset_of
from sdlite.exporters.rewrites.hoist import hoist
from sdlite.exporters.targets.base import NotRunnable, Runtime, Target
from sdlite.io import scratch
from sdlite.manifest import MANIFEST, NetworkRow, write_manifest
from sdlite.onnx_graph import Graph
from sdlite.settings import At, settings
from sdlite.spec import SPECS

CODE = """
import numpy as np
import onnxruntime as ort


def load(part):
    session = ort.InferenceSession(f"{part}/model.onnx", providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda **inputs: dict(zip(names, session.run(names, inputs)))
"""
FUSED = """
import numpy as np
import onnxruntime as ort


def opened(path):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    return lambda given: dict(
        zip(names, session.run(names, {k: v for k, v in given.items() if k in wanted}))
    )


def load(part):
    if part != "unet":
        network = opened(f"{part}/model.onnx")
        return lambda **inputs: network(inputs)
    # time.onnx depends on the timestep alone, prompt.onnx on the prompt: once for each will do
    time, prompt, step = (opened(f"unet/{name}.onnx") for name in ("time", "prompt", "step"))
    return lambda **inputs: step(inputs | time(inputs) | prompt(inputs))
"""
_SAID_SINCE_18 = [("Resize", "antialias", 0), ("Resize", "keep_aspect_ratio_policy", b"stretch")]


@settings
@dataclass(frozen=True)
class Options:
    """`fuse_schedule`: the UNet as three graphs. `opset`: of the graphs; None: the model's."""

    fuse_schedule: bool = False
    opset: Annotated[int, At(17, 23)] | None = None


class Onnx(Target[Options]):
    """onnxruntime, anywhere."""

    name = "onnx"
    packages = ("onnx", "onnxruntime")
    precisions = ("fp32", "fp16", "int8-static")
    dynamic = True
    opened_by = ("onnxruntime", "openvino")
    options_type = Options

    def runtime(self) -> Runtime:
        """onnxruntime's Python package."""
        if not self.options.fuse_schedule:
            return Runtime("onnxruntime", "onnxruntime", CODE)
        return Runtime(
            "onnxruntime, the UNet in three graphs",
            "onnxruntime",
            FUSED,
            note="`unet/time.onnx`, `unet/prompt.onnx` and `unet/step.onnx` share the UNet's work.",
        )

    def prepare(self, part: str, graph: Path) -> Path:
        """The graph in the profile's opset.

        Raises:
            ExportError: the network needs what that opset does not have.
        """
        opset = self.options.opset
        if opset is None:
            return graph
        proto = onnx.load(str(graph), load_external_data=False)
        if opset_of(proto) == opset:
            return graph
        out = graph.with_name(f"{part}.{opset}.onnx")
        try:
            onnx.save_model(_at(proto, opset), str(out))
            onnx.checker.check_model(str(out), full_check=True)
        except (
            RuntimeError,
            onnx.checker.ValidationError,
            onnx.shape_inference.InferenceError,
        ) as e:
            raise ExportError(
                f"{part} cannot be written in opset {opset}: {' '.join(str(e).split())[:300]}."
            ) from e
        return out

    def convert(self, part: str, graph: Path, out: Path) -> list[Path]:
        """The graph with its weights, or the UNet's three graphs."""
        if part == "unet" and self.options.fuse_schedule:
            return _hoisted(_stored(graph, self.precision(part)), graph, out)
        return write_graph(graph, out, self.precision(part))

    def finish(self, out: Path, artifact: Artifact, latent_shape: tuple[int, ...]) -> list[Path]:
        """With free shapes the folder is a model too: `Pipeline.from_pretrained` opens it."""
        own, source = artifact.manifest, self.profile.source(artifact)
        fixed = not self.profile.dynamic or self.options.fuse_schedule
        if own is None or source is None or fixed:
            return []
        precision = self.profile.precision
        entries: dict[str, NetworkRow] = {}
        for part in self.specs:
            graph = out / part / "model.onnx"
            beside = sorted(graph.parent.glob(f"{graph.name}.*"))
            entries[part] = {
                **own.variants[source][part],
                "file": f"{part}/{graph.name}",
                "weights": [f"{part}/{f.name}" for f in beside],
                "opset": opset_of(onnx.load(str(graph), load_external_data=False)),
            }
            if self.precision(part) == "fp16":
                entries[part]["storage"] = "float16"
        changed = dataclasses.replace(own, variants={precision: entries}, files={}, quality=None)
        write_manifest(out, changed)
        return [out / MANIFEST]

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """The network on this machine's CPU."""
        try:
            from sdlite.backends.ort import Session
        except ModuleNotFoundError as e:
            raise NotRunnable(f"{e.name} is not installed") from e
        if part == "unet" and self.options.fuse_schedule:
            cut = hoisted(files[0].parent, threads, SPECS["unet"].output.name)
            return lambda **inputs: cut(**inputs)
        return Session(str(files[0]), "cpu", threads, sum(f.stat().st_size for f in files))


def _at(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Newer by ONNX's converter, which cannot turn a Split of 18 back. Older: without what says
    what 17 does anyway; the checker refuses the rest.
    """
    if opset > opset_of(proto):
        return onnx.version_converter.convert_version(proto, opset)
    for node in proto.graph.node:
        kept = [
            a
            for a in node.attribute
            if (node.op_type, a.name, onnx.helper.get_attribute_value(a)) not in _SAID_SINCE_18
        ]
        if node.op_type == "Split" and len(node.input) == 1:  # equal parts, one for each output
            kept = [a for a in kept if a.name != "num_outputs"]
        del node.attribute[:]
        node.attribute.extend(kept)
    next(o for o in proto.opset_import if o.domain == "").version = opset
    return proto


def _stored(graph: Path, precision: str) -> Graph:
    out = Graph.load(graph)
    if precision == "fp16":
        out.store_as_half()
    return out


def write_graph(graph: Path, out: Path, precision: str) -> list[Path]:
    """`out`/model.onnx and its weights, which are float16 for "fp16"."""
    files = _stored(graph, precision).save(out / "model.onnx")
    onnx.checker.check_model(str(files[0]))
    return files


def _hoisted(source: Graph, graph: Path, out: Path) -> list[Path]:
    shapes = input_shapes(graph)
    if any(isinstance(d, str) for s in shapes.values() for d in s):
        raise InputError(
            "fuse_schedule needs fixed shapes; choose a profile with dynamic = false, such as"
            " onnx-fixed."
        )
    if further := sorted(set(shapes) - {t.name for t in SPECS["unet"].inputs}):
        raise InputError(
            f"fuse_schedule cuts UNets that are given latents, timestep and text alone; this one is"
            f" given {', '.join(further)} too. Export without it."
        )
    inputs = {
        t.name: np.zeros([int(d) for d in shapes[t.name]], t.dtype) for t in SPECS["unet"].inputs
    }

    def once(cut: Graph, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with scratch("once") as tmp:
            cut.save(tmp / "m.onnx")
            return runner(tmp / "m.onnx", None)[0](given)

    files = []
    for name, cut in hoist(source, inputs, once).items():
        files += cut.save(out / f"{name}.onnx")
        onnx.checker.check_model(str(out / f"{name}.onnx"))
    return files
