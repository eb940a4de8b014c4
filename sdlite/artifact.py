"""The artefact: a diffusers folder with ONNX graphs beside the weights and `sdlite.json`, the manifest that ties them together.

    model_index.json  tokenizer/  scheduler/  text_encoder/  unet/  vae/      diffusers' own layout, safetensors
    <part>/model.onnx                                                         graphs, for text_encoder, unet, vae_decoder
    sdlite.json                                                               format, student, variants, sampler, file hashes

A folder without a manifest is a plain diffusers pipeline and is accepted for the `torch` backend. Readers refuse unknown major
versions, paths that leave the folder, missing or changed files, and pickles. Writers write beside and rename.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sdlite import families
from sdlite.errors import ArtifactError
from sdlite.files import Files
from sdlite.io import left_behind, printable, read_json, sha256, write_json
from sdlite.sampling import known_sampler, sampler_of

if TYPE_CHECKING:
    from sdlite.exported import Export

MANIFEST = "sdlite.json"
FORMAT = "1.0"
PRECISIONS = ("fp32", "fp16", "int8-dynamic", "int8-static")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
PARTS = ("text_encoder", "unet", "vae_decoder")
REPORT = "export-report.json"
STUDENT = "student.json"
ADAPTER = "adapter_config.json"
# Keys of a configuration by which transformers and diffusers load code, kernels or other classes.
CODE = (
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "quantization_config",
    "trust_remote_code", "transformers_weights", "custom_pipeline", "custom_pipelines",
)  # fmt: skip


@dataclass(frozen=True)
class SamplerDefaults:
    """What a call uses when it does not say: the student's own steps and guidance."""

    num_inference_steps: int
    guidance_scale: float


@dataclass
class Manifest:
    """sdlite.json. `variants`: precision -> part -> {file, weights, storage, arithmetic, opset}; `files`: path -> {sha256, bytes}."""

    format: str = FORMAT
    name: str = ""
    student: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    size_multiple: int = 8  # height and width must be multiples of this for the ONNX graphs
    max_pixels: int | None = None  # height x width x images that a call may make when it does not say; None: sdlite's own

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Manifest:
        version = str(data.get("format", ""))
        if version.split(".")[0] != FORMAT.split(".")[0]:
            raise ArtifactError(
                f"{MANIFEST} has format {version!r}; this sdlite reads {FORMAT.split('.')[0]}.x. Update sdlite or save the model again."
            )
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(data) - known:
            raise ArtifactError(f"{MANIFEST} has unknown keys {sorted(unknown)}; known: {', '.join(sorted(known))}.")
        out = cls(**data)
        most = out.max_pixels
        if most is not None and (type(most) is not int or most < 1):
            raise ArtifactError(f"{MANIFEST} has max_pixels={most!r}; accepted: a whole number, at least 1. Save the model again.")
        try:
            for path, entry in out.files.items():
                safe_path(path)
                entry["sha256"], int(entry["bytes"])
            for precision, parts in out.variants.items():
                if precision not in PRECISIONS:
                    raise ArtifactError(f"{MANIFEST} has a variant {precision!r}; known: {', '.join(PRECISIONS)}.")
                for part, entry in parts.items():
                    if missing := [p for p in (entry["file"], *entry["weights"]) if p not in out.files]:
                        raise ArtifactError(
                            f"{MANIFEST}: {precision} {part} names {missing}, which `files` does not list; save the model again."
                        )
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            if isinstance(e, ArtifactError):
                raise
            raise ArtifactError(f"{MANIFEST} is malformed ({type(e).__name__}: {e}); save the model again.") from e
        return out


def plain_path(path: str, listing: str = MANIFEST) -> PurePosixPath:
    """A relative POSIX path that stays inside the folder; `listing` is the file that names it."""
    p = PurePosixPath(path)
    if not path or p.is_absolute() or ".." in p.parts or "\\" in path or ":" in path:
        raise ArtifactError(f"{listing} names {path!r}, which is not a plain path inside the model folder; do not use this model.")
    return p


def safe_path(path: str) -> PurePosixPath:
    """A plain path that is not a pickle."""
    p = plain_path(path)
    if p.suffix.lower() in PICKLES:
        raise ArtifactError(f"{MANIFEST} names {path!r}, a pickle format that can run code; only safetensors and ONNX are loaded.")
    return p


