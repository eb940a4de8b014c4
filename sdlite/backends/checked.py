"""What a network is given and gives, against its `IOSpec`: as its engine declares it, and at each
call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdlite.errors import ArtifactError, EngineError, SdliteError, printable
from sdlite.spec import Arrays, IOSpec, Tensor, spec_of

if TYPE_CHECKING:
    from sdlite.backends import Network

# What onnxruntime and OpenVINO call the types -> numpy's names.
_TYPES = {
    "float": "float32",
    "f32": "float32",
    "float16": "float16",
    "f16": "float16",
    "int64": "int64",
    "i64": "int64",
    "int32": "int32",
    "i32": "int32",
    "double": "float64",
    "f64": "float64",
}
_PLACE = re.compile(r"Exception from \S+:\d+:?$|Check '.*' failed at \S+:\d+:?$")
Declared = tuple[
    str, str, Sequence[object] | None
]  # name, type in the engine's word, shape: numbers where fixed


def words_of(e: Exception) -> str:
    """What an engine says of its own error, in one line: without the lines that only name places in
    its source.
    """
    lines = [line.strip() for line in str(e).splitlines()]
    said = [line for line in lines if line and not _PLACE.match(line)] or [
        line for line in lines if line
    ]
    words = printable(" ".join(said)) or type(e).__name__
    # the cause stands last
    return words if len(words) <= 300 else f"{words[:120]} ... {words[-175:]}"


def declared(
    path: str | Path, part: str | IOSpec, inputs: Sequence[Declared], outputs: Sequence[Declared]
) -> None:
    """Compare what an engine says of a graph with what the network is.

    Raises:
        ArtifactError: another name, type, number of axes or fixed size.
    """
    spec = spec_of(part)
    part = spec.part
    names = [t.name for t in spec.inputs]
    if sorted(given := [name for name, _, _ in inputs]) != sorted(names):
        _refuse(path, part, f"takes {', '.join(given) or 'nothing'}", f"takes {', '.join(names)}")
    wanted = [t.name for t in spec.outputs]
    answers = [o for o in outputs if o[0] in wanted]
    if len(answers) < len(wanted):
        _refuse(
            path,
            part,
            f"gives {', '.join(o[0] for o in outputs) or 'nothing'}",
            f"gives {', '.join(wanted)}",
        )
    tensors = {t.name: t for t in (*spec.inputs, *spec.outputs)}
    sides = {
        letter: int(letter) for t in tensors.values() for letter in t.shape if letter.isdigit()
    }
    for name, kind, shape in (*inputs, *answers):
        tensor, kind = tensors[name], kind.removeprefix("tensor(").removesuffix(")")
        fits = _TYPES.get(kind) == tensor.dtype and (
            shape is None or len(shape) == len(tensor.shape)
        )
        for letter, side in zip(tensor.shape, shape or (), strict=False):
            if isinstance(side, int):
                fits &= 0 < side == sides.setdefault(letter, side)
        if not fits:
            _refuse(
                path,
                part,
                f"has {name} as {kind} {_shown(shape)}",
                f"has {tensor.dtype} {_shown(tensor.shape)}",
            )


def _shown(shape: Sequence[object] | None) -> str:
    return (
        "of any shape"
        if shape is None
        else "[" + ", ".join("?" if s is None else str(s) for s in shape) + "]"
    )


def _refuse(path: str | Path, part: str, has: str, wants: str) -> None:
    raise ArtifactError(
        f"{path} {has}; a {part} {wants}. Fetch the model again, or export it again."
    )


class Checked:
    """A network whose engine's errors are ours, and whose answers have the shape that they must
    have.

    Everything else is the network's own.
    """

    def __init__(self, inner: Network, part: str | IOSpec, stride: int, engine: str):
        """`stride`: pixels per latent. `engine`: what errors call it."""
        self.spec = spec_of(part)
        self.inner, self.part, self.stride, self.engine = inner, self.spec.part, stride, engine

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        """Raises:
        EngineError: the engine could not run it, or gave another shape.
        """
        try:
            out = self.inner(**inputs)
        except SdliteError:
            raise
        except Exception as e:  # each engine has its own types
            raise EngineError(
                f"{self.part} with {_shapes(inputs)} cannot be run by {self.engine}"
                f" ({type(e).__name__}: {words_of(e)}); where memory is short make smaller or fewer"
                " images, or enable_vae_tiling(); else run `sdlite verify` on the model."
            ) from e
        for tensor in self.spec.outputs:
            made = out.get(tensor.name)
            if made is None or made.dtype != np.float32 or not self._fits(inputs, tensor, made):
                has = "nothing" if made is None else f"{made.dtype} {list(made.shape)}"
                raise EngineError(
                    f"{self.part} with {_shapes(inputs)} gave {has}, not float32"
                    f" {_shown(tensor.shape)}; the file is not of this model. Fetch it again."
                )
        return out

    def _fits(self, inputs: Mapping[str, np.ndarray], output: Tensor, made: np.ndarray) -> bool:
        sides = {"3": 3}
        for tensor in self.spec.inputs:
            sides |= zip(tensor.shape, np.shape(inputs[tensor.name]), strict=False)
        sides |= {k.upper(): sides[k] * self.stride for k in ("h", "w") if k in sides}
        sides |= {k.lower(): sides[k] // self.stride for k in ("H", "W") if k in sides}
        return made.ndim == len(output.shape) and all(
            int(k) == n if k.isdigit() else sides.get(k, n) == n
            for k, n in zip(output.shape, made.shape, strict=True)
        )


def _shapes(inputs: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{k} {list(np.shape(v))}" for k, v in inputs.items())
