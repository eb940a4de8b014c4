"""README.md of an exported folder: its networks, the numbers around them, and code that runs it with the target's runtime alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlite.artifact import PARTS
from sdlite.exporters.parity import Recording
from sdlite.exporters.profile import Profile
from sdlite.exporters.snippets import IMAGE, ONE, RUNTIMES, Runtime
from sdlite.pipeline import Pipeline
from sdlite.spec import SPECS, Tensor

FILE = "README.md"
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {  # our sampler -> diffusers' class, and what it is told besides the file
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm-rk": ("PNDMScheduler", {"skip_prk_steps": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}),
    "unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}  # fmt: skip
_CLIPS = ("DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler")
_OFFSETS = ("DPMSolverSinglestepScheduler",)  # the one that has no steps_offset
_NOISY = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler")


def runtime(profile: Profile) -> Runtime:
    """What the profile's README says of its runtime."""
    return RUNTIMES["onnx, fused" if profile.options.get("fuse_schedule") else profile.target]


def networks(
    folder: Path,
    made: Mapping[str, Sequence[Path]],
    recording: Recording,
    profile: Profile,
    source: Mapping[str, Mapping[str, Any]],
    free_size: bool,
) -> dict[str, dict[str, Any]]:
    """part -> {file, weights, storage, arithmetic, batch, inputs, output}: the report's `networks`.

    Args:
        made: the files of each part, in `folder`.
        recording: of the calls whose shapes the networks have.
        source: the rows of the manifest's variant that the networks were made of.
        free_size: whether a dynamic profile's networks take any image size.
    """
    out = {}
    for part in PARTS:
        names = [f.relative_to(folder).as_posix() for f in made[part]]
        main = f"{part}/step.onnx" if f"{part}/step.onnx" in names else names[0]
        given, answer = recording.calls[part][0]
        free = ("B", "h", "w", "H", "W") if profile.dynamic and free_size else ("B",) if profile.dynamic else ()
        stride = recording.images.shape[1] // recording.calls["unet"][0][0]["sample"].shape[2]
        letters = {"B": "batch", "h": f"height/{stride}", "w": f"width/{stride}", "H": "height", "W": "width"}
        words = {k: v for k, v in letters.items() if k in free}
        inputs = [_described(t, given[t.name].shape, words, profile, i) for i, t in enumerate(SPECS[part].inputs)]
        output = _described(SPECS[part].output, answer.shape, words, profile, None)
        halved = profile.precision == "fp16" or (profile.dynamic and source[part]["storage"] == "float16")
        out[part] = {
            "file": main, "weights": [n for n in names if n != main],
            "storage": source[part]["storage"] if profile.precision == "int8-static" else "float16" if halved else "float32",
            "arithmetic": source[part]["arithmetic"], "inputs": inputs, "output": output,
            **({} if profile.dynamic else {"batch": profile.batch or 1}), **({"cuts": True} if main.endswith("step.onnx") else {}),
        }  # fmt: skip
    return out


def _described(tensor: Tensor, seen: tuple[int, ...], words: Mapping[str, str], profile: Profile, place: int | None) -> dict[str, Any]:
    """A tensor as the runtime has it. `words`: shape letters that stay free. `place`: of an input; None is the output."""
    told = RUNTIMES[profile.target]
    shape = [words[letter] if letter in words else 1 if letter == "B" else int(n) for letter, n in zip(tensor.shape, seen, strict=True)]
    name = tensor.name
    if told.names == "ncnn":
        name, shape = "out0" if place is None else f"in{place}", shape[1:] if shape else [1]
    elif profile.target == "coreml" and not shape:
        shape = [1]
    dtype = "int32" if tensor.dtype == "int64" and told.narrow_ids else tensor.dtype
    return {"name": name, "dtype": dtype, "shape": shape, "range": tensor.range, "is": tensor.name}


def write(folder: Path, about: Mapping[str, Mapping[str, Any]], pipe: Pipeline, profile: Profile, recording: Recording) -> None:
    """Write README.md of the networks `about` (see `networks`) into `folder`."""
    told = runtime(profile)
    numbers = _numbers(pipe, recording)
    head = [
        f"# {pipe.artifact.name} for {told.title}", "",
        f"Made by `sdlite export` with the profile `{profile.name}`, in {profile.precision}. `export-report.json` says how it was checked, and has",
        "the SHA-256 of every file: `sdlite verify .` compares them, `sdlite info .` shows what the folder is.", "",
        *_table(about), *_said(pipe, numbers, any("width" in str(d) for t in about["unet"]["inputs"] for d in t["shape"])),
    ]  # fmt: skip
    code = _web() if profile.target == "web" else _code(told, numbers, profile)
    (folder / FILE).write_text("\n".join([*head, *code, ""]), encoding="utf-8")


