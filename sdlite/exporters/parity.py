"""Is the exported network still the same one? Inputs recorded from the student's real loop, the target's answers against the float ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdlite.artifact import PARTS
from sdlite.pipeline import Pipeline
from sdlite.quant.calibrate import with_networks
from sdlite.quant.metrics import psnr, sqnr

Call = tuple[dict[str, np.ndarray], np.ndarray]


@dataclass
class Recording:
    """Every call of every network over some pictures, and the pictures."""

    calls: dict[str, list[Call]]
    images: np.ndarray  # uint8 (N, H, W, 3)
    prompts: list[str]
    arguments: dict[str, Any]


class _Tape:
    def __init__(self, network: Any, calls: list[Call]):
        self.network, self.calls = network, calls

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        out: np.ndarray = self.network(**inputs)
        self.calls.append(({k: v.copy() for k, v in inputs.items()}, out.copy()))
        return out


def record(pipe: Pipeline, prompts: Sequence[str], **arguments: Any) -> Recording:
    """Make one picture of each prompt (seed i for prompt i) and keep what went in and out of each network."""
    calls: dict[str, list[Call]] = {p: [] for p in PARTS}
    taped = with_networks(pipe, {p: _Tape(getattr(pipe.networks, p), calls[p]) for p in PARTS})
    images = [np.asarray(taped(p, seed=i, **arguments).images[0]) for i, p in enumerate(prompts)]
    return Recording(calls, np.stack(images), list(prompts), arguments)


@dataclass
class Parity:
    """Figures of one export; `networks` has those that ran, `not_run` says why others did not."""

    networks: dict[str, dict[str, float]] = field(default_factory=dict)
    psnr: list[float] | None = None
    not_run: dict[str, str] = field(default_factory=dict)

    def fails(self, gate: dict[str, float]) -> list[str]:
        out = []
        for p, wanted in gate.items():
            if p == "psnr":
                if self.psnr is not None and not min(self.psnr) >= wanted:
                    out.append(f"picture PSNR {min(self.psnr):.1f} dB, wanted {wanted:g}")
            elif p in self.networks and not self.networks[p]["sqnr"] >= wanted:
                out.append(f"{p} SQNR {self.networks[p]['sqnr']:.1f} dB, wanted {wanted:g}")
        return out

    def worst(self) -> str:
        if not self.networks:
            return "no network ran"
        name = min(self.networks, key=lambda p: self.networks[p]["sqnr"])
        return f"{name} ({self.networks[name]['sqnr']:.1f} dB, largest error {self.networks[name]['max_error']:.3g})"


def measure(pipe: Pipeline, recording: Recording, networks: dict[str, Callable[..., np.ndarray]], not_run: dict[str, str]) -> Parity:
    """SQNR and largest error of each network over all recorded calls, and the pictures when all three run."""
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
        out.networks[p] = {"sqnr": min(sqnr(signal, noise), 200.0), "max_error": worst, "calls": len(recording.calls[p])}
    if set(networks) == set(PARTS):
        made = with_networks(pipe, dict(networks))
        images = [np.asarray(made(p, seed=i, **recording.arguments).images[0]) for i, p in enumerate(recording.prompts)]
        out.psnr = [min(psnr(a, b), 100.0) for a, b in zip(recording.images, images, strict=True)]
    return out
