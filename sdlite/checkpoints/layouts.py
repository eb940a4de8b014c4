"""Which model one file of weights is: read from its header, before any weights.

A file in the original layout (CompVis' `ldm`, Stability's `sgm`) has no configuration. Its names
tell the family, its shapes the widths; what neither tells (heads, norms, sampler) is as the models
were published.

Sources: diffusers 0.39 `loaders/single_file_utils.py`; the configs of
stable-diffusion-v1-5/stable-diffusion-v1-5 and stabilityai/stable-diffusion-2-1 (-base).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlite.errors import ArtifactError, InputError

Shapes = Mapping[str, tuple[int, ...]]  # tensor name -> shape
Config = dict[str, Any]  # content of a config.json
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
PREDICTIONS = ("epsilon", "v_prediction")
# Names that only files of other kinds have -> what the file is, and what to do with it.
OTHERS = (
    (("lora_unet_", "lora_te", ".lora_", ".lora."), "a LoRA: give it as lora="),
    (("emb_params", "string_to_param"), "a textual inversion: give it as embedding="),
    (("control_model.", "controlnet_cond_embedding."), "a ControlNet, which sdlite does not run"),
    (("conditioner.embedders.",), "SDXL's layout, which sdlite does not read from one file yet"),
    (("joint_blocks.",), "Stable Diffusion 3's, which is not a family that sdlite knows"),
    (("double_blocks.", "transformer.single_"), "FLUX's, which is not a family that sdlite knows"),
    (("down_blocks.",), "one network of a diffusers folder: give the folder"),
)
_CROSS, _UP_CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_UNET_1: Config = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "down_block_types": [_CROSS, _CROSS, _CROSS, "DownBlock2D"],
    "layers_per_block": 2,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", _UP_CROSS, _UP_CROSS, _UP_CROSS],
}
_UNET_2 = _UNET_1 | {
    "attention_head_dim": [5, 10, 20, 20],
    "sample_size": 96,
    "upcast_attention": True,  # its attention overflows in float16
    "use_linear_projection": True,
}
_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_TEXT_1: Config = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_TEXT_2 = _TEXT_1 | {"hidden_act": "gelu", "num_attention_heads": 16, "projection_dim": 512}
_SCHEDULER: Config = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Layout:
    """A recognized file.

    Attributes:
        version: 1 or 2, of Stable Diffusion.
        prediction_type: "epsilon" or "v_prediction", what the UNet was trained to give.
        has_vae: whether the file holds the autoencoder.
    """

    version: int
    prediction_type: str
    has_vae: bool
    unet: Config
    vae: Config
    text_encoder: Config

    @property
    def name(self) -> str:
        """What errors and reports call it."""
        return f"Stable Diffusion {self.version}.x"

    @property
    def scheduler(self) -> Config:
        """What 1.5 and 2.1 were published with."""
        return _SCHEDULER | {"prediction_type": self.prediction_type}

    @property
    def index(self) -> Config:
        """Content of model_index.json."""
        return {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", self.scheduler["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }

    def config(self, part: str) -> Config:
        """Content of a network's config.json."""
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}[part]

    def write(self, folder: Path) -> None:
        """A diffusers folder without weights: configs, scheduler, tokenizer."""
        files = {"model_index.json": self.index, "scheduler/scheduler_config.json": self.scheduler}
        files |= {f"{p}/config.json": self.config(p) for p in ("text_encoder", "unet", "vae")}
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(folder / "tokenizer", "!" if self.version == 2 else "<|endoftext|>")


