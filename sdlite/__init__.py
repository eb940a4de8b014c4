"""sdlite: run compressed Stable Diffusion students anywhere.

    import sdlite
    pipe = sdlite.Pipeline.from_pretrained("emoji")
    pipe("a red apple on a blue background").images[0].save("apple.png")

The public names are `Pipeline` and `__version__`; errors are in `sdlite.errors`. Importing this package loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdlite._version import __version__

if TYPE_CHECKING:
    from sdlite.pipeline import Pipeline

__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from sdlite.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'sdlite' has no attribute {name!r}")
