"""The targets by name. To add one, write a subclass of `base.Target` and `register` it; it needs
no other place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sdlite.errors import InputError, UnknownNameError
from sdlite.exporters.targets.base import Target

if TYPE_CHECKING:
    from sdlite.exporters.profile import Profile

_CLASSES: dict[str, str | type[Target[object]]] = {  # name -> class, or "module:class"
    "onnx": "sdlite.exporters.targets.onnx:Onnx",
    "openvino": "sdlite.exporters.targets.openvino:OpenVINO",
    "web": "sdlite.exporters.targets.web:Web",
    "ncnn": "sdlite.exporters.targets.ncnn:Ncnn",
    "executorch": "sdlite.exporters.targets.executorch:ExecuTorch",
    "coreml": "sdlite.exporters.targets.coreml:CoreML",
    "mnn": "sdlite.exporters.targets.mnn:MNN",
    "tensorrt": "sdlite.exporters.targets.tensorrt:TensorRT",
    "tensorrt-rtx": "sdlite.exporters.targets.tensorrt_rtx:TensorRTRTX",
    "qnn": "sdlite.exporters.targets.qnn:QNN",
}


def names() -> tuple[str, ...]:
    """Names of all targets, registered ones included."""
    return tuple(_CLASSES)


def register(target: type[Target[object]]) -> None:
    """Make a target known by its `name`; profiles can name it from then on.

    Raises:
        InputError: the name is taken.
    """
    if target.name in _CLASSES:
        raise InputError(f"target name {target.name!r} is taken; choose another.")
    _CLASSES[target.name] = target


def get(name: str) -> type[Target[object]]:
    """The class of a target.

    Raises:
        UnknownNameError: no such target.
    """
    if name not in _CLASSES:
        raise UnknownNameError(
            f"target={name!r} is not known; choose one of {', '.join(_CLASSES)}."
        )
    found = _CLASSES[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        loaded: type[Target[object]] = getattr(importlib.import_module(module), attribute)
        return loaded
    return found


def of(profile: Profile) -> Target[object]:
    """The target of a profile, its options read.

    Raises:
        UnknownNameError, InputError, PrecisionError: what the target cannot do.
    """
    return get(profile.target)(profile)
