"""OpenVINO IR (.xml and .bin), float32, float16 weights, or int8 from the u8 QDQ graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdlite.backends import Network
from sdlite.exporters.targets.base import NoOptions, Runtime, Target
from sdlite.onnx_graph import Graph

if TYPE_CHECKING:
    import openvino as ov

SMALL = 256  # numbers of a constant that stays float32, as in `Graph.save`
CODE = """
import numpy as np
import openvino as ov

core = ov.Core()


def load(part):
    # OpenVINO's default is the CPU's half precision (bf16) where it has one: faster, other numbers
    network = core.compile_model(f"{part}/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


    def run(**inputs):
        made = network(inputs)
        return {o.any_name: made[o].copy() for o in network.outputs}

    return run
"""


class OpenVINO(Target[NoOptions]):
    """Intel CPUs, GPUs and NPUs."""

    name = "openvino"
    extra = "quantize,openvino"
    packages = ("openvino",)
    precisions = ("fp32", "fp16", "int8-static")
    dynamic = True
    opened_by = ("openvino",)

    def runtime(self) -> Runtime:
        """OpenVINO's Python package."""
        return Runtime("OpenVINO", "openvino", CODE)

    def convert(self, part: str, graph: Path, out: Path) -> list[Path]:
        """ONNX to OpenVINO IR."""
        import openvino as ov

        path = out / "model.xml"
        if self.precision(part) == "fp16":
            for used in _save_half(graph, path):
                used.unlink()
        else:
            ov.save_model(ov.Core().read_model(str(graph)), str(path), compress_to_fp16=False)
        return [path, path.with_suffix(".bin")]

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """The network on this machine's CPU."""
        from sdlite.backends.openvino_network import CompiledNetwork

        spec, precision = self.specs[part], self.precision(part)
        return CompiledNetwork(str(files[0]), spec, "cpu", threads, precision)


def _save_half(graph: Path, path: Path) -> list[Path]:
    """Weights in float16, as OpenVINO compresses what is float32: marked, so that a CPU in float32
    holds them once (BK-Tiny's UNet: 1.4 GB, unmarked 2.7). It rounds the few numbers that are
    computed with too, an attention's scale, the frequencies of a timestep (embedded UNet: 71 dB, so
    120): they are put back.

    Returns:
        What was written beside `graph` on the way.
    """
    import openvino as ov

    floats, aside = (graph.with_name(f"{graph.stem}.{x}") for x in ("float.onnx", "half.xml"))
    files = Graph.load(graph).save(floats, whole=True)
    model = ov.Core().read_model(str(floats))
    exact = {n.get_friendly_name(): n for n in model.get_ops() if _constant(n, ov.Type.f32)}
    ov.save_model(model, str(aside), compress_to_fp16=True)
    half = ov.Core().read_model(str(aside))
    for node in half.get_ops():
        source = node.input(0).get_source_output().get_node() if node.get_input_size() else node
        if node.get_type_name() != "Convert" or not _constant(source, ov.Type.f16):
            continue
        whole = exact.get(source.get_friendly_name().removesuffix("_compressed"))
        if whole is not None and whole.data.size <= SMALL:
            kept = ov.op.Constant(np.array(whole.data))
            kept.set_friendly_name(whole.get_friendly_name())
            node.output(0).replace(kept.output(0))
    ov.save_model(half, str(path), compress_to_fp16=False)
    return [*files, aside, aside.with_suffix(".bin")]


def _constant(node: ov.Node, kind: ov.Type) -> bool:
    return bool(node.get_type_name() == "Constant" and node.get_element_type() == kind)
