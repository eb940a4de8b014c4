"""README.md of an exported folder: its networks, the numbers around them, and code that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdlite.exporters import snippets
from sdlite.exporters.described import NetworkRow
from sdlite.exporters.parity import Recording
from sdlite.exporters.targets.base import Runtime, Target
from sdlite.pipeline import Pipeline
from sdlite.spec import Tensor

FILE = "README.md"
_DPM = "DPMSolverMultistepScheduler"
CLASSES: dict[str, tuple[str, dict[str, object]]] = {
    # our sampler -> diffusers' class, and what it is told besides the file
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm-rk": ("PNDMScheduler", {"skip_prk_steps": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm++2m": (_DPM, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m-sde": (_DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpm++3m": (_DPM, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpm++2s": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "lower_order_final": True},
    ),
    "dpm++sde": ("DPMSolverSDEScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}),
    "unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
# Two keys are what diffusers' pipeline makes of them, whatever the file says (`sdlite.sampling`).
_CLIPS = ("DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler")
_NO_OFFSET = ("DPMSolverSinglestepScheduler",)
_NOISY = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler")
_NO_ZERO_SNR = (  # do not know `rescale_betas_zero_snr`
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)


@dataclass(frozen=True)
class Told:
    """What an export is of.

    Attributes:
        recording: of the model's calls; the first prompt is the code's.
        left_out: part -> why it is not exported, of those that the model need not have.
    """

    target: Target[object]
    recording: Recording
    left_out: Mapping[str, str]


def write(
    folder: Path,
    about: Mapping[str, NetworkRow],
    pipe: Pipeline,
    export: Told,
    more: Sequence[str] = (),
) -> None:
    """Write README.md into an export.

    Args:
        about: its networks, see `sdlite.exporters.described.networks`.
        pipe: the model that was exported.
        more: lines at its end.
    """
    recording, told, profile = export.recording, export.target.runtime(), export.target.profile
    numbers = _numbers(pipe, recording)
    numbers |= _beside(pipe, recording, numbers)
    lines = [
        f"# {pipe.artifact.name} for {told.title}",
        "",
        (
            f"Made by `sdlite export` with the profile `{profile.name}`, in {profile.precision}."
            " `export-report.json` says how it was"
        ),
        (
            "checked, and has the SHA-256 of every file: `sdlite verify .` compares them, `sdlite"
            " info .` shows what the folder is."
        ),
        "",
        *_table(about, export.left_out),
        *_around(pipe, recording, numbers, about),
        *([told.usage.strip("\n")] if told.usage else _code(told, pipe, recording, numbers)),
        *([] if told.usage else _apart(pipe, numbers["CLASS"])),
        *more,
    ]
    (folder / FILE).write_text("\n".join([*lines, ""]), encoding="utf-8")


def _table(about: Mapping[str, NetworkRow], left_out: Mapping[str, str]) -> list[str]:
    lines = ["## Networks", "", "| network | files | | name | dtype | shape | values |"]
    lines.append("|---|---|---|---|---|---|---|")
    for part, row in about.items():
        start, package, _ = row["file"].partition(".mlpackage")
        files = start + package if package else ", ".join(sorted([row["file"], *row["weights"]]))
        first = f"{part} | {files}"
        made = [row["output"], *row.get("more_outputs", ())]
        for kind, tensor in [
            *(("input", t) for t in row["inputs"]),
            *(("output", t) for t in made),
        ]:
            shape = ", ".join(map(str, tensor["shape"])) or "a scalar"
            name, dtype, values = tensor["name"], tensor["dtype"], tensor["range"]
            lines.append(f"| {first} | {kind} | `{name}` | {dtype} | {shape} | {values} |")
            first = " | "
    said = [f"`{part}` is not here: {why}." for part, why in left_out.items()]
    return [*lines, "", *(line for text in said for line in (text, ""))]


def _zeros(tensor: Tensor, seen: np.ndarray) -> str:
    shape = (1, *seen.shape[1:]) if tensor.shape else ()
    return f"\n    {tensor.name}=np.zeros({shape}, np.{tensor.dtype}),"


def _numbers(pipe: Pipeline, recording: Recording) -> dict[str, str]:
    """Placeholder -> Python code."""
    vae, name = pipe.vae_config, pipe.default_sampler
    spec, given = recording.specs["unet"], recording.calls["unet"][0][0]
    cls, told = CLASSES[name.removesuffix("-karras")]
    told = dict(told)
    if name.endswith("-karras"):
        told["use_karras_sigmas"] = True
    if cls in _CLIPS:
        told["clip_sample"] = False
    if cls not in _NO_OFFSET:
        told["steps_offset"] = 1
    shift = vae.get("shift_factor") or 0.0
    height, width = recording.images.shape[1:3]
    side = given["sample"].shape[2:]
    latents = f"(1, {pipe.channels}, height // {height // side[0]}, width // {width // side[1]})"
    return {
        "TEXT": pipe.family.snippet(pipe.index, pipe.unet_config),
        "ZEROS": "".join(_zeros(t, given[t.name]) for t in spec.inputs),
        "LATENTS": latents,
        "STRIDE": repr(height // side[0]),
        "SIZE": f"{height}, {width}",
        "CLASS": cls,
        "SETTINGS": "".join(f", {k}={v!r}" for k, v in told.items()),
        "PROMPT": repr(recording.prompts[0]),
        "STEPS": repr(pipe.defaults.num_inference_steps),
        "GUIDANCE": repr(pipe.defaults.guidance_scale),
        "WINDOW": repr(pipe.tokenizer.max_length),
        "SCALING": repr(vae["scaling_factor"]),
        "SHIFT": f" + np.float32({shift})" if shift else "",
        "NOISY": _step_arguments(cls, name),
    }


def _beside(pipe: Pipeline, recording: Recording, numbers: Mapping[str, str]) -> dict[str, str]:
    """Placeholder -> what an inpainting model's code has besides."""
    if not pipe.inpaints:
        return {"BESIDE": "", "SAMPLE": "", "KEPT": ""}
    given = {**numbers, **_encoded(pipe, recording)}
    beside = _filled(snippets.BESIDE, given)
    return {"BESIDE": f"{beside}\n", "SAMPLE": snippets.SAMPLE.rstrip(), "KEPT": snippets.KEPT[1:]}


