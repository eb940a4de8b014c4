"""Snapdragon NPU (Hexagon HTP): context binaries by onnxruntime-qnn, float16 or a16w8, for one SoC
and HTP version.

Each network is `model.onnx`, a small graph with one EPContext node, and `model_qnn.bin`, which the
NPU loads. A device runs them with onnxruntime and its QNN provider. They are made and run here on
the x86 simulator of the HTP, with the fallback to the CPU forbidden: a node that the HTP does not
take is an error, not a slow device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np

from sdlite.artifact import Artifact
from sdlite.backends import Network
from sdlite.errors import ExportError, InputError
from sdlite.exporters.profile import assets
from sdlite.exporters.rewrites import a16w8
from sdlite.exporters.rewrites.angles import in_digits
from sdlite.exporters.targets.base import Facts, Graphs, Runtime, Target
from sdlite.io import scratch
from sdlite.onnx_graph import Graph, Layer
from sdlite.pipeline import Pipeline
from sdlite.quant.calibrate import read_prompts
from sdlite.quant.options import KEEP_FLOAT
from sdlite.settings import At, settings
from sdlite.spec import Arrays

if TYPE_CHECKING:
    import onnxruntime

CODE = """
import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as qnn

PROVIDER = "QNNExecutionProvider"
ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())


def load(part):
    options = ort.SessionOptions()
    device = next(d for d in ort.get_ep_devices() if d.ep_name == PROVIDER)
    settings = {"backend_path": qnn.get_qnn_htp_path(), "htp_arch": "@HTP@", "soc_model": "@SOC@"}
    options.add_provider_for_devices([device], settings)
    session = ort.InferenceSession(f"{part}/model.onnx", options)
    names = [o.name for o in session.get_outputs()]
    return lambda **inputs: dict(zip(names, session.run(names, inputs)))
