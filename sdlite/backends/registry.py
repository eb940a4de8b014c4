"""The backends by name. Nothing else lists them."""

from __future__ import annotations

import importlib

from sdlite.backends.base import Backend
from sdlite.errors import InputError, UnknownNameError

# name -> a backend, or "module:class" of one that is imported when it is asked for
_BACKENDS: dict[str, Backend | str] = {
    "onnxruntime": "sdlite.backends.onnxruntime:OnnxRuntime",
    "openvino": "sdlite.backends.openvino:OpenVINO",
    "tensorrt": "sdlite.backends.tensorrt:TensorRT",
    "torch": "sdlite.backends.torch:Torch",
}


def names() -> tuple[str, ...]:
    """What `backend=` may be, besides "auto"."""
    return tuple(_BACKENDS)


def register(backend: Backend) -> None:
    """Make a backend of your own known under its name, in this process.

    Raises:
        InputError: the name is taken.
    """
    if backend.name in (*_BACKENDS, "auto"):
        raise InputError(
            f"backend name {backend.name!r} is taken; choose another than auto,"
            f" {', '.join(_BACKENDS)}."
        )
    _BACKENDS[backend.name] = backend


def get_backend(name: str) -> Backend:
    """A backend by name, whether its engine is installed or not.

    Raises:
        UnknownNameError: there is no such backend.
    """
    if name not in _BACKENDS:
        raise UnknownNameError(
            f"backend={name!r} is not known; choose one of auto, {', '.join(_BACKENDS)}."
        )
    found = _BACKENDS[name]
    if isinstance(found, str):
        module, _, kind = found.partition(":")
        made = getattr(importlib.import_module(module), kind)()
        assert isinstance(made, Backend)
        found = _BACKENDS[name] = made
    return found


def ready(name: str) -> Backend:
    """A backend by name, its engine imported.

    Raises:
        UnknownNameError: there is no such backend. MissingExtraError: its engine is not installed.
    """
    backend = get_backend(name)
    backend.require()
    return backend


def installed(name: str) -> bool:
    """Whether the package of a known backend can be found."""
    return get_backend(name).installed()


def ordered() -> list[Backend]:
    """All backends, in the order in which "auto" tries them."""
    return sorted(map(get_backend, _BACKENDS), key=lambda b: b.order)


def installed_with(precision: str) -> list[str]:
    """Installed backends that run ONNX graphs of this precision, in "auto"'s order."""
    able = (b for b in ordered() if b.graphs and precision in b.precisions)
    return [b.name for b in able if installed(b.name)]


def known_precisions() -> tuple[str, ...]:
    """Every precision that some backend runs."""
    return tuple(dict.fromkeys(p for b in ordered() for p in b.precisions))
