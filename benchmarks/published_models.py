"""Published Stable Diffusion folders in small: their configs, file layouts and flags, with narrow
random networks.

What is true to the published files: config keys and values, block lists, number of heads and
layers, tokenizer files with CLIP's whole vocabulary, scheduler configs, tensor names, dtypes and
extra buffers. What is not: widths (divided by 2 to 16), the norm groups of SD-2.x (8, so that its
heads divide the widths), and weights. SSD-1B's, Vega's and KOALA's depths are those of ComfyUI's
table of UNets (`comfy/supported_models_base`), which gives their published parameter counts.
Cross attention is made loud, so that another prompt is another picture. CLIP's merges are read from
the `open_clip_torch` wheel (installed without its dependencies; its code is not imported).

python -m benchmarks.published_models sd21 OUT
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP = "CrossAttnUpBlock2D", "UpBlock2D"

# --- configs, as published but for widths

UNET_SD1: dict[str, Any] = {
    "_diffusers_version": "0.6.0.dev0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [32, 64, 128, 128],
    "center_input_sample": False,
    "cross_attention_dim": 48,
    "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [UP, UP_CROSS, UP_CROSS, UP_CROSS],
}
UNET_SD2 = UNET_SD1 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [40, 80, 160, 160],
    "cross_attention_dim": 64,
    "dual_cross_attention": False,
    "norm_num_groups": 8,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
BK_SMALL = {
    "_diffusers_version": "0.15.0",
    "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
    "layers_per_block": 1,
    "mid_block_type": None,
    "up_block_types": [UP, UP_CROSS, UP_CROSS, UP_CROSS],
}
BK_BASE = BK_SMALL | {"mid_block_type": "UNetMidBlock2DCrossAttn"}
BK_TINY = BK_SMALL | {"down_block_types": [CROSS] * 3, "up_block_types": [UP_CROSS] * 3}
SDXS_UNET = {  # SDXS-512-DreamShaper: no attention in the outermost stage
    "block_out_channels": [32, 64, 128],
    "down_block_types": [PLAIN, CROSS, CROSS],
    "up_block_types": [UP_CROSS, UP_CROSS, UP],
}
VAE_SD1: dict[str, Any] = {
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TAESD: dict[str, Any] = {  # no block_out_channels: diffusers adds that key in memory
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "relu",
    "decoder_block_out_channels": [64] * 4,
    "encoder_block_out_channels": [64] * 4,
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}
TEXT_SD1: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 48,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
TEXT_SD2 = TEXT_SD1 | {
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
TEXT_SDXL = TEXT_SD1 | {"projection_dim": 768, "torch_dtype": "float16"}
TEXT_2_SDXL = TEXT_SD2 | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 80,
    "intermediate_size": 320,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 80,
}

BETAS = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
}
EULER: dict[str, Any] = BETAS | {
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd14": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.7.0.dev0",
        **BETAS,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "sd21": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        **BETAS,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sd21-base": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.10.0.dev0",
        **BETAS,
        "clip_sample": False,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sd-turbo": {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.24.0.dev0",
        **EULER,
        "timestep_spacing": "trailing",
    },
    "tiny-sd": {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "algorithm_type": "dpmsolver++",
        **BETAS,
        "clip_sample": False,
        "dynamic_thresholding_ratio": 0.995,
        "lambda_min_clipped": -float("inf"),
        "lower_order_final": True,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "solver_order": 2,
        "solver_type": "midpoint",
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "trained_betas": None,
        "use_karras_sigmas": False,
        "variance_type": None,
    },
    "small-sd": {
        "_class_name": "DEISMultistepScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "algorithm_type": "deis",
        **BETAS,
        "clip_sample": False,
        "dynamic_thresholding_ratio": 0.995,
        "lower_order_final": True,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "solver_order": 2,
        "solver_type": "logrho",
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
    "lcm": {
        "_class_name": "LCMScheduler",
        "_diffusers_version": "0.22.0.dev0",
        **BETAS,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
        "trained_betas": None,
    },
    "sdxl-turbo": {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "_diffusers_version": "0.24.0.dev0",
        **EULER,
        "timestep_spacing": "trailing",
    },
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        **EULER,
        "timestep_spacing": "leading",
    },
}


@dataclass(frozen=True)
class Published:
    """One published folder.

    Attributes:
        tokenizer: style of the tokenizer's files: "sd1", "sd2" (two files that disagree about the
            pad token) or "turbo".
        steps, guidance: what the model card calls it with (at most 4 steps here).
        position_ids: whether the text encoder's file still holds that int64 buffer.
        old_vae_names: whether the VAE's attention has the names of diffusers before 0.16 (query,
            key, value, proj_attn).
        pipeline: `_class_name` of model_index.json.
        text_2: config of SDXL's second text encoder.
    """

    unet: dict[str, Any]
    scheduler: str
    text: dict[str, Any] = field(default_factory=lambda: TEXT_SD1)
    vae: dict[str, Any] = field(default_factory=lambda: VAE_SD1)
    tokenizer: str = "sd1"
    steps: int = 4
    guidance: float = 7.5
    dtype: str = "float32"
    position_ids: bool = True
    old_vae_names: bool = True
    safety_checker: bool = True
    pipeline: str = "StableDiffusionPipeline"
    text_2: dict[str, Any] | None = None


V2 = {"text": TEXT_SD2, "tokenizer": "sd2", "safety_checker": False}
SDXL_UNET = UNET_SD2 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "block_out_channels": [40, 80, 160],
    "attention_head_dim": [5, 10, 20],
    "addition_embed_type_num_heads": 64,
    "class_embed_type": None,
    "cross_attention_dim": 128,
    "down_block_types": [PLAIN, CROSS, CROSS],
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 256 * 6 + 80,
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [UP_CROSS, UP_CROSS, UP],
    "upcast_attention": None,
}
XL: dict[str, Any] = {
    "text": TEXT_SDXL,
    "text_2": TEXT_2_SDXL,
    "vae": VAE_SD1
    | {
        "_diffusers_version": "0.20.0.dev0",
        "force_upcast": True,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
    },
    "position_ids": False,
    "old_vae_names": False,
    "safety_checker": False,
    "pipeline": "StableDiffusionXLPipeline",
}
# one down block less in each stage
KOALA = SDXL_UNET | {"layers_per_block": 1}
MODELS: dict[str, Published] = {
    "sd14": Published(UNET_SD1, "sd14"),
    "sd15-fp16": Published(UNET_SD1, "sd14", dtype="float16"),
    "sd21": Published(UNET_SD2, "sd21", **V2),
    "sd21-base": Published(
        UNET_SD2 | {"sample_size": 64, "upcast_attention": False}, "sd21-base", **V2
    ),
    "sd-turbo": Published(
        UNET_SD2 | {"sample_size": 64, "upcast_attention": None},
        "sd-turbo",
        text=TEXT_SD2,
        tokenizer="turbo",
        steps=1,
        guidance=0.0,
        position_ids=False,
        old_vae_names=False,
        safety_checker=False,
        vae=VAE_SD1 | {"scaling_factor": 0.18215, "sample_size": 768},
    ),
    "bk-sdm-base": Published(UNET_SD1 | BK_BASE, "sd14"),
    "bk-sdm-small": Published(UNET_SD1 | BK_SMALL, "sd14"),
    "bk-sdm-tiny": Published(UNET_SD1 | BK_TINY | {"block_out_channels": [32, 64, 128]}, "sd14"),
    "bk-sdm-v2-tiny": Published(
        UNET_SD2
        | BK_TINY
        | {"block_out_channels": [40, 80, 160], "attention_head_dim": [5, 10, 20]},
        "sd21",
        **V2,
    ),
    "tiny-sd": Published(
        UNET_SD1
        | {
            "block_out_channels": [32, 64, 128],
            "down_block_types": [CROSS] * 3,
            "layers_per_block": 1,
            "up_block_types": [UP_CROSS] * 3,
            "mid_block_type": None,
        },
        "tiny-sd",
        position_ids=False,
    ),
    "small-sd": Published(UNET_SD1 | BK_BASE, "small-sd", position_ids=False),
    "lcm-dreamshaper": Published(
        UNET_SD1 | {"time_cond_proj_dim": 256},
        "lcm",
        guidance=8.0,
        pipeline="LatentConsistencyModelPipeline",
    ),
    "sdxs-09": Published(
        UNET_SD2
        | BK_TINY
        | {
            "block_out_channels": [40, 80, 160],
            "attention_head_dim": [5, 10, 20],
            "sample_size": 64,
        },
        "sd-turbo",
        steps=1,
        guidance=0.0,
        vae=TAESD | {"block_out_channels": [64] * 4},
        old_vae_names=False,
        **V2,
    ),
    "sdxs-dreamshaper": Published(
        UNET_SD1 | BK_TINY | SDXS_UNET,
        "sd-turbo",
        steps=1,
        guidance=0.0,
        old_vae_names=False,
        vae=TAESD | {"block_out_channels": [64] * 4},
    ),
    "sd14-taesd": Published(UNET_SD1, "sd14", vae=TAESD, old_vae_names=False),
    "sdxl": Published(SDXL_UNET, "sdxl", guidance=5.0, **XL),
    "sdxl-turbo": Published(
        SDXL_UNET | {"sample_size": 64}, "sdxl-turbo", steps=1, guidance=0.0, **XL
    ),
    "sdxl-lightning": Published(SDXL_UNET, "sd-turbo", guidance=0.0, **XL),
    "ssd-1b": Published(
        SDXL_UNET
        | {
            "mid_block_type": "UNetMidBlock2D",
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "transformer_layers_per_block": [1, 2, 4],
        },
        "sdxl",
        guidance=9.0,
        **XL,
    ),
    "vega": Published(
        SDXL_UNET | {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]},
        "sdxl",
        guidance=9.0,
        **XL,
    ),
    "vega-fp16-vae": Published(  # with madebyollin/sdxl-vae-fp16-fix in place of its own VAE
        SDXL_UNET | {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]},
        "sdxl",
        guidance=9.0,
        **XL | {"vae": XL["vae"] | {"force_upcast": False, "sample_size": 512}},
    ),
    "koala-700m": Published(
        KOALA | {"mid_block_type": None, "transformer_layers_per_block": [1, 2, 5]},
        "sdxl",
        guidance=7.5,
        **XL,
    ),
    "koala-1b": Published(
        KOALA | {"transformer_layers_per_block": [1, 2, 6]}, "sdxl", guidance=7.5, **XL
    ),
    # other pipelines: refused in one line
    "sdxl-refiner": Published(
        SDXL_UNET
        | {
            "block_out_channels": [24, 48, 96, 96],
            "attention_head_dim": [6, 12, 24, 24],
            "down_block_types": [PLAIN, CROSS, CROSS, PLAIN],
            "up_block_types": [UP, UP_CROSS, UP_CROSS, UP],
            "cross_attention_dim": 80,
            "projection_class_embeddings_input_dim": 256 * 5 + 80,
            "transformer_layers_per_block": 4,
        },
        "sdxl",
        **XL | {"pipeline": "StableDiffusionXLImg2ImgPipeline"},
    ),
    "sd-inpainting": Published(
        UNET_SD1 | {"in_channels": 9}, "sd14", pipeline="StableDiffusionInpaintPipeline"
    ),
    "sdxl-inpainting": Published(
        SDXL_UNET | {"in_channels": 9},
        "sdxl",
        guidance=5.0,
        **XL | {"pipeline": "StableDiffusionXLInpaintPipeline"},
    ),
    "instruct-pix2pix": Published(
        UNET_SD1 | {"in_channels": 8}, "sd14", pipeline="StableDiffusionInstructPix2PixPipeline"
    ),
    "x4-upscaler": Published(
        UNET_SD2 | {"in_channels": 7, "num_class_embeds": 1000},
        "sd21",
        pipeline="StableDiffusionUpscalePipeline",
        **V2,
    ),
}

# --- tokenizer files


def merges_file() -> Path | None:
    """`bpe_simple_vocab_16e6.txt.gz` of the installed open_clip_torch, or None where it is not
    installed.
    """
    try:
        files = importlib.metadata.files("open_clip_torch") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next(
        (Path(str(f.locate())) for f in files if f.name == "bpe_simple_vocab_16e6.txt.gz"), None
    )


@functools.cache
def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's 49,408 tokens and 48,894 merges.

    Raises:
        FileNotFoundError: open_clip_torch is not installed.
    """
    path = merges_file()
    if path is None:
        raise FileNotFoundError(
            "CLIP's merges come with open_clip_torch: pip install --no-deps open_clip_torch"
        )
    merges = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(m.split()) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {t: i for i, t in enumerate(tokens)}, merges


