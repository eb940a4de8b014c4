"""ONNX for onnxruntime (CPU, CUDA, mobile): fixed or free shapes; float32, float16 weights with
float32 arithmetic, or QDQ int8.

With free shapes the folder opens as a model: `Pipeline.from_pretrained`. With the option
`fuse_schedule` the UNet comes as three graphs, see `sdlite.exporters.rewrites.hoist`. The option
`opset` writes the graphs in another version of ONNX than the artefact's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter

from sdlite.artifact import Artifact
from sdlite.backends.ort import hoisted, runner
from sdlite.errors import ExportError, InputError
from sdlite.exporters.profile import Profile
from sdlite.exporters.rewrites.fixed_shapes import input_shapes, opset_of
from sdlite.exporters.rewrites.hoist import hoist
from sdlite.exporters.targets import NotRunnable
from sdlite.io import scratch
from sdlite.manifest import MANIFEST, PARTS, NetworkRow, write_manifest
from sdlite.onnx_graph import Graph
from sdlite.spec import SPECS

PACKAGES = ("onnx", "onnxruntime")
PRECISIONS = ("fp32", "fp16", "int8-static")
DYNAMIC = True
OPTIONS = {"fuse_schedule", "opset"}
OPSETS = range(17, 24)
_SAID_SINCE_18 = [("Resize", "antialias", 0), ("Resize", "keep_aspect_ratio_policy", b"stretch")]


def prepare(part: str, graph: Path, profile: Profile) -> Path:
    """The graph in the profile's opset.

    Raises:
        InputError: not one of OPSETS. ExportError: the network needs what that opset does not have.
    """
    opset = profile.options.get("opset")
    if opset is None:
        return graph
    if opset not in OPSETS:
        raise InputError(
            f"profile {profile.name}: opset={opset!r}; it can be {OPSETS[0]} to {OPSETS[-1]}."
        )
    proto = onnx.load(str(graph), load_external_data=False)
    if opset_of(proto) == opset:
        return graph
    out = graph.with_name(f"{part}.{opset}.onnx")
    try:
        onnx.save_model(_at(proto, opset), str(out))
        onnx.checker.check_model(str(out), full_check=True)
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise ExportError(
            f"{part} cannot be written in opset {opset}: {' '.join(str(e).split())[:300]}."
        ) from e
    return out


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


def convert(part: str, graph: Path, out: Path, profile: Profile) -> list[Path]:
    source = Graph.load(graph)
    if profile.precision == "fp16":
        source.store_as_half()
    if part == "unet" and profile.options.get("fuse_schedule"):
        return _hoisted(source, graph, out)
    files = source.save(out / "model.onnx")
    onnx.checker.check_model(str(files[0]))
    return files


def _hoisted(source: Graph, graph: Path, out: Path) -> list[Path]:
    shapes = input_shapes(graph)
    if any(isinstance(d, str) for s in shapes.values() for d in s):
        raise InputError(
            "fuse_schedule needs fixed shapes; choose a profile with dynamic = false, such as"
            " onnx-fixed."
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


def finish(
    out: Path, artifact: Artifact, profile: Profile, latent_shape: tuple[int, ...]
) -> list[Path]:
    """With free shapes the folder is an artefact too: `Pipeline.from_pretrained` opens it."""
    own, source = artifact.manifest, profile.source(artifact)
    if own is None or source is None or not profile.dynamic or profile.options.get("fuse_schedule"):
        return []
    entries: dict[str, NetworkRow] = {}
    for part in PARTS:
        graph = out / part / "model.onnx"
        entries[part] = {
            **own.variants[source][part],
            "file": f"{part}/{graph.name}",
            "weights": [f"{part}/{f.name}" for f in sorted(graph.parent.glob(f"{graph.name}.*"))],
            "opset": opset_of(onnx.load(str(graph), load_external_data=False)),
        }
        if profile.precision == "fp16":
            entries[part]["storage"] = "float16"
    write_manifest(
        out, dataclasses.replace(own, variants={profile.precision: entries}, files={}, quality=None)
    )
    return [out / MANIFEST]


def run(
    part: str, files: list[Path], profile: Profile, threads: int | None
) -> Callable[..., np.ndarray]:
    try:
        from sdlite.backends.ort import Session
    except ModuleNotFoundError as e:
        raise NotRunnable(f"{e.name} is not installed") from e
    if part == "unet" and profile.options.get("fuse_schedule"):
        return hoisted(files[0].parent, threads, SPECS["unet"].output.name)
    return Session(str(files[0]), "cpu", threads, sum(f.stat().st_size for f in files))
