"""What a family of models says of itself: its parts, what its UNet is given, and what a prompt
becomes. Sampling, backends, quantizing and exporting see parts and conditions and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from sdlite.families import snippets
from sdlite.families.configs import inpaints
from sdlite.spec import LATENT_SAMPLE, SPECS, Arrays, IOSpec, Tensor

# Named arrays, one row per image, that go to the UNet as they are, in every step.
Conditions = Arrays
Config = Mapping[str, Any]  # content of a config.json
# Keywords of a pipeline's call that have a ControlNet, see `sdlite.controlling`.
CONTROLS = (
    "control_image",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "guess_mode",
)
DOWN = "down_block_additional_residual_"  # before a number: a UNet's input of a ControlNet
NEGATIVE = "negative_"  # before a keyword's name: the same of the negative prompt
Configs = Callable[[str], Config]  # "unet", "vae", ... -> its configuration


@dataclass(frozen=True)
class Call:
    """What a family sees of a call.

    Attributes:
        prompts: one per image.
        negatives: the same where guidance makes two rows of each image, else (). None where the
            caller gave none, which is not "" to every family.
        height, width: the images' size in pixels.
        more: of `Family.texts` (one per image, as negatives), `Family.sizes` (pairs of whole
            numbers) and `Family.embeds` (arrays, a row per image), those that the caller gave.
    """

    prompts: Sequence[str]
    negatives: Sequence[str | None]
    guidance_scale: float
    height: int
    width: int
    more: Mapping[str, Any] = field(default_factory=dict)


class Encoders(Protocol):
    """What of a pipeline makes conditions."""

    @property
    def index(self) -> Config: ...  # content of model_index.json

    @property
    def unet_config(self) -> Config: ...

    def tokenize(self, prompts: Sequence[str], part: str = "text_encoder") -> np.ndarray: ...
    def encode(self, part: str, ids: np.ndarray) -> Arrays: ...


class Family:
    """A kind of model. The methods' defaults are those of a text encoder, a UNet that is given its
    hidden states, and a VAE.

    Attributes:
        name: what errors and manifests call it.
        networks: folder of a diffusers pipeline -> classes that it may be of.
        parts: the networks that are run, in the order of a call; a part is the folder of its graph.
        optional: networks that a model may have besides: what edits images alone needs. They are
            opened at their first call.
        tokenizers: text encoder -> folder of its tokenizer.
        texts, sizes: further keywords of a pipeline's call: texts, as the negative prompt is one,
            and (height, width) or (top, left) in pixels.
        controls: `CONTROLS` where a control image may be given, else ().
        embeds: keywords that give conditions in place of a prompt -> those conditions. The same
            with negative_ are of the negative prompt.
    """

    name: str
    networks: Mapping[str, tuple[str, ...]]
    parts: tuple[str, ...] = ("text_encoder", "unet", "vae_decoder")
    optional: tuple[str, ...] = ("vae_encoder",)
    tokenizers: Mapping[str, str] = {"text_encoder": "tokenizer"}
    texts: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    embeds: Mapping[str, str] = {"prompt_embeds": "encoder_hidden_states"}

    @property
    def keywords(self) -> tuple[str, ...]:
        """All further keywords of a pipeline's call."""
        own = (*self.texts, *self.sizes, *self.controls, *self.embeds)
        return (*own, *(f"{NEGATIVE}{k}" for k in self.embeds))

    def refusal(self, index: Config, configs: Configs) -> str:
        """Why a pipeline is not of this family, or not one of it that sdlite runs; "" where it is.

        Args:
            index: content of model_index.json. configs: asked only for folders of `networks`.
        """
        raise NotImplementedError

    def unet_inputs(self, unet: Config) -> tuple[Tensor, ...]:
        """What the UNet is given besides latents, timestep and hidden states. A number in a shape
        is that size.
        """
        return ()

    def uncontrolled(self, unet: Config, sample: np.ndarray) -> Arrays:
        """Those of `unet_inputs` that a control image fills, as they are without one. `sample`: the
        latents (B, C, h, w) that go with them.
        """
        return {}

    def spec(self, part: str, configs: Configs) -> IOSpec:
        """What a part takes and gives."""
        base = SPECS[part]
        if part == "vae_encoder" and configs("vae").get("_class_name") == "AutoencoderTiny":
            return replace(base, outputs=(LATENT_SAMPLE,))
        if part != "unet":
            return base
        unet, first = configs("unet"), base.inputs[0]
        if inpaints(unet, configs("vae")):
            shape = ("B", str(unet["in_channels"]), "h", "w")
            said = f"{first.range}, the mask (1 is painted), the latents of the rest of the image"
            first = replace(first, shape=shape, range=said)
        return replace(base, inputs=(first, *base.inputs[1:], *self.unet_inputs(unet)))

    def guides_itself(self, unet: Config) -> bool:
        """Whether guidance is an input of the UNet, so that no second row is needed."""
        return False

    def spreads(self, index: Config) -> bool:
        """Whether an edit makes all its steps on the less noisy part of a consistency sampler's
        grid, in place of the last steps.
        """
        return False

    def defaults(self, index: Config) -> tuple[int, float]:
        """Steps and guidance of a folder that does not say, as diffusers' pipeline has them."""
        return 50, 7.5

    def overflowing(self, configs: Configs) -> dict[str, str]:
        """Parts that float16 arithmetic is too narrow for -> what says so."""
        return {}

    def snippet(self, index: Config, unet: Config) -> str:
        """Python code of an export's README that makes `conditions` of `prompt`, `negative_prompt`
        (None: none), `guidance`, `height` and `width`: a list with a dict of the UNet's inputs,
        besides latents and timestep, for each call of a step; the negative prompt's is the second.

        The code has `np`, transformers' `CLIPTokenizer`, and `load(part)` for a network: a function
        of the names of its inputs that gives its outputs by name. `@WINDOW@` stands for the number
        of tokens.
        """
        return snippets.ENCODE + snippets.GUIDED

    def empty_is_zeros(self, index: Config) -> bool:
        """Whether a prompt that is not given is zeros, not the encoded "". `index`: content of
        model_index.json.
        """
        return False

    def size_conditions(self, sizes: np.ndarray) -> Conditions:
        """What the UNet is told of images' sizes; {} where it is told nothing.

        Args:
            sizes: whole numbers (B, 6) in pixels: height and width of the original, top and left
                of the crop (in the original resized to the crop's scale), height and width of the
                image.
        """
        return {}

    def conditions(self, encoders: Encoders, call: Call) -> tuple[Conditions, Conditions | None]:
        """The conditions of the prompts, and of the negative ones where there are some."""
        cond, uncond = self.given(call), self.given(call, NEGATIVE)
        texts = [] if cond else [*call.prompts]
        count = len(texts)
        texts += [] if uncond else [n or "" for n in call.negatives]
        if texts:
            made = encoders.encode("text_encoder", encoders.tokenize(texts))["last_hidden_state"]
            cond = cond or {"encoder_hidden_states": made[:count]}
            uncond = uncond or {"encoder_hidden_states": made[count:]}
        return cond, uncond if call.negatives else None

    def given(self, call: Call, prefix: str = "") -> Conditions:
        """The conditions that the caller gave in place of a prompt; empty where there are none."""
        names = {name: f"{prefix}{keyword}" for keyword, name in self.embeds.items()}
        return {name: call.more[k] for name, k in names.items() if k in call.more}


def unet_arguments(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """What the UNet is given besides latents, timestep and hidden states, by our names -> keywords
    of diffusers' UNet2DConditionModel.
    """
    added = {k: v for k, v in conditions.items() if k in ("text_embeds", "time_ids")}
    down = {k: v for k, v in conditions.items() if k.startswith(DOWN)}
    others = {k: v for k, v in conditions.items() if k not in added and k not in down}
    if added:
        others["added_cond_kwargs"] = added
    if down:
        in_order = tuple(down[f"{DOWN}{i}"] for i in range(len(down)))
        others["down_block_additional_residuals"] = in_order
    return others