class Artifact:
    """An opened model folder. Its files are read through `files`, which verifies them."""

    def __init__(self, folder: Path, manifest: Manifest | None, export: Export | None = None):
        self.folder, self.manifest, self.export = folder, manifest, export
        listed, listing = (manifest.files, MANIFEST) if manifest else (export.files, REPORT) if export else (None, "")
        self.files = Files(folder, listed, listing)
        self.index = self.files.read_json("model_index.json")

    @classmethod
    def open(cls, folder: str | Path, *, any_kind: bool = False) -> Artifact:
        """Read the manifest (or accept a plain diffusers folder); file contents are verified when they are loaded.

        Args:
            any_kind: open pipelines that sdlite does not run too, to look at them.

        Raises:
            ArtifactError: not a model folder, a pipeline that sdlite does not run, or a manifest that is damaged, unsafe or of
                another major version.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is not a folder; give a model folder, a hub id or the name of an embedded model.")
        if left_behind(folder):
            raise ArtifactError(
                f"{folder} is half written, by a process that is still at work or was stopped; use what it wrote in the end."
            )
        if not os.path.lexists(folder / "model_index.json"):
            raise ArtifactError(
                f"{folder} has no model_index.json, so it is not a diffusers pipeline folder; give the folder that holds it."
            )
        from sdlite.exported import Export

        path = folder / MANIFEST
        listed = os.path.lexists(path)
        out = cls(folder, Manifest.from_dict(read_json(path)) if listed else None, None if listed else Export.open(folder))
        if not any_kind and (why := out.refusal()):
            raise ArtifactError(why)
        return out

    def refusal(self) -> str:
        """Why sdlite does not run this kind of model, in one line; "" where it does."""
        return families.refusal(str(self.folder), self.index, self.config)

    @property
    def name(self) -> str:
        given = self.manifest.name if self.manifest else self.export.report.get("model") if self.export else None
        return str(given or self.folder.name)

    @property
    def sampler(self) -> dict[str, Any]:
        """Name, steps and guidance that the model is made for; {} for a plain diffusers folder."""
        return self.manifest.sampler if self.manifest else dict(self._student().get("sampler", {}))

    @property
    def sampler_name(self) -> str:
        """The model's own sampler, or what its scheduler is to us.

        Raises:
            UnknownNameError, InputError: a scheduler that we do not have.
        """
        return str(self.sampler.get("name") or sampler_of(self.config("scheduler")))

    @property
    def sampler_defaults(self) -> SamplerDefaults:
        """The model's own steps and guidance, or those of diffusers' pipeline."""
        own = self.sampler
        return SamplerDefaults(own.get("num_inference_steps", 50), own.get("guidance_scale", 7.5))

    @property
    def samples_with(self) -> dict[str, Any]:
        """What a call samples with when it does not say: {name, num_inference_steps, guidance_scale}.

        Raises:
            UnknownNameError, InputError: a scheduler that we do not have.
        """
        return {"name": self.sampler_name, **dataclasses.asdict(self.sampler_defaults)}

    def with_sampler(self, name: str | None) -> Artifact:
        """The same model, opened, with another sampler of its own: what is made of it keeps that one.

        Raises:
            UnknownNameError: no such sampler.
        """
        if name is None:
            return self
        known_sampler(name)
        assert self.manifest is not None
        out = copy.copy(self)
        out.manifest = dataclasses.replace(self.manifest, sampler={**self.manifest.sampler, "name": name})
        return out

    @property
    def student(self) -> dict[str, Any]:
        """How the model was made and how large it is; {} for a plain diffusers folder."""
        return self.manifest.student if self.manifest else dict(self._student().get("student", {}))

    def _student(self) -> dict[str, Any]:
        """student.json, which an export carries."""
        return self.files.read_json(STUDENT) if self.export and self.files.has(STUDENT) else {}

    @property
    def listing(self) -> Manifest | Export | None:
        """What names the folder's networks and their files' hashes."""
        return self.manifest or self.export

    @property
    def failed(self) -> list[str]:
        """What of its quality check does not hold: the model was kept to be looked at. [] for every other."""
        said: Any = self.manifest.quality if self.manifest else self.export.report if self.export else None
        return [str(x) for x in said.get("failed", ())] if isinstance(said, dict) else []

    def has_onnx(self, precision: str) -> bool:
        return bool(self.manifest and set(PARTS) <= set(self.manifest.variants.get(precision, {})))

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a network or the scheduler.

        Raises:
            ArtifactError: the file is missing, damaged or not the listed one, or asks for code.
        """
        return config(self.files.part(part), "scheduler_config.json" if part == "scheduler" else "config.json")

    def verify(self, paths: Iterable[str] | None = None) -> list[str]:
        """Check size and SHA-256 of `paths` (default: every file of the manifest, or of an export's report); returns what was checked.

        Raises:
            ArtifactError: the first file that is missing, cut off, changed or not listed, named with what was expected.
        """
        if self.listing is None:
            raise ArtifactError(
                f"{self.folder} has no {MANIFEST}, so there is nothing to verify it against; make a model with one by sdlite.convert."
            )
        checked = sorted(self.listing.files) if paths is None else list(paths)
        for path in checked:
            self.files.verified(path, again=paths is None)
        if paths is None and self.failed:
            raise ArtifactError(f"{self.folder} failed its quality check ({'; '.join(self.failed)}); it was kept to be looked at alone.")
        return checked

    def loose_pickles(self) -> list[str]:
        listed = self.export.files if self.export else {}  # an OpenVINO or ncnn network ends in .bin
        found = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.suffix.lower() in PICKLES)
        return sorted(p for p in found if p not in listed)


def config(files: Files, name: str = "config.json") -> dict[str, Any]:
    """The configuration in a folder of a model.

    Raises:
        ArtifactError: the file cannot be used, or it or a file beside it asks the libraries for code or weights from elsewhere.
    """
    out = files.read_json(name)
    if asked := [k for k in CODE if out.get(k) is not None]:
        raise ArtifactError(
            f"{files.path(name)} has {asked[0]}={printable(repr(out[asked[0]]), 80)}, which has code or weights from elsewhere loaded; "
            "accepted: none. Load with transformers or diffusers what you trust, and save_pretrained() it without."
        )
    if files.has(ADAPTER):
        raise ArtifactError(
            f"{files.path(ADAPTER)} puts other weights into the network; sdlite loads no adapters. "
            "Merge it (peft's merge_and_unload(), or fuse_lora()) and save_pretrained(), or remove the file."
        )
    return out


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash every file below `folder` into `manifest.files` and write sdlite.json beside and rename."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    manifest.files = {p.relative_to(folder).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in paths}
    data = dataclasses.asdict(manifest)
    if manifest.max_pixels is None:
        del data["max_pixels"]  # earlier versions do not know it
    Manifest.from_dict(json.loads(json.dumps(data)))
    write_json(folder / MANIFEST, data)
