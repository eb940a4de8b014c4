"""What a family of models says of itself: its parts, what its UNet is given, and what a prompt
becomes. Sampling, backends, quantizing and exporting see parts and conditions and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sdlite.spec import SPECS, IOSpec, Tensor

# Named arrays, one row per image, that go to the UNet as they are, in every step.
Conditions = dict[str, np.ndarray]
Config = Mapping[str, Any]  # content of a config.json
Configs = Callable[[str], Config]  # "unet", "vae", ... -> its configuration


@dataclass(frozen=True)
class Call:
    """What a family sees of a call: one prompt per image, negative ones where guidance makes two
    rows of each image (else none), guidance, and the image's size in pixels.
    """

    prompts: Sequence[str]
    negatives: Sequence[str]
    guidance_scale: float
    height: int
    width: int


class Encoders(Protocol):
    """What of a pipeline makes conditions."""

    @property
    def unet_config(self) -> Config: ...

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray: ...
    def encode_text(self, ids: np.ndarray) -> np.ndarray: ...


class Family:
    """A kind of model. The methods' defaults are those of a text encoder, a UNet that is given its
    hidden states, and a VAE.

    Attributes:
        name: what errors and manifests call it.
        networks: folder of a diffusers pipeline -> classes that it may be of.
    """

    name: str
    networks: Mapping[str, tuple[str, ...]]

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

    def spec(self, part: str, unet: Config) -> IOSpec:
        """What a part takes and gives."""
        base = SPECS[part]
        if part != "unet":
            return base
        inputs = (*base.inputs, *self.unet_inputs(unet))
        return IOSpec(base.part, base.source, inputs, base.output)

    def guides_itself(self, unet: Config) -> bool:
        """Whether guidance is an input of the UNet, so that no second row is needed."""
        return False

    def defaults(self, index: Config) -> tuple[int, float]:
        """Steps and guidance of a folder that does not say, as diffusers' pipeline has them."""
        return 50, 7.5

    def snippet(self, unet: Config) -> tuple[str, str]:
        """Python code of an export's README: lines that make the further inputs of the UNet from
        `guidance`, and how they are handed over, such as ", class_labels=labels".
        """
        return "", ""

    def conditions(self, encoders: Encoders, call: Call) -> tuple[Conditions, Conditions | None]:
        """The conditions of the prompts, and of the negative ones where there are some."""
        embeds = encoders.encode_text(encoders.tokenize([*call.prompts, *call.negatives]))
        if not call.negatives:
            return {"encoder_hidden_states": embeds}, None
        with_prompt, without = np.split(embeds, 2)
        return {"encoder_hidden_states": with_prompt}, {"encoder_hidden_states": without}


def unet_arguments(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions besides the hidden states -> keywords of diffusers' UNet2DConditionModel."""
    added = {k: v for k, v in conditions.items() if k in ("text_embeds", "time_ids")}
    others = {k: v for k, v in conditions.items() if k not in added}
    return {**others, **({"added_cond_kwargs": added} if added else {})}
