"""Core ML (.mlpackage) for iPhones and Macs by coremltools: fixed shapes, float32 or float16.
Converted here, run on Apple's systems only.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from sdlite.backends import Network
from sdlite.errors import ExportError, UnknownNameError
from sdlite.exporters.targets.base import NotRunnable, Runtime, Target
from sdlite.settings import settings

if TYPE_CHECKING:
    import torch

CODE = """
import coremltools as ct
import numpy as np

OUTPUTS = @OUTPUTS@


def load(part):
    model = ct.models.MLModel(f"{part}/model.mlpackage")  # runs on a Mac

    def network(**inputs):
        given = {k: np.atleast_1d(v) for k, v in inputs.items()}
        if "input_ids" in given:
            given["input_ids"] = given["input_ids"].astype(np.int32)
        made = model.predict(given)
        return {name: made[name] for name in OUTPUTS[part]}

    return network
"""
_KINDS = {"int64": np.int32, "float32": np.float32}


@settings
@dataclass(frozen=True)
class Options:
    """`minimum_deployment_target`: the oldest system that runs it, a name of coremltools.target."""

    minimum_deployment_target: str = "iOS17"


class CoreML(Target[Options]):
    """Apple's runtime."""

    name = "coreml"
    extra = "coreml"
    packages = ("coremltools", "torch", "diffusers", "transformers", "onnx-ir")
    precisions = ("fp32", "fp16")
    from_torch = True
    options_type = Options

    def runtime(self) -> Runtime:
        """coremltools on a Mac."""
        return Runtime(
            "Core ML",
            "coremltools",
            self.named(CODE),
            note="Written from coremltools' documentation, not run by us.",
            narrow_ids=True,
            scalars=False,
        )

    def convert_torch(
        self, part: str, network: torch.nn.Module, example: tuple[torch.Tensor, ...], out: Path
    ) -> list[Path]:
        """A torch network to an .mlpackage.

        Raises:
            ExportError: coremltools cannot convert it.
            UnknownNameError: it does not know the deployment target.
        """
        import torch

        logging.getLogger("coremltools").setLevel(logging.ERROR)
        import coremltools as ct

        _teach()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(network.eval(), example, strict=False)
            program = program.run_decompositions({})
        spec = self.specs[part]
        inputs = [
            ct.TensorType(name=t.name, shape=tuple(x.shape) or (1,), dtype=_KINDS[t.dtype])
            for t, x in zip(spec.inputs, example, strict=True)
        ]
        half = self.precision(part) == "fp16"
        deployed = self._deployed(ct)
        try:
            model = ct.convert(
                program,
                inputs=inputs,
                outputs=[ct.TensorType(name=t.name, dtype=np.float32) for t in spec.outputs],
                compute_precision=_half(ct) if half else ct.precision.FLOAT32,
                minimum_deployment_target=deployed,
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

    def _deployed(self, ct: ModuleType) -> object:
        wanted = self.options.minimum_deployment_target
        if (found := getattr(ct.target, wanted, None)) is None:
            raise UnknownNameError(
                f"profile {self.profile.name}: minimum_deployment_target={wanted!r} is not known;"
                f" choose one of {', '.join(t.name for t in ct.target)}."
            )
        return found

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """Not here."""
        raise NotRunnable("Core ML runs on Apple's systems only")


def _half(ct: ModuleType) -> object:
    """float16 but for what reaches a sine or a cosine: see `float16.before_sines`."""
    wide: dict[int, set[str]] = {}  # of each block

    def narrow(op: Any) -> bool:
        block = op.enclosing_block
        if id(block) not in wide:
            wide[id(block)] = _sines(block.operations)
        return op.name not in wide[id(block)]

    return ct.transform.FP16ComputePrecision(op_selector=narrow)


def _sines(operations: Iterable[Any]) -> set[str]:
    """Names of the sines and cosines of a block, and of what leads to them."""
    ahead = [op for op in operations if op.op_type in ("sin", "cos")]
    out: set[str] = set()
    while ahead:
        out |= {op.name for op in ahead}
        given = [v for op in ahead for v in op.inputs.values()]
        flat = [v for x in given for v in (x if isinstance(x, (list, tuple)) else (x,))]
        ahead = [v.op for v in flat if v.op is not None and v.op.name not in out]
    return out


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
