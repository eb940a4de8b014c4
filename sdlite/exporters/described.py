"""What an export's report says of its networks: their files, inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlite.exporters.parity import Recording
from sdlite.exporters.profile import Profile
from sdlite.exporters.snippets import RUNTIMES
from sdlite.manifest import PARTS
from sdlite.spec import SPECS, Tensor

STEP = "step.onnx"  # of three graphs, see `sdlite.exporters.rewrites.hoist`


def networks(
    folder: Path,
    made: Mapping[str, Sequence[Path]],
    recording: Recording,
    profile: Profile,
    source: Mapping[str, Mapping[str, Any]],
    free_size: bool,
) -> dict[str, dict[str, Any]]:
    """part -> {file, weights, storage, arithmetic, inputs, output}, and `batch` of a fixed one.

    Args:
        made: the files of each part, in `folder`.
        recording: of the calls whose shapes the networks have.
        source: the rows of the manifest's variant that the networks were made of.
        free_size: whether a dynamic profile's networks take any image size.
    """
    words = _free(recording, free_size) if profile.dynamic else {}
    out = {}
    for part in PARTS:
        names = [f.relative_to(folder).as_posix() for f in made[part]]
        main = next((n for n in names if n == f"{part}/{STEP}"), names[0])
        given, answer = recording.calls[part][0]
        inputs = SPECS[part].inputs
        out[part] = {
            "file": main,
            "weights": [n for n in names if n != main],
            "storage": _storage(profile, str(source[part]["storage"])),
            "arithmetic": source[part]["arithmetic"],
            "inputs": [
                _input(t, given[t.name].shape, words, profile, i) for i, t in enumerate(inputs)
            ],
            "output": _tensor(SPECS[part].output, answer.shape, words, profile, "out0"),
        }
        if not profile.dynamic:
            out[part]["batch"] = profile.batch or 1
        if main.endswith(STEP):
            out[part]["cuts"] = True
    return out


def _free(recording: Recording, free_size: bool) -> dict[str, str]:
    """Shape letter -> what it is called where it stays free."""
    stride = recording.images.shape[1] // recording.calls["unet"][0][0]["sample"].shape[2]
    sides = {"h": f"height/{stride}", "w": f"width/{stride}", "H": "height", "W": "width"}
    return {"B": "batch", **(sides if free_size else {})}


def _storage(profile: Profile, source: str) -> str:
    """The weights' dtype. With fixed shapes casts are folded, so that float16 becomes float32."""
    if profile.precision == "fp16":
        return "float16"
    return source if profile.dynamic or profile.precision == "int8-static" else "float32"


def _input(
    tensor: Tensor, seen: tuple[int, ...], words: Mapping[str, str], profile: Profile, place: int
) -> dict[str, Any]:
    out = _tensor(tensor, seen, words, profile, f"in{place}")
    if RUNTIMES[profile.target].narrow_ids and tensor.dtype == "int64":
        out["dtype"] = "int32"
    return out


def _tensor(
    tensor: Tensor, seen: tuple[int, ...], words: Mapping[str, str], profile: Profile, ncnn: str
) -> dict[str, Any]:
    """A tensor as the runtime has it. `words`: see `_free`. `ncnn`: its name there."""
    sides = {"B": 1} | {k: int(n) for k, n in zip(tensor.shape, seen, strict=True) if k != "B"}
    shape = [words.get(letter, sides[letter]) for letter in tensor.shape]
    name = tensor.name
    if RUNTIMES[profile.target].names == "ncnn":  # no batch axis
        name, shape = ncnn, shape[1:] or [1]
    elif profile.target == "coreml":
        shape = shape or [1]
    return {"name": name, "dtype": tensor.dtype, "shape": shape, "range": tensor.range}
