"""OpenVINO IR (.xml and .bin), float32, float16 weights, or int8 from the u8 QDQ graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sdlite.exporters.profile import Profile

PACKAGES = ("openvino",)
PRECISIONS = ("fp32", "fp16", "int8-static")
DYNAMIC = True


def convert(part: str, graph: Path, out: Path, profile: Profile) -> list[Path]:
    import openvino as ov

    model = ov.Core().read_model(str(graph))
    ov.save_model(model, str(out / "model.xml"), compress_to_fp16=profile.precision == "fp16")
    return [out / "model.xml", out / "model.bin"]


def run(
    part: str, files: list[Path], profile: Profile, threads: int | None
) -> Callable[..., np.ndarray]:
    from sdlite.backends.openvino_network import CompiledNetwork

    return CompiledNetwork(str(files[0]), part, "cpu", threads, profile.precision)
