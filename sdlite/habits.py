"""What people know from diffusers and write here works where the meaning is the same, or is
answered with our word for it.

The tables hold diffusers 0.39's names. A keyword's first entry are the values that ask for nothing:
they are accepted.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sdlite.errors import AttributeNameError, InputError, UnknownNameError

_POOLED = "this model's UNet takes no pooled text, as SDXL's do: give prompt_embeds= alone"
_IP = "image prompts (IP-Adapter) are not supported"
_CONTROL = (
    "this model has no ControlNet: convert it with one (sdlite convert SOURCE --controlnet FOLDER"
    " --out DIR)"
)
_HUB = "huggingface_hub's own settings hold"
_UNSAFE = "there is none; check prompts and images in your app"
_PARTS = "a pipeline is loaded whole: save the folder with that part in it, and load the folder"
_ENGINE = "the engine plans its memory itself; pipe.enable_vae_tiling() lowers the decoder's"
_LORA = "sdlite.convert(..., lora=[FILE]) (--lora) fuses it; load that"
_LOAD = "pass it when the pipeline is loaded: Pipeline.from_pretrained(..., device=...)"

Table = Mapping[str, tuple[tuple[object, ...], str]]
_SDXL = "it is for models with two text encoders (SDXL's); this model has one: leave it out"
_SIZES = (
    "original_size",
    "target_size",
    "negative_original_size",
    "negative_target_size",
    "crops_coords_top_left",
    "negative_crops_coords_top_left",
)
CALL: Table = {
    **dict.fromkeys(("prompt_2", "negative_prompt_2", *_SIZES), ((None,), _SDXL)),
    **dict.fromkeys(
        ("control_image", "controlnet_conditioning_scale", "guess_mode"), ((None,), _CONTROL)
    ),
    **dict.fromkeys(("control_guidance_start", "control_guidance_end"), ((None,), _CONTROL)),
    "pooled_prompt_embeds": ((None,), _POOLED),
    "negative_pooled_prompt_embeds": ((None,), _POOLED),
    "ip_adapter_image": ((None,), _IP),
    "ip_adapter_image_embeds": ((None,), _IP),
    "return_dict": ((True,), "the answer is a PipelineOutput: .images is the tuple's first entry"),
    "cross_attention_kwargs": ((None, {}), "a LoRA's scale is fused into the weights"),
    "guidance_rescale": ((None, 0.0), "it is not supported; leave it out"),
    "clip_skip": ((None,), "it is the model's: sdlite.convert(..., clip_skip=N) (--clip-skip N)"),
    "callback_on_step_end_tensor_inputs": ((None, ["latents"]), "callbacks see latents alone"),
    "callback_steps": ((None, 1), "callback= is called after each step: skip some there"),
}
LOAD: Table = {
    "torch_dtype": ((None,), "pass precision='fp32' or 'fp16'"),
    "dtype": ((None,), "pass precision='fp32' or 'fp16'"),
    "use_safetensors": ((None, True), "pickles can run code: save the model as safetensors"),
    "safety_checker": ((None,), _UNSAFE),
    "feature_extractor": ((None,), "it belongs to the safety checker, and there is none"),
    "image_encoder": ((None,), _IP),
    "requires_safety_checker": ((None, False), _UNSAFE),
    "scheduler": ((None,), "name the sampler in the call: pipe(..., sampler='euler')"),
    "text_encoder": ((), _PARTS),
    "tokenizer": ((), _PARTS),
    "unet": ((), _PARTS),
    "vae": ((), _PARTS),
    "device_map": ((None,), "pass device='cpu' or 'cuda'"),
    "provider": ((None,), "pass backend= and device="),
    "sess_options": ((None,), "pass threads="),
    "export": ((None, True, False), ""),
    "low_cpu_mem_usage": ((None, True, False), ""),
    "cache_dir": ((None,), f"{_HUB}: set HF_HOME"),
    "local_files_only": ((None, False), f"{_HUB}: set HF_HUB_OFFLINE=1"),
    "force_download": ((None, False), f"{_HUB}: remove the model with `hf cache`"),
    "token": ((None,), f"{_HUB}: set HF_TOKEN or run `hf auth login`"),
    "use_auth_token": ((None,), f"{_HUB}: set HF_TOKEN or run `hf auth login`"),
    "subfolder": ((None,), "give the folder that holds model_index.json"),
    "custom_pipeline": ((None,), "code is never loaded from a model"),
    "trust_remote_code": ((None, False), "code is never loaded from a model"),
    "quantization_config": ((None,), "make an int8 model with sdlite.quantize"),
}
ATTRIBUTES: Mapping[str, str] = {
    "scheduler": (
        "name the sampler in the call: sampler='euler'; the model's own is pipe.default_sampler"
    ),
    "unet": "it is pipe.networks.unet, a function of named numpy arrays",
    "vae": "its decoder is pipe.networks.vae_decoder; in tiles by pipe.enable_vae_tiling()",
    "text_encoder": "it is pipe.networks.text_encoder, a function of named numpy arrays",
    "safety_checker": _UNSAFE,
    "device": "it is pipe.report.device",
    "dtype": "it is pipe.report.precision",
    "config": "it is pipe.artifact, and pipe.defaults for steps and guidance",
    "components": _PARTS,
    "_interrupt": "return False from callback= to cancel",
    "_guidance_scale": "guidance is the same in every step; pass guidance_scale= in the call",
    "cuda": _LOAD,
    "enable_attention_slicing": _ENGINE,
    "enable_vae_slicing": f"images of a batch are decoded together; call with fewer, or: {_ENGINE}",
    "enable_model_cpu_offload": _LOAD,
    "enable_sequential_cpu_offload": _LOAD,
    "enable_xformers_memory_efficient_attention": _ENGINE,
    "enable_freeu": "it is not supported; remove the line",
    "set_progress_bar_config": "pass progress=True or False in the call",
    "load_lora_weights": _LORA,
    "fuse_lora": _LORA,
    "set_adapters": _LORA,
    "load_textual_inversion": "sdlite.convert(..., embedding=[FILE]) (--embedding); load that",
    "load_ip_adapter": _IP,
    "from_single_file": "give the file to from_pretrained, or to `sdlite convert`",
    "from_pipe": "load each pipeline with Pipeline.from_pretrained",
    "encode_prompt": "it is two stages: pipe.encode_text(pipe.tokenize(prompts))",
    "decode_latents": "it is pipe.decode(latents)",
    "prepare_latents": "it is pipe.init_latents(noise, height, width)",
}
# names of other libraries and of the command line
NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "num_images": "num_images_per_prompt",
}
OUTPUTS = ("pil", "np", "latent")
_DTYPES = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}


def keywords(given: Mapping[str, object], table: Table, known: Iterable[str]) -> None:
    """Refuse keywords that a function does not have, with the way to what they ask for.

    Raises:
        InputError: diffusers', with a value that means something.
        UnknownNameError: nobody's; the nearest name is said.
    """
    for name, value in given.items():
        if name not in table:
            raise UnknownNameError(f"{name}= is not an argument{_nearest(name, [*known])}.")
        harmless, way = table[name]
        if (
            not isinstance(value, (type(None), bool, int, float, list, dict))
            or value not in harmless
        ):
            raise InputError(f"{name}= is diffusers' and not taken here: {way}.")


def positional(given: Sequence[object], first: str, example: str) -> None:
    """Refuse what comes after the first argument without a name: other libraries have others there.

    Raises:
        InputError: there is something.
    """
    if given:
        raise InputError(
            f"{1 + len(given)} arguments without a name; accepted: {first} alone. Name the others:"
            f" {example}."
        )


def attribute(name: str, known: Iterable[str]) -> AttributeNameError:
    """The error for an attribute that a pipeline does not have."""
    if name in ATTRIBUTES:
        return AttributeNameError(f"pipe.{name} is diffusers' and not here: {ATTRIBUTES[name]}.")
    return AttributeNameError(f"a pipeline has no attribute {name!r}{_nearest(name, known)}.")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = [NAMES[name]] if name in NAMES else difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(known))}"


def moved(wanted: Sequence[object], device: str, precision: str) -> None:
    """`pipe.to(...)`: nothing where it is what was loaded, an error where it is not.

    torch's devices and dtypes count by name.
    """
    same = {device, f"{device}:0", _DTYPES.get(precision)}
    for w in wanted:
        if w is not None and str(w) not in same:
            what = "precision=" if str(w).startswith("torch.") else "device="
            raise InputError(
                f"to({str(w)!r}): this pipeline is {precision} on {device} and stays there; pass"
                f" {what} to Pipeline.from_pretrained."
            )


class TorchGenerator(Protocol):
    """What we use of `torch.Generator`, which is not imported here."""

    device: object

    def initial_seed(self) -> int: ...
    def manual_seed(self, seed: int) -> TorchGenerator: ...
    def get_state(self) -> Any: ...


Generators = TorchGenerator | Sequence[TorchGenerator]


class GeneratorNoise:
    """Draws of a torch CPU generator, which moves on as in diffusers. Stands for
    `sampling.Noise`.
    """

    def __init__(self, generator: TorchGenerator):
        self.generator = generator

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """float32 of `shape`, the generator's next draws."""
        out: np.ndarray = sys.modules["torch"].randn(tuple(shape), generator=self.generator).numpy()
        return out