def _token(content: str, normalized: bool) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
    }


def write_tokenizer(folder: Path, style: str) -> None:
    """vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, as SD-1.x, SD-2.x
    or SD-Turbo has them.
    """
    vocab, merges = clip_vocabulary()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
    )
    start, end, pad = "<|startoftext|>", "<|endoftext|>", "<|endoftext|>" if style == "sd1" else "!"
    config: dict[str, Any] = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    if style == "turbo":
        decoder = {
            "0": _token("!", False),
            "49406": _token(start, True),
            "49407": _token(end, True),
        }
        config |= {
            "added_tokens_decoder": {k: v | {"special": True} for k, v in decoder.items()},
            "bos_token": start,
            "clean_up_tokenization_spaces": True,
            "eos_token": end,
            "pad_token": "!",
            "unk_token": end,
        }
        del config["name_or_path"], config["special_tokens_map_file"]
    else:
        added = {
            k: {"__type": "AddedToken", **_token(v, True)}
            for k, v in (("bos", start), ("eos", end), ("unk", end))
        }
        config |= {f"{k}_token": v for k, v in added.items()} | {"pad_token": end}
    special = {
        "bos_token": _token(start, True),
        "eos_token": _token(end, True),
        "pad_token": pad,
        "unk_token": _token(end, True),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


# --- networks


def _save(folder: Path, name: str, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata={"format": "pt"}
    )


def _write_unet(model: Published, folder: Path, dtype: Any) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    config = {"_class_name": "UNet2DConditionModel", **model.unet}
    unet = UNet2DConditionModel.from_config(config)
    with torch.no_grad():  # the prompt must matter in a random network
        for name, p in unet.named_parameters():
            if "attn2" in name or name.startswith("conv_out"):
                p.mul_(3.0)
    _save(folder, "diffusion_pytorch_model.safetensors", config, unet.to(dtype).state_dict())


def _write_vae(model: Published, folder: Path, dtype: Any) -> None:
    import diffusers

    kind = "AutoencoderTiny" if "latent_magnitude" in model.vae else "AutoencoderKL"
    config = {"_class_name": kind, **model.vae}
    tensors = getattr(diffusers, kind).from_config(config).to(dtype).state_dict()
    if model.old_vae_names:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, name in old.items():
            tensors = {
                k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v
                for k, v in tensors.items()
            }
    _save(folder, "diffusion_pytorch_model.safetensors", config, tensors)


def _write_text_encoder(
    config: dict[str, Any], folder: Path, dtype: Any, position_ids: bool
) -> None:
    import torch
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    text = kind(
        transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k != "torch_dtype"})
    )
    tensors = text.to(dtype).state_dict()
    if not any(k.startswith("text_model.") for k in tensors):  # transformers 5 names them without
        tensors = {"text_model." + k: v for k, v in tensors.items()}
    tensors = {k: v for k, v in tensors.items() if not k.endswith("position_ids")}
    name = "text_model.embeddings.token_embedding.weight"
    tensors[name] = tensors[name] * 50
    if position_ids:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    _save(folder, "model.safetensors", config, tensors)