def _encoded(pipe: Pipeline, recording: Recording) -> dict[str, str]:
    """Placeholder -> code from what the encoder gives to latents."""
    drawn = recording.specs["vae_encoder"].output.name == "latent_parameters"
    shift, factor = pipe.vae_config.get("shift_factor") or 0.0, pipe.vae_config["scaling_factor"]
    return {
        "ENCODED": (snippets.DRAWN if drawn else snippets.PLAIN).strip("\n"),
        "FROM_ENCODER": f"(encoded - {shift}) * {factor}" if shift else f"encoded * {factor}",
    }


def _step_arguments(cls: str, name: str) -> str:
    """What a step is told besides: the image's generator where it draws; sdlite's TCD draws
    nothing.
    """
    if cls == "TCDScheduler":
        return ", eta=0.0"
    draws = cls in _NOISY or ("sde" in name and cls != "DPMSolverSDEScheduler")
    return ", generator=generator" if draws else ""


def _around(
    pipe: Pipeline,
    recording: Recording,
    numbers: Mapping[str, str],
    about: Mapping[str, NetworkRow],
) -> list[str]:
    """What goes in and out of the networks, in words."""
    height, width = recording.images.shape[1:3]
    latents = (1, pipe.channels, *recording.calls["unet"][0][0]["sample"].shape[2:])
    free = any("width" in str(n) for t in about["unet"]["inputs"] for n in t["shape"])
    sizes = f"or any multiples of {pipe.networks.size_multiple}" if free else "this size alone"
    shift = numbers["SHIFT"].replace("np.float32", "")
    return [
        "## Around them",
        "",
        *_tokens(pipe),
        (
            f"- Latents: unit normal noise of {latents} for an image of {height}x{width}"
            f" px ({sizes}), from a generator with the image's seed."
        ),
        (
            f"- Steps: `scheduler/scheduler_config.json`, sampler {pipe.default_sampler}"
            f" (diffusers' {numbers['CLASS']}), {numbers['STEPS']} steps,"
        ),
        f"  guidance {numbers['GUIDANCE']}; the UNet predicts {pipe.schedule.prediction_type}.",
        *_guidance(pipe),
        *(f"- {p} stays in {row['kept']}." for p, row in about.items() if "kept" in row),
        (
            f"- Decoder: gets latents / {numbers['SCALING']}{shift}; its pixels are -1 to 1, and (x"
            " / 2 + 0.5) x 255 is 0 to 255."
        ),
        *_encoder(pipe, recording),
        *_painted(pipe),
        "",
    ]


