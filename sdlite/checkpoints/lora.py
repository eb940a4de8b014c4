"""LoRAs -> the weights of UNet and text encoders, by peft: what is made has no LoRA left in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlite import arguments, headers
from sdlite.checkpoints.few_step import LORAS, FewStep, by_name
from sdlite.errors import ArtifactError, InputError, need, printable

_OLD = re.compile(r"\.to_(q|k|v|out)_lora\.(down|up)")
_KINDS = {
    "dora_scale": "a DoRA",
    "lora_magnitude": "a DoRA",
    "hada": "a LoHa",
    "lokr": "a LoKr",
    "oft_": "an OFT",
    "glora": "a GLoRA",
}


@dataclass(frozen=True)
class Lora:
    """A file, and how strongly it counts: 1 is as it was trained."""

    path: Path
    weight: float = 1.0

    @classmethod
    def given(cls, value: object) -> Lora:
        """ "style.safetensors", "style.safetensors:0.8" or ("style.safetensors", 0.8).

        Raises:
            InputError: something else, or a weight that is no finite number.
        """
        if isinstance(value, tuple | list) and len(value) == 2:
            path, weight = value
        else:
            path, weight = arguments.path("lora", value), 1.0
            found = re.fullmatch(r"(.+\.\w+):([^:/\\]*)", str(path))
            if found:
                path, weight = found[1], _number(found[2])
        return cls(Path(arguments.path("lora", path)), arguments.number("lora weight", weight))

    @property
    def few_step(self) -> FewStep | None:
        """What its file's or folder's name says it is made for."""
        return by_name(self.path, LORAS)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"lora weight={text!r}; accepted: a number after the last colon, FILE:0.8."
        ) from None


@dataclass(frozen=True)
class Read:
    """A LoRA that was read: "unet.<module>.lora_A.weight" and the like -> tensor; "unet.<module>
    .alpha" -> alpha; or peft's configuration out of its metadata.
    """

    lora: Lora
    tensors: dict[str, Tensor]
    alphas: dict[str, float] | None
    metadata: dict[str, Any] | None

    def of(self, part: str) -> Read:
        """What is for one network."""
        own = {k: v for k, v in self.tensors.items() if k.startswith(f"{part}.")}
        return dataclasses.replace(self, tensors=own)


def read(lora: Lora, unet: Mapping[str, Any], parts: Sequence[str]) -> Read:
    """The LoRA of a file.

    Args:
        unet: the model's unet/config.json: files in the names of the original layout are read by
            its layers.
        parts: the model's networks.

    Raises:
        MissingExtraError: peft is not installed.
        InputError, ArtifactError: not a LoRA in a layout that diffusers reads, or one that has
            layers of networks that the model lacks.
    """
    need("fusing a LoRA", "lora", "peft")
    path = lora.path
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"lora={str(path)!r}; accepted: a .safetensors file, FILE or FILE:WEIGHT.")
    _refuse_others(path)
    from diffusers import StableDiffusionPipeline
    from diffusers.configuration_utils import FrozenDict

    try:
        tensors, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            unet_config=FrozenDict({"layers_per_block": 2, **unet}),
            local_files_only=True,
            use_safetensors=True,
            return_lora_metadata=True,
        )
    except (ValueError, KeyError, RuntimeError) as e:
        raise ArtifactError(
            f"{path} is not a LoRA in a layout that diffusers reads ({printable(e, 300)})."
        ) from e
    out = Read(lora, _as_peft(tensors), alphas or None, metadata or None)
    _refuse_other_networks(path, out.tensors, parts)
    return out


def fuse(part: str, network: nn.Module, reads: Sequence[Read], skip_missing: bool) -> list[str]:
    """Add LoRAs to the weights of one network, in place.

    Args:
        part: "unet", "text_encoder", "text_encoder_2".
        skip_missing: leave out layers that the network does not have (BK-SDM and SSD-1B have fewer
            blocks than the model that most LoRAs were trained on) instead of refusing the file.

    Returns:
        What was left out, a line for each file.

    Raises:
        ArtifactError: one of another base, or one with layers that are not there.
    """
    notes = []
    for one in reads:
        own = one.of(part)
        tensors, note = _fitting(one.lora.path, part, network, own.tensors, skip_missing)
        notes += [note] if note else []
        if tensors:
            _add(part, network, dataclasses.replace(own, tensors=tensors))
    return notes


def _refuse_others(path: Path) -> None:
    names = headers.read(path)
    if kind := next((w for mark, w in _KINDS.items() if any(mark in n for n in names)), None):
        raise ArtifactError(
            f"{path} is {kind}, which is no LoRA of two matrices; accepted: LoRA and LoCon in the"
            " layouts of kohya, diffusers and peft."
        )
    if not any("lora" in n for n in names):
        raise ArtifactError(
            f"{path} holds no LoRA: no tensor's name has 'lora' in it; accepted: LoRA and LoCon in"
            " the layouts of kohya, diffusers and peft."
        )


def _refuse_other_networks(path: Path, tensors: Iterable[str], parts: Sequence[str]) -> None:
    """Raises ArtifactError where a LoRA has layers of a network that the model does not have."""
    asked = {k.split(".lora_")[0] for k in tensors}
    other = sorted(n for n in asked if n.split(".")[0] not in parts or n.startswith("vae."))
    if not other:
        return
    second = all(n.startswith("text_encoder_2.") for n in other)
    whose = "a second text encoder, as SDXL has" if second else "no network of this model"
    raise ArtifactError(
        f"{path} is a LoRA of another base: {len(other)} of its {len(asked)} layers are of {whose}"
        f" ({', '.join(other[:3])}). Take a LoRA of this model."
    )


def _as_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of every age of diffusers -> peft's: `<module>.lora_A.weight`, `.lora_B.weight`."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    unet = {k: v for k, v in tensors.items() if k.startswith("unet.")}
    text = {k: v for k, v in tensors.items() if k.startswith(("text_encoder.", "text_encoder_2."))}
    other = {k: v for k, v in tensors.items() if k not in unet and k not in text}
    if unet and not any(".lora_A." in k for k in unet):
        unet = convert_unet_state_dict_to_peft(unet)
    if text and not any(".lora_A." in k for k in text):
        # diffusers' kohya reader names a text encoder's attention as it did before 0.18
        text = {_OLD.sub(r".\1_proj.lora_linear_layer.\2", k): v for k, v in text.items()}
        text = convert_state_dict_to_peft(text)
    return {**unet, **text, **other}


def _fitting(
    path: Path, part: str, network: nn.Module, tensors: dict[str, Tensor], skip_missing: bool
) -> tuple[dict[str, Tensor], str]:
    """What of a LoRA has a layer in `network`, and what is said of the rest."""
    # transformers 5.6 and later has CLIPTextModel without this level, diffusers knows
    inner = "text_model." if part != "unet" and not hasattr(network, "text_model") else ""
    modules = {f"{part}.{inner}{name}": module for name, module in network.named_modules()}
    asked = {k.split(".lora_")[0] for k in tensors}
    missing = sorted(asked - set(modules))
    counted = f"{len(missing)} of its {len(asked)} layers of the {part.replace('_', ' ')}"
    which = f"{counted} are not in this model ({', '.join(missing[:3])})"
    odd = [w for n in sorted(asked & set(modules)) if (w := _misfit(path, n, modules[n], tensors))]
    if odd:
        more = f"; {which}" if missing else ""
        raise ArtifactError(
            f"{path} is a LoRA of another base: {len(odd)} of its {len(asked)} layers of the"
            f" {part.replace('_', ' ')} have another size; its {odd[0]}{more}. Take a LoRA of this"
            " model."
        )
    if not missing:
        return tensors, ""
    if len(missing) == len(asked) and not skip_missing:
        raise ArtifactError(
            f"{path} is a LoRA of another base: none of its {len(asked)} layers of the"
            f" {part.replace('_', ' ')} is in this model ({', '.join(missing[:3])}). Take a LoRA of"
            " this model."
        )
    if not skip_missing:
        raise ArtifactError(
            f"{path}: {which}: it was trained on a model with other blocks. Leave them out with"
            " lora_skip_missing=True (--lora-skip-missing), or take a LoRA of this model."
        )
    left = {k: v for k, v in tensors.items() if k.split(".lora_")[0] in modules}
    return left, f"{path.name}: {which}; left out"


def _misfit(path: Path, name: str, module: Any, tensors: dict[str, Tensor]) -> str:
    """What a LoRA's matrices make of a layer, where they are not its size; "" where they are."""
    down, up = (tensors.get(f"{name}.lora_{m}.weight") for m in "AB")
    if down is None or up is None:
        raise ArtifactError(f"{path} has only one of the two matrices of {name}; fetch it again.")
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim < 2:
        return f"{name} is a matrix, this model's is none"
    has, made = tuple(weight.shape[:2]), (up.shape[0], down.shape[1])
    if has == made and down.shape[0] == up.shape[1]:
        return ""
    return f"{name} is {made[0]} x {made[1]}, this model's is {has[0]} x {has[1]}"


def _add(part: str, network: Any, read: Read) -> None:
    """peft's layers around the network's, their deltas merged, and the layers taken out again."""
    from diffusers import StableDiffusionPipeline
    from peft.tuners.lora import LoraLayer

    pipe: Any = StableDiffusionPipeline
    given: dict[str, Any] = {"adapter_name": "sdlite", "metadata": read.metadata}
    if part == "unet":
        pipe.load_lora_into_unet(read.tensors, read.alphas, network, **given)
    else:
        pipe.load_lora_into_text_encoder(read.tensors, read.alphas, network, prefix=part, **given)
    with torch.no_grad():
        for name, module in list(network.named_modules()):
            if isinstance(module, LoraLayer):
                layer: Any = module
                layer.set_scale("sdlite", read.lora.weight)
                layer.merge(adapter_names=["sdlite"])
                parent, _, last = name.rpartition(".")
                setattr(network.get_submodule(parent), last, layer.get_base_layer())
    del network.peft_config
    network._hf_peft_config_loaded = False  # what is saved is a network of its own