def _write_safety_checker(folder: Path, dtype: Any) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={"hidden_size": 32, "num_hidden_layers": 1},
        vision_config=vision,
        projection_dim=16,
    )
    StableDiffusionSafetyChecker(config).to(dtype).save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 224,
                "do_center_crop": True,
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "size": 224,
            }
        )
    )


def write(name: str, out: Path, seed: int = 0, dtype: str | None = None) -> Path:
    """The published folder `name`, a key of `MODELS`, at `out`, which must not exist.

    Args:
        dtype: of the weights, "float32" or "float16"; default: the model's own.
    """
    import torch

    model = MODELS[name]
    kind = getattr(torch, dtype or model.dtype)
    torch.manual_seed(seed)
    _write_unet(model, out / "unet", kind)
    _write_vae(model, out / "vae", kind)
    _write_text_encoder(model.text, out / "text_encoder", kind, model.position_ids)
    write_tokenizer(out / "tokenizer", model.tokenizer)
    scheduler = SCHEDULERS[model.scheduler]
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    index: dict[str, Any] = {
        "_class_name": model.pipeline,
        "_diffusers_version": "0.2.2",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [
            "diffusers",
            "AutoencoderTiny" if "latent_magnitude" in model.vae else "AutoencoderKL",
        ],
    }
    if model.safety_checker:
        _write_safety_checker(out, kind)
        index |= {
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        }
    elif model.text_2 is None:
        index |= {
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "requires_safety_checker": False,
        }
    if model.text_2 is not None:
        _write_text_encoder(model.text_2, out / "text_encoder_2", kind, False)
        write_tokenizer(out / "tokenizer_2", "turbo")
        index |= {
            "force_zeros_for_empty_prompt": True,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        if model.pipeline == "StableDiffusionXLImg2ImgPipeline":  # the refiner
            index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
            index["requires_aesthetics_score"] = True
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return out


# of a UNet's config, what its ControlNet's says too; the rest is diffusers' default, as published
_SHARED = (
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "in_channels",
    "layers_per_block",
    "norm_num_groups",
    "upcast_attention",
    "use_linear_projection",
)


def write_controlnet(pipeline: Path, out: Path, seed: int = 0, **changes: Any) -> Path:
    """A ControlNet in the new folder `out` for a folder's UNet, as sd-controlnet-canny is one for
    SD-1.5's: its blocks and widths, and a middle block even where the UNet has none. What begins at
    zero there is made loud.

    Args:
        changes: of its config.
    """
    import torch
    from diffusers import ControlNetModel

    unet = json.loads((pipeline / "unet" / "config.json").read_text())
    torch.manual_seed(seed)
    network = ControlNetModel(**{k: unet[k] for k in _SHARED if k in unet} | changes)
    for weights in network.parameters():
        if weights.dim() == 4 and not weights.any():
            torch.nn.init.normal_(weights, std=0.2)
    network.save_pretrained(out)
    return out


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("model", choices=list(MODELS))
    ap.add_argument("out", type=Path)
    args = ap.parse_args()
    print(write(args.model, args.out))


if __name__ == "__main__":
    main()
