"""Is the quantised pipeline still the same picture? Measured against the float one, at equal seeds,
on each engine that runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sdlite import arguments
from sdlite.instrument import Call, Tape, with_networks
from sdlite.manifest import PARTS
from sdlite.metrics import psnr, sqnr, ssim, structure_distance
from sdlite.pipeline import Pipeline
from sdlite.spec import latent_size


@dataclass
class Gate:
    """What must hold before a quantised model is written.

    Attributes:
        psnr_mean, psnr_worst: dB between the float and the quantised picture (uint8), over prompts
            x seeds.
        ssim_mean: structural similarity.
        prompts: None takes calibration prompts that were not used, or all of them when there are no
            others.
        num_prompts: at most so many of them.
        seeds: each prompt is drawn with each.
        max_float: share of the quantisable parameters that may go back to float to make the gate
            hold; 0 forbids it.
        engines: backends to check; None is every installed one that has the precision.
    """

    psnr_mean: float = 36.0
    psnr_worst: float = 30.0
    ssim_mean: float = 0.98
    prompts: Sequence[str] | None = None
    num_prompts: int = 16
    seeds: Sequence[int] = (0, 1)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None
    max_float: float = 0.3
    engines: Sequence[str] | None = None

    def check(self) -> None:
        """Types and ranges.

        Raises:
            InputError: an attribute is not accepted.
        """
        for name in ("psnr_mean", "psnr_worst"):
            arguments.number(name, getattr(self, name), 0)
        arguments.number("ssim_mean", self.ssim_mean, -1, 1)
        arguments.number("max_float", self.max_float, 0, 1)
        self.prompts = arguments.optional(arguments.lines, "gate prompts", self.prompts)
        arguments.integer("num_prompts", self.num_prompts, 1)
        self.seeds = arguments.integers("gate seeds", self.seeds, 0, arguments.SEEDS)
        arguments.optional(
            arguments.integer, "gate num_inference_steps", self.num_inference_steps, 1
        )
        arguments.optional(arguments.number, "gate guidance_scale", self.guidance_scale, 0)
        arguments.optional(arguments.size, "gate size", self.size)
        self.engines = arguments.optional(arguments.lines, "engines", self.engines)


@dataclass
class Comparison:
    """Pictures of one engine against the float pipeline's."""

    engine: str
    pictures: int
    psnr_mean: float
    psnr_worst: float
    ssim_mean: float
    structure_distance_mean: float
    worst: str  # prompt and seed of the worst picture
    networks: dict[str, float] = field(
        default_factory=dict
    )  # SQNR in dB on the float pipeline's own inputs

    def fails(self, gate: Gate) -> list[str]:
        out = []
        for name in ("psnr_mean", "psnr_worst", "ssim_mean"):
            value, wanted = getattr(self, name), getattr(gate, name)
            if not value >= wanted:
                out.append(f"{self.engine}: {name} {value:.4g}, wanted {wanted:.4g}")
        return out

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: what is equal is infinitely close, which becomes None."""

        def finite(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: finite(v) for k, v in value.items()}
            return None if isinstance(value, float) and not np.isfinite(value) else value

        return {k: finite(v) for k, v in asdict(self).items()}


def pictures(pipe: Pipeline, prompts: Sequence[str], gate: Gate) -> np.ndarray:
    """uint8 (prompts x seeds, H, W, 3)."""
    height, width = gate.size or (None, None)
    every = [(p, s) for p in prompts for s in gate.seeds]
    side = (
        max(latent_size(pipe.unet_config)) * pipe.stride
        if height is None
        else max(height, width or 0)
    )
    batch = max(1, min(16, (1 << 17) // (side * side)))
    out = []
    for i in range(0, len(every), batch):
        part = every[i : i + batch]
        made = pipe(
            [p for p, _ in part],
            seed=[s for _, s in part],
            num_inference_steps=gate.num_inference_steps,
            guidance_scale=gate.guidance_scale,
            height=height,
            width=width,
        )
        out += [np.asarray(x) for x in made.images]
    return np.stack(out)


def calls(floats: Pipeline, prompts: Sequence[str], gate: Gate) -> dict[str, list[Call]]:
    """Every network's calls in the first prompt's picture."""
    tapes = {p: Tape(getattr(floats.networks, p), []) for p in PARTS}
    height, width = gate.size or (None, None)
    with_networks(floats, dict(tapes))(
        prompts[0],
        seed=gate.seeds[0],
        num_inference_steps=gate.num_inference_steps,
        guidance_scale=gate.guidance_scale,
        height=height,
        width=width,
    )
    return {p: t.calls for p, t in tapes.items()}


def compare(
    reference: np.ndarray,
    floats: dict[str, list[Call]],
    pipe: Pipeline,
    prompts: Sequence[str],
    gate: Gate,
) -> tuple[Comparison, np.ndarray]:
    """Pictures of `pipe` against `reference`, and the SQNR of its networks on the float pipeline's
    inputs (`calls`).
    """
    made = pictures(pipe, prompts, gate)
    values = [psnr(a, b) for a, b in zip(reference, made, strict=True)]
    ratios = {}
    for p in PARTS:
        signal = noise = 0.0
        for inputs, wanted in floats[p]:
            got = getattr(pipe.networks, p)(**inputs)
            signal += float(np.square(wanted, dtype=np.float64).sum())
            noise += float(np.square(got.astype(np.float64) - wanted).sum())
        ratios[p] = sqnr(signal, noise)
    at = int(np.argmin(values))
    return (
        Comparison(
            engine=pipe.report.backend,
            pictures=len(values),
            psnr_mean=float(np.mean(np.minimum(values, 100.0))),  # equal pictures count as 100 dB
            psnr_worst=float(np.min(values)),
            ssim_mean=float(np.mean([ssim(a, b) for a, b in zip(reference, made, strict=True)])),
            structure_distance_mean=float(
                np.mean([structure_distance(a, b) for a, b in zip(reference, made, strict=True)])
            ),
            worst=f"{prompts[at // len(gate.seeds)]!r}, seed {gate.seeds[at % len(gate.seeds)]}",
            networks=ratios,
        ),
        made,
    )