"""
PROVIDER = "QNNExecutionProvider"
OPERATORS = ("Conv", "MatMul", "Gemm")
Part = Literal["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"]


@settings
@dataclass(frozen=True)
class Options:
    """The chip, and what becomes integer.

    Attributes:
        htp_arch, soc_model: Qualcomm's numbers. "75", "57": Snapdragon 8 Gen 3; "73", "43": 8 Gen
            2; "79", "69": 8 Elite.
        samples: calibration images.
        integer: part -> operators that become integer; default: all.
        keep_float: part -> regular expressions of modules that stay float, besides the model's.
    """

    htp_arch: str = "75"
    soc_model: str = "57"
    samples: Annotated[int, At(1)] = 8
    integer: dict[Part, tuple[Literal["Conv", "MatMul", "Gemm"], ...]] = field(default_factory=dict)
    keep_float: dict[Part, tuple[str, ...]] = field(default_factory=dict)


class QNN(Target[Options]):
    """Qualcomm's NPU."""

    name = "qnn"
    extra = "qnn"
    packages = ("onnxruntime-qnn", "onnxruntime")
    precisions = ("fp16", "a16w8")
    options_type = Options

    def runtime(self) -> Runtime:
        """onnxruntime with its QNN plugin."""
        code = CODE.replace("@HTP@", self.options.htp_arch)
        code = code.replace("@SOC@", self.options.soc_model)
        title = "Qualcomm's NPU, by onnxruntime-qnn"
        return Runtime(title, "onnxruntime onnxruntime-qnn", code)

    def check(self, artifact: Artifact) -> None:
        """Refuse a model with a network that overflows in float16: the NPU's floats are these.

        Raises:
            InputError: it has one.
        """
        for part, why in artifact.family.overflowing(artifact.config).items():
            raise InputError(
                f"{part} of {artifact.name} overflows in float16 ({why}), and the NPU of target qnn"
                " has no float32: give the model a VAE that was made for float16, such as"
                " madebyollin/sdxl-vae-fp16-fix, or choose another target."
            )

    def quantize(
        self,
        graphs: Graphs,
        pipe: Pipeline,
        shown: Sequence[str],
        steps: int | None,
        threads: int | None,
    ) -> tuple[Graphs, Facts | None]:
        """a16w8: integer graphs, calibrated on prompts that the quality check does not show."""
        if self.profile.precision != "a16w8":
            return graphs, None
        prompts = [p for p in _prompts(pipe.artifact) if p not in shown][: self.options.samples]
        loaded = {p: Graph.load(g) for p, g in graphs.items()}
        layers = {p: self._chosen(pipe.artifact, p, loaded[p]) for p in graphs}
        with scratch("observe") as aside:
            ranges = a16w8.observe(
                loaded,
                layers,
                pipe,
                prompts,
                aside,
                threads,
                num_inference_steps=steps,
                sampler=pipe.artifact.sampler_name,
                **self.profile.size,
            )
        out = {}
        for p, graph in graphs.items():
            out[p] = graph.with_name(f"{p}.a16w8.onnx")
            a16w8.insert(loaded[p], list(layers[p].values()), ranges[p]).save(out[p])
        return out, {"prompts": len(prompts), "layers": {p: sorted(layers[p]) for p in graphs}}

    def _chosen(self, artifact: Artifact, part: str, graph: Graph) -> dict[str, Layer]:
        """Layers that become integer: all but the model's list (or sdlite's) and the profile's."""
        own = artifact.calibration.get("keep_float", KEEP_FLOAT)
        integer = {str(k): v for k, v in self.options.integer.items()}.get(part, OPERATORS)
        more = {str(k): v for k, v in self.options.keep_float.items()}.get(part, ())
        keep = [*own.get(part, KEEP_FLOAT.get(part, ())), *more]
        return a16w8.choose(graph, Graph.load(artifact.graph("fp32", part)), integer, keep)

    def prepare(self, part: str, graph: Path) -> Path:
        """A timestep's angles in what float16 holds."""
        return in_digits(graph)

    def convert(self, part: str, graph: Path, out: Path) -> list[Path]:
        """ONNX to a context binary.

        Raises:
            ExportError: the HTP does not take a node.
        """
        files = [out / "model.onnx", out / "model_qnn.bin"]
        try:
            self.session(graph, context=files[0])
        except Exception as e:  # onnxruntime's errors have no common type
            words = " ".join(str(e).split())[:400]
            raise ExportError(
                f"QNN refuses {part} for htp_arch {self.options.htp_arch}: {words}. Its log names"
                " the nodes."
            ) from e
        if missing := [f.name for f in files if not f.is_file()]:
            raise ExportError(
                f"QNN made no {', '.join(missing)} of {part}; the graph did not become one context."
            )
        return files

    def session(
        self, graph: Path, context: Path | None = None, threads: int | None = None
    ) -> onnxruntime.InferenceSession:
        """A session whose nodes all run on the HTP, or an error. With `context` it also writes the
        context binary there.
        """
        import onnxruntime as ort
        import onnxruntime_qnn as qnn

        if not _devices(ort.get_ep_devices()):
            ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        if threads is not None:
            settings.intra_op_num_threads = threads
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if context is not None:
            settings.add_session_config_entry("ep.context_enable", "1")
            settings.add_session_config_entry("ep.context_file_path", str(context))
            settings.add_session_config_entry("ep.context_embed_mode", "0")
        settings.add_provider_for_devices(
            _devices(ort.get_ep_devices())[:1],
            {
                "backend_path": qnn.get_qnn_htp_path(),
                "htp_arch": self.options.htp_arch,
                "soc_model": self.options.soc_model,
            },
        )
        return ort.InferenceSession(str(graph), settings)

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """The context binary on the simulator."""
        session = self.session(files[0], threads=threads)
        spec = self.specs[part]
        types = {t.name: np.dtype(t.dtype) for t in spec.inputs}
        names = [t.name for t in spec.outputs]

        def network(**inputs: np.ndarray) -> Arrays:
            given = {k: np.asarray(v, types[k]) for k, v in inputs.items()}
            return dict(zip(names, session.run(names, given), strict=True))

        return network


def _prompts(artifact: Artifact) -> list[str]:
    """The model's own calibration prompts, or ours."""
    own = artifact.calibration.get("prompts")
    return list(own or read_prompts(assets() / "calibration" / "sd.txt"))


def _devices(every: Sequence[onnxruntime.OrtEpDevice]) -> list[onnxruntime.OrtEpDevice]:
    return [d for d in every if d.ep_name == PROVIDER]
