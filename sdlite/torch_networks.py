"""The networks of a diffusers folder as torch modules. They are opened here and nowhere else, and
only if every tensor is in its file.

diffusers and transformers fill what they do not find with random numbers and leave out what they do
not know; both are errors here. Used by the torch backend, the converter, the exporters that start
from torch, and distillation.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdlite.artifact import config as read_config
from sdlite.errors import ArtifactError
from sdlite.files import Files
from sdlite.schema import Json
from sdlite.weights import Stored, cause, dtypes, stem, variant_of, weight_files, weight_index

# What files of CLIP's text encoder may hold besides it: a buffer that is computed, and the rest of
# CLIP, which no pipeline uses.
HARMLESS = {
    "text_encoder": (
        r"(.*\.)?position_ids|(text_projection|visual_projection)\.weight"
        r"|logit_scale|vision_model\..*"
    ),
    "text_encoder_2": r"(.*\.)?position_ids|visual_projection\.weight|logit_scale|vision_model\..*",
}


def vae_class(config: Json) -> Any:
    """diffusers' class of a vae/config.json: `AutoencoderKL`, or `AutoencoderTiny` (TAESD and our
    tiny decoders).

    Raises:
        ArtifactError: another class. diffusers would load it all the same, with random weights.
    """
    import diffusers

    name = config.get("_class_name", "AutoencoderKL")
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ArtifactError(
            f"the vae is a {name}; accepted: AutoencoderKL and AutoencoderTiny. Save the pipeline"
            " with one of these."
        )
    return getattr(diffusers, name)


def open_network(folder: Path | Files, **options: Any) -> Any:
    """The network of one folder of a pipeline (`text_encoder`, `text_encoder_2`, `unet`,
    `controlnet` or `vae`),
    in float32, whatever it is stored in.

    The libraries are given what was read and verified here, and look nowhere else.

    Args:
        folder: of an opened model `artifact.files.part("unet")`.
        options: more for `from_pretrained`, such as `attn_implementation`.

    Raises:
        ArtifactError: weights are missing, are no safetensors, are damaged, or are not exactly
            those of the folder's config.json, or that asks for code.
    """
    files = Files.of(folder)
    config = read_config(files)
    weights = weight_files(files)
    stored = weight_index(weights)
    dtypes(stored)
    options = {
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "local_files_only": True,
        "variant": variant_of(weights[0].name, stem(files.name)) or None,
        **options,
    }
    if _is_text(files.name):
        options = {"attn_implementation": "sdpa", **options}
    try:
        with _quiet():
            if _is_text(files.name):
                options["config"] = _text_config(config)
            _check_size(files, config, stored)
            network, info = _class(files.name, config).from_pretrained(files.folder, **options)
    except ArtifactError:
        raise
    except Exception as e:  # safetensors, diffusers and transformers each raise their own
        first = (str(e).splitlines() or [""])[0][:200]
        raise ArtifactError(
            f"{folder} cannot be loaded ({type(e).__name__}: {first}); fetch or save the model"
            " again."
        ) from e
    harmless = HARMLESS.get(folder.name, "(?!)")
    left = sorted(k for k in info["unexpected_keys"] if not re.fullmatch(harmless, k))
    missing = sorted(k for k in info["missing_keys"] if not re.fullmatch(harmless, k))
    if missing or left or info["mismatched_keys"]:
        raise ArtifactError(
            _misfit(
                weights, missing, left, _shapes(network, info["mismatched_keys"], stored), stored
            )
        )
    return network.float()


def text_states(network: Any, input_ids: Any, names: Sequence[str]) -> tuple[Any, ...]:
    """A text encoder's outputs by name: "last_hidden_state", "text_embeds", "hidden_states.0" (the
    embeddings) and so on.

    Args:
        input_ids: int64 (B, L).
    """
    inner = any(n.startswith("hidden_states.") for n in names)
    out = network(input_ids, output_hidden_states=True) if inner else network(input_ids)
    return tuple(
        out.hidden_states[int(n.split(".")[1])] if n.startswith("hidden_states.") else out[n]
        for n in names
    )


def latent_parameters(vae: Any, pixels: Any) -> Any:
    """Pixels (B, 3, H, W) in [-1, 1] -> what an autoencoder's encoder gives: mean and log variance
    (B, 2C, h, w), or the latents (B, C, h, w) of `AutoencoderTiny`.
    """
    out = vae.encoder(pixels)
    convolution = getattr(vae, "quant_conv", None)
    return out if convolution is None else convolution(out)


def control_residuals(network: Any, sample: Any, timestep: Any, states: Any, image: Any) -> Any:
    """What a ControlNet adds to a UNet: its feature maps on the way down, and the middle's.

    Args:
        sample, timestep, states: as the UNet has them. image: pixels (B, 3, H, W) in [0, 1].
    """
    down, middle = network(sample, timestep, states, image, return_dict=False)
    return (*down, middle)


def _class(part: str, config: Json) -> Any:
    if part == "vae":
        return vae_class(config)
    if part == "unet":
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel
    if part == "controlnet":
        from diffusers import ControlNetModel

        return ControlNetModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel


def _is_text(part: str) -> bool:
    return part.startswith("text_encoder")


def _text_config(config: Json) -> Any:
    """transformers' configuration, of the architecture's own keys alone: others tell it where to
    load from.
    """
    from transformers import CLIPTextConfig

    own = inspect.signature(CLIPTextConfig.__init__).parameters
    return CLIPTextConfig(**{k: v for k, v in config.items() if k in own})


# Keys that multiply what a network is made of.
_COUNTED = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
    "num_encoder_blocks",
    "num_decoder_blocks",
)


def _check_size(files: Files, config: Json, stored: dict[str, Stored]) -> None:
    """A configuration may ask for any memory; the weights say how much there is to it. Nothing is
    reserved here.

    Raises:
        ArtifactError: it asks for more layers than there are tensors, or for more than twice the
            numbers that they hold.
    """
    import torch

    path, layers = files.path("config.json"), math.prod(_most(config.get(k)) for k in _COUNTED)
    if layers > len(stored):
        raise ArtifactError(
            f"{path} asks for {layers} layers, its weights have {len(stored)} tensors; fetch or"
            " save the model again."
        )
    kind = _class(files.name, config)
    with torch.device("meta"):
        network = kind(_text_config(config)) if _is_text(files.name) else kind.from_config(config)
    asked = sum(p.numel() for p in network.parameters())
    held = sum(math.prod(s.shape) for s in stored.values())
    if asked > 2 * held + (1 << 20):  # some may be missing: that is said by name
        raise ArtifactError(
            f"{path} asks for {asked} numbers, its weights hold {held}; fetch or save the model"
            " again."
        )


def _most(value: object) -> int:
    """The largest of a count, or of counts in lists."""
    inner = [_most(v) for v in value] if isinstance(value, (list, tuple)) else []
    return max(inner, default=1) if not isinstance(value, int) else value


def _shapes(network: Any, mismatched: list[Any], stored: dict[str, Stored]) -> list[str]:
    """What is said of each tensor of another shape. transformers 4 gives names alone, the others
    (name, stored, wanted).
    """
    out = []
    for entry in mismatched:
        name = entry if isinstance(entry, str) else entry[0]
        has = stored[name].shape if isinstance(entry, str) else tuple(entry[1])
        out.append(f"{name}, {has} instead of {tuple(network.state_dict()[name].shape)}")
    return sorted(out)


def _misfit(
    files: list[Path],
    missing: list[str],
    left: list[str],
    other: list[str],
    stored: Collection[str],
) -> str:
    """What does not fit, in one line: how many tensors, the first of each kind, the cause where it
    is known.
    """
    said = []
    if missing:
        said.append(f"lacks {len(missing)} of the network's tensors (first: {missing[0]})")
    if left:
        said.append(f"holds {len(left)} that the network does not have (first: {left[0]})")
    if other:
        said.append(f"holds {len(other)} of another shape than config.json's (first: {other[0]})")
    file = files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    why = (
        cause(stored)
        or "weights and config.json do not belong together: fetch or save the model again"
    )
    return f"{files[0].parent}/{file} {' and '.join(said)}; {why}."


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries: what they would warn of is an error of ours, in one line."""
    import transformers

    loggers = [logging.getLogger(n) for n in ("diffusers", "transformers")]
    levels, bars = [x.level for x in loggers], transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    for x in loggers:
        x.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
