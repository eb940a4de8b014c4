"""Embeddings that a call gives in place of prompts, as diffusers' `prompt_embeds=`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdlite.errors import InputError, ShapeError
from sdlite.families import NEGATIVE
from sdlite.spec import Tensor


def read(
    given: Mapping[str, object],
    embeds: Mapping[str, str],
    inputs: Sequence[Tensor],
    width: object,
    repeat: int,
) -> dict[str, np.ndarray]:
    """The arrays of a call, checked: keyword -> float32, a row for each image.

    Args:
        given: keywords of the call; None is not given.
        embeds: of the family, see `families.Family.embeds`.
        inputs: of the UNet.
        width: D of its hidden states, where its configuration says one number.
        repeat: images of each row.

    Raises:
        InputError: not finite numbers, or one array without the other that belongs to it.
        ShapeError: another shape than the UNet takes, or than the other arrays'.
    """
    shapes = {t.name: t.shape for t in inputs}
    out: dict[str, np.ndarray] = {}
    for prefix in ("", NEGATIVE):
        names = {f"{prefix}{keyword}": condition for keyword, condition in embeds.items()}
        held = [n for n in names if given.get(n) is not None]
        if lost := [n for n in names if held and n not in held]:
            raise InputError(
                f"{held[0]}= is given without {lost[0]}=; this model's UNet takes both: give them"
                " together."
            )
        for name in held:
            sides = [str(width) if s == "D" else s for s in shapes[names[name]]]
            out[name] = _array(name, given[name], sides)
    _alike(out)
    return {name: np.repeat(x, repeat, axis=0) for name, x in out.items()}


def rows(arrays: Mapping[str, np.ndarray]) -> int:
    """Rows of the arrays; 0 where there are none."""
    return next((len(x) for x in arrays.values()), 0)


def said(arrays: Mapping[str, np.ndarray], image: int) -> dict[str, str]:
    """What an image's file keeps of its embeddings: keyword -> the beginning of their SHA-256."""
    return {k: hashlib.sha256(x[image].tobytes()).hexdigest()[:16] for k, x in arrays.items()}


def _array(name: str, value: Any, sides: Sequence[str]) -> np.ndarray:
    """`value` of numpy or torch as float32. `sides`: a number, or a letter for any."""
    if hasattr(value, "detach"):
        value = value.detach().float().cpu()
    out = np.asarray(value)
    fits = out.ndim == len(sides) and all(
        n == int(s) if s.isdigit() else n > 0 for n, s in zip(out.shape, sides, strict=True)
    )
    if out.dtype.kind != "f" or not fits:
        what = f"{out.dtype} {list(out.shape)}"
        raise ShapeError(f"{name} is {what}; accepted: float [{', '.join(sides)}].")
    out = np.ascontiguousarray(out, np.float32)
    if not np.isfinite(out).all():
        raise InputError(f"{name} holds NaN or infinity; give finite numbers.")
    return out


def _alike(arrays: Mapping[str, np.ndarray]) -> None:
    if len({len(x) for x in arrays.values()}) > 1:
        counts = ", ".join(f"{len(x)} of {name}" for name, x in arrays.items())
        raise ShapeError(f"embeddings differ in their rows ({counts}); give as many of each.")
    for name, x in arrays.items():
        other = arrays.get(f"{NEGATIVE}{name}", x)
        if other.shape != x.shape:
            raise ShapeError(
                f"{name} is {list(x.shape)} and {NEGATIVE}{name} {list(other.shape)}; give both of"
                " one shape."
            )
