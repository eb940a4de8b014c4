"""A model folder: diffusers' layout with ONNX graphs beside the weights, and the manifest that ties
them together.

    model_index.json tokenizer/ scheduler/ text_encoder/ unet/ vae/   diffusers' layout, safetensors
    <part>/model.onnx      a graph of text_encoder, unet and vae_decoder each
    sdlite.json            format, student, variants, sampler, hashes of all files

A folder without a manifest is a plain diffusers pipeline, which the `torch` backend runs. Readers
refuse unknown major versions, paths that leave the folder, missing or changed files, and pickles.
Writers write beside the folder and rename.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlite import families, schema
from sdlite.errors import ArtifactError, InputError, printable
from sdlite.exported import Export
from sdlite.files import TOKENIZER_FILES, Files, read_listing
from sdlite.io import left_behind, plain, read_bytes, write_json
from sdlite.manifest import (
    INDEX,
    MANIFEST,
    PICKLES,
    REPORT,
    SAMPLER,
    STUDENT,
    TEXT,
    CalibrationRow,
    Manifest,
    NetworkRow,
    SamplerRow,
)
from sdlite.sampling import known_sampler, sampler_of
from sdlite.spec import IOSpec
from sdlite.weights import check_variant, model_files, stem

log = logging.getLogger("sdlite")
GRAPH_BYTES = 64 << 20  # more than a graph has whose weights stand elsewhere
ADAPTER = "adapter_config.json"
# Keys of a configuration by which transformers and diffusers load code, kernels or other classes.
CODE = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "quantization_config",
    "trust_remote_code",
    "transformers_weights",
    "custom_pipeline",
    "custom_pipelines",
)


@dataclass(frozen=True)
class SamplerDefaults:
    """What a call uses when it does not say: the student's own steps and guidance."""

    num_inference_steps: int
    guidance_scale: float


_STUDENT = schema.record({"name": TEXT, "student": schema.OBJECT, "sampler": SAMPLER})
_COMPONENT = schema.each(schema.optional(TEXT), 2, 2)  # [library, class], or [null, null]