def _table(about: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["## Networks", "", "| network | files | | name | dtype | shape | values |", "|---|---|---|---|---|---|---|"]
    for part, row in about.items():
        package = row["file"].partition(".mlpackage")
        files = package[0] + package[1] if package[1] else ", ".join(sorted([row["file"], *row["weights"]]))
        for kind, tensor in [*(("input", t) for t in row["inputs"]), ("output", row["output"])]:
            shape = ", ".join(map(str, tensor["shape"])) or "a scalar"
            lines.append(f"| {part} | {files} | {kind} | `{tensor['name']}` | {tensor['dtype']} | {shape} | {tensor['range']} |")
            part = files = ""
    return [*lines, ""]


def _numbers(pipe: Pipeline, recording: Recording) -> dict[str, Any]:
    """What the code is told, as Python literals by placeholder, and what the text says."""
    vae, name = pipe.vae_config, pipe.default_sampler
    given = recording.calls["unet"][0][0]
    cls, told = _CLASSES[name.removesuffix("-karras")]
    told = {
        **told, **({"use_karras_sigmas": True} if name.endswith("-karras") else {}), **({"clip_sample": False} if cls in _CLIPS else {}),
        **({} if cls in _OFFSETS else {"steps_offset": 1}),
    }  # fmt: skip
    settings = "".join(f", {k}={v!r}" for k, v in told.items())
    shift = vae.get("shift_factor") or 0.0
    return {
        "LATENTS": repr((1, *given["sample"].shape[1:])), "EMBEDS": repr((1, *given["encoder_hidden_states"].shape[1:])),
        "CLASS": cls, "SETTINGS": settings, "PROMPT": repr(recording.prompts[0]).replace("'", '"'),
        "STEPS": repr(pipe.defaults.num_inference_steps), "GUIDANCE": repr(pipe.defaults.guidance_scale),
        "WINDOW": repr(pipe.tokenizer.max_length), "SCALING": repr(vae.get("scaling_factor", 0.18215)), "SHIFT": f" + np.float32({shift})" if shift else "",
        "NOISY": ", generator=generator" if cls in _NOISY or "sde" in name else "", "sampler": name, "pad": pipe.tokenizer.pad, "image": recording.images.shape[1:3],
    }  # fmt: skip


def _said(pipe: Pipeline, numbers: Mapping[str, Any], free: bool) -> list[str]:
    height, width = numbers["image"]
    multiple = pipe.networks.size_multiple
    sizes = f"or any multiples of {multiple}" if free else "this size alone"
    return [
        "## Around them", "",
        f"- Tokens: `tokenizer/` (CLIP's), {numbers['WINDOW']} of them, padded with id {numbers['pad']}; longer texts are cut before the end token.",
        f"- Latents: unit normal noise of {numbers['LATENTS']} for an image of {height}x{width} px ({sizes}), from a generator with the image's seed.",
        f"- Steps: `scheduler/scheduler_config.json`, sampler {numbers['sampler']} (diffusers' {numbers['CLASS']}), {numbers['STEPS']} steps, guidance "
        f"{numbers['GUIDANCE']}; the UNet predicts {pipe.schedule.prediction_type}.",
        "- Guidance g is u + g (c - u), with u for the negative prompt and c for the prompt; 1 needs no second call.",
        f"- Decoder: gets latents / {numbers['SCALING']}{numbers['SHIFT'].replace('np.float32', '')}; its pixels are -1 to 1, (x / 2 + 0.5) x 255 is 0 to 255.",
        "",
    ]  # fmt: skip


def _filled(code: str, numbers: Mapping[str, Any]) -> str:
    for key, value in numbers.items():
        if key.isupper():
            code = code.replace(f"@{key}@", value)
    return code.strip("\n")


def _code(told: Runtime, numbers: Mapping[str, Any], profile: Profile) -> list[str]:
    """Two snippets: one network on numpy arrays, and an image."""
    htp = {"HTP": str(profile.options.get("htp_arch", "75")), "SOC": str(profile.options.get("soc_model", "57"))}
    load = _filled(told.code, {**numbers, **htp})
    note = [told.note, ""] if told.note else []
    return [
        "## Run one network", "", f"`pip install numpy {told.install}`, then in this folder:", "", *note,
        "```python", load, "", "", _filled(ONE, numbers), "```", "",
        "## Make an image", "", "With transformers' tokenizer and diffusers' scheduler (`pip install transformers diffusers torch pillow`), after `load` above:",
        "", "```python", _filled(IMAGE, numbers), "```",
    ]  # fmt: skip


def _web() -> list[str]:
    return [
        "## Serve it", "", "Any static server will do; opened as a file the page does not run. Here:", "",
        "```bash", "python3 -m http.server 8000", "```", "",
        "and open http://localhost:8000. With the headers `Cross-Origin-Opener-Policy: same-origin` and `Cross-Origin-Embedder-Policy: require-corp`",
        "wasm has more than one thread. In a page of your own:", "",
        "```js", 'import { Pipeline } from "./sdlite.js";', "",
        'const pipe = await Pipeline.load(".");', 'const { pixels, width, height } = await pipe.generate({ prompt: "a red apple", seed: 0 });', "```",
    ]  # fmt: skip