def recognized(path: Path, shapes: Shapes, prediction_type: str | None = None) -> Layout:
    """The layout of a file of weights.

    Args:
        path: what errors call it.
        prediction_type: of a 2.x model; None takes what 2.1 at 768 px has, "v_prediction", as
            diffusers does: names and shapes do not tell it from 2.1-base. 1.x is "epsilon" unless
            it is given.

    Raises:
        ArtifactError: another kind of file, or one that holds not all of a model.
        InputError: no such prediction type.
    """
    if prediction_type not in (None, *PREDICTIONS):
        accepted = " or ".join(PREDICTIONS)
        raise InputError(f"prediction_type={prediction_type!r} is not known; accepted: {accepted}.")
    _refuse_others(path, shapes)
    version = 2 if any(k.startswith(OPEN_CLIP) for k in shapes) else 1
    if version == 1 and not any(k.startswith(CLIP) for k in shapes):
        raise ArtifactError(
            f"{path} holds a UNet and no text encoder, so it is not a whole model; give a file with"
            " all parts, or put the UNet into a diffusers folder."
        )
    try:
        unet = (_UNET_2 if version == 2 else _UNET_1) | _unet_widths(shapes)
        text = (_TEXT_2 | _open_clip_widths(shapes)) if version == 2 else _clip(shapes)
        has_vae = f"{VAE}decoder.conv_in.weight" in shapes
        vae = _VAE | (
            _vae_widths(shapes, VAE) if has_vae else {"block_out_channels": [128, 256, 512, 512]}
        )
    except KeyError as e:
        raise ArtifactError(
            f"{path} is a Stable Diffusion checkpoint without the tensor {e.args[0]}; fetch the"
            " file again, from a source that has all of it."
        ) from None
    given = prediction_type or ("v_prediction" if version == 2 else "epsilon")
    if given == "epsilon" and version == 2:
        unet |= {"sample_size": 64, "upcast_attention": False}  # 2.1-base
    return Layout(version, given, has_vae, unet, vae, text)


def _refuse_others(path: Path, shapes: Shapes) -> None:
    """Raises ArtifactError where the names are not those of Stable Diffusion's original layout."""
    if any(k.startswith(UNET) for k in shapes) and not any(
        k.startswith("conditioner.") or ".joint_blocks." in k or ".double_blocks." in k
        for k in shapes
    ):
        return
    if f"{VAE}decoder.conv_in.weight" in shapes or "decoder.conv_in.weight" in shapes:
        what = "an autoencoder alone: give it as vae="
    else:
        what = next(
            (w for marks, w in OTHERS if any(m in k for k in shapes for m in marks)),
            "of no layout that sdlite knows",
        )
    raise ArtifactError(
        f"{path} is not a Stable Diffusion 1.x or 2.x checkpoint in the original layout; it is"
        f" {what}. Accepted: one file with the UNet under {UNET}, or a diffusers folder."
    )


def _unet_widths(shapes: Shapes) -> Config:
    blocks = [f"{UNET}input_blocks.{i}.0.out_layers.3.weight" for i in (1, 4, 7, 10)]
    return {
        "block_out_channels": [shapes[b][0] for b in blocks],
        "cross_attention_dim": shapes[
            f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        ][1],
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
    }


def _vae_widths(shapes: Shapes, prefix: str) -> Config:
    blocks = [f"{prefix}encoder.down.{i}.block.0.conv1.weight" for i in range(4)]
    return {"block_out_channels": [shapes[b][0] for b in blocks]}


def vae_config(path: Path, shapes: Shapes) -> Config:
    """The configuration of an autoencoder in a file of its own, with or without LDM's prefix.

    Raises:
        ArtifactError: it is none.
    """
    prefix = VAE if any(k.startswith(VAE) for k in shapes) else ""
    try:
        return _VAE | _vae_widths(shapes, prefix)
    except KeyError as e:
        raise ArtifactError(
            f"{path} is no autoencoder in the original layout (it has no {e.args[0]}); accepted as"
            " vae: such a file, or the vae/ folder of a diffusers pipeline."
        ) from None


def _clip(shapes: Shapes) -> Config:
    layers = {k.split(".")[5] for k in shapes if k.startswith(f"{CLIP}encoder.layers.")}
    first = f"{CLIP}encoder.layers.0.mlp.fc1.weight"
    return _TEXT_1 | {
        "hidden_size": shapes[first][1],
        "intermediate_size": shapes[first][0],
        "num_hidden_layers": len(layers),
        "vocab_size": shapes[f"{CLIP}embeddings.token_embedding.weight"][0],
    }


def _open_clip_widths(shapes: Shapes) -> Config:
    """SD 2.x reads the last layer but one: where the file has all 24, the last is not used."""
    blocks = {
        int(k.split(".")[4]) for k in shapes if k.startswith(f"{OPEN_CLIP}transformer.resblocks.")
    }
    first = f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight"
    return {
        "hidden_size": shapes[first][1],
        "intermediate_size": shapes[first][0],
        "num_hidden_layers": min(23, len(blocks)),
        "vocab_size": shapes[f"{OPEN_CLIP}token_embedding.weight"][0],
    }


def write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's tokenizer: its 49,408 tokens follow from its 48,894 merges (MIT, OpenAI)."""
    packed = Path(__file__).with_name("clip-merges.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    tokens = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {t: i for i, t in enumerate([*tokens, start, end])}
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    config = special | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("vocab.json", vocabulary),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(text, encoding="utf-8")
