"""`export`: an artefact to a device's runtime, compared with the original before it may call itself
done.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sdlite import arguments, families, hub, images, memory
from sdlite._version import __version__
from sdlite.artifact import Artifact
from sdlite.backends import RowByRow
from sdlite.errors import ExportError, InputError, MissingExtraError, PrecisionError, SdliteError
from sdlite.exported import REPORT
from sdlite.exporters import described, readme, resources
from sdlite.exporters import profile as profiles
from sdlite.exporters.parity import Recording, measure, pictures, record
from sdlite.exporters.profile import Profile
from sdlite.exporters.rewrites.fixed_shapes import fix, opset_of, size_of
from sdlite.exporters.targets import NotRunnable
from sdlite.instrument import let_go, on_demand
from sdlite.io import read_json, scratch, sha256, write_json, writing
from sdlite.manifest import MANIFEST, PARTS
from sdlite.onnx_graph import Graph
from sdlite.pipeline import Pipeline
from sdlite.quant import reports
from sdlite.sampling import known_sampler
from sdlite.spec import SPECS

GRID = (  # the model's images and the export's, beside the report of a gate that does not hold
    "export-grid.png"
)
_HANDED = {
    "onnxruntime": "the graph that was handed to the converter, on onnxruntime",
    "torch": "the network that was handed to the converter, on torch",
}


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
) -> dict[str, Any]:
    """Export the three networks to a runtime, check them, and write them with tokenizer, scheduler
    and configs.

    Args:
        model: embedded name, folder or hub id. For an int8 profile: a model that `sdlite.quantize`
            made.
        out: new or empty folder; written beside and renamed when the gate holds.
        target: name of a built-in profile (`sdlite export --list`) or the path of a profile.toml.
        prompts: pictures that are compared, seed i for prompt i; default: two of the model's
            calibration prompts, or two of ours.
        num_inference_steps: of those pictures, and of the calibration where there is one; default:
            the model's own.
        fuse_schedule: the UNet as three graphs, see `sdlite.exporters.rewrites.hoist`; onnx
            profiles of fixed shapes.
        reference: embedded name, folder or hub id of the float model that `model` was quantised
            from: the pictures are compared with its too, and the gate's `reference` holds. Without
            it an int8 export is compared with the quantised model only.
        sampler: what those pictures are sampled with, and the export's own; default: the model's.
        keep_failed: when the gate does not hold, keep the export too, in `out`.failed/model. It
            opens with a warning, and does not verify.

    Returns:
        The report, as written to `export-report.json`.

    Raises:
        UnknownNameError, InputError, PrecisionError, MissingExtraError: an argument is not
            accepted, or a tool is missing.
        ExportError: the converter refuses the graph, and nothing is written; or the gate does not
            hold, and the report and the images go to `out`.failed.
    """
    begin = time.perf_counter()
    arguments.path("model", model, arguments.MODEL)
    arguments.path("out", out)
    arguments.path("target", target, "a profile's name or file")
    arguments.optional(arguments.path, "reference", reference, arguments.MODEL)
    prompts = arguments.optional(arguments.lines, "prompts", prompts)
    arguments.optional(arguments.integer, "num_inference_steps", num_inference_steps, 1)
    arguments.threads(threads)
    profile = profiles.load(target)
    if fuse_schedule:
        if profile.target != "onnx":
            raise InputError(
                f"fuse_schedule is for onnx profiles; {profile.name} is for {profile.target}."
            )
        profile = dataclasses.replace(profile, options={**profile.options, "fuse_schedule": True})
    module = _module(profile)
    artifact = Artifact.open(hub.resolve(model, None))
    if artifact.export:
        raise InputError(
            f"{artifact.folder} is an export for {artifact.export.target} already; give the model"
            " that it was made from."
        )
    if artifact.manifest is None:
        raise InputError(
            f"{artifact.folder} has no {profile.precision} ONNX graphs; make an artefact of it"
            " first: sdlite.converter.convert."
        )
    if artifact.failed:
        raise InputError(
            f"{artifact.folder} failed its quality check ({'; '.join(artifact.failed)}); export a"
            " model that holds it."
        )
    artifact = artifact.with_sampler(arguments.optional(arguments.text, "sampler", sampler))
    assert artifact.manifest is not None
    source, free_size = _source(artifact, profile), getattr(module, "FREE_SIZE", True)
    known_sampler(artifact.sampler_name)  # before any work
    if hasattr(module, "check"):
        module.check(artifact)
    resources.check(artifact, profile, source, Path(out))
    pipe = on_demand(artifact, threads, source)
    own = (artifact.manifest.calibration or {}).get("prompts")
    shown = list(
        prompts or (own[:2] if isinstance(own, list) else ["a red apple", "a house with a garden"])
    )
    size = {"height": profile.height or None, "width": profile.width or None}
    with resources.watched(profile), scratch("export") as aside, writing(out) as tmp:
        recording = record(
            pipe,
            shown,
            num_inference_steps=num_inference_steps,
            sampler=artifact.sampler_name,
            **size,
        )
        let_go(pipe)
        graphs = {
            p: _graph(artifact, p, profile, source, recording, aside, free_size) for p in PARTS
        }
        calibration = None
        if hasattr(module, "quantise"):
            graphs, calibration = module.quantise(
                graphs, pipe, profile, shown, num_inference_steps, threads
            )
            let_go(pipe)
        if hasattr(module, "prepare"):
            graphs = {p: module.prepare(p, g, profile) for p, g in graphs.items()}
        opset = opset_of(onnx.load(str(graphs["unet"]), load_external_data=False))
        made: dict[str, list[Path]] = {}
        torch_networks = {}
        for p in PARTS:
            (tmp / p).mkdir()
        if hasattr(module, "convert_torch"):
            for p, network, example in _torch_networks(artifact, profile, recording):
                with _refusals(p, profile):
                    made[p] = module.convert_torch(p, network, example, tmp / p, profile)
                torch_networks[p] = network
        else:
            for p in PARTS:
                with _refusals(p, profile):
                    made[p] = module.convert(p, graphs[p], tmp / p, profile)
        _companions(artifact, tmp)
        about = described.networks(
            tmp, made, recording, profile, artifact.manifest.variants[source], free_size
        )
        readme.write(tmp, about, pipe, profile, recording)
        if hasattr(module, "finish"):
            shape = recording.calls["unet"][0][0]["sample"].shape
            made["page"] = module.finish(tmp, artifact, profile, (profile.batch or 1, *shape[1:]))
        if hasattr(module, "judged"):
            graphs = {p: module.judged(p, g, profile) for p, g in graphs.items()}
        running = _networks(module, profile, tmp, made, torch_networks or graphs, threads)
        try:
            original = (
                None
                if reference is None
                else pictures(_float(reference, threads), shown, recording.arguments)
            )
            parity = measure(pipe, recording, running.networks, running.not_run, original)
            clocked = running.clock(shown[0], num_inference_steps) if running.clock else None
        finally:
            running.close()
        failures = parity.fails(profile.gate)
        weight = sum(f.stat().st_size for p in PARTS for f in made[p]) / (1 << 20)
        if profile.memory_mib and weight > profile.memory_mib:
            failures.append(
                f"the networks have {weight:.1f} MiB, wanted at most {profile.memory_mib}"
            )
        not_run = running.not_run
        report = {
            "sdlite": __version__,
            "model": artifact.name,
            "profile": dataclasses.asdict(profile),
            "tools": _versions(module.PACKAGES),
            "source": source,
            "opset": opset,
            "networks": about,
            "size": None if profile.dynamic and free_size else list(recording.images.shape[1:3]),
            "size_multiple": artifact.manifest.size_multiple,
            **_hashes(tmp, [f for fs in made.values() for f in fs]),
            "checked_by": (
                _HANDED["torch" if torch_networks else "onnxruntime"]
                if not_run
                else "the runtime itself"
            ),
            "not_run": not_run,
            "parity": {
                "networks": parity.networks,
                "psnr": parity.psnr,
                "reference": parity.reference,
                "pictures": len(shown),
            },
            "calibration": calibration,
            "picture_seconds": clocked,
            "seconds": time.perf_counter() - begin,
            "peak_mib": memory.peak_mib(),
            "converter_peak_mib": memory.peak_mib(children=True) or None,
        }
        if failures:
            report["failed"] = failures
            kept = _keep_failed(
                Path(out), tmp if keep_failed else None, report, recording, parity.images
            )
            raise ExportError(
                f"the gate of {profile.name} does not hold: {'; '.join(failures)}; worst network"
                f" {parity.worst()}. No model was written; {kept}."
            )
        write_json(tmp / REPORT, report)
    return report


def _keep_failed(
    out: Path,
    candidate: Path | None,
    report: dict[str, Any],
    recording: Recording,
    made: np.ndarray | None,
) -> str:
    """Report and images of an export whose gate does not hold, and the export where it is asked
    for; see `reports.keep_failed`.
    """

    def write(folder: Path) -> None:
        if made is not None:
            columns = ["model", report["profile"]["name"]]
            images.save(
                reports.grid(
                    recording.images, made, columns, list(zip(recording.prompts, itertools.count()))
                ),
                folder / GRID,
            )
        write_json(folder / REPORT, report)

    if candidate is not None:
        write_json(candidate / REPORT, report)
        if (candidate / MANIFEST).exists():
            manifest = read_json(candidate / MANIFEST)
            write_json(candidate / MANIFEST, {**manifest, "quality": {"failed": report["failed"]}})
    return reports.keep_failed(out, write, candidate)


def _hashes(folder: Path, made: Sequence[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """Bytes and SHA-256 of every file: `files` are what the target's converter made, `companions`
    the rest.
    """
    every = {
        f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256(f)}
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }
    networks = {f.relative_to(folder).as_posix() for f in made}
    return {
        "files": {k: v for k, v in every.items() if k in networks},
        "companions": {k: v for k, v in every.items() if k not in networks},
    }


def _float(model: str | Path, threads: int | None) -> Pipeline:
    """The reference's pipeline, in the widest float precision that it holds."""
    artifact = Artifact.open(hub.resolve(model, None))
    held = [p for p in ("fp32", "fp16") if artifact.has_onnx(p)]
    if not held:
        raise PrecisionError(
            f"the reference {model} holds no float ONNX graphs; name the model that was quantised."
        )
    return Pipeline.from_pretrained(
        artifact.folder, precision=held[0], backend="onnxruntime", threads=threads
    )


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


