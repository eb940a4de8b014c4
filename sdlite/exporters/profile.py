"""A target profile is data: which runtime, which precision, which shapes, and what must hold.
Built-in ones are in `export/profiles/`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlite.arguments import MOST_IMAGES, MOST_PIXELS, integer, number, one_of, text, truth
from sdlite.artifact import Artifact
from sdlite.errors import InputError, UnknownNameError, printable
from sdlite.io import read_toml

TARGETS = {  # runtime -> (module, the extras that install it)
    "onnx": ("sdlite.exporters.targets.onnx", "quantize"),
    "openvino": ("sdlite.exporters.targets.openvino", "quantize,openvino"),
    "web": ("sdlite.exporters.targets.web", "quantize"),
    "ncnn": ("sdlite.exporters.targets.ncnn", "ncnn"),
    "executorch": ("sdlite.exporters.targets.executorch", "executorch"),
    "coreml": ("sdlite.exporters.targets.coreml", "coreml"),
    "mnn": ("sdlite.exporters.targets.mnn", "mnn"),
    "tensorrt": ("sdlite.exporters.targets.tensorrt", "tensorrt"),
    "tensorrt-rtx": ("sdlite.exporters.targets.tensorrt_rtx", "tensorrt-rtx"),
    "qnn": ("sdlite.exporters.targets.qnn", "qnn"),
}
# precision -> the artefact's graphs that it can be made from, the best first
SOURCES = {
    "fp32": ("fp32",),
    "fp16": ("fp16", "fp32"),
    "bf16": ("fp32",),
    "int8-static": ("int8-static",),
    "a16w8": ("fp32",),
}
PRECISIONS = tuple(SOURCES)
GATES = ("psnr", "reference", "text_encoder", "unet", "vae_decoder")


@dataclass(frozen=True)
class Profile:
    """What an export makes.

    Attributes:
        target: runtime, a key of `TARGETS`.
        precision: "fp32", "fp16", "bf16", "int8-static" (takes the graphs of a quantised artefact)
            or "a16w8" (16 bits of activation, 8 of weight; calibrated during the export).
        batch: rows of a network call, or 0 for any. Phones: 1, with guidance as two calls.
        height, width: pixels, or 0: the student's own when `dynamic` is false, any when it is true.
        dynamic: keep free shapes; only some runtimes can.
        memory_mib: most MiB that the files of the networks may have together, which a device holds
            in memory besides activations; 0: no ceiling.
        gate: {"psnr": dB of the final picture, "reference": the same against the float model that
            `export(reference=)` names, "text_encoder" | "unet" | "vae_decoder": SQNR in dB}.
        options: what the target's module takes besides.
    """

    name: str
    target: str
    precision: str = "fp32"
    batch: int = 1
    height: int = 0
    width: int = 0
    dynamic: bool = False
    memory_mib: int = 0
    gate: dict[str, float] = field(default_factory=lambda: {"psnr": 40.0})
    options: dict[str, Any] = field(default_factory=dict)
    about: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        """Precisions of the artefact's graphs that the export can start from, the best first."""
        return SOURCES[self.precision]

    def source(self, artifact: Artifact) -> str | None:
        """The best of `sources` that the artefact holds."""
        return next((s for s in self.sources if artifact.has_onnx(s)), None)

    @classmethod
    def parse(cls, raw: dict[str, Any], name: str) -> Profile:
        """Check what a TOML file says.

        Raises:
            InputError, UnknownNameError: an unknown name, or a value of another type or range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise InputError(
                f"profile {name}: {', '.join(unknown)} not known; known:"
                f" {', '.join(sorted(known))}."
            )
        for key, value in {"target": "", **raw}.items():
            _check(f"profile {name}: {key}", key, value)
        return cls(**{"name": name, **raw})


def _check(label: str, key: str, value: Any) -> None:
    """One key of a profile: its type and its range."""
    match key:
        case "target" | "precision":
            one_of(label, value, tuple(TARGETS) if key == "target" else PRECISIONS)
        case "batch":
            integer(label, value, 0, MOST_IMAGES)
        case "height" | "width":
            integer(label, value, 0, MOST_PIXELS)
        case "memory_mib":
            integer(label, value, 0)
        case "dynamic":
            truth(label, value)
        case "name" | "about":
            text(label, value)
        case "gate" | "options":
            if not isinstance(value, dict):
                raise InputError(
                    f"{label}={printable(repr(value), 80)} is no table; accepted: name = value."
                )
            if key == "gate" and (unknown := sorted(set(value) - set(GATES))):
                raise InputError(f"{label} names {', '.join(unknown)}; known: {', '.join(GATES)}.")
            for part, least in value.items() if key == "gate" else ():
                number(f"{label}, {part}", least)


def assets() -> Path:
    """The `export/` folder: profiles, calibration prompts, pages. In the installed package, or
    beside it in a checkout.
    """
    for place in (Path(__file__).parent / "assets", Path(__file__).parents[2] / "export"):
        if (place / "profiles").is_dir():
            return place
    raise InputError(
        "this installation holds no built-in profiles; install it again, or give a profile.toml."
    )


def builtin() -> dict[str, Profile]:
    """Name -> profile."""
    return {
        p.stem: Profile.parse(tomllib.loads(p.read_text(encoding="utf-8")), p.stem)
        for p in sorted((assets() / "profiles").glob("*.toml"))
    }


def load(target: str | Path) -> Profile:
    """A built-in name, or the path of a TOML file.

    Raises:
        UnknownNameError: neither. InputError: a file that is not TOML or says something unknown.
    """
    path = Path(target)
    if path.suffix == ".toml":
        if not path.is_file():
            raise InputError(
                f"profile {path} does not exist; give a TOML file or one of {', '.join(builtin())}."
            )
        return Profile.parse(read_toml(path, "profile", "give a TOML file"), path.stem)
    known = builtin()
    if str(target) not in known:
        raise UnknownNameError(
            f"target {str(target)!r} is not known; choose one of {', '.join(known)}, or a"
            " profile.toml."
        )
    return known[str(target)]
