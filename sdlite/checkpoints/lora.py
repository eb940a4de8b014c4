"""LoRAs -> the weights of UNet and text encoder, by peft: what is made has no LoRA left in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlite import arguments, headers
from sdlite.errors import ArtifactError, InputError, need, printable

# Few-step LoRAs by the names that they are shared under -> what their model cards call them with:
# latent-consistency/lcm-lora-*, ByteDance/Hyper-SD, h1t/TCD-*-LoRA.
FEW_STEP: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"lcm[-_]?lora", {"name": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}),
    (r"tcd", {"name": "tcd", "num_inference_steps": 4, "guidance_scale": 1.0}),
    (r"hyper-?sd.*1[-_]?step", {"name": "tcd", "num_inference_steps": 1, "guidance_scale": 1.0}),
    (r"hyper-?sd.*2[-_]?steps", {"name": "tcd", "num_inference_steps": 2, "guidance_scale": 1.0}),
    (r"hyper-?sd.*4[-_]?steps", {"name": "tcd", "num_inference_steps": 4, "guidance_scale": 1.0}),
    (r"hyper-?sd.*8[-_]?steps", {"name": "tcd", "num_inference_steps": 8, "guidance_scale": 1.0}),
)
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
    def sampler(self) -> dict[str, Any] | None:
        """{name, num_inference_steps, guidance_scale} that its file's or folder's name says it is
        made for; None where it says nothing.
        """
        name = f"{self.path.parent.name}/{self.path.name}".lower()
        return next((dict(s) for pattern, s in FEW_STEP if re.search(pattern, name)), None)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"lora weight={text!r}; accepted: a number after the last colon, FILE:0.8."
        ) from None


@dataclass(frozen=True)
class _Read:
    """A file's content: "unet.<module>.lora_A.weight" and the like -> tensor; "unet.<module>.alpha"
    -> alpha; or peft's configuration out of its metadata.
    """

    path: Path
    tensors: dict[str, Tensor]
    alphas: dict[str, float] | None
    metadata: dict[str, Any] | None


def fuse(
    networks: dict[str, nn.Module], loras: Sequence[Lora], skip_missing: bool = False
) -> list[str]:
    """Add LoRAs to the weights of `networks` ("unet", "text_encoder"), in place.

    Args:
        skip_missing: leave out layers that the networks do not have (BK-SDM has fewer blocks than
            the model that most LoRAs were trained on) instead of refusing the file.

    Returns:
        What was left out, a line for each file.

    Raises:
        MissingExtraError: peft is not installed.
        ArtifactError: not a LoRA, one of another base, or one with layers that are not there.
    """
    need("fusing a LoRA", "lora", "peft")
    notes = []
    for lora in loras:
        read = _read(lora.path, networks["unet"])
        for part, network in networks.items():
            own = {k: v for k, v in read.tensors.items() if k.startswith(f"{part}.")}
            own, note = _fitting(read.path, part, network, own, skip_missing)
            notes += [note] if note else []
            if own:
                _add(part, network, dataclasses.replace(read, tensors=own), lora.weight)
    return notes


def _read(path: Path, unet: Any) -> _Read:
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"lora={str(path)!r}; accepted: a .safetensors file, FILE or FILE:WEIGHT.")
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
    from diffusers import StableDiffusionPipeline

    try:
        tensors, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            unet_config=unet.config,
            local_files_only=True,
            use_safetensors=True,
            return_lora_metadata=True,
        )
    except (ValueError, KeyError, RuntimeError) as e:
        raise ArtifactError(
            f"{path} is not a LoRA in a layout that diffusers reads ({printable(e, 300)})."
        ) from e
    return _Read(path, _as_peft(tensors), alphas or None, metadata or None)


def _as_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of every age of diffusers -> peft's: `<module>.lora_A.weight`, `.lora_B.weight`."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    unet = {k: v for k, v in tensors.items() if k.startswith("unet.")}
    text = {k: v for k, v in tensors.items() if k.startswith("text_encoder.")}
    if unet and not any(".lora_A." in k for k in unet):
        unet = convert_unet_state_dict_to_peft(unet)
    if text and not any(".lora_A." in k for k in text):
        # diffusers' kohya reader names a text encoder's attention as it did before 0.18
        text = {_OLD.sub(r".\1_proj.lora_linear_layer.\2", k): v for k, v in text.items()}
        text = convert_state_dict_to_peft(text)
    return {**unet, **text}


def _fitting(
    path: Path, part: str, network: nn.Module, tensors: dict[str, Tensor], skip_missing: bool
) -> tuple[dict[str, Tensor], str]:
    """What of a LoRA has a layer in `network`, and what is said of the rest."""
    modules = {f"{part}.{name}": module for name, module in network.named_modules()}
    asked = {k.split(".lora_")[0] for k in tensors}
    for name in sorted(asked & set(modules)):
        _same_size(path, name, modules[name], tensors)
    missing = sorted(asked - set(modules))
    if not missing:
        return tensors, ""
    counted = f"{len(missing)} of its {len(asked)} layers of the {part.replace('_', ' ')}"
    which = f"{counted} are not in this model ({', '.join(missing[:3])})"
    if not skip_missing:
        raise ArtifactError(
            f"{path}: {which}: it was trained on a model with other blocks. Leave them out with"
            " lora_skip_missing=True (--lora-skip-missing), or take a LoRA of this model."
        )
    left = {k: v for k, v in tensors.items() if k.split(".lora_")[0] in modules}
    return left, f"{path.name}: {which}; left out"


def _same_size(path: Path, name: str, module: Any, tensors: dict[str, Tensor]) -> None:
    """Raises ArtifactError where a LoRA's matrices do not fit the layer."""
    down, up = (tensors.get(f"{name}.lora_{m}.weight") for m in "AB")
    if down is None or up is None:
        raise ArtifactError(f"{path} has only one of the two matrices of {name}; fetch it again.")
    has = tuple(module.weight.shape[:2])
    made = (up.shape[0], down.shape[1])
    if has != made or down.shape[0] != up.shape[1]:
        raise ArtifactError(
            f"{path} is a LoRA of another base: its {name} is {made[0]} x {made[1]}, this model's"
            f" is {has[0]} x {has[1]}."
        )


def _add(part: str, network: Any, read: _Read, weight: float) -> None:
    """peft's layers around the network's, their deltas merged, and the layers taken out again."""
    from diffusers import StableDiffusionPipeline
    from peft.tuners.lora import LoraLayer

    pipe: Any = StableDiffusionPipeline
    load = pipe.load_lora_into_unet if part == "unet" else pipe.load_lora_into_text_encoder
    load(read.tensors, read.alphas, network, adapter_name="sdlite", metadata=read.metadata)
    with torch.no_grad():
        for name, module in list(network.named_modules()):
            if isinstance(module, LoraLayer):
                layer: Any = module
                layer.set_scale("sdlite", weight)
                layer.merge(adapter_names=["sdlite"])
                parent, _, last = name.rpartition(".")
                setattr(network.get_submodule(parent), last, layer.get_base_layer())
    del network.peft_config
    network._hf_peft_config_loaded = False  # what is saved is a network of its own