def _module(profile: Profile) -> Any:
    path, extra = profiles.TARGETS[profile.target]
    module = importlib.import_module(path)
    if profile.precision not in module.PRECISIONS:
        raise PrecisionError(
            f"target {profile.target} makes {', '.join(module.PRECISIONS)}, not"
            f" {profile.precision}."
        )
    known = sorted(getattr(module, "OPTIONS", ()))
    if unknown := sorted(set(profile.options) - set(known)):
        raise InputError(
            f"profile {profile.name}: options {', '.join(unknown)} not known; target"
            f" {profile.target} knows {', '.join(known) or 'none'}."
        )
    if profile.dynamic and not module.DYNAMIC:
        raise InputError(
            f"target {profile.target} has fixed shapes only; set dynamic = false and a batch."
        )
    missing = [p for p in module.PACKAGES if _version(p) is None]
    if missing:
        raise MissingExtraError(
            f"target {profile.name} needs {', '.join(missing)}: pip install 'sdlite[{extra}]'."
        )
    return module


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {p: v for p in packages if (v := _version(p)) is not None}


def _source(artifact: Artifact, profile: Profile) -> str:
    """The precision of the artefact's graphs that the export starts from. Every target rounds to
    float16 by itself, so fp32 will do for that.

    Raises:
        PrecisionError: the artefact does not hold it.
    """
    source = profile.source(artifact)
    if source is None:
        held = ", ".join(artifact.manifest.variants) if artifact.manifest else "none"
        how = (
            "quantise it first (sdlite quantize)"
            if profile.precision.startswith("int8")
            else "export the float model"
        )
        raise PrecisionError(
            f"{artifact.name} holds {held}, the profile {profile.name} wants"
            f" {' or '.join(profile.sources)}: {how}."
        )
    return source


