"""`export`: a model to a device's runtime, compared with the original before it is kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from sdlite import arguments, families, hub, memory
from sdlite._version import __version__
from sdlite.artifact import Artifact
from sdlite.backends import Network
from sdlite.errors import ExportError, InputError, PrecisionError, SdliteError, SdliteWarning
from sdlite.exporters import described, device, handed, parity, readme, resources, targets
from sdlite.exporters import profile as profiles
from sdlite.exporters import report as reports
from sdlite.exporters.handed import TorchNetwork
from sdlite.exporters.parity import Parity, Recording
from sdlite.exporters.profile import Profile
from sdlite.exporters.report import ExportReport
from sdlite.exporters.report import table as table  # the command line shows it
from sdlite.exporters.rewrites.fixed_shapes import opset_of
from sdlite.exporters.targets.base import Facts, Graphs, NotRunnable, Running, Seconds, Target
from sdlite.instrument import OnDemand, let_go, of_one_model, on_demand
from sdlite.io import scratch, write_json, writing
from sdlite.manifest import INDEX, REPORT, STUDENT, Manifest
from sdlite.pipeline import Pipeline
from sdlite.sampling import known_sampler

PROMPTS = ("a red apple", "a house with a garden")  # where the model has none


def export(
    model: str | Path,
    out: str | Path,
    *,
    target: str | Path,
    prompts: Sequence[str] | None = None,
    num_inference_steps: int | None = None,
    fuse_schedule: bool = False,
    reference: str | Path | None = None,
    threads: int | None = None,
    sampler: str | None = None,
    keep_failed: bool = False,
) -> ExportReport:
    """Export a model's networks to a runtime, check them, and write them with tokenizer, scheduler
    and configs. The encoder of a model that edits images is one of them.

    Args:
        model: embedded name, folder or hub id. For an int8 profile: a model that `sdlite.quantize`
            made.
        out: new or empty folder; it is written beside, and renamed when the quality check holds.
        target: name of a built-in profile (`sdlite export --list`) or the path of a profile.toml.
        prompts: of the images that are compared, seed i for prompt i; default: two of the model's
            calibration prompts, or two of ours.
        num_inference_steps: of those images, and of the calibration where there is one; default:
            the model's own.
        fuse_schedule: the UNet as three graphs, see `sdlite.exporters.rewrites.hoist`; onnx
            profiles of fixed shapes.
        reference: embedded name, folder or hub id of the float model that `model` was quantized
            from: the images are compared with its too, and the gate's `reference` holds. Without
            it an int8 export is compared with the quantized model only.
        threads: CPU threads of the networks; default: the engine's own choice.
        sampler: what those images are sampled with, and the export's own; default: the model's.
        keep_failed: when the quality check fails, keep the export too, in `out`.failed/model. It
            opens with a warning, and does not verify.

    Returns:
        The report, as written to `export-report.json`.

    Raises:
        UnknownNameError, InputError, PrecisionError, MissingExtraError: an argument is not
            accepted, or a tool is missing.
        ExportError: the converter refuses the graph, and nothing is written; or the quality check
            fails, and the report and the images go to `out`.failed.
    """
    begin = time.perf_counter()
    arguments.path("model", model, arguments.MODEL)
    arguments.path("out", out)
    arguments.path("target", target, "a profile's name or file")
    arguments.optional(arguments.path, "reference", reference, arguments.MODEL)
    given = arguments.optional(arguments.lines, "prompts", prompts)
    arguments.optional(arguments.integer, "num_inference_steps", num_inference_steps, 1)
    arguments.threads(threads)
    wanted = targets.of(_profile(target, fuse_schedule))
    wanted.need_packages()
    artifact, manifest = _exportable(model, wanted.profile, sampler)
    job = _Job(artifact, manifest, wanted, given, num_inference_steps, threads)
    wanted.specs = {p: artifact.spec(p) for p in job.parts}
    wanted.overflowing = artifact.family.overflowing(artifact.config)
    wanted.check(artifact)
    resources.check(artifact, wanted.profile, job.source, Path(out))
    with resources.watched(wanted.profile), scratch("export") as aside, writing(out) as folder:
        recording = job.record(aside)
        graphs, facts = job.graphs(recording, aside)
        made, networks = job.convert(graphs, recording, folder)
        rows = job.describe(folder, made, recording)
        made["page"] = job.finish(folder, recording)
        checked = job.check(folder, made, networks or job.judged(graphs), recording, reference)
        report = job.report(folder, made, rows, recording, checked, facts)
        report["opset"] = opset_of(onnx.load(str(graphs["unet"]), load_external_data=False))
        report["seconds"] = time.perf_counter() - begin
        if failures := job.failures(made, checked.parity):
            report["failed"] = failures
            kept = folder if keep_failed else None
            raise _failed(Path(out), kept, report, recording, checked, job.doubt())
        write_json(folder / REPORT, report)
    return report


def _profile(target: str | Path, fuse_schedule: bool) -> Profile:
    profile = profiles.load(target)
    if not fuse_schedule:
        return profile
    if profile.target != "onnx":
        raise InputError(
            f"fuse_schedule is for onnx profiles; {profile.name} is for {profile.target}."
        )
    return dataclasses.replace(profile, options={**profile.options, "fuse_schedule": True})


def _exportable(
    model: str | Path, profile: Profile, sampler: str | None
) -> tuple[Artifact, Manifest]:
    """The opened model, with `sampler` for its own."""
    artifact = Artifact.open(hub.resolve(model, None))
    if artifact.export:
        raise InputError(
            f"{artifact.folder} is an export for {artifact.export.target} already; give the model"
            " that it was made from."
        )
    if artifact.manifest is None:
        raise InputError(
            f"{artifact.folder} has no {profile.precision} ONNX graphs; convert it first:"
            " sdlite.convert(folder, out)."
        )
    if artifact.failed:
        raise InputError(
            f"{artifact.folder} failed its quality check ({'; '.join(artifact.failed)}); export a"
            " model that holds it."
        )
    if artifact.family.controls and profile.target != "onnx":
        raise InputError(
            f"{artifact.name} has a ControlNet, which is exported for onnx alone, not for"
            f" {profile.target}; choose an onnx profile (sdlite export --list), or convert the"
            " model without --controlnet."
        )
    artifact = artifact.with_sampler(arguments.optional(arguments.text, "sampler", sampler))
    assert artifact.manifest is not None
    known_sampler(artifact.sampler_name)  # before any work
    return artifact, artifact.manifest


Made = dict[str, list[Path]]  # part, or "page", -> files in the folder


@dataclass(frozen=True)
class _Checked:
    """How near the export is; `checked_by` says what ran."""

    parity: Parity
    clocked: Seconds | None
    checked_by: str


class _Job:
    """The steps of one export."""

    def __init__(
        self,
        artifact: Artifact,
        manifest: Manifest,
        target: Target[object],
        prompts: Sequence[str] | None,
        steps: int | None,
        threads: int | None,
    ):
        self.artifact, self.manifest, self.target = artifact, manifest, target
        self.profile, self.steps, self.threads = target.profile, steps, threads
        self.source = handed.source_of(artifact, self.profile)
        self.parts, self.left_out = handed.parts_of(artifact, target, self.source)
        own = (manifest.calibration or {}).get("prompts")
        self.prompts = list(prompts or (own[:2] if isinstance(own, list) else PROMPTS))

    def record(self, aside: Path) -> Recording:
        """The model's own images, and the calls of its networks; `aside` is the job's scratch."""
        self.aside, copies = aside, aside / "float32"
        self.pipe = on_demand(self.artifact, self.threads, self.source, copies)
        out = parity.record(
            self.pipe,
            self.parts,
            self.prompts,
            {
                "num_inference_steps": self.steps,
                "sampler": self.artifact.sampler_name,
                "height": self.profile.height or None,
                "width": self.profile.width or None,
            },
        )
        let_go(self.pipe)
        shutil.rmtree(copies, ignore_errors=True)  # calibration makes them again
        return out

    def graphs(self, recording: Recording, folder: Path) -> tuple[Graphs, Facts | None]:
        """The graphs that the converter is given, in `folder`; and what a calibration was."""
        shaped = {
            p: handed.shaped_graph(self.artifact, p, self.target, self.source, recording, folder)
            for p in self.parts
        }
        graphs, facts = self.target.quantize(
            shaped, self.pipe, self.prompts, self.steps, self.threads
        )
        let_go(self.pipe)
        return {p: self.target.prepare(p, g) for p, g in graphs.items()}, facts

    def convert(
        self, graphs: Graphs, recording: Recording, folder: Path
    ) -> tuple[Made, dict[str, TorchNetwork]]:
        """The files of each part, and the torch networks where they were made from these."""
        made: Made = {}
        networks: dict[str, TorchNetwork] = {}
        for p in self.parts:
            (folder / p).mkdir()
        if self.target.from_torch:
            for p, network in handed.torch_networks(self.artifact, self.profile, recording):
                with _refusals(p, self.profile):
                    made[p] = self.target.convert_torch(
                        p, network.module, network.example, folder / p
                    )
                networks[p] = network
        else:
            for p in graphs:
                with _refusals(p, self.profile):
                    made[p] = self.target.convert(p, graphs[p], folder / p)
        return made, networks

    def describe(
        self, folder: Path, made: Made, recording: Recording
    ) -> dict[str, described.NetworkRow]:
        """Write tokenizer, scheduler, configs and README; the report's rows of the networks."""
        _companions(self.artifact, self.manifest, self.parts, folder)
        rows = described.networks(
            folder, made, recording, self.target, self.manifest.variants[self.source]
        )
        shape = recording.calls["unet"][0][0]["sample"].shape
        more = self._device_file(folder, shape) if self.target.sample else []
        told = readme.Told(self.target, recording, self.left_out)
        readme.write(folder, rows, self.pipe, told, more)
        return rows

    def _device_file(self, folder: Path, latent_shape: tuple[int, ...]) -> list[str]:
        """Write what the sample in C++ reads, or say why it does not run this model; lines for the
        README.
        """
        sample = f"`export/samples/{self.target.sample}` in sdlite's repository"
        try:
            device.write(folder, self.artifact, latent_shape)
        except InputError as e:
            warnings.warn(f"no {device.FILE} was written: {e}", SdliteWarning, stacklevel=2)
            return ["", "## In C++", "", f"{sample} does not run this model: {e}"]
        return [
            "",
            "## In C++",
            "",
            f"{sample} makes an image of a prompt with this folder.",
            f"`{device.FILE}` has the tokenizer, the sampling steps and the guidance for it.",
        ]

    def finish(self, folder: Path, recording: Recording) -> list[Path]:
        """What the target adds."""
        shape = recording.calls["unet"][0][0]["sample"].shape
        return self.target.finish(folder, self.artifact, (self.profile.rows, *shape[1:]))

    def judged(self, graphs: Graphs) -> dict[str, Path]:
        """The graphs that the check runs where the runtime does not."""
        return {p: self.target.judged(p, g) for p, g in graphs.items()}

    def check(
        self,
        folder: Path,
        made: Made,
        given: Mapping[str, Path | TorchNetwork],
        recording: Recording,
        reference: str | Path | None,
    ) -> _Checked:
        """Compare the export with the model.

        Args:
            given: what the converter was given: part -> graph or torch network.
        """
        original = self._reference(reference, recording)
        with ExitStack() as stack:
            running, not_run = None, {}
            try:
                running = self.target.run_all(folder, self.threads)
            except NotRunnable as e:
                not_run = dict.fromkeys(self.parts, str(e))
            if running:
                stack.callback(running.close)
            networks = dict(running.networks) if running else {}
            others = {p: made[p] for p in self.parts if p not in networks}
            networks |= self._networks(others, given, not_run)
            by_rows = {p: handed.by_rows(n, self.profile) for p, n in networks.items()}
            found = parity.measure(self.pipe, recording, by_rows, not_run, original)
            clocked = self._own_images(running, recording, found) if running else None
        what = "torch network" if self.target.from_torch else "graph"
        return _Checked(found, clocked, _HANDED[what] if not_run else "the runtime itself")

    def _networks(
        self, made: Made, given: Mapping[str, Path | TorchNetwork], not_run: dict[str, str]
    ) -> dict[str, OnDemand]:
        """Networks that were opened once, so that `not_run` says which do not run here; those of a
        large model are not all open at once.
        """
        out = {}
        for p, files in made.items():
            size = sum(f.stat().st_size for f in files)
            out[p] = OnDemand(partial(self._network, p, files, given[p], not_run), size)
        of_one_model(out.values())
        for network in out.values():
            network.opened()
        return out

    def _network(
        self,
        part: str,
        files: Sequence[Path],
        given: Path | TorchNetwork,
        not_run: dict[str, str],
        _: bool,
    ) -> Network:
        """A network on the runtime; or what the converter was given, and `not_run` says why."""
        if part not in not_run:
            try:
                return self.target.run(part, files, self.threads)
            except NotRunnable as e:
                not_run[part] = str(e)
        if isinstance(given, Path):
            return handed.run_graph(given, self.threads)
        return handed.run_torch(self.target.specs[part], given)

    def _reference(self, model: str | Path | None, recording: Recording) -> np.ndarray | None:
        """The images of the float model that the check names."""
        if model is None:
            return None
        pipe = _float_pipeline(model, self.threads, self.aside / "reference")
        made = parity.make_images(pipe, self.prompts, recording.arguments)
        let_go(pipe)
        return made

    def _own_images(self, running: Running, recording: Recording, found: Parity) -> Seconds:
        """Compare the images that the target makes by itself, and take their time."""
        found.own = parity.measure_own(recording, running.image, running.edit)
        return running.clock(self.prompts[0], self.steps)

    def failures(self, made: Made, found: Parity) -> list[str]:
        """What of the quality check does not hold."""
        out = found.fails(self.profile.gate)
        weight = sum(f.stat().st_size for p in self.parts for f in made[p]) / (1 << 20)
        if self.profile.memory_mib and weight > self.profile.memory_mib:
            out.append(
                f"the networks have {weight:.1f} MiB, wanted at most {self.profile.memory_mib}"
            )
        return out

    def doubt(self) -> str:
        """Why an int8 model may not hold its export's gate: it is further from float itself."""
        quality = (self.manifest.quality or {}) if self.source.startswith("int8") else {}
        engines, wanted = quality.get("engines", {}), self.profile.gate.psnr
        found = min((float(str(e["psnr_mean"])) for e in engines.values()), default=None)
        if found is None or wanted is None or found >= wanted:
            return ""
        return (
            f" The model's own quality check found images {found:.1f} dB from float ones, and two"
            " engines round an int8 network about as far apart as that: mend the model, or lower"
            " the gate in a profile of your own."
        )

    def report(
        self,
        folder: Path,
        made: Made,
        rows: dict[str, described.NetworkRow],
        recording: Recording,
        checked: _Checked,
        facts: Facts | None,
    ) -> ExportReport:
        """The report; `opset` and `seconds` are filled by the caller."""
        files, companions = reports.hashes(folder, [f for fs in made.values() for f in fs])
        any_size = self.profile.dynamic and self.target.free_size
        return {
            "sdlite": __version__,
            "model": self.artifact.name,
            "profile": self.profile.to_dict(),
            "tools": reports.versions(self.target.packages),
            "opened_by": list(self.target.opened_by),
            "source": self.source,
            "opset": 0,
            "networks": rows,
            "left_out": self.left_out,
            "size": None if any_size else list(recording.images.shape[1:3]),
            "size_multiple": self.manifest.size_multiple,
            "files": files,
            "companions": companions,
            "checked_by": checked.checked_by,
            "not_run": checked.parity.not_run,
            "parity": reports.parity_row(checked.parity, len(self.prompts)),
            "calibration": facts,
            "picture_seconds": checked.clocked,
            "seconds": 0.0,
            "peak_mib": memory.peak_mib(),
            "converter_peak_mib": memory.peak_mib(children=True) or None,
        }


