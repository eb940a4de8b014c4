"""Is the exported network still the same one? Inputs recorded from the model's real loop, the
target's answers against the float ones, and its images against the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from sdlite.backends import Network
from sdlite.editing import Edit
from sdlite.errors import InputError
from sdlite.exporters.profile import Gate
from sdlite.image_input import from_array, pixels
from sdlite.instrument import Call, Tape, asked, closeness, controlled, with_networks
from sdlite.metrics import psnr
from sdlite.pipeline import Pipeline
from sdlite.sampling import get_sampler
from sdlite.spec import IOSpec

MOST_PSNR, MOST_SQNR = 100.0, 200.0  # dB that stand for equal


class CallArguments(TypedDict):
    """What the images are made with besides prompt and seed; None: the model's own."""

    num_inference_steps: int | None
    sampler: str
    height: int | None
    width: int | None


class Figures(TypedDict):
    """A network over all recorded calls, see `sdlite.instrument.closeness`: SQNR in dB, and the
    largest absolute error.
    """

    sqnr: float
    max_error: float
    calls: int


@dataclass
class Recording:
    """Every call of every network over some images, and the images.

    Attributes:
        images: uint8 (N, H, W, 3), one for each prompt.
        specs: of the networks, in the order of a call.
        edit: uint8 (1, H, W, 3), the first image edited, where there is an encoder and the sampler
            edits. strength: of it.
    """

    calls: dict[str, list[Call]]
    images: np.ndarray
    prompts: list[str]
    arguments: CallArguments
    specs: dict[str, IOSpec]
    edit: np.ndarray | None = None
    strength: float | None = None


def record(
    pipe: Pipeline, parts: Sequence[str], prompts: Sequence[str], arguments: CallArguments
) -> Recording:
    """Make one image of each prompt (seed i for prompt i), edit the first of them where `parts`
    has an encoder, make one more after a control image where it has a ControlNet, and keep what
    went in and out of each network. The images of an inpainting model are edits already.
    """
    calls: dict[str, list[Call]] = {p: [] for p in parts}
    taped = with_networks(pipe, {p: Tape(pipe.networks.parts[p], calls[p]) for p in calls})
    specs = {p: pipe.artifact.spec(p) for p in parts}
    images = make_images(taped, prompts, arguments)
    out = Recording(calls, images, list(prompts), arguments, specs)
    if "controlnet" in calls:
        hint = controlled(taped, arguments["height"], arguments["width"])
        taped(prompts[0], seed=0, **arguments, **hint)
    if "vae_encoder" in calls and not pipe.inpaints:
        out.strength = edit_strength(pipe, arguments)
        if out.strength is None:
            taped.network("vae_encoder")(sample=pixels([from_array(images[0])]))
        else:
            out.edit = make_edit(taped, out)
    return out


def edit_strength(pipe: Pipeline, arguments: CallArguments) -> float | None:
    """Of the edit that is compared: half of the steps; of one step none, so that the image goes
    through the autoencoder alone. None where the sampler makes no part of a schedule.
    """
    steps = arguments["num_inference_steps"] or pipe.defaults.num_inference_steps
    for strength in (0.5, 0.0):
        solver = get_sampler(arguments["sampler"], pipe.schedule, steps)
        try:
            Edit([], None, strength).schedule(solver, pipe.family.spreads(pipe.index))
        except InputError:
            continue
        return strength
    return None


def make_edit(pipe: Pipeline, recording: Recording) -> np.ndarray:
    """uint8 (1, H, W, 3): the recording's first image, edited by its own prompt with seed 0."""
    prompt, source = recording.prompts[0], recording.images[0]
    strength = recording.strength
    made = pipe(prompt, image=source, strength=strength, seed=0, **recording.arguments)
    return np.asarray(made.images[0])[None]


def make_images(pipe: Pipeline, prompts: Sequence[str], arguments: CallArguments) -> np.ndarray:
    """uint8 (N, H, W, 3): one image of each prompt, seed i for prompt i; of an inpainting model the
    example's, repainted.
    """
    given = asked(pipe, arguments["height"], arguments["width"])
    return np.stack(
        [np.asarray(pipe(p, seed=i, **arguments, **given).images[0]) for i, p in enumerate(prompts)]
    )


