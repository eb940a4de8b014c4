"""The artefact: a diffusers folder with ONNX graphs beside the weights and `sdlite.json`, the manifest that ties them together.

    model_index.json  tokenizer/  scheduler/  text_encoder/  unet/  vae/      diffusers' own layout, safetensors
    <part>/model.onnx                                                         graphs, for text_encoder, unet, vae_decoder
    sdlite.json                                                               format, student, variants, sampler, file hashes

A folder without a manifest is a plain diffusers pipeline and is accepted for the `torch` backend. Readers refuse unknown major
versions, paths that leave the folder, missing or changed files, and pickles. Writers write beside and rename.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sdlite import families
from sdlite.errors import ArtifactError
from sdlite.io import left_behind, read_json, sha256, write_json
from sdlite.sampling import known_sampler, sampler_of

if TYPE_CHECKING:
    from sdlite.exported import Export

MANIFEST = "sdlite.json"
FORMAT = "1.0"
PRECISIONS = ("fp32", "fp16", "int8-dynamic", "int8-static")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
PARTS = ("text_encoder", "unet", "vae_decoder")


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
    """An opened model folder."""

    def __init__(self, folder: Path, manifest: Manifest | None, export: Export | None = None):
        self.folder, self.manifest, self.export = folder, manifest, export
        self.index = read_json(folder / "model_index.json")

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
        if not (folder / "model_index.json").exists():
            raise ArtifactError(
                f"{folder} has no model_index.json, so it is not a diffusers pipeline folder; give the folder that holds it."
            )
        path = folder / MANIFEST
        from sdlite.exported import Export

        listed = path.exists()
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
        manifest = dataclasses.replace(self.manifest, sampler={**self.manifest.sampler, "name": name})
        return Artifact(self.folder, manifest)

    @property
    def student(self) -> dict[str, Any]:
        """How the model was made and how large it is; {} for a plain diffusers folder."""
        return self.manifest.student if self.manifest else dict(self._student().get("student", {}))

    def _student(self) -> dict[str, Any]:
        """student.json, which an export carries."""
        path = self.folder / "student.json"
        return read_json(path) if path.exists() else {}

    @property
    def listing(self) -> Manifest | Export | None:
        """What names the folder's networks and their files' hashes."""
        return self.manifest or self.export

    def has_onnx(self, precision: str) -> bool:
        return bool(self.manifest and set(PARTS) <= set(self.manifest.variants.get(precision, {})))

    def config(self, part: str) -> dict[str, Any]:
        return read_json(self.folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))

    def verify(self, paths: Iterable[str] | None = None) -> list[str]:
        """Check size and SHA-256 of `paths` (default: every file of the manifest, or of an export's report); returns what was checked.

        Raises:
            ArtifactError: the first file that is missing, cut off, or changed, named with what was expected.
        """
        if self.listing is None:
            raise ArtifactError(
                f"{self.folder} has no {MANIFEST}, so there is nothing to verify it against; save it with Pipeline.save_pretrained."
            )
        said = "manifest" if self.manifest else "report"
        checked = sorted(self.listing.files) if paths is None else list(paths)
        for path in checked:
            entry, file = self.listing.files[path], self.folder / plain_path(path)
            if not file.is_file():
                raise ArtifactError(f"{file} is missing; fetch or save the model again.")
            if not file.resolve().is_relative_to(self.folder.resolve()) and not _in_hub_cache(self.folder, file):
                raise ArtifactError(f"{file} is a link that leaves the model folder; do not use this model.")
            if (size := file.stat().st_size) != entry["bytes"]:
                raise ArtifactError(
                    f"{file} has {size} bytes, its {said} says {entry['bytes']}; it is cut off or changed. Fetch the model again."
                )
            if (digest := sha256(file)) != entry["sha256"]:
                raise ArtifactError(
                    f"{file} has SHA-256 {digest[:12]}..., its {said} says {entry['sha256'][:12]}...; it was changed. Fetch the model again."
                )
        return checked

    def loose_pickles(self) -> list[str]:
        listed = self.export.files if self.export else {}  # an OpenVINO or ncnn network ends in .bin
        found = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.suffix.lower() in PICKLES)
        return sorted(p for p in found if p not in listed)


def _in_hub_cache(folder: Path, file: Path) -> bool:
    """huggingface_hub links snapshots/<rev>/file to blobs/<hash> beside it: links into that folder are its own."""
    repo = next((p for p in folder.parents if (p / "blobs").is_dir() and (p / "snapshots").is_dir()), None)
    return repo is not None and file.resolve().is_relative_to((repo / "blobs").resolve())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash every file below `folder` into `manifest.files` and write sdlite.json beside and rename."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    manifest.files = {p.relative_to(folder).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in paths}
    data = dataclasses.asdict(manifest)
    if manifest.max_pixels is None:
        del data["max_pixels"]  # earlier versions do not know it
    Manifest.from_dict(json.loads(json.dumps(data)))
    write_json(folder / MANIFEST, data)
