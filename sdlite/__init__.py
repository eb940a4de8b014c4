"""sdlite: run compressed Stable Diffusion students anywhere.

    import sdlite
    pipe = sdlite.Pipeline.from_pretrained("emoji")
    pipe("a red apple on a blue background").images[0].save("apple.png")

The public names are `Pipeline`, `quantize` and `__version__`; errors are in `sdlite.errors`. Importing this package loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdlite._version import __version__

if TYPE_CHECKING:
    from sdlite.pipeline import Pipeline
    from sdlite.quant.api import quantize

__all__ = ["Pipeline", "__version__", "quantize"]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from sdlite.pipeline import Pipeline

        return Pipeline
    if name == "quantize":
        try:
            from sdlite.quant.api import quantize
        except ModuleNotFoundError as e:
            if (e.name or "").startswith("sdlite"):
                raise
            from sdlite.errors import MissingExtraError

            raise MissingExtraError(f"quantising needs {e.name!r}: pip install 'sdlite[quantize]'.") from e
        return quantize
    raise AttributeError(f"module 'sdlite' has no attribute {name!r}")
