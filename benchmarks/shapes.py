"""Stable Diffusion folders of real shape and random weights: for speed, memory and plumbing, not
for pictures.

python -m benchmarks.shapes bk-tiny OUT        # 323M UNet; the others: see SHAPES
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CROSS, PLAIN, UP_CROSS, UP = (
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
)


@dataclass(frozen=True)
class Shape:
    """`preset`: of sdlite.distill.students, None is the teacher itself. `mini`: two small stages
    instead of SD-1.4's, for tests of the plumbing.
    """

    preset: str | None = None
    tiny_vae: bool = False  # AutoencoderTiny (TAESD's shape) instead of SD's autoencoder
    mini: bool = False


SHAPES: dict[str, Shape] = {
    "sd14": Shape(),  # 860M
    "w0.62": Shape("w0.62"),  # 340M
    "extreme-120m": Shape("extreme-120m", tiny_vae=True),  # 123M
    "bk-base": Shape("bk-base"),
    "bk-small": Shape("bk-small"),
    "bk-tiny": Shape("bk-tiny"),  # 323M
    "mini": Shape(mini=True),
    "mini-tiny-vae": Shape(mini=True, tiny_vae=True),
}


def build_unet(shape: str) -> Any:
    from diffusers import UNet2DConditionModel

    from sdlite.distill.students import PRESETS, build

    if SHAPES[shape].mini:
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            down_block_types=(CROSS, PLAIN),
            up_block_types=(UP, UP_CROSS),
        )
    teacher = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=(CROSS, CROSS, CROSS, PLAIN),
        up_block_types=(UP, UP_CROSS, UP_CROSS, UP_CROSS),
    )
    preset = SHAPES[shape].preset
    return teacher if preset is None else build(teacher, PRESETS[preset])


def build_vae(shape: str) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    mini = SHAPES[shape].mini
    if SHAPES[shape].tiny_vae:
        width, blocks = ((8,) * 4, (1, 1, 1, 1)) if mini else ((64,) * 4, (3, 3, 3, 1))
        return AutoencoderTiny(
            encoder_block_out_channels=width,
            decoder_block_out_channels=width,
            num_decoder_blocks=blocks,
            num_encoder_blocks=(1, *blocks[:3]),
        )
    width = (16, 16, 32, 32) if mini else (128, 256, 512, 512)
    return AutoencoderKL(
        block_out_channels=width,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if mini else 2,
        latent_channels=4,
        sample_size=64 if mini else 512,
        scaling_factor=0.18215,
        norm_num_groups=16 if mini else 32,
    )


def build_text_encoder(shape: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    width, layers, heads = (32, 2, 2) if SHAPES[shape].mini else (768, 12, 12)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49_408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
            bos_token_id=49_406,
            eos_token_id=49_407,
            pad_token_id=1,
        )
    )


def write_tokenizer(folder: Path) -> None:
    """CLIP's size and file format (49,408 tokens) with an invented vocabulary."""
    letters = [
        chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))
    ]
    tokens = [*letters, *(c + "</w>" for c in letters)]
    tokens += [f"<unused{i}>" for i in range(49_406 - len(tokens))] + [
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {f"{k}_token": "<|endoftext|>" for k in ("eos", "unk", "pad")} | {
        "bos_token": "<|startoftext|>"
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    )


def write_sd_folder(shape: str, out: Path, seed: int = 0) -> Path:
    """A diffusers StableDiffusionPipeline folder with SD-1.4's configs, random float32 weights and
    the PNDM scheduler.
    """
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    write_tokenizer(out / "tokenizer")
    text, vae = build_text_encoder(shape), build_vae(shape)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
        unet=build_unet(shape),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out, safe_serialization=True)
    # SD-1.4's own has a key that PNDM does not know and other samplers read
    config = out / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "clip_sample": False}, indent=2) + "\n"
    )
    return out


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("shape", choices=list(SHAPES))
    ap.add_argument("out", type=Path)
    args = ap.parse_args()
    print(write_sd_folder(args.shape, args.out))


if __name__ == "__main__":
    main()