@dataclass
class Parity:
    """Figures of one export.

    Attributes:
        networks: those that ran.
        psnr: of the images that sdlite makes with these networks, dB; None where not all ran.
        edit: of one image that is edited with them. None where there is no encoder, or not all ran.
        own: of the images that the target makes by itself, from the prompt on: its own tokenizer,
            noise and sampler; and last of its own edit. None where it makes none.
        reference: of the former to the images of another model: the float one that a quantized
            model was made of.
        not_run: why others did not run.
        images: uint8 (N, H, W, 3), the export's, where all networks ran.
    """

    networks: dict[str, Figures] = field(default_factory=dict)
    psnr: list[float] | None = None
    edit: list[float] | None = None
    own: list[float] | None = None
    reference: list[float] | None = None
    not_run: dict[str, str] = field(default_factory=dict)
    images: np.ndarray | None = None

    def fails(self, gate: Gate) -> list[str]:
        """One sentence for each bar that is not reached."""
        out = [
            f"{what} {min(found):.1f} dB, wanted {wanted:g}"
            for what, found, wanted in (
                ("image PSNR", self.psnr, gate.psnr),
                ("PSNR of an edited image", self.edit, gate.psnr),
                ("PSNR of the target's own images", self.own, gate.psnr),
                ("image PSNR to the reference", self.reference, gate.reference),
            )
            if found is not None and wanted is not None and not min(found) >= wanted
        ]
        for part, wanted in gate.wanted().items():
            if part in self.networks and not self.networks[part]["sqnr"] >= wanted:
                out.append(f"{part} SQNR {self.networks[part]['sqnr']:.1f} dB, wanted {wanted:g}")
        return out

    def worst(self) -> str:
        """The network that is farthest from the original, in words."""
        if not self.networks:
            return "no network ran"
        name = min(self.networks, key=lambda p: self.networks[p]["sqnr"])
        return (
            f"{name} ({self.networks[name]['sqnr']:.1f} dB, largest error"
            f" {self.networks[name]['max_error']:.3g})"
        )


def measure(
    pipe: Pipeline,
    recording: Recording,
    networks: Mapping[str, Network],
    not_run: Mapping[str, str],
    reference: np.ndarray | None = None,
) -> Parity:
    """SQNR and largest error of each network over all recorded calls, and the images when all
    run.

    Args:
        reference: uint8 (N, H, W, 3), images of another model at the recording's prompts and seeds.

    Raises:
        InputError: the reference's images have another size.
    """
    if reference is not None and reference.shape != recording.images.shape:
        raise InputError(
            f"the reference makes images {reference.shape[1:]}, the model"
            f" {recording.images.shape[1:]}; name the model it was made of."
        )
    out = Parity(not_run=dict(not_run))
    for p, network in networks.items():
        out.networks[p] = _figures(network, recording.calls[p])
    if set(networks) == set(recording.specs):
        made = with_networks(pipe, dict(networks))
        out.images = make_images(made, recording.prompts, recording.arguments)
        out.psnr = _each_psnr(recording.images, out.images)
        if recording.edit is not None:
            out.edit = _each_psnr(recording.edit, make_edit(made, recording))
        if reference is not None:
            out.reference = _each_psnr(reference, out.images)
    return out


def measure_own(
    recording: Recording,
    image: Callable[[str, int, int | None], np.ndarray],
    edit: Callable[[str, np.ndarray, float, int, int | None], np.ndarray],
) -> list[float]:
    """PSNR in dB of the target's own images, made from the recording's prompts, and last of its own
    edit, where there is one to compare with.

    Args:
        image, edit: see `targets.base.Running`.

    Raises:
        InputError: the images have another size.
    """
    steps = recording.arguments["num_inference_steps"]
    made = [image(p, i, steps) for i, p in enumerate(recording.prompts)]
    if made[0].shape != recording.images.shape[1:]:
        raise InputError(
            f"the target makes images {made[0].shape}, the model {recording.images.shape[1:]}."
        )
    out = _each_psnr(recording.images, np.stack(made))
    if recording.edit is not None and recording.strength is not None:
        first, source = recording.prompts[0], recording.images[0]
        edited = edit(first, source, recording.strength, 0, steps)
        out += _each_psnr(recording.edit, edited[None])
    return out


def _figures(network: Network, calls: Sequence[Call]) -> Figures:
    lowest, worst = closeness(network, calls)
    return {"sqnr": min(lowest, MOST_SQNR), "max_error": worst, "calls": len(calls)}


def _each_psnr(wanted: np.ndarray, made: np.ndarray) -> list[float]:
    return [min(psnr(a, b), MOST_PSNR) for a, b in zip(wanted, made, strict=True)]
