"""sdlite: run compressed Stable Diffusion students anywhere.

    import sdlite
    pipe = sdlite.Pipeline.from_pretrained("emoji")
    pipe("a red apple on a blue background").images[0].save("apple.png")

The public names are `Pipeline`, its answer `PipelineOutput`, `quantize`, `export`, `convert` and
`__version__`; errors, `Cancelled` among them, are in `sdlite.errors`. Importing this package loads
nothing heavy, and keeps the engines from reporting home (`sdlite.offline`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sdlite import errors, offline
from sdlite._version import __version__

if TYPE_CHECKING:
    from sdlite.converter import convert
    from sdlite.exporters.export import export
    from sdlite.pipeline import Pipeline, PipelineOutput
    from sdlite.quant.api import quantize

__all__ = ["Pipeline", "PipelineOutput", "__version__", "convert", "errors", "export", "quantize"]

# name -> (module, the extra that installs what it needs)
_LAZY = {
    "Pipeline": ("sdlite.pipeline", None),
    "PipelineOutput": ("sdlite.pipeline", None),
    "quantize": ("sdlite.quant.api", "quantize"),
    "export": ("sdlite.exporters.export", "quantize"),
    "convert": ("sdlite.converter", "export"),
}

offline.switch_off()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker has the names from above, and finds misspelled ones

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module 'sdlite' has no attribute {name!r}")
        module, extra = _LAZY[name]
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as e:
            if extra is None or (e.name or "").startswith("sdlite"):
                raise
            raise errors.MissingExtraError(
                f"sdlite.{name} needs {e.name!r}: pip install 'sdlite[{extra}]'."
            ) from e
