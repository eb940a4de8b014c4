"""A diffusers folder of Stable Diffusion 1.x, 2.x or XL -> one file in the original key layout.

The other direction is what sdlite does; tests make their files with this. The names are those of
CompVis' `ldm` (openaimodel.UNetModel, diffusionmodules.model) and of open_clip's text transformer;
SDXL's are those of Stability's `sgm`, which puts both text encoders under `conditioner.embedders`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Container
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Tensors = dict[str, Tensor]
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

_PLACE = re.compile(
    r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)"
)


def _weights(folder: Path) -> Tensors:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def unet_name(key: str, layers: int = 2, plain: Container[int] = (0,)) -> str:
    """diffusers' name of a UNet's tensor -> LDM's. `layers`: of a block on the way down; `plain`:
    blocks on the way up that have no attention.
    """
    if outer := next((k for k in _OUTER if key.startswith(f"{k}.")), None):
        return key.replace(outer, _OUTER[outer], 1)
    found = _PLACE.fullmatch(key)
    assert found is not None, key
    side, block, kind, index, rest = found.groups()
    i, j, step = int(block or 0), int(index), layers + 1
    if kind == "resnets":
        name, tail = rest.split(".", 1)
        rest = f"{_RESNET[name]}.{tail}"
    if side == "mid":
        return f"middle_block.{2 * j if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{step * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{step * i + layers}.{1 if i in plain else 2}.{rest}"
    place = (
        f"input_blocks.{step * i + j + 1}" if side == "down" else f"output_blocks.{step * i + j}"
    )
    return f"{place}.{0 if kind == 'resnets' else 1}.{rest}"


def unet(folder: Path) -> Tensors:
    """A UNet's tensors under the names of its file."""
    config = json.loads((folder / "config.json").read_text())
    plain = [i for i, kind in enumerate(config["up_block_types"]) if kind == "UpBlock2D"]
    names = functools.partial(unet_name, layers=config["layers_per_block"], plain=plain)
    return {f"model.diffusion_model.{names(k)}": v for k, v in _weights(folder).items()}


def vae_name(key: str) -> str:
    """diffusers' name of a VAE's tensor -> LDM's; attention by its names before diffusers 0.16."""
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", key
    )
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
    inner = {"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
    inner |= {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for name, short in inner.items():
        key = key.replace(f"mid_block.attentions.0.{name}.", f"mid.attn_1.{short}.")
    return key


def open_clip(text: Tensors) -> Tensors:
    """CLIPTextModel's tensors of SD 2.x, or of SDXL's second encoder, as open_clip's: q, k and v in
    one, the projection transposed.
    """
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    inner |= {"mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    out = {}
    for key, value in text.items():
        if key in names:
            out[names[key]] = value
        elif key == "text_projection.weight":
            out["text_projection"] = value.T
        elif found := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key):
            layer, what, kind = found.groups()
            place = f"transformer.resblocks.{layer}"
            if what in inner:
                out[f"{place}.{inner[what]}.{kind}"] = value
            elif what == "self_attn.q_proj":
                three = [text[key.replace("q_proj", f"{p}_proj")] for p in "qkv"]
                out[f"{place}.attn.in_proj_{kind}"] = torch.cat(three)
    return out


def checkpoint(folder: Path, *, vae: bool = True) -> Tensors:
    """The tensors of one file, as people share it."""
    out = unet(folder / "unet")
    text = _weights(folder / "text_encoder")
    if (folder / "text_encoder_2").exists():
        out |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in text.items()}
        second = open_clip(_weights(folder / "text_encoder_2"))
        out |= {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
        out["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    elif "text_model.encoder.layers.22.layer_norm1.weight" in text:
        out |= {f"cond_stage_model.model.{k}": v for k, v in open_clip(text).items()}
    else:
        out |= {f"cond_stage_model.transformer.{k}": v for k, v in text.items()}
    for key, value in _weights(folder / "vae").items() if vae else ():
        name = vae_name(key)
        as_conv = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) and value.ndim == 2
        out[f"first_stage_model.{name}"] = value[:, :, None, None] if as_conv else value
    return {k: v.contiguous() for k, v in out.items()}
