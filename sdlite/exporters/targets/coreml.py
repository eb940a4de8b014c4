"""Core ML (.mlpackage) for iPhones and Macs by coremltools: fixed shapes, float32 or float16.
Converted here, run on Apple's systems only.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdlite.errors import ExportError, UnknownNameError
from sdlite.exporters.profile import Profile
from sdlite.exporters.targets import NotRunnable
from sdlite.spec import SPECS

PACKAGES = ("coremltools", "torch", "diffusers", "transformers", "onnx-ir")
PRECISIONS = ("fp32", "fp16")
DYNAMIC = False
OPTIONS = {"minimum_deployment_target"}  # a name of coremltools.target


def _teach() -> None:
    """Names of operations that coremltools 9.0 does not know, and has.

    `alias` does nothing: torch 2.9 and later write it. `where` with a number for its second value:
    in the causal mask of transformers 5.
    """
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import (
        _TORCH_OPS_REGISTRY as known,
    )

    for name, same in (("alias", ops.noop), ("where.scalarother", ops.where)):
        if known.get_func(name) is None:
            known.set_func_by_name(same, name)


def convert_torch(
    part: str, network: Any, example: tuple[Any, ...], out: Path, profile: Profile
) -> list[Path]:
    import torch

    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools as ct

    _teach()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network.eval(), example, strict=False).run_decompositions({})
    spec = SPECS[part]
    kinds = {"int64": np.int32, "float32": np.float32}
    inputs = [
        ct.TensorType(name=t.name, shape=tuple(x.shape) or (1,), dtype=kinds[t.dtype])
        for t, x in zip(spec.inputs, example, strict=True)
    ]
    precision = ct.precision.FLOAT16 if profile.precision == "fp16" else ct.precision.FLOAT32
    target = getattr(
        ct.target, wanted := profile.options.get("minimum_deployment_target", "iOS17"), None
    )
    if target is None:
        raise UnknownNameError(
            f"profile {profile.name}: minimum_deployment_target={wanted!r} is not known; choose one"
            f" of {', '.join(t.name for t in ct.target)}."
        )
    try:
        model = ct.convert(
            program,
            inputs=inputs,
            outputs=[ct.TensorType(name=spec.output.name, dtype=np.float32)],
            compute_precision=precision,
            minimum_deployment_target=target,
            skip_model_load=True,
        )
    except Exception as e:  # coremltools raises bare ValueErrors and its own
        raise ExportError(
            f"coremltools could not convert {part} ({type(e).__name__}):"
            f" {(str(e).splitlines() or [''])[0][:300]}"
        ) from e
    folder = out / "model.mlpackage"
    shutil.rmtree(folder, ignore_errors=True)
    model.save(str(folder))
    return sorted(f for f in folder.rglob("*") if f.is_file())


def run(
    part: str, files: list[Path], profile: Profile, threads: int | None
) -> Callable[..., np.ndarray]:
    raise NotRunnable("Core ML runs on Apple's systems only")