def generators(given: object, count: int) -> list[TorchGenerator]:
    """`generator=`: one for each image, which is then the image of `seed=generator.initial_seed()`.

    Raises:
        InputError: not torch generators, one that is not on the CPU or was drawn from before, or
            another number of them.
    """
    every = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(every) != count:
        raise InputError(
            f"{len(every)} generators for {count} images; give a list of one for each, or seed=."
        )
    for g in every:
        if not (type(g).__module__.startswith("torch") and hasattr(g, "initial_seed")):
            raise InputError(
                f"generator={type(g).__name__}; accepted: torch.Generator, one an image. Or pass"
                " seed=."
            )
        if str(g.device) != "cpu":
            raise InputError(
                f"generator is on {g.device}, whose draws are other ones on each card; use"
                " torch.Generator('cpu'), or seed=."
            )
        fresh = type(g)().manual_seed(g.initial_seed())
        if not g.get_state().equal(fresh.get_state()):
            raise InputError(
                f"generator was drawn from before: its seed {g.initial_seed()} no longer says which"
                " image comes. Give a new one, or seed=."
            )
    if len({id(g) for g in every}) != count:
        raise InputError(
            "generator: one stands twice in the list; give each image its own, or seed=."
        )
    return every


def step_end(
    callback: Callable[[Any, int, float, dict[str, np.ndarray]], object],
    pipe: object,
    step: int,
    timestep: float,
    latents: np.ndarray,
) -> None:
    """diffusers' `callback_on_step_end(pipe, step, timestep, {"latents": ...})`.

    The latents that it returns go on.
    """
    made = callback(pipe, step, timestep, {"latents": latents})
    if not isinstance(made, Mapping) or set(made) - {"latents"}:
        shown = ", ".join(map(str, made)) if isinstance(made, Mapping) else type(made).__name__
        raise InputError(
            f"callback_on_step_end returned {shown}; accepted: a dict, with 'latents' or empty."
        )
    new = np.asarray(made.get("latents", latents))
    if new.shape != latents.shape:
        raise InputError(
            f"callback_on_step_end returned latents {new.shape}; accepted: {latents.shape}."
        )
    if new is not latents:
        latents[...] = new
