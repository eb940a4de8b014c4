"""OpenVINO IR (.xml and .bin), float32, float16 weights, or int8 from the u8 QDQ graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdlite.backends import Network
from sdlite.exporters.targets.base import NoOptions, Runtime, Target
from sdlite.onnx_graph import Graph

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
        """ONNX to OpenVINO IR. Its weights are made float16 here: OpenVINO's own compression rounds
        the constants that are computed with too (embedded UNet: 71 dB, so 120 dB).
        """
        import openvino as ov

        source = graph
        if self.precision(part) == "fp16":
            source = graph.with_name(f"{part}.half.onnx")
            halved = Graph.load(graph)
            halved.store_as_half()
            files = halved.save(source)
        model = ov.Core().read_model(str(source))
        ov.save_model(model, str(out / "model.xml"), compress_to_fp16=False)
        if source != graph:
            del model  # it maps the files
            for f in files:
                f.unlink()
        return [out / "model.xml", out / "model.bin"]

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """The network on this machine's CPU."""
        from sdlite.backends.openvino_network import CompiledNetwork

        spec, precision = self.specs[part], self.precision(part)
        return CompiledNetwork(str(files[0]), spec, "cpu", threads, precision)
