"""Is the exported network still the same one? Inputs recorded from the student's real loop, the
target's answers against the float ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdlite.errors import InputError
from sdlite.instrument import Call, Tape, with_networks
from sdlite.manifest import PARTS
from sdlite.metrics import psnr, sqnr
from sdlite.pipeline import Pipeline


@dataclass
class Recording:
    """Every call of every network over some pictures, and the pictures."""

    calls: dict[str, list[Call]]
    images: np.ndarray  # uint8 (N, H, W, 3)
    prompts: list[str]
    arguments: dict[str, Any]


def record(pipe: Pipeline, prompts: Sequence[str], **arguments: Any) -> Recording:
    """Make one picture of each prompt (seed i for prompt i) and keep what went in and out of each
    network.
    """
    calls: dict[str, list[Call]] = {p: [] for p in PARTS}
    taped = with_networks(pipe, {p: Tape(getattr(pipe.networks, p), calls[p]) for p in PARTS})
    return Recording(calls, pictures(taped, prompts, arguments), list(prompts), arguments)


@dataclass
class Parity:
    """Figures of one export; `networks` has those that ran, `not_run` says why others did not."""

    networks: dict[str, dict[str, float]] = field(default_factory=dict)
    psnr: list[float] | None = None
    reference: list[float] | None = (
        # PSNR to the pictures of another model: the float one that a quantised model was made of
        None
    )
    not_run: dict[str, str] = field(default_factory=dict)
    images: np.ndarray | None = None  # uint8 (N, H, W, 3), the export's, where all networks ran

    def fails(self, gate: dict[str, float]) -> list[str]:
        out = []
        pictures = {
            "psnr": ("picture PSNR", self.psnr),
            "reference": ("picture PSNR to the reference", self.reference),
        }
        for p, wanted in gate.items():
            if p in pictures:
                what, found = pictures[p]
                if found is not None and not min(found) >= wanted:
                    out.append(f"{what} {min(found):.1f} dB, wanted {wanted:g}")
            elif p in self.networks and not self.networks[p]["sqnr"] >= wanted:
                out.append(f"{p} SQNR {self.networks[p]['sqnr']:.1f} dB, wanted {wanted:g}")
        return out

    def worst(self) -> str:
        if not self.networks:
            return "no network ran"
        name = min(self.networks, key=lambda p: self.networks[p]["sqnr"])
        return (
            f"{name} ({self.networks[name]['sqnr']:.1f} dB, largest error"
            f" {self.networks[name]['max_error']:.3g})"
        )


def pictures(pipe: Pipeline, prompts: Sequence[str], arguments: dict[str, Any]) -> np.ndarray:
    """uint8 (N, H, W, 3): one picture of each prompt, seed i for prompt i."""
    return np.stack(
        [np.asarray(pipe(p, seed=i, **arguments).images[0]) for i, p in enumerate(prompts)]
    )


def measure(
    pipe: Pipeline,
    recording: Recording,
    networks: dict[str, Callable[..., np.ndarray]],
    not_run: dict[str, str],
    reference: np.ndarray | None = None,
) -> Parity:
    """SQNR and largest error of each network over all recorded calls, and the pictures when all
    three run.

    Args:
        reference: uint8 (N, H, W, 3), pictures of another model at the recording's prompts and
            seeds.

    Raises:
        InputError: the reference's pictures have another size.
    """
    if reference is not None and reference.shape != recording.images.shape:
        raise InputError(
            f"the reference makes pictures {reference.shape[1:]}, the model"
            f" {recording.images.shape[1:]}; name the model it was made of."
        )
    out = Parity(not_run=dict(not_run))
    for p, network in networks.items():
        signal = noise = worst = 0.0
        for inputs, wanted in recording.calls[p]:
            d = np.asarray(network(**inputs), np.float64) - wanted
            signal, noise, worst = (
                signal + float(np.square(wanted, dtype=np.float64).sum()),
                noise + float(np.square(d).sum()),
                max(worst, float(np.abs(d).max())),
            )
        out.networks[p] = {
            "sqnr": min(sqnr(signal, noise), 200.0),
            "max_error": worst,
            "calls": len(recording.calls[p]),
        }
    if set(networks) == set(PARTS):
        made = with_networks(pipe, dict(networks))
        images = out.images = pictures(made, recording.prompts, recording.arguments)
        out.psnr = [min(psnr(a, b), 100.0) for a, b in zip(recording.images, images, strict=True)]
        if reference is not None:
            out.reference = [min(psnr(a, b), 100.0) for a, b in zip(reference, images, strict=True)]
    return out
