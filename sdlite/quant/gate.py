"""The quality check of a quantized model: its images against the float model's, at equal seeds, on
each backend that runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from sdlite import arguments, image_input
from sdlite.instrument import Call, Tape, asked, closeness, controlled, with_networks
from sdlite.metrics import psnr, ssim, structure_distance
from sdlite.pipeline import Pipeline
from sdlite.spec import latent_size


@dataclass
class Gate:
    """What must hold before a quantized model is written.

    Attributes:
        psnr_mean, psnr_worst: dB between the float and the quantized image (uint8), over prompts x
            seeds.
        ssim_mean: structural similarity.
        prompts: None takes calibration prompts that were not used, or all of them when there are no
            others.
        num_prompts: at most so many of them.
        seeds: each prompt is sampled with each.
        max_float: share of the quantizable parameters that may go back to float to make the gate
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

    @property
    def shown(self) -> list[str]:
        """The prompts; [] until they are filled in."""
        return list(self.prompts or ())

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
    """Images of one backend against the float pipeline's.

    Attributes:
        engine: the backend's name.
        pictures: how many images.
        psnr_mean, psnr_worst: dB; the mean counts equal images as 100 dB.
        worst: prompt and seed of the worst image.
        networks: SQNR of each network in dB, on the float pipeline's own inputs.
    """

    engine: str
    pictures: int
    psnr_mean: float
    psnr_worst: float
    ssim_mean: float
    structure_distance_mean: float
    worst: str
    networks: dict[str, float] = field(default_factory=dict)

    def fails(self, gate: Gate) -> list[str]:
        """What does not hold, in words."""
        out = []
        for name in ("psnr_mean", "psnr_worst", "ssim_mean"):
            value, wanted = getattr(self, name), getattr(gate, name)
            if not value >= wanted:
                out.append(f"{self.engine}: {name} {value:.4g}, wanted {wanted:.4g}")
        return out

    def to_dict(self) -> dict[str, object]:
        """As JSON holds it: infinity, which is what equal images give, becomes None."""

        def finite(value: object) -> object:
            if isinstance(value, dict):
                return {k: finite(v) for k, v in value.items()}
            return None if isinstance(value, float) and not np.isfinite(value) else value

        return {k: finite(v) for k, v in asdict(self).items()}


def images(
    pipe: Pipeline, prompts: Sequence[str], gate: Gate, source: np.ndarray | None = None
) -> np.ndarray:
    """Each prompt with each of the gate's seeds: uint8 (prompts x seeds, H, W, 3); and one more
    where the model edits images: `source` (default: the first of them), edited; and one more where
    it has a ControlNet.
    """
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
            **asked(pipe, height, width),
        )
        out += [np.asarray(x) for x in made.images]
    if pipe.holds("vae_encoder"):
        out.append(_edited(pipe, prompts[0], gate, out[0] if source is None else source))
    if pipe.holds("controlnet"):
        out.append(_controlled(pipe, prompts[0], gate))
    return np.stack(out)


def _controlled(pipe: Pipeline, prompt: str, gate: Gate) -> np.ndarray:
    """An image of the same prompt after a control image."""
    height, width = gate.size or (None, None)
    made = pipe(
        prompt,
        seed=gate.seeds[0],
        num_inference_steps=gate.num_inference_steps,
        guidance_scale=gate.guidance_scale,
        height=height,
        width=width,
        **controlled(pipe, height, width),
    )
    return np.asarray(made.images[0])


def _edited(pipe: Pipeline, prompt: str, gate: Gate, image: np.ndarray) -> np.ndarray:
    """An image of the same prompt again, by half of the steps: what an edit does to it."""
    steps = gate.num_inference_steps or pipe.defaults.num_inference_steps
    made = pipe(
        prompt,
        strength=0.5 if steps > 1 else 0.0,
        seed=gate.seeds[0],
        num_inference_steps=gate.num_inference_steps,
        guidance_scale=gate.guidance_scale,
        **{**asked(pipe, *image.shape[:2]), "image": image},
    )
    return np.asarray(made.images[0])


def calls(floats: Pipeline, prompts: Sequence[str], gate: Gate) -> dict[str, list[Call]]:
    """Every network's calls in the first prompt's image."""
    tapes = {p: Tape(network, []) for p, network in floats.networks.parts.items()}
    height, width = gate.size or (None, None)
    made = with_networks(floats, dict(tapes))(
        prompts[0],
        seed=gate.seeds[0],
        num_inference_steps=gate.num_inference_steps,
        guidance_scale=gate.guidance_scale,
        height=height,
        width=width,
        **controlled(floats, height, width),
    )
    if "vae_encoder" in tapes:
        tapes["vae_encoder"](sample=image_input.pixels(made.images))
    return {p: t.calls for p, t in tapes.items()}


def compare(
    reference: np.ndarray,
    floats: dict[str, list[Call]],
    pipe: Pipeline,
    prompts: Sequence[str],
    gate: Gate,
) -> tuple[Comparison, np.ndarray]:
    """Images of `pipe` against `reference`, and the SQNR of its networks on the float pipeline's
    inputs (`calls`).
    """
    made = images(pipe, prompts, gate, reference[0])
    pairs = list(zip(reference, made, strict=True))
    values = [psnr(a, b) for a, b in pairs]
    at = int(np.argmin(values))
    found = Comparison(
        engine=pipe.report.backend,
        pictures=len(values),
        psnr_mean=float(np.mean(np.minimum(values, 100.0))),
        psnr_worst=float(np.min(values)),
        ssim_mean=float(np.mean([ssim(a, b) for a, b in pairs])),
        structure_distance_mean=float(np.mean([structure_distance(a, b) for a, b in pairs])),
        worst=_named(at, prompts, gate, pipe),
        networks={p: closeness(pipe.network(p), held)[0] for p, held in floats.items()},
    )
    return found, made


def _named(at: int, prompts: Sequence[str], gate: Gate, pipe: Pipeline) -> str:
    """Prompt and seed of an image."""
    if (further := at - len(prompts) * len(gate.seeds)) >= 0:
        parts = {"vae_encoder": "edited", "controlnet": "after a control image"}
        kinds = [words for part, words in parts.items() if pipe.holds(part)]
        return f"{prompts[0]!r}, seed {gate.seeds[0]}, {kinds[further]}"
    return f"{prompts[at // len(gate.seeds)]!r}, seed {gate.seeds[at % len(gate.seeds)]}"
