"""Stable Diffusion folders of real shape and random weights: for speed, memory and plumbing, not for pictures.

python -m benchmarks.shapes bk-tiny OUT        # 323M UNet; also sd14 (860M), bk-base, bk-small
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CROSS, PLAIN, UP_CROSS, UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
SHAPES = ("sd14", "bk-base", "bk-small", "bk-tiny")


def build_unet(shape: str) -> Any:
    from diffusers import UNet2DConditionModel

    from sdlite.distill.students import PRESETS, build

    teacher = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768, attention_head_dim=8,
        down_block_types=(CROSS, CROSS, CROSS, PLAIN), up_block_types=(UP, UP_CROSS, UP_CROSS, UP_CROSS),
    )  # fmt: skip
    return teacher if shape == "sd14" else build(teacher, PRESETS[shape])


def write_tokenizer(folder: Path) -> None:
    """CLIP's size and file format (49,408 tokens) with an invented vocabulary."""
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = [*letters, *(c + "</w>" for c in letters)]
    tokens += [f"<unused{i}>" for i in range(49_406 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {f"{k}_token": "<|endoftext|>" for k in ("eos", "unk", "pad")} | {"bos_token": "<|startoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}))


def write_sd_folder(shape: str, out: Path, seed: int = 0) -> Path:
    """A diffusers StableDiffusionPipeline folder with SD-1.4's configs, random float32 weights and the PNDM scheduler."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    write_tokenizer(out / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49_408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2, latent_channels=4, sample_size=512, scaling_factor=0.18215,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
    )
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"), unet=build_unet(shape), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(out, safe_serialization=True)
    return out


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    ap.add_argument("shape", choices=SHAPES)
    ap.add_argument("out", type=Path)
    args = ap.parse_args()
    print(write_sd_folder(args.shape, args.out))


if __name__ == "__main__":
    main()