def _graph(
    artifact: Artifact,
    part: str,
    profile: Profile,
    source: str,
    recording: Recording,
    scratch: Path,
    free_size: bool = True,
) -> Path:
    """The artefact's graph with the profile's shapes and plain weights."""
    graph = Graph.load(artifact.graph(source, part))
    out = scratch / f"{part}.onnx"
    if profile.dynamic and free_size:
        graph.save(out)
        return out
    seen = recording.calls[part][0][0]
    batch: int | str = "batch" if profile.dynamic else profile.batch or 1
    return fix(graph, {k: (batch, *v.shape[1:]) if v.ndim else () for k, v in seen.items()}, out)


def _torch_networks(
    artifact: Artifact, profile: Profile, recording: Recording
) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """part, wrapped torch network and example inputs (one recorded row for each row of the
    profile's batch).
    """
    import torch

    from sdlite.converter import networks

    for p, network in networks(artifact.files).items():
        seen = recording.calls[p][0][0]
        batch = profile.batch or 1
        rows = [
            np.repeat(seen[t.name][:1], batch, axis=0) if seen[t.name].ndim else seen[t.name]
            for t in SPECS[p].inputs
        ]
        yield (
            p,
            network.eval().requires_grad_(False),
            tuple(
                torch.from_numpy(np.array(r, t.dtype))
                for r, t in zip(rows, SPECS[p].inputs, strict=True)
            ),
        )