_HANDED = {
    "graph": "the graph that was handed to the converter, on onnxruntime",
    "torch network": "the network that was handed to the converter, on torch",
}


def _failed(
    out: Path,
    candidate: Path | None,
    report: ExportReport,
    recording: Recording,
    checked: _Checked,
    doubt: str,
) -> ExportError:
    """Keep what a failed export leaves, and say so."""
    kept = reports.keep_failed(out, candidate, report, recording, checked.parity)
    return ExportError(
        f"the gate of {report['profile']['name']} does not hold: {'; '.join(report['failed'])};"
        f" worst network {checked.parity.worst()}.{doubt} No model was written; {kept}."
    )


def _float_pipeline(model: str | Path, threads: int | None, aside: Path) -> Pipeline:
    """The reference's pipeline, in the widest float precision that it holds."""
    artifact = Artifact.open(hub.resolve(model, None))
    held = [p for p in ("fp32", "fp16") if artifact.has_onnx(p)]
    if not held:
        raise PrecisionError(
            f"the reference {model} holds no float ONNX graphs; name the model that was quantized."
        )
    return on_demand(artifact, threads, held[0], aside)


@contextmanager
def _refusals(part: str, profile: Profile) -> Iterator[None]:
    """What a converter raises by itself becomes an ExportError with its words."""
    try:
        yield
    except (SdliteError, OSError, MemoryError):
        raise
    except Exception as e:  # converters raise their own kinds
        if memory.is_memory(e):
            raise MemoryError(str(e)) from e
        words = " ".join(str(e).split())[:400]
        raise ExportError(
            f"{profile.target} could not convert {part} ({type(e).__name__}): {words}. Nothing was"
            " written."
        ) from e


def _companions(artifact: Artifact, manifest: Manifest, parts: Sequence[str], out: Path) -> None:
    """Tokenizer, scheduler and configs, which the device's code reads."""
    for part in (*artifact.family.tokenizers.values(), "scheduler"):
        artifact.files.part(part).copy_configs(out / part)
    # optimum looks for the decoder's config beside its graph
    sources = {p: artifact.spec(p).source for p in parts}
    for part, source in {**{s: s for s in sources.values()}, **sources}.items():
        (out / part).mkdir(exist_ok=True)
        artifact.files.copy(f"{source}/config.json", out / part / "config.json")
    about = {"name": manifest.name, "student": manifest.student, "sampler": artifact.samples_with}
    for name, content in ((INDEX, families.listed_index(artifact.index)), (STUDENT, about)):
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
