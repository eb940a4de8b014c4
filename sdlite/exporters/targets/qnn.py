"""Snapdragon NPU (Hexagon HTP): context binaries by onnxruntime-qnn, float16 or a16w8, for one SoC
and HTP version.

Each network is `model.onnx`, a small graph with one EPContext node, and `model_qnn.bin`, which the
NPU loads. A device runs them with onnxruntime and its QNN provider. They are made and run here on
the x86 simulator of the HTP, with the fallback to the CPU forbidden: a node that the HTP does not
take is an error, not a slow device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdlite.errors import ExportError, InputError
from sdlite.exporters.profile import Profile, assets
from sdlite.exporters.rewrites import a16w8
from sdlite.io import scratch
from sdlite.manifest import PARTS
from sdlite.onnx_graph import Graph
from sdlite.pipeline import Pipeline
from sdlite.quant.api import KEEP_FLOAT
from sdlite.quant.calibrate import read_prompts
from sdlite.spec import SPECS

PACKAGES = ("onnxruntime-qnn", "onnxruntime")
PRECISIONS = ("fp16", "a16w8")
DYNAMIC = False
PROVIDER = "QNNExecutionProvider"
OPERATORS = ("Conv", "MatMul", "Gemm")
# htp_arch, soc_model: Qualcomm's numbers (75, 57: Snapdragon 8 Gen 3; 73, 43: 8 Gen 2; 79, 69: 8
# Elite); samples: calibration pictures; integer: part -> operators that become integer (default:
# all); keep_float: part -> regular expressions of modules that stay float, besides the artefact's
OPTIONS = {"htp_arch", "soc_model", "samples", "integer", "keep_float"}


def _options(profile: Profile) -> dict[str, Any]:
    """Raises InputError for what is not accepted."""
    integer = profile.options.get("integer", {})
    if wrong := sorted({*integer} - {*PARTS}) or sorted(
        {o for v in integer.values() for o in v} - {*OPERATORS}
    ):
        raise InputError(
            f"profile {profile.name}: integer names {', '.join(wrong)}; it maps {', '.join(PARTS)}"
            f" to some of {', '.join(OPERATORS)}."
        )
    if (samples := profile.options.get("samples", 8)) < 1:
        raise InputError(f"profile {profile.name}: samples={samples}; at least 1.")
    return {"htp_arch": "75", "soc_model": "57", "samples": 8, **profile.options}


def quantise(
    graphs: dict[str, Path],
    pipe: Pipeline,
    profile: Profile,
    shown: list[str],
    steps: int | None,
    threads: int | None,
) -> tuple[dict[str, Path], dict[str, Any] | None]:
    """a16w8: integer graphs, calibrated on prompts that the gate does not show."""
    options = _options(profile)
    if profile.precision != "a16w8":
        return graphs, None
    own: dict[str, Any] = dict(pipe.artifact.calibration)
    prompts = [
        p
        for p in own.get("prompts") or read_prompts(assets() / "calibration" / "sd.txt")
        if p not in shown
    ][: options["samples"]]
    loaded = {p: Graph.load(g) for p, g in graphs.items()}
    layers = {
        p: a16w8.choose(loaded[p], _original(pipe, p), _integer(options, p), _keep(options, own, p))
        for p in PARTS
    }
    arguments = {
        "height": profile.height or None,
        "width": profile.width or None,
        "num_inference_steps": steps,
    }
    with scratch("observe") as aside:
        ranges = a16w8.observe(loaded, layers, pipe, prompts, aside, threads, **arguments)
    out = {}
    for p, graph in graphs.items():
        out[p] = graph.with_name(f"{p}.a16w8.onnx")
        a16w8.insert(loaded[p], list(layers[p].values()), ranges[p]).save(out[p])
    return out, {"prompts": len(prompts), "layers": {p: sorted(layers[p]) for p in PARTS}}


def _original(pipe: Pipeline, part: str) -> Graph:
    return Graph.load(pipe.artifact.graph("fp32", part))


def _integer(options: dict[str, Any], part: str) -> list[str]:
    return list(options.get("integer", {}).get(part, OPERATORS))


def _keep(options: dict[str, Any], own: dict[str, Any], part: str) -> list[str]:
    """The artefact's list (or sdlite's) and the profile's."""
    return [
        *own.get("keep_float", KEEP_FLOAT).get(part, KEEP_FLOAT[part]),
        *options.get("keep_float", {}).get(part, ()),
    ]


def convert(part: str, graph: Path, out: Path, profile: Profile) -> list[Path]:
    files = [out / "model.onnx", out / "model_qnn.bin"]
    options = _options(profile)
    try:
        _session(graph, options, context=files[0])
    except Exception as e:  # onnxruntime's errors have no common type
        words = " ".join(str(e).split())[:400]
        raise ExportError(
            f"QNN refuses {part} for htp_arch {options['htp_arch']}: {words}. Its log names the"
            " nodes."
        ) from e
    if missing := [f.name for f in files if not f.is_file()]:
        raise ExportError(
            f"QNN made no {', '.join(missing)} of {part}; the graph did not become one context."
        )
    return files


def _session(
    graph: Path, options: dict[str, Any], context: Path | None = None, threads: int | None = None
) -> Any:
    """A session whose nodes all run on the HTP, or an error. With `context` it also writes the
    context binary.
    """
    import onnxruntime as ort
    import onnxruntime_qnn as qnn

    if not _devices(ort):
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
        _devices(ort)[:1],
        {
            "backend_path": qnn.get_qnn_htp_path(),
            "htp_arch": options["htp_arch"],
            "soc_model": options["soc_model"],
        },
    )
    return ort.InferenceSession(str(graph), settings)


def _devices(ort: Any) -> list[Any]:
    return [d for d in ort.get_ep_devices() if d.ep_name == PROVIDER]


def run(
    part: str, files: list[Path], profile: Profile, threads: int | None
) -> Callable[..., np.ndarray]:
    """The context binary on the simulator."""
    session = _session(files[0], _options(profile), threads=threads)
    types = {t.name: np.dtype(t.dtype) for t in SPECS[part].inputs}

    def network(**inputs: np.ndarray) -> np.ndarray:
        out: np.ndarray = session.run(
            None, {k: np.asarray(v, types[k]) for k, v in inputs.items()}
        )[0]
        return out

    return network