@dataclasses.dataclass
class _Running:
    """What the gate calls for each part, why the runtime itself is not called where it is not, and
    how to let go of it.
    """

    networks: dict[str, Callable[..., np.ndarray]]
    not_run: dict[str, str]
    close: Callable[[], None] = lambda: None
    # (prompt, steps) -> seconds of the target's own pictures
    clock: Callable[[str, int | None], dict[str, Any]] | None = None


def _networks(
    module: Any,
    profile: Profile,
    folder: Path,
    made: dict[str, list[Path]],
    handed: Mapping[str, Any],
    threads: int | None,
) -> _Running:
    def rowwise(network: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        return network if profile.dynamic else RowByRow(network)

    out = _Running({}, {})
    if hasattr(module, "run_all"):
        try:
            networks, close, clock = module.run_all(folder, profile, threads)
            return _Running({p: rowwise(n) for p, n in networks.items()}, {}, close, clock)
        except NotRunnable as e:
            out.not_run = dict.fromkeys(PARTS, str(e))
    for p in PARTS:
        try:
            if p not in out.not_run:
                out.networks[p] = rowwise(module.run(p, made[p], profile, threads))
        except NotRunnable as e:
            out.not_run[p] = str(e)
        if p not in out.networks:
            out.networks[p] = _handed_over(p, handed[p], profile, threads)
    return out


def _handed_over(
    part: str, graph: Any, profile: Profile, threads: int | None
) -> Callable[..., np.ndarray]:
    """What the converter was given: a graph file, or a torch network."""
    if not isinstance(graph, Path):
        import torch

        def network(**inputs: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                out: np.ndarray = graph(
                    *(
                        torch.from_numpy(np.array(inputs[t.name], t.dtype))
                        for t in SPECS[part].inputs
                    )
                ).numpy()
            return out

        return RowByRow(network)
    from sdlite.backends.ort import Session

    session = Session(str(graph), "cpu", threads, size_of(graph))
    return session if profile.dynamic else RowByRow(session)


def _companions(artifact: Artifact, out: Path) -> None:
    """Tokenizer, scheduler and configs, which the device's code reads."""
    for part in ("tokenizer", "scheduler"):
        artifact.files.part(part).copy_configs(out / part)
    for part in {
        *PARTS,
        *(SPECS[p].source for p in PARTS),
    }:  # optimum looks for the decoder's beside its graph
        (out / part).mkdir(exist_ok=True)
        artifact.files.copy(
            f"{SPECS[part].source if part in SPECS else part}/config.json",
            out / part / "config.json",
        )
    (out / "model_index.json").write_text(
        json.dumps(families.listed_index(artifact.index), indent=1) + "\n", encoding="utf-8"
    )
    manifest = artifact.manifest
    assert manifest is not None
    (out / "student.json").write_text(
        json.dumps(
            {"name": manifest.name, "student": manifest.student, "sampler": artifact.samples_with},
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )


def table(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [
        f"{report['model']} -> {report['profile']['name']}"
        f" ({', '.join(f'{k} {v}' for k, v in report['tools'].items())}), checked by"
        f" {report['checked_by']}"
    ]
    lines += [
        f"  {p:<13} SQNR {n['sqnr']:.1f} dB, largest error {n['max_error']:.3g}, {n['calls']} calls"
        for p, n in report["parity"]["networks"].items()
    ]
    if report["parity"]["psnr"]:
        lines.append(
            f"  pictures      PSNR {min(report['parity']['psnr']):.1f} dB at worst of"
            f" {report['parity']['pictures']}"
        )
    if report["parity"]["reference"]:
        lines.append(f"  to reference  PSNR {min(report['parity']['reference']):.1f} dB at worst")
    if seconds := report["picture_seconds"]:
        later = ", ".join(f"{s:.2f}" for s in seconds["later"])
        lines.append(
            f"  seconds       {seconds['first']:.2f} to the first picture with loading, then"
            f" {later} a picture, {seconds['steps']} steps"
        )
    lines += [f"  not run       {p}: {why}" for p, why in report["not_run"].items()]
    return "\n".join(lines)
