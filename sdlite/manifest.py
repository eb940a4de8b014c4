"""The manifest, `sdlite.json`: what a model folder holds, in which precisions, with the hash of
every file. Also the names of the files of a folder, and the rules that listings share.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Required, TypedDict

from sdlite import schema
from sdlite.errors import ArtifactError, printable
from sdlite.io import sha256, write_json

MANIFEST = "sdlite.json"
INDEX = "model_index.json"
FORMAT = "1.0"
PRECISIONS = ("fp32", "fp16", "int8-dynamic", "int8-static")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
REPORT = "export-report.json"
STUDENT = "student.json"


class FileRow(TypedDict):
    """What a listing says of one file."""

    sha256: str
    bytes: int


class NetworkRow(TypedDict, total=False):
    """What a listing says of one network: its files, and how its weights are kept and computed."""

    file: Required[str]
    weights: Required[list[str]]  # files that `file` reads
    storage: Required[str]
    arithmetic: Required[str]
    opset: int
    scheme: str
    inputs: list[dict[str, object]]
    output: dict[str, object]
    more_outputs: list[dict[str, object]]
    batch: int  # where it is fixed
    cuts: bool  # the UNet is three graphs (`sdlite.backends.fused`)


class SamplerRow(TypedDict, total=False):
    """How a model samples when a call does not say."""

    name: str
    num_inference_steps: int
    guidance_scale: float


class CalibrationRow(TypedDict, total=False):
    """Prompts that quantizing measures ranges on, and the layers that it leaves in float; of a
    quantized model, how its ranges were measured.
    """

    prompts: list[str]
    keep_float: dict[str, list[str]]
    prompts_sha256: str
    num_prompts: int
    samples: int
    seed: int
    num_inference_steps: int
    observer: str


class QualityRow(TypedDict, total=False):
    """The quality check of a quantized model: what it was compared with, the result on each
    backend, and what failed.
    """

    against: str
    engines: dict[str, dict[str, object]]
    failed: list[str]


Variants = dict[str, dict[str, NetworkRow]]  # precision -> part -> its row


@dataclass
class Manifest:
    """What sdlite.json holds.

    Attributes:
        student: how the model was made and how large it is.
        files: path -> size and hash of every file of the model.
        size_multiple: height and width must be multiples of this for the ONNX graphs, in pixels.
        max_pixels: height x width x images that a call may make when it does not say; None is
            sdlite's own limit.
        preview: what paints previews of latents, (channels + 1, 3); None: fitted when it is needed.
    """

    format: str = FORMAT
    name: str = ""
    student: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerRow = field(default_factory=SamplerRow)
    variants: Variants = field(default_factory=dict)
    files: dict[str, FileRow] = field(default_factory=dict)
    calibration: CalibrationRow | None = None
    quality: QualityRow | None = None
    size_multiple: int = 8
    max_pixels: int | None = None
    preview: list[list[float]] | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any], file: str | Path = MANIFEST) -> Manifest:
        """Check everything that a manifest says; `file` is what errors call it.

        Raises:
            ArtifactError: another major version, or what is not accepted, with its key.
        """
        version = data.get("format")
        if not isinstance(version, str) or version.split(".")[0] != FORMAT.split(".")[0]:
            raise schema.refused(
                file,
                "format",
                version,
                f"{FORMAT.split('.')[0]}.x, which this sdlite reads; or update sdlite",
            )
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise schema.refused(file, "a key", unknown[0], ", ".join(sorted(known)))
        _MANIFEST(file, "", data)
        out = cls(**data)
        for precision, parts in out.variants.items():
            for part, entry in parts.items():
                check_row(file, f"variants.{precision}.{part}", part, entry, out.files, (".onnx",))
        return out

    def to_dict(self) -> dict[str, object]:
        """What sdlite.json holds."""
        out = dataclasses.asdict(self)
        for key in ("max_pixels", "preview"):  # earlier versions do not know them
            if out[key] is None:
                del out[key]
        return out


def check_row(
    file: str | Path,
    key: str,
    part: str,
    entry: NetworkRow,
    files: Collection[str],
    endings: tuple[str, ...] = (),
) -> None:
    """Whether a network's files are listed, and stand in its own folder with a known ending.

    Raises:
        ArtifactError: they do not.
    """
    if endings and not (entry["file"].startswith(f"{part}/") and entry["file"].endswith(endings)):
        raise schema.refused(file, f"{key}.file", entry["file"], f"{part}/*{' or '.join(endings)}")
    if missing := [p for p in (entry["file"], *entry["weights"]) if p not in files]:
        raise schema.refused(file, key, missing[0], "files that `files` lists")


def plain_path(path: str, listing: str | Path = MANIFEST) -> PurePosixPath:
    """A relative POSIX path that stays inside the folder; `listing` is the file that names it.

    Raises:
        ArtifactError: it is none.
    """
    p = PurePosixPath(path)
    bad = (
        p.is_absolute()
        or ".." in p.parts
        or str(p) != path
        or path == "."
        or len(path) > 1000
        or any(len(x) > 255 for x in p.parts)
    )
    if bad or "\\" in path or ":" in path or schema.unclean(path):
        raise ArtifactError(
            f"{listing} names {printable(repr(path), 100)}, which is not a plain path inside the"
            " model folder; do not use this model."
        )
    return p


def safe_path(path: str, listing: str | Path = MANIFEST) -> PurePosixPath:
    """A plain path that is not a pickle. Raises: ArtifactError."""
    p = plain_path(path, listing)
    if p.suffix.lower() in PICKLES:
        raise ArtifactError(
            f"{listing} names {path!r}, a pickle format that can run code; only safetensors and"
            " ONNX are loaded."
        )
    return p


def listed(path: schema.Rule) -> schema.Rule:
    """Rule of path -> {sha256, bytes}."""
    sha = schema.rule(
        "64 hexadecimal digits",
        lambda v: isinstance(v, str) and re.fullmatch(r"[0-9a-fA-F]{64}", v) is not None,
    )
    return schema.table(
        path, schema.record({"sha256": sha, "bytes": schema.whole()}, ("sha256", "bytes"))
    )


TEXT, _TEXTS = schema.text(), schema.each(schema.text(10_000))
SIZE_MULTIPLE = schema.whole(1, 8192)
SAMPLER = schema.record(
    {"name": TEXT, "num_inference_steps": schema.whole(1, 1000), "guidance_scale": schema.number()}
)
# Which networks a model has is its family's to say: `Artifact` looks at that.
PART = schema.rule(
    "the name of a network",
    lambda v: isinstance(v, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,63}", v) is not None,
)
ROW = schema.record(
    {
        "file": TEXT,
        "weights": schema.each(TEXT),
        "storage": TEXT,
        "arithmetic": TEXT,
        "opset": schema.whole(1),
        "scheme": TEXT,
        "inputs": schema.each(schema.OBJECT),
        "output": schema.OBJECT,
        "more_outputs": schema.each(schema.OBJECT),
        "batch": schema.whole(1),
        "cuts": schema.BOOL,
    },
    ("file", "weights", "storage", "arithmetic"),
)
_MANIFEST = schema.record(
    {
        "name": TEXT,
        "student": schema.OBJECT,
        "sampler": SAMPLER,
        "variants": schema.table(schema.one_of(PRECISIONS), schema.table(PART, ROW)),
        "files": listed(lambda file, key, path: safe_path(str(path), file)),
        "calibration": schema.optional(
            schema.record({"prompts": _TEXTS, "keep_float": schema.table(TEXT, _TEXTS)})
        ),
        "quality": schema.optional(
            schema.record({"engines": schema.table(TEXT, schema.OBJECT), "failed": _TEXTS})
        ),
        "size_multiple": SIZE_MULTIPLE,
        "max_pixels": schema.optional(schema.whole(1)),
        "preview": schema.optional(
            schema.each(schema.each(schema.number(-1e6, 1e6), 3, 3), 2, 1025)
        ),
    }
)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash every file below `folder` into `manifest.files` and write sdlite.json beside and
    rename.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    manifest.files = {
        p.relative_to(folder).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size}
        for p in paths
    }
    data = manifest.to_dict()
    Manifest.from_dict(json.loads(json.dumps(data)))
    write_json(folder / MANIFEST, data)
