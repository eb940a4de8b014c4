"""The kinds of a recipe's stages, one class each. A new kind is one more file and one more name in
this list, or a call of `register` from outside.
"""

from __future__ import annotations

from sdlite.distill.tasks.base import StageKind
from sdlite.distill.tasks.few_step import Adversarial, Consistency, Guidance, Progressive
from sdlite.distill.tasks.other_networks import TextEncoder, TinyDecoder
from sdlite.distill.tasks.student import Output
from sdlite.errors import InputError

KINDS: dict[str, type[StageKind]] = {
    kind.name: kind
    for kind in (Output, Guidance, Progressive, Consistency, Adversarial, TextEncoder, TinyDecoder)
}


def register(kind: type[StageKind]) -> type[StageKind]:
    """Make a kind known to recipes by its name; also a decorator.

    Raises:
        InputError: another kind has that name.
    """
    if KINDS.setdefault(kind.name, kind) is not kind:
        raise InputError(f"stage kind {kind.name!r} is known already; choose another name.")
    return kind
