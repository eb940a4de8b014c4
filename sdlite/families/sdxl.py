"""SDXL and its students (Turbo, Lightning, SSD-1B, Vega, KOALA): two CLIP text encoders, of which
the UNet reads the last hidden states but one, side by side, and the second one's pooled embedding;
it is also told the image's size, its crop and its target size.

Source: diffusers 0.39 `StableDiffusionXLPipeline.encode_prompt`, `_get_add_time_ids`, `__call__`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdlite.families import snippets
from sdlite.families.base import NEGATIVE, Call, Conditions, Config, Configs, Encoders
from sdlite.families.sd import StableDiffusion, misfit, unfed
from sdlite.spec import SPECS, IOSpec, Tensor

ENCODERS = ("text_encoder", "text_encoder_2")
POOLED, STATES = "text_embeds", "encoder_hidden_states"
# in the config.json of both encoders: how many more layers than the last are passed over, as
# diffusers' `clip_skip` counts. All layers stay, for the second one's last makes the pooled text.
CLIP_SKIP = "_sdlite_clip_skip"
TIME_IDS = 6  # numbers: height and width of the original, top and left of the crop, target's


class StableDiffusionXL(StableDiffusion):
    """See the module docstring."""

    name = "sdxl"
    networks: Mapping[str, tuple[str, ...]] = {
        **StableDiffusion.networks,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    }
    parts = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    tokenizers: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    texts = ("prompt_2", "negative_prompt_2")
    embeds: Mapping[str, str] = {**StableDiffusion.embeds, "pooled_prompt_embeds": POOLED}
    sizes = (
        "original_size",
        "crops_coords_top_left",
        "target_size",
        "negative_original_size",
        "negative_crops_coords_top_left",
        "negative_target_size",
    )

    def refusal(self, index: Config, configs: Configs) -> str:
        return self.unknown_parts(index) or _misfits(
            *(configs(p) for p in ("unet", "vae", *ENCODERS))
        )

    def unet_inputs(self, unet: Config) -> tuple[Tensor, ...]:
        pooled = Tensor(POOLED, ("B", str(_pooled_width(unet))), "float32", "pooled text")
        sizes = "height, width, top, left, target height, target width in pixels"
        time_ids = Tensor("time_ids", ("B", str(TIME_IDS)), "float32", sizes)
        return (*super().unet_inputs(unet), pooled, time_ids)

    def spec(self, part: str, configs: Configs) -> IOSpec:
        if part not in ENCODERS:
            return super().spec(part, configs)
        config, base = configs(part), SPECS["text_encoder"]
        states = [f"hidden_states.{i}" for i in range(_layers(config))]
        read = states.pop(-1 - config.get(CLIP_SKIP, 0))
        wanted = Tensor(read, ("B", "L", "D"), "float32", "before the last layer")
        outputs: tuple[Tensor, ...] = (wanted,)
        if part == "text_encoder_2":
            width = str(config.get("projection_dim", 512))
            outputs = (Tensor(POOLED, ("B", width), "float32", "of the end token"), wanted)
        also = ("last_hidden_state", *states)
        return replace(base, part=part, source=part, outputs=outputs, also=also)

    def overflowing(self, configs: Configs) -> dict[str, str]:
        vae = configs("vae")  # as diffusers reads it: AutoencoderKL's default is true
        upcast = vae.get("force_upcast", vae.get("_class_name") != "AutoencoderTiny")
        parts = ("vae_decoder", "vae_encoder") if upcast else ()
        return dict.fromkeys(parts, "force_upcast in vae/config.json")

    def defaults(self, index: Config) -> tuple[int, float]:
        return 50, 5.0

    def snippet(self, index: Config, unet: Config) -> str:
        width = unet.get("time_cond_proj_dim")
        guided = snippets.GUIDED_OR_ZEROS if _zeros(index) else snippets.GUIDED
        last = guided if width is None else snippets.EMBEDDED % int(width)
        return snippets.ENCODE_TWO + last + snippets.SIZES

    def empty_is_zeros(self, index: Config) -> bool:
        return _zeros(index)

    def size_conditions(self, sizes: np.ndarray) -> Conditions:
        return {"time_ids": sizes.astype(np.float32)}

    def conditions(self, encoders: Encoders, call: Call) -> tuple[Conditions, Conditions | None]:
        second = call.more.get("prompt_2") or call.prompts
        cond = self.given(call) or _encoded(encoders, call.prompts, second)
        uncond = None
        if call.negatives:
            uncond = self.given(call, NEGATIVE) or _negative(encoders, call, cond)
        cond["time_ids"] = _time_ids(call, "")
        if uncond is not None:
            told = any(k.startswith(NEGATIVE) and k in self.sizes for k in call.more)
            uncond["time_ids"] = _time_ids(call, NEGATIVE) if told else cond["time_ids"]
        self.add_guidance(encoders, call, cond)
        return cond, uncond


def _encoded(encoders: Encoders, first: Sequence[str], second: Sequence[str]) -> Conditions:
    """Texts for the two encoders -> hidden states side by side, and the pooled embedding."""
    states = []
    pooled = np.empty(0, np.float32)
    for part, texts in zip(ENCODERS, (first, second), strict=True):
        out = encoders.encode(part, encoders.tokenize(texts, part))
        states += [x for name, x in out.items() if name.startswith("hidden_states.")]
        pooled = out.get(POOLED, pooled)
    return {STATES: np.concatenate(states, axis=-1), POOLED: pooled}


def _negative(encoders: Encoders, call: Call, like: Conditions) -> Conditions:
    """The same of the negative prompts; zeros where none is given and the pipeline says so."""
    second = call.more.get("negative_prompt_2") or call.negatives
    zeros = _zeros(encoders.index)
    pairs = list(zip(call.negatives, second, strict=True))
    given = [i for i, (a, b) in enumerate(pairs) if not (zeros and a is None and b is None)]
    out = {k: np.zeros_like(v) for k, v in like.items()}
    if given:
        texts = [(pairs[i][0] or "", pairs[i][1]) for i in given]
        made = _encoded(encoders, [a for a, _ in texts], [a if b is None else b for a, b in texts])
        for k, rows in made.items():
            out[k][given] = rows
    return out


def _zeros(index: Config) -> bool:
    """Whether no negative prompt is zeros, and not an empty text."""
    return bool(index.get("force_zeros_for_empty_prompt", True))


def _time_ids(call: Call, prefix: str) -> np.ndarray:
    """float32 (B, 6): original size, top and left of the crop, target size."""
    size = (call.height, call.width)
    row = [
        *call.more.get(f"{prefix}original_size", size),
        *call.more.get(f"{prefix}crops_coords_top_left", (0, 0)),
        *call.more.get(f"{prefix}target_size", size),
    ]
    return np.repeat(np.array([row], np.float32), len(call.prompts), axis=0)


def _layers(text: Config) -> int:
    """Of a text encoder; transformers' default where its configuration does not say."""
    return int(text.get("num_hidden_layers", 12))


