"""A tiny real Stable Diffusion folder, written by diffusers' and transformers' own classes, and
ways to damage its weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import EMOJI

CROSS, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": (CROSS, "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", UP),
    "mid_block_type": None,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
VAE: dict[str, Any] = {
    "block_out_channels": (4, 4, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 4,
    "sample_size": 64,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


def write(
    out: Path, *, unet: dict[str, Any] | None = None, dtype: str = "float32", seed: int = 0
) -> Path:
    """The folder at `out`; `unet`: config keys that differ."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    own = json.loads((EMOJI / "text_encoder" / "config.json").read_text())
    text = CLIPTextConfig(**TEXT, **{k: own[k] for k in ("vocab_size", "max_position_embeddings")})
    networks = {
        "text_encoder": CLIPTextModel(text),
        "unet": UNet2DConditionModel(**{**UNET, **(unet or {})}),
        "vae": AutoencoderKL(**VAE),
    }
    for name, network in networks.items():
        network.to(getattr(torch, dtype)).save_pretrained(out / name)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(EMOJI / name, out / name)
    shutil.copy(EMOJI / "model_index.json", out / "model_index.json")
    return out


def change(folder: Path, part: str, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a network's file anew with what `edit` makes of its tensors."""
    from safetensors.torch import load_file, save_file

    file = folder / part / WEIGHTS[part]
    save_file(
        {k: v.contiguous() for k, v in edit(load_file(file)).items()},
        file,
        metadata={"format": "pt"},
    )


def configure(path: Path, **keys: Any) -> None:
    """Set keys of a JSON file; `...` removes one."""
    data = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def relist(folder: Path) -> None:
    """Have the manifest vouch for the files as they are, as someone does who changes a model on
    purpose.
    """
    path = folder / "sdlite.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        raw = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    path.write_text(json.dumps(manifest))
