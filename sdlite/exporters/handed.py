"""What a converter is handed: the model's graphs with the profile's shapes, or its torch networks;
and how these run, where the target's runtime does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdlite.artifact import Artifact
from sdlite.backends import Network, RowByRow
from sdlite.errors import PrecisionError
from sdlite.exporters.parity import Recording
from sdlite.exporters.profile import Profile
from sdlite.exporters.rewrites.fixed_shapes import fix, size_of
from sdlite.exporters.targets.base import Target
from sdlite.onnx_graph import Graph
from sdlite.spec import Arrays, IOSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TorchNetwork:
    """A network of torch, and one set of its inputs, of the profile's batch."""

    module: torch.nn.Module
    example: tuple[torch.Tensor, ...]


def source_of(artifact: Artifact, profile: Profile) -> str:
    """The precision of the model's graphs that the export starts from. Every target rounds to
    float16 by itself, so fp32 will do for that.

    Raises:
        PrecisionError: the model does not hold it.
    """
    source = profile.source(artifact)
    if source is None:
        held = ", ".join(artifact.manifest.variants) if artifact.manifest else "none"
        how = (
            "quantize it first (sdlite quantize)"
            if profile.precision.startswith("int8")
            else "export the float model"
        )
        raise PrecisionError(
            f"{artifact.name} holds {held}, the profile {profile.name} wants"
            f" {' or '.join(profile.sources)}: {how}."
        )
    return source


def parts_of(
    artifact: Artifact, target: Target[object], source: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The networks that are exported, in the order of a call; and those that are not, with why.

    Args:
        source: see `source_of`.
    """
    held, left_out = artifact.held_parts(source), {}
    for p in artifact.family.optional:
        if p in held and (why := target.lacks(p)):
            left_out[p] = why
    if "vae_encoder" not in held:
        which = f"no {source} one" if _elsewhere(artifact, "vae_encoder") else "none"
        left_out["vae_encoder"] = (
            f"{artifact.name} holds {which}, so the export edits no images; convert the model again"
            " (sdlite convert), which makes one"
        ) + (", and quantize that" if source.startswith("int8") else "")
    return tuple(p for p in held if p not in left_out), left_out


def _elsewhere(artifact: Artifact, part: str) -> bool:
    """Whether it is held in any precision."""
    return any(part in artifact.held_parts(p) for p in artifact.precisions)


def shaped_graph(
    artifact: Artifact,
    part: str,
    target: Target[object],
    source: str,
    recording: Recording,
    folder: Path,
) -> Path:
    """The model's graph with the profile's shapes and plain weights, written to `folder`."""
    names = [t.name for t in artifact.spec(part).outputs]
    graph = Graph.load(artifact.graph(source, part)).answers(names)
    profile, out = target.profile, folder / f"{part}.onnx"
    if profile.dynamic and target.free_size:
        graph.save(out)
        return out
    seen = recording.calls[part][0][0]
    batch: int | str = "batch" if profile.dynamic else profile.rows
    return fix(graph, {k: (batch, *v.shape[1:]) if v.ndim else () for k, v in seen.items()}, out)


def torch_networks(
    artifact: Artifact, profile: Profile, recording: Recording
) -> Iterator[tuple[str, TorchNetwork]]:
    """(part, network) in float32; each row of the batch is the first recorded one."""
    import torch

    from sdlite.tracing import network

    for p in recording.specs:
        spec = artifact.spec(p)
        module = network(artifact.files, dataclasses.replace(spec, also=()))
        seen = recording.calls[p][0][0]
        rows = [
            np.repeat(seen[t.name][:1], profile.rows, axis=0) if seen[t.name].ndim else seen[t.name]
            for t in spec.inputs
        ]
        example = tuple(
            torch.from_numpy(np.array(r, t.dtype)) for r, t in zip(rows, spec.inputs, strict=True)
        )
        yield p, TorchNetwork(module.eval().requires_grad_(False), example)


def run_graph(graph: Path, threads: int | None) -> Network:
    """An ONNX file on onnxruntime's CPU provider."""
    from sdlite.backends.ort import Session

    return Session(str(graph), "cpu", threads, size_of(graph))


def run_torch(spec: IOSpec, network: TorchNetwork) -> Network:
    """A torch network on the CPU, called with arrays of one row."""
    import torch

    def run(**inputs: np.ndarray) -> Arrays:
        given = [torch.from_numpy(np.array(inputs[t.name], t.dtype)) for t in spec.inputs]
        with torch.no_grad():
            out = network.module(*given)
        out = out if isinstance(out, tuple) else (out,)
        return {t.name: x.numpy() for t, x in zip(spec.outputs, out, strict=False)}

    return run


def by_rows(network: Network, profile: Profile) -> Network:
    """A network of a fixed batch as one of any batch."""
    return network if profile.dynamic else RowByRow(network)


Handed = Mapping[str, Path | TorchNetwork]  # part -> what the converter was given