def _pooled_width(unet: Config) -> int:
    """Of the pooled text: what the UNet's embedding takes besides six numbers of that width."""
    sizes = TIME_IDS * int(unet.get("addition_time_embed_dim") or 256)
    return int(unet.get("projection_class_embeddings_input_dim") or 2816) - sizes


def _misfits(unet: Config, vae: Config, first: Config, second: Config) -> str:
    """Why the UNet cannot be called with what the two encoders give; "" where it can."""
    if (kind := unet.get("addition_embed_type")) != "text_time":
        return f"its UNet is told no sizes (addition_embed_type={kind!r} instead of 'text_time')"
    if why := unfed(unet, "addition_embed_type") or misfit(unet, vae):
        return why
    for part, config in zip(ENCODERS, (first, second), strict=True):
        if (last := config.get(CLIP_SKIP, 0)) >= _layers(config):
            return f"its {part} is to pass over {last} of its {_layers(config)} layers"
    widths = [c.get("hidden_size") for c in (first, second)]
    wide = unet.get("cross_attention_dim")
    if isinstance(wide, int) and all(isinstance(w, int) for w in widths):
        a, b = (int(w or 0) for w in widths)
        if wide != a + b:
            return f"its UNet reads text of width {wide}, its text encoders give {a} and {b}"
    pooled, given = _pooled_width(unet), second.get("projection_dim")
    if isinstance(given, int) and given != pooled:
        return f"its UNet reads pooled text of width {pooled}, its text_encoder_2 gives {given}"
    return ""
