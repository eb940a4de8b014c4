"""Run the student's own sampling loop and look at its tensors, one prompt at a time. Statistics are
all that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdlite import arguments, image_input
from sdlite.backends import Network
from sdlite.errors import InputError
from sdlite.instrument import NamedOutputs, Visit, Watched, asked, controlled, with_networks
from sdlite.pipeline import Pipeline
from sdlite.quant.observe import OBSERVERS
from sdlite.spec import Arrays


@dataclass
class Calibration:
    """What the student is shown while ranges are measured.

    Attributes:
        prompts: None takes the model's own (`calibration.prompts` in its manifest).
        samples: images, prompt i with seed `seed` + i; where there are more samples than prompts,
            they start again at the first.
        num_inference_steps, guidance_scale: None takes the model's own.
        observer: "min-max", "percentile" or "mse".
        percentile: share in percent that the range keeps, for "percentile".
        smooth_alpha: SmoothQuant's alpha for Linear layers; None leaves them.
        size: height and width in pixels; None is the student's own.
    """

    prompts: Sequence[str] | None = None
    samples: int = 16
    seed: int = 1000
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    observer: str = "mse"
    percentile: float = 99.999
    smooth_alpha: float | None = 0.5
    size: tuple[int, int] | None = None

    @property
    def shown(self) -> list[str]:
        """The prompts; [] until the model's own are filled in."""
        return list(self.prompts or ())

    def check(self) -> None:
        """Types and ranges.

        Raises:
            InputError, UnknownNameError: an attribute is not accepted.
        """
        arguments.integer("calibration samples", self.samples, 1)
        arguments.integer("calibration seed", self.seed, 0, arguments.SEEDS - self.samples + 1)
        arguments.optional(
            arguments.integer, "calibration num_inference_steps", self.num_inference_steps, 1
        )
        arguments.optional(arguments.number, "calibration guidance_scale", self.guidance_scale, 0)
        arguments.optional(arguments.number, "smooth_alpha", self.smooth_alpha, 0, 1)
        arguments.optional(arguments.size, "calibration size", self.size)
        if arguments.text("observer", self.observer) not in OBSERVERS:
            raise InputError(
                f"observer={self.observer!r} is not known; choose one of {', '.join(OBSERVERS)}."
            )
        if not 50 < arguments.number("percentile", self.percentile) <= 100:
            raise InputError(f"percentile={self.percentile}; accepted: above 50, at most 100.")
        self.prompts = arguments.optional(arguments.lines, "calibration prompts", self.prompts)
        if self.prompts is not None and not [p for p in self.prompts if p.strip()]:
            raise InputError(
                "the calibration prompts are empty; give at least one line of text, better 16 or"
                " more."
            )


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines and lines that begin with # are left out.

    Raises:
        InputError: the file is missing, is not text, or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(
            f"prompts file {path} does not exist; give a text file with one prompt a line."
        ) from None
    except (UnicodeDecodeError, IsADirectoryError) as e:
        raise InputError(
            f"prompts file {path} cannot be read as UTF-8 text ({e}); give a text file with one"
            " prompt a line."
        ) from e
    prompts = [s for s in (line.strip() for line in lines) if s and not s.startswith("#")]
    if not prompts:
        raise InputError(f"prompts file {path} holds no prompt; write one prompt a line.")
    return prompts


class _Later:
    """Stands for the decoder: keeps the latents that it is given, which are small, and answers an
    empty image.
    """

    def __init__(self, stride: int):
        self.stride, self.given = stride, list[np.ndarray]()

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        self.given.append(inputs["latent_sample"])
        b, _, h, w = inputs["latent_sample"].shape
        return {"sample": np.broadcast_to(np.float32(0), (b, 3, h * self.stride, w * self.stride))}


class _Silence:
    """Stands for the UNet while prompts are encoded."""

    def __init__(self, channels: int):
        self.channels = channels

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        b, _, *size = inputs["sample"].shape
        return {"out_sample": np.zeros((b, self.channels, *size), np.float32)}


class _Kept:
    """A text encoder's answers: kept while there is a network, and given again without it."""

    def __init__(self, answers: dict[bytes, Arrays], network: Network | None = None):
        self.answers, self.network = answers, network

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        key = b"".join(x.tobytes() for x in inputs.values())
        if self.network is not None:
            self.answers[key] = self.network(**inputs)
        return self.answers[key]


def walk(
    pipe: Pipeline,
    calibration: Calibration,
    sessions: dict[str, NamedOutputs],
    visit: Visit,
    samples: int,
) -> Iterator[None]:
    """Run the calibration images through watched networks: all prompts through the text encoders,
    all images up to their latents, then all through the decoder, and the decoder's images through
    the encoder where there is one, so that the networks whose tensors or weights are the largest
    are never in memory together. Yields after each half of an image.

    Args:
        sessions: part -> graph with extra outputs. They are closed when their part is done.
        samples: how many images.
    """
    prompts, later = calibration.shown, _Later(pipe.stride)
    height, width = calibration.size or (None, None)
    specs = {p: pipe.artifact.spec(p) for p in sessions}
    around = {p: n for p, n in pipe.networks.parts.items() if p == "vae_encoder"}
    answers: dict[str, dict[bytes, Arrays]] = {p: {} for p in pipe.tokenizers}

    def image(i: int, networks: dict[str, Network]) -> None:
        given = controlled if "controlnet" in networks else asked
        with_networks(pipe, {**around, **networks})(
            prompts[i % len(prompts)],
            seed=calibration.seed + i,
            num_inference_steps=calibration.num_inference_steps,
            guidance_scale=calibration.guidance_scale,
            height=height,
            width=width,
            **given(pipe, height, width),
        )

    silence = _Silence(pipe.unet_config["out_channels"])
    for i in range(samples):
        texts = {p: _Kept(answers[p], Watched(specs[p], sessions[p], visit)) for p in answers}
        image(i, {**texts, "unet": silence, "vae_decoder": _Later(pipe.stride)})
    for p in answers:
        sessions[p].close()
    kept = {p: _Kept(answers[p]) for p in answers}
    for i in range(samples):
        # every second one with a control image, where there is a ControlNet
        both = [p for p in ("unet", "controlnet") if p in sessions][: 2 - i % 2]
        watched = {p: Watched(specs[p], sessions[p], visit) for p in both}
        image(i, {**kept, **watched, "vae_decoder": later})
        yield
    for p in {"unet", "controlnet"} & sessions.keys():
        sessions[p].close()
    made, decoder = [], Watched(specs["vae_decoder"], sessions["vae_decoder"], visit)
    for latents in later.given:
        made.append(np.clip(decoder(latent_sample=latents)["sample"], -1, 1))
        decoder.step = 0
        yield
    sessions["vae_decoder"].close()
    if "vae_encoder" in sessions:
        # whatever people give: also black, white and saturated colors, which no image may have made
        example, _ = image_input.example(*made[0].shape[2:])
        for pixels in [*made, image_input.pixels([example])]:
            Watched(specs["vae_encoder"], sessions["vae_encoder"], visit)(sample=pixels)
        sessions["vae_encoder"].close()
