"""A profile says what an export makes: which runtime, which precision, which shapes, and what must
hold. The built-in ones are in `export/profiles/`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sdlite.arguments import MOST_IMAGES, MOST_PIXELS
from sdlite.artifact import Artifact
from sdlite.errors import InputError, UnknownNameError, printable
from sdlite.exporters import targets
from sdlite.io import read_toml
from sdlite.settings import At, read, settings

# precision -> the precisions of a model's graphs that it can be made from, the best first
SOURCES = {
    "fp32": ("fp32",),
    "fp16": ("fp16", "fp32"),
    "bf16": ("fp32",),
    "int8-static": ("int8-static",),
    "a16w8": ("fp32",),
}
Precision = Literal["fp32", "fp16", "bf16", "int8-static", "a16w8"]
Decibel = float | None
Side = Annotated[int, At(0, MOST_PIXELS)]


@settings
@dataclass(frozen=True)
class Gate:
    """What the quality check of an export must reach, in dB; None: not asked for.

    Attributes:
        psnr: PSNR of the images to the model's.
        reference: PSNR to the images of the float model that `export(reference=)` names.
        text_encoder, unet, vae_decoder, vae_encoder, controlnet: SQNR of the network's outputs.
    """

    psnr: Decibel = None
    reference: Decibel = None
    text_encoder: Decibel = None
    unet: Decibel = None
    vae_decoder: Decibel = None
    vae_encoder: Decibel = None
    controlnet: Decibel = None

    def wanted(self) -> dict[str, float]:
        """What is asked for, by name."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@settings
@dataclass(frozen=True)
class Profile:
    """What an export makes.

    Attributes:
        target: the runtime, see `sdlite.exporters.targets`.
        precision: "fp32", "fp16", "bf16", "int8-static" (takes the graphs of a quantized model) or
            "a16w8" (16 bits of activation, 8 of weight; calibrated during the export).
        batch: rows of a network call, or 0 for any. Phones: 1, with guidance as two calls.
        height, width: pixels. 0: the model's own size when `dynamic` is false, any when it is true.
        dynamic: keep free shapes; only some runtimes can.
        memory_mib: most MiB that the files of the networks may have together, which a device holds
            in memory besides activations; 0: no ceiling.
        gate: the quality check.
        options: what the target takes besides, see its `options_type`.
        about: one sentence for `sdlite export --list`.
    """

    name: str
    target: str
    precision: Precision = "fp32"
    batch: Annotated[int, At(0, MOST_IMAGES)] = 1
    height: Side = 0
    width: Side = 0
    dynamic: bool = False
    memory_mib: Annotated[int, At(0)] = 0
    gate: Gate = field(default_factory=lambda: Gate(psnr=40.0))
    options: dict[str, object] = field(default_factory=dict)
    about: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        """Precisions of the model's graphs that the export can start from, the best first."""
        return SOURCES[self.precision]

    @property
    def rows(self) -> int:
        """Rows of a call of a network with a fixed batch."""
        return self.batch or 1

    @property
    def size(self) -> dict[str, int | None]:
        """`height` and `width` as a pipeline's call takes them."""
        return {"height": self.height or None, "width": self.width or None}

    def source(self, artifact: Artifact) -> str | None:
        """The best of `sources` that the model holds."""
        return next((s for s in self.sources if artifact.has_onnx(s)), None)

    def to_dict(self) -> dict[str, object]:
        """What the report of an export says of it."""
        return {**dataclasses.asdict(self), "gate": self.gate.wanted()}

    @classmethod
    def parse(cls, raw: Mapping[str, object], name: str) -> Profile:
        """Check what a TOML file says. The options are read by the target, see `targets.of`.

        Raises:
            InputError: an unknown key, or a value of another type or range.
            UnknownNameError: an unknown target.
            MissingExtraError: pydantic is not installed.
        """
        label = f"profile {printable(name, 80)}"
        out = read(cls, {"name": name, **raw}, label)
        if out.target not in targets.names():
            raise UnknownNameError(
                f"{label}: target={out.target!r} is not known; choose one of"
                f" {', '.join(targets.names())}."
            )
        return out


def assets() -> Path:
    """The `export/` folder: profiles, calibration prompts, pages. It stands in the installed
    package, or beside it in a checkout.
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
    """A built-in profile by name, or the path of a TOML file.

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
