"""A diffusers folder of Stable Diffusion 1.x or 2.x -> one checkpoint in the original key layout.

The other direction is what sdlite does; tests make their files with this. The names are those of
CompVis' `ldm` (openaimodel.UNetModel, diffusionmodules.model) and of open_clip's text transformer.
"""

from __future__ import annotations

import re
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


def unet_name(key: str) -> str:
    """diffusers' name of a UNet's tensor -> LDM's."""
    if outer := next((k for k in _OUTER if key.startswith(f"{k}.")), None):
        return key.replace(outer, _OUTER[outer], 1)
    found = _PLACE.fullmatch(key)
    assert found is not None, key
    side, block, kind, index, rest = found.groups()
    i, j = int(block or 0), int(index)
    if kind == "resnets":
        name, tail = rest.split(".", 1)
        rest = f"{_RESNET[name]}.{tail}"
    if side == "mid":
        return f"middle_block.{2 * j if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.{rest}"
    place = f"input_blocks.{3 * i + j + 1}" if side == "down" else f"output_blocks.{3 * i + j}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{rest}"


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
    """CLIPTextModel's tensors of SD 2.x as open_clip's, q, k and v in one."""
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
    out = {f"model.diffusion_model.{unet_name(k)}": v for k, v in _weights(folder / "unet").items()}
    text = _weights(folder / "text_encoder")
    if "text_model.encoder.layers.22.layer_norm1.weight" in text:
        out |= {f"cond_stage_model.model.{k}": v for k, v in open_clip(text).items()}
    else:
        out |= {f"cond_stage_model.transformer.{k}": v for k, v in text.items()}
    for key, value in _weights(folder / "vae").items() if vae else ():
        name = vae_name(key)
        as_conv = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) and value.ndim == 2
        out[f"first_stage_model.{name}"] = value[:, :, None, None] if as_conv else value
    return {k: v.contiguous() for k, v in out.items()}