def _painted(pipe: Pipeline) -> list[str]:
    """What an inpainting UNet is given besides latents."""
    if not pipe.inpaints:
        return []
    return [
        (
            f"- `sample` of the UNet: {pipe.channels} channels of latents, one of the mask (1 is"
            f" painted anew; every {pipe.stride}th pixel of it), and"
        ),
        (
            f"  {pipe.channels} of the encoded image, whose painted pixels are 0 (gray); the last"
            " two are the same in every step."
        ),
    ]


def _encoder(pipe: Pipeline, recording: Recording) -> list[str]:
    """What the encoder takes and gives, where there is one."""
    if "vae_encoder" not in recording.specs:
        return []
    shift = pipe.vae_config.get("shift_factor") or 0.0
    scaled = f"(z - {shift})" if shift else "z"
    drawn = recording.specs["vae_encoder"].output.name == "latent_parameters"
    z = "mean + exp(log variance / 2) x unit normal noise" if drawn else "what it gives"
    return [
        (
            "- Encoder: its pixels are 0 to 255 / 127.5 - 1; z is"
            f" {z}, and latents are {scaled} x"
            f" {pipe.vae_config['scaling_factor']}."
        )
    ]


def _tokens(pipe: Pipeline) -> list[str]:
    """What each text encoder reads."""
    return [
        f"- Tokens: `{folder}/` (CLIP's), {pipe.tokenizers[part].max_length} of them, padded with"
        f" id {pipe.tokenizers[part].pad}; longer texts are cut before the end token."
        for part, folder in pipe.family.tokenizers.items()
    ]


def _guidance(pipe: Pipeline) -> list[str]:
    if pipe.family.guides_itself(pipe.unet_config):
        return [
            "- Guidance is an input of the UNet: one call a step at any guidance, and no negative"
            " prompt."
        ]
    return [
        "- Guidance g is u + g (c - u), u for the negative prompt and c for the prompt; from 0 to 1"
        " there is none, and no second call."
    ]


def _filled(code: str, numbers: Mapping[str, str]) -> str:
    for key, value in numbers.items():
        code = code.replace(f"@{key}@", value)
    return code.strip("\n")


def _code(
    told: Runtime, pipe: Pipeline, recording: Recording, numbers: Mapping[str, str]
) -> list[str]:
    """Snippets: one network on numpy arrays, an image, and an edit of it."""
    return [
        "## Run one network",
        "",
        f"`pip install numpy {told.install}`, then in this folder:",
        "",
        *([told.note, ""] if told.note else []),
        "```python",
        told.code.strip("\n"),
        "",
        "",
        _filled(snippets.ONE, numbers),
        "```",
        "",
        "## Make an image",
        "",
        (
            "With transformers' tokenizer and diffusers' scheduler (`pip install transformers"
            " diffusers torch pillow`), after `load` above"
            + (", of `photo.png` and `mask.png`:" if pipe.inpaints else ":")
        ),
        "",
        "```python",
        _filled(snippets.IMAGE, numbers),
        "```",
        *_edit(pipe, recording, numbers),
    ]


def _edit(pipe: Pipeline, recording: Recording, numbers: Mapping[str, str]) -> list[str]:
    """A snippet that edits the image, where there is an encoder and the sampler edits."""
    if recording.strength is None:
        return []
    spreads = pipe.family.spreads(pipe.index)
    more = {
        **_encoded(pipe, recording),
        "FIRST": (snippets.SPREAD if spreads else snippets.LAST).strip("\n"),
        "STRENGTH": "0.6" if pipe.defaults.num_inference_steps > 1 else "1.0",
    }
    return [
        "",
        "## Edit an image",
        "",
        (
            "After the code above: the image is encoded, the noise of a later step is added, and"
            " the steps from there on are made. To"
        ),
        (
            "repaint a part of it, put the encoded image's own latents, with the noise of the next"
            " timestep, in place of the rest after each"
        ),
        "step, and the image's own pixels in the end.",
        "",
        "```python",
        _filled(snippets.EDIT, {**more, **numbers}),
        "```",
    ]


def _apart(pipe: Pipeline, cls: str) -> list[str]:
    """Said where the code's image is not sdlite's."""
    if cls == "DPMSolverSDEScheduler":
        return [
            "",
            f"diffusers' {cls} needs torchsde and draws its noise from a Brownian tree: this",
            "code's image is another than sdlite's, of the same distribution.",
        ]
    if not pipe.schedule.rescale_betas_zero_snr or cls not in _NO_ZERO_SNR:
        return []
    return [
        "",
        f"diffusers' {cls} does not rescale the noise to zero terminal SNR, which this model was",
        (
            "trained with: this code's image is another than sdlite's. Export with `--sampler ddim`"
            " for one"
        ),
        "that is the same.",
    ]
