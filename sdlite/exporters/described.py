"""What an export's report says of its networks: their files, inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from sdlite.exporters.parity import Recording
from sdlite.exporters.targets.base import Runtime, Target
from sdlite.spec import Tensor

STEP = "step.onnx"  # of three graphs, see `sdlite.exporters.rewrites.hoist`


class TensorRow(TypedDict):
    """A tensor as the runtime has it. A free side of its shape is a name."""

    name: str
    dtype: str
    shape: list[int | str]
    range: str


class NetworkRow(TypedDict):
    """A network. `batch`: rows of a call, if fixed. `cuts`: it comes as three graphs. `kept`: why
    it is not in the export's float16.
    """

    file: str
    weights: list[str]
    storage: str
    arithmetic: str
    inputs: list[TensorRow]
    output: TensorRow
    more_outputs: NotRequired[list[TensorRow]]
    batch: NotRequired[int]
    cuts: NotRequired[bool]
    kept: NotRequired[str]


def networks(
    folder: Path,
    made: Mapping[str, Sequence[Path]],
    recording: Recording,
    target: Target[object],
    source: Mapping[str, Mapping[str, object]],
) -> dict[str, NetworkRow]:
    """part -> what the report says of it.

    Args:
        made: the files of each part, in `folder`.
        recording: of the calls whose shapes the networks have.
        source: the rows of the manifest's variant that the networks were made of.
    """
    profile = target.profile
    words = _free(recording, target.free_size) if profile.dynamic else {}
    out: dict[str, NetworkRow] = {}
    for part in recording.specs:
        names = [f.relative_to(folder).as_posix() for f in made[part]]
        main = next((n for n in names if n == f"{part}/{STEP}"), names[0])
        spec, (given, answers) = recording.specs[part], recording.calls[part][0]
        tensors = _Tensors(target.runtime(), words)
        out[part] = {
            "file": main,
            "weights": [n for n in names if n != main],
            "storage": _storage(target, part, str(source[part]["storage"])),
            "arithmetic": str(source[part]["arithmetic"]),
            "inputs": [tensors.input(t, given[t.name].shape, i) for i, t in enumerate(spec.inputs)],
            "output": tensors.row(spec.output, answers[spec.output.name].shape, "out0"),
        }
        if more := [
            tensors.row(t, answers[t.name].shape, f"out{i}")
            for i, t in enumerate(spec.outputs[1:], 1)
        ]:
            out[part]["more_outputs"] = more
        if not profile.dynamic:
            out[part]["batch"] = profile.rows
        if target.precision(part) != profile.precision:
            why = target.overflowing[part]
            out[part]["kept"] = f"float32, as it overflows in float16 ({why})"
        if main.endswith(STEP):
            out[part]["cuts"] = True
    return out


def _free(recording: Recording, free_size: bool) -> dict[str, str]:
    """Shape letter -> what it is called where it stays free."""
    stride = recording.images.shape[1] // recording.calls["unet"][0][0]["sample"].shape[2]
    sides = {"h": f"height/{stride}", "w": f"width/{stride}", "H": "height", "W": "width"}
    for d in (2, 4, 8, 16):  # rounded up
        sides |= {f"h/{d}": f"height/{stride * d}", f"w/{d}": f"width/{stride * d}"}
    return {"B": "batch", **(sides if free_size else {})}


def _storage(target: Target[object], part: str, source: str) -> str:
    """The weights' dtype. With fixed shapes casts are folded, so that float16 becomes float32."""
    if target.precision(part) == "fp16":
        return "float16"
    kept = target.profile.dynamic or target.profile.precision == "int8-static"
    return source if kept else "float32"


class _Tensors:
    """Tensors as a runtime has them. `words`: see `_free`."""

    def __init__(self, runtime: Runtime, words: Mapping[str, str]):
        self.runtime, self.words = runtime, words

    def input(self, tensor: Tensor, seen: tuple[int, ...], place: int) -> TensorRow:
        out = self.row(tensor, seen, f"in{place}")
        if self.runtime.narrow_ids and tensor.dtype == "int64":
            out["dtype"] = "int32"
        return out

    def row(self, tensor: Tensor, seen: tuple[int, ...], place: str) -> TensorRow:
        """`place`: its name where the runtime has no names."""
        sides = {k: int(n) for k, n in zip(tensor.shape, seen, strict=True)} | {"B": 1}
        shape = [self.words.get(letter, sides[letter]) for letter in tensor.shape]
        name = tensor.name
        if not self.runtime.batch_axis:
            name, shape = place, shape[1:] or [1]
        elif not self.runtime.scalars:
            shape = shape or [1]
        return {"name": name, "dtype": tensor.dtype, "shape": shape, "range": tensor.range}