class Artifact:
    """An opened model folder. Its files are read through `files`, which verifies them."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest | None,
        export: Export | None = None,
        variant: str | None = None,
    ):
        self.folder, self.manifest, self.export = folder, manifest, export
        listed = self.listing.files if self.listing else None
        listing = MANIFEST if manifest else REPORT if export else ""
        self.files = Files(folder, listed, listing, variant=variant or "")
        self.index = self._index()

    def _index(self) -> schema.Json:
        out = self.files.read_json(INDEX)
        for key, value in out.items():
            TEXT(self.files.path(INDEX), "a key", key)
            if isinstance(value, (list, str)):
                (_COMPONENT if isinstance(value, list) else TEXT)(
                    self.files.path(INDEX), key, value
                )
        return out

    @classmethod
    def open(
        cls, folder: str | Path, *, any_kind: bool = False, variant: str | None = None
    ) -> Artifact:
        """Read the manifest (or accept a plain diffusers folder); file contents are verified when
        they are loaded.

        Args:
            any_kind: open pipelines that sdlite does not run too, to look at them.
            variant: of the weights of a plain folder, such as "fp16", where it has several.

        Raises:
            UnknownNameError, InputError: a variant that the folder does not have, or cannot have.
            ArtifactError: not a model folder, a pipeline that sdlite does not run, or a manifest
                that is damaged, unsafe or of another major version.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ArtifactError(
                f"{folder} is not a folder; give a model folder, a hub id or the name of an"
                " embedded model."
            )
        if left_behind(folder):
            raise ArtifactError(
                f"{folder} is half written, by a process that is still at work or was stopped; use"
                " what it wrote in the end."
            )
        if not os.path.lexists(folder / INDEX):
            raise ArtifactError(
                f"{folder} has no model_index.json, so it is not a diffusers pipeline folder; give"
                " the folder that holds it."
            )
        path = folder / MANIFEST
        has = os.path.lexists(path)
        out = cls(
            folder,
            Manifest.from_dict(read_listing(folder, MANIFEST), path) if has else None,
            None if has else Export.open(folder),
            variant,
        )
        if out.listing is None and (sign := out._lost()):
            raise ArtifactError(
                f"{folder} was made by sdlite ({sign}) and has lost {MANIFEST}, which lists its"
                " files; without it, it would be another model. Fetch or save it again."
            )
        if not any_kind:
            if why := out.refusal():
                raise ArtifactError(why)
            out._check_parts()
        if variant is not None:
            out._check_variant(variant)
        return out

    def _check_variant(self, variant: str) -> None:
        """Raises where no network has weights of a variant; says which have none."""
        if self.listing is not None:
            raise InputError(
                f"variant={variant!r} is for diffusers folders and hub repositories; {self.folder}"
                f" is a model of sdlite that holds {', '.join(self.listing.variants) or 'none'}:"
                " choose one with precision=."
            )
        names = {p: self.files.part(p).names() for p in self.family.networks}
        _, others = check_variant(variant, names, str(self.folder))
        if others:
            log.warning(
                "%s has no %s of %s: the default weights are taken, as in diffusers",
                self.folder,
                variant,
                ", ".join(others),
            )

    def _check_parts(self) -> None:
        """Raises ArtifactError where a network is listed that the family does not have."""
        listing = self.listing
        for precision, networks in listing.variants.items() if listing else ():
            if unknown := sorted(set(networks) - {*self.parts, *self.family.optional}):
                raise schema.refused(
                    self.files.path(self.files.listing),
                    f"a network in {precision}",
                    unknown[0],
                    ", ".join(self.parts),
                )

    def _lost(self) -> str:
        """What only a folder has that had a manifest or a report; "" for diffusers' and optimum's
        own.
        """
        if families.MARK in self.index:
            return f"{INDEX} says so"
        graphs = [
            f"{p}/{n}"
            for p in (*families.networks(), "vae_decoder")
            for n in self.files.part(p).names()
            if n.endswith(".onnx")
        ]
        signs = [
            n
            for n in (STUDENT, "quantize-report.json", "vae_decoder/model.onnx.data")
            if self.files.has(n)
        ]
        signs += [n for n in graphs if "/model.int8-" in n or self._points_into_safetensors(n)]
        return f"it holds {signs[0]}" if signs else ""

    def _points_into_safetensors(self, graph: str) -> bool:
        path = self.files.path(graph)
        return plain(path).st_size <= GRAPH_BYTES and b".safetensors" in read_bytes(
            path, GRAPH_BYTES
        )

    def refusal(self) -> str:
        """Why sdlite does not run this kind of model, in one line; "" where it does."""
        return families.refusal(str(self.folder), self.index, self.config)

    @property
    def family(self) -> families.Family:
        """The family of models that it is of."""
        return families.family_of(self.index, self.config)

    @property
    def parts(self) -> tuple[str, ...]:
        """Its networks, in the order of a call: folders of their graphs."""
        return self.family.parts

    def held_parts(self, precision: str) -> tuple[str, ...]:
        """Its networks that are listed in a precision, those that edit images included."""
        listed = self.listing.variants.get(precision, {}) if self.listing else {}
        return tuple(p for p in (*self.parts, *self.family.optional) if p in listed)

    @property
    def folders(self) -> tuple[str, ...]:
        """Of a diffusers pipeline that it runs with: tokenizers, scheduler, networks."""
        family = self.family
        return (*family.tokenizers.values(), "scheduler", *family.networks)

    def spec(self, part: str) -> IOSpec:
        """What one of its networks takes and gives."""
        return self.family.spec(part, self.config)

    @property
    def name(self) -> str:
        """What the manifest or the report calls the model, else the folder's name."""
        given = self.manifest.name if self.manifest else self._report.get("model")
        return printable(given or self.folder.name)

    @property
    def _report(self) -> Mapping[str, Any]:
        """An export's report; {} for any other folder."""
        return self.export.report if self.export else {}

    def required_manifest(self) -> Manifest:
        """The manifest.

        Raises:
            ArtifactError: a plain diffusers folder or an export, which have none.
        """
        if self.manifest is None:
            raise ArtifactError(
                f"{self.folder} has no {MANIFEST}; make a model with one by sdlite.convert."
            )
        return self.manifest

    @property
    def sampler(self) -> SamplerRow:
        """Name, steps and guidance that the model is made for; {} for a plain diffusers folder."""
        if self.manifest:
            return self.manifest.sampler
        own: SamplerRow = self._student().get("sampler", {})
        return own

    @property
    def sampler_name(self) -> str:
        """The model's own sampler, or what its scheduler is to us.

        Raises:
            UnknownNameError, InputError: a scheduler that we do not have.
        """
        return self.sampler.get("name") or sampler_of(self.config("scheduler"))

    @property
    def sampler_defaults(self) -> SamplerDefaults:
        """The model's own steps and guidance, or those of diffusers' pipeline."""
        own, (steps, guidance) = self.sampler, self.family.defaults(self.index)
        return SamplerDefaults(
            own.get("num_inference_steps", steps), own.get("guidance_scale", guidance)
        )

    @property
    def samples_with(self) -> SamplerRow:
        """What a call samples with when it does not say.

        Raises:
            UnknownNameError, InputError: a scheduler that we do not have.
        """
        own = self.sampler_defaults
        return {
            "name": self.sampler_name,
            "num_inference_steps": own.num_inference_steps,
            "guidance_scale": own.guidance_scale,
        }

    def with_sampler(self, name: str | None) -> Artifact:
        """The same model, opened, with another sampler of its own: what is made of it keeps that
        one.

        Raises:
            UnknownNameError: no such sampler. ArtifactError: the folder has no manifest.
        """
        if name is None:
            return self
        known_sampler(name)
        own = self.required_manifest()
        out = copy.copy(self)
        out.manifest = dataclasses.replace(own, sampler={**own.sampler, "name": name})
        return out

    @property
    def student(self) -> schema.Json:
        """How the model was made and how large it is; {} for a plain diffusers folder."""
        return self.manifest.student if self.manifest else dict(self._student().get("student", {}))

    def _student(self) -> schema.Json:
        """student.json, which an export carries."""
        if not self.export or not self.files.has(STUDENT):
            return {}
        out = self.files.read_json(STUDENT)
        _STUDENT(self.files.path(STUDENT), "", out)
        return out

    @property
    def calibration(self) -> CalibrationRow:
        """The manifest's own prompts and layers in float; {} where it has none."""
        return (self.manifest.calibration if self.manifest else None) or {}

    @property
    def failed(self) -> list[str]:
        """What of its quality check does not hold: the model was kept to be looked at. [] for every
        other.
        """
        said = self.manifest.quality if self.manifest else self._report
        return [str(x) for x in said.get("failed", ())] if said else []

    def checked_on(self, backend: str) -> bool:
        """Whether the model's quality check ran on a backend."""
        quality = (self.manifest.quality if self.manifest else None) or {}
        return backend in quality.get("engines", {})

    # --- what it holds

    @property
    def listing(self) -> Manifest | Export | None:
        """What names the folder's networks and their files' hashes."""
        return self.manifest or self.export

    @property
    def precisions(self) -> list[str]:
        """Of the listed networks, best first; [] for a plain diffusers folder."""
        return list(self.listing.variants) if self.listing else []

    @property
    def precision(self) -> str:
        """The one that is run when nobody says: the export's, the first that is held, or fp32."""
        return self.export.precision if self.export else next(iter(self.precisions), "fp32")

    def holds(self, precision: str) -> bool:
        """Whether all networks are listed in a precision."""
        return self.listing is not None and set(self.parts) <= set(
            self.listing.variants.get(precision, {})
        )

    def has_onnx(self, precision: str) -> bool:
        """Whether a model that sdlite converted holds ONNX graphs of a precision."""
        return self.manifest is not None and self.holds(precision)

    @property
    def has_weights(self) -> bool:
        """Whether it holds float weights that torch runs."""
        return self.manifest is None or any((self.folder / "unet").glob("*.safetensors"))

    def network(self, precision: str, part: str) -> NetworkRow:
        """What the listing says of a network. The precision must be one that `holds`."""
        if self.listing is None:
            raise ArtifactError(f"{self.folder} has no {MANIFEST} that lists its networks.")
        return self.listing.variants[precision][part]

    def network_files(self, precision: str, part: str) -> list[str]:
        """Paths of a network's graph and of the weights that it reads."""
        row = self.network(precision, part)
        return [row["file"], *row["weights"]]

    def hashes(self, files: Iterable[str]) -> list[str]:
        """SHA-256 of listed files."""
        return [self.listing.files[f]["sha256"] for f in files] if self.listing else []

    def bytes_of(self, files: Iterable[str]) -> int:
        """Bytes of listed files together; a file that is named twice counts once."""
        listed = self.listing.files if self.listing else {}
        return sum(int(listed[f]["bytes"]) for f in dict.fromkeys(files))

    def bytes_held(self, precision: str) -> int:
        """Bytes of the files of a precision's networks that make an image of a prompt."""
        if self.listing is None:
            return 0
        return self.bytes_of(f for p in self.parts for f in self.network_files(precision, p))

    def config(self, part: str) -> schema.Json:
        """The configuration of a network or the scheduler.

        Raises:
            ArtifactError: the file is missing, damaged or not the listed one, or asks for code.
        """
        return config(
            self.files.part(part), "scheduler_config.json" if part == "scheduler" else "config.json"
        )

    def graph(self, precision: str, part: str) -> Path:
        """Where a network's graph is that the manifest lists. It and its weights are verified.

        Raises:
            ArtifactError: see `verify`.
        """
        files = self.network_files(precision, part)
        self.verify(files)
        return self.files.path(files[0])

    def verify(self, paths: Iterable[str] | None = None) -> list[str]:
        """Check size and SHA-256 of `paths` (default: every file of the manifest, or of an export's
        report); returns what was checked.

        Raises:
            ArtifactError: the first file that is missing, cut off, changed or not listed, named
                with what was expected.
        """
        if self.listing is None:
            raise ArtifactError(
                f"{self.folder} has no {MANIFEST}, so there is nothing to verify it against; make a"
                " model with one by sdlite.convert."
            )
        checked = sorted(self.listing.files) if paths is None else list(paths)
        for path in checked:
            self.files.verified(path, again=paths is None)
        if paths is None:
            for path in filter(self.files.has, self._used()):
                self.files.file(path)  # an error where it is not listed
            self._refuse_failed()
        return checked

    def _used(self) -> list[str]:
        """Where files stand that are read, or that libraries read, if they are there."""

        out = [
            INDEX,
            "scheduler/scheduler_config.json",
            *(f"{t}/{n}" for t in self.family.tokenizers.values() for n in TOKENIZER_FILES),
        ]
        for part in self.family.networks:
            weights = f"{stem(part)}.safetensors"
            out += [
                f"{part}/{n}" for n in ("config.json", ADAPTER, weights, f"{weights}.index.json")
            ]
        return out

    def save(self, folder: Path) -> None:
        """Copy what the model consists of to a new folder: the listed files, or what a plain
        diffusers folder runs with.

        Raises:
            ArtifactError: a file is missing, cut off, changed or no plain file, or the model failed
                its quality check.
        """
        self._refuse_failed()
        for name in self.listing.files if self.listing else self.plain_files():
            if self.listing or name != INDEX:
                self.files.copy(name, folder / name)
        if self.manifest:
            write_json(folder / MANIFEST, self.manifest.to_dict())
        elif self.export:
            write_json(folder / REPORT, self.export.report)
        else:
            write_json(folder / INDEX, families.own_index(self.index))

    def plain_files(self) -> list[str]:
        """Files of a plain diffusers folder that it runs with, and its licenses: paths, sorted."""
        family = self.family
        return model_files(self.files, family.networks, family.tokenizers.values())

    def _refuse_failed(self) -> None:
        if self.failed:
            raise ArtifactError(
                f"{self.folder} failed its quality check ({'; '.join(self.failed)}); it was kept to"
                " be looked at alone."
            )

    def loose_pickles(self) -> list[str]:
        """Pickles below the folder that no listing names, as relative paths."""
        # an OpenVINO or ncnn network ends in .bin
        listed = self.export.files if self.export else {}
        found = (
            p.relative_to(self.folder).as_posix()
            for p in self.folder.rglob("*")
            if p.suffix.lower() in PICKLES
        )
        return sorted(p for p in found if p not in listed)


def config(files: Files, name: str = "config.json") -> schema.Json:
    """The configuration in a folder of a model.

    Raises:
        ArtifactError: the file cannot be used, or it or a file beside it asks the libraries for
            code or weights from elsewhere.
    """
    out = files.read_json(name, infinity=name == "scheduler_config.json")
    if asked := [k for k in CODE if out.get(k) is not None]:
        raise ArtifactError(
            f"{files.path(name)} has {asked[0]}={printable(repr(out[asked[0]]), 80)}, which has"
            " code or weights from elsewhere loaded; accepted: none. Load with transformers or"
            " diffusers what you trust, and save_pretrained() it without."
        )
    if files.has(ADAPTER):
        raise ArtifactError(
            f"{files.path(ADAPTER)} puts other weights into the network; sdlite loads no adapters."
            " Merge it (peft's merge_and_unload(), or fuse_lora()) and save_pretrained(), or"
            " remove the file."
        )
    families.check_config(files.name, files.path(name), out)
    return out
