"""Load the networks of a model on one backend."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from sdlite.artifact import Artifact
from sdlite.backends import registry
from sdlite.backends.auto import choose
from sdlite.backends.base import Backend
from sdlite.backends.checked import Checked
from sdlite.backends.network import Network, close
from sdlite.backends.report import NetworkReport, Report
from sdlite.errors import PrecisionError, UnknownNameError
from sdlite.families import vae_stride
from sdlite.manifest import PRECISIONS


@dataclass
class Networks:
    """What a pipeline runs.

    Attributes:
        parts: name -> network, in the order of a call.
        size_multiple: height and width of an image are multiples of this, in pixels.
        size: (height, width) in pixels where the networks take no other.
        opener: opens a network that is not in `parts`, and says of it what the report does.
    """

    parts: dict[str, Network]
    report: Report
    size_multiple: int
    size: tuple[int, int] | None = None
    opener: Callable[[str], tuple[Network, NetworkReport]] | None = None

    @property
    def text_encoder(self) -> Network:
        """input_ids int64 (B, L) -> hidden states (B, L, D)."""
        return self.parts["text_encoder"]

    @property
    def unet(self) -> Network:
        """sample (B, C, h, w), timestep, conditions -> out_sample (B, C, h, w)."""
        return self.parts["unet"]

    @property
    def vae_decoder(self) -> Network:
        """latent_sample (B, C, h, w) -> sample (B, 3, H, W)."""
        return self.parts["vae_decoder"]

    def close(self) -> None:
        """Free what the networks hold."""
        for held in self.parts.values():
            close(held)


def load(
    artifact: Artifact,
    precision: str,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    arithmetic: str | None = None,
) -> Networks:
    """Load the networks of a model. `arithmetic` is what float layers are computed in; None
    is the backend's choice.

    Raises:
        UnknownNameError: precision, backend or device is not one that exists. PrecisionError: it
            exists, but not here.
        MissingExtraError: the engine is not installed. ArtifactError: a file is missing, cut off or
            changed.
    """
    if precision not in (known := _precisions()):
        raise UnknownNameError(
            f"precision={precision!r} is not known; choose one of {', '.join(known)}."
        )
    if backend == "auto":
        name, reason = choose(artifact, precision, arithmetic)
    else:
        name, reason = backend, "as asked"
    chosen = registry.ready(name)
    if backend == "auto" and arithmetic is None:
        arithmetic, more = chosen.unasked(precision)
        reason += more
    _check(artifact, chosen, precision, device, arithmetic)
    notes = chosen.notes(precision, device, arithmetic)
    report = Report(artifact.name, name, device, precision, reason, chosen.engine(), notes=notes)
    stride = vae_stride(artifact.config("vae"))

    def opened(part: str) -> tuple[Network, NetworkReport]:
        start = time.perf_counter()
        inner, row = chosen.load_part(artifact, part, precision, device, threads, arithmetic)
        network = Checked(inner, artifact.spec(part), stride, report.engine)
        return network, dataclasses.replace(row, load_seconds=time.perf_counter() - start)

    loaded: dict[str, Network] = {}
    for part in artifact.parts:
        loaded[part], row = opened(part)
        report.networks.append(row)
    size = artifact.export.size if artifact.export else None
    return Networks(loaded, report, chosen.size_multiple(artifact), size, opened)


def _precisions() -> tuple[str, ...]:
    """A model's own, then those that only some backends have."""
    return tuple(dict.fromkeys((*PRECISIONS, *registry.known_precisions())))


def _check(
    artifact: Artifact, backend: Backend, precision: str, device: str, arithmetic: str | None
) -> None:
    """Whether the backend runs the model like this, before any work.

    Raises:
        ArtifactError, UnknownNameError, PrecisionError: see `load`.
    """
    if artifact.export and backend.name not in artifact.export.backends:
        raise artifact.export.refusal(artifact.folder, backend.name)
    if device not in backend.devices:
        raise UnknownNameError(
            f"device={device!r} is not known to backend {backend.name!r}; choose one of"
            f" {', '.join(backend.devices)}."
        )
    if precision not in backend.precisions:
        others = [b.name for b in registry.ordered() if precision in b.precisions and b.installed()]
        raise PrecisionError(
            f"backend {backend.name!r} has no {precision}; it has {', '.join(backend.precisions)}"
            + (f"; backends here that have it: {', '.join(others)}." if others else ".")
        )
    if arithmetic is not None and arithmetic not in backend.arithmetic:
        raise PrecisionError(_untold(backend, arithmetic))


def _untold(backend: Backend, arithmetic: str) -> str:
    said = f"backend {backend.name!r} cannot be told to compute in {arithmetic!r}"
    if backend.arithmetic:
        return f"{said}; choose one of {', '.join(backend.arithmetic)}."
    able = [f"backend={b.name!r}" for b in registry.ordered() if b.arithmetic]
    return f"{said}; leave arithmetic out, or use {' or '.join(able)}."
