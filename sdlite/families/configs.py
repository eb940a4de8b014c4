"""What the configurations of a pipeline's networks may say, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from sdlite.schema import (
    BOOL,
    Config,
    Json,
    Rule,
    each,
    either,
    number,
    optional,
    record,
    text,
    whole,
)

T = TypeVar("T")

# What values may be that sdlite, torch or diffusers reserve memory for or count to: several times
# those of any published model (SD-2.1: 1280 channels, 24 heads of text; latents of 128 are 1024
# px).
_CHANNELS, _LAYERS, _BLOCKS = whole(1, 16384), whole(1, 256), 16
_SIDE = either(
    "a whole number, 1 to 2048, or [height, width]", whole(1, 2048), each(whole(1, 2048), 2, 2)
)


def _by_block(inner: Rule, most: int) -> Rule:
    """One for all blocks, or a list of one for each, or of one for each layer in it."""
    words = f"a whole number, 1 to {most}, or a list of them for up to {_BLOCKS} blocks"
    return either(words, inner, each(either("", inner, each(inner, 1, _BLOCKS)), 1, _BLOCKS))


_BY_BLOCK, _LAYERS_BY_BLOCK = _by_block(_CHANNELS, 16384), _by_block(_LAYERS, 256)
_SHARED: dict[str, Rule] = {
    "in_channels": whole(1, 1024),
    "out_channels": whole(1, 1024),
    "down_block_types": each(text(), 1, _BLOCKS),
    "up_block_types": each(text(), 1, _BLOCKS),
    "layers_per_block": _LAYERS_BY_BLOCK,
    "norm_num_groups": optional(whole(1, 1024)),
    "norm_eps": number(0, 1),
}
SCHEMAS: dict[str, dict[str, Rule]] = {
    "unet": {
        **_SHARED,
        "sample_size": _SIDE,
        "block_out_channels": each(_CHANNELS, 1, _BLOCKS),
        "cross_attention_dim": optional(_BY_BLOCK),
        "attention_head_dim": optional(_BY_BLOCK),
        "num_attention_heads": optional(_BY_BLOCK),
        "transformer_layers_per_block": optional(_LAYERS_BY_BLOCK),
        "reverse_transformer_layers_per_block": optional(_LAYERS_BY_BLOCK),
        "time_embedding_dim": optional(_CHANNELS),
        "time_cond_proj_dim": optional(whole(4, 16384)),
        "conv_in_kernel": whole(1, 31),
        "conv_out_kernel": whole(1, 31),
    },
    "controlnet": {
        **_SHARED,
        "block_out_channels": each(_CHANNELS, 1, _BLOCKS),
        "conditioning_channels": whole(1, 1024),
        "conditioning_embedding_out_channels": optional(each(_CHANNELS, 1, 8)),
        "cross_attention_dim": optional(_BY_BLOCK),
        "attention_head_dim": optional(_BY_BLOCK),
        "num_attention_heads": optional(_BY_BLOCK),
        "transformer_layers_per_block": optional(_LAYERS_BY_BLOCK),
    },
    "vae": {
        **_SHARED,
        "sample_size": optional(whole(1, 16384)),
        "block_out_channels": each(_CHANNELS, 1, 8),  # each but one halves the size
        "encoder_block_out_channels": each(_CHANNELS, 1, 8),
        "decoder_block_out_channels": each(_CHANNELS, 1, 8),
        "num_encoder_blocks": each(_LAYERS, 1, 8),
        "num_decoder_blocks": each(_LAYERS, 1, 8),
        "latent_channels": whole(1, 1024),
        "scaling_factor": number(1e-4, 1e4),  # published: 0.13025 to 1.5305
        "shift_factor": optional(number(-1e4, 1e4)),
    },
    "text_encoder": {
        "vocab_size": whole(1, 1 << 20),
        "max_position_embeddings": whole(3, 4096),  # start, a token, end; CLIP has 77
        "hidden_size": _CHANNELS,
        "intermediate_size": whole(1, 65536),
        "projection_dim": _CHANNELS,
        "num_hidden_layers": _LAYERS,
        "_sdlite_clip_skip": whole(0, 255),
        "num_attention_heads": whole(1, 1024),
        "layer_norm_eps": number(0, 1),
        "hidden_act": text(),
        "tie_word_embeddings": BOOL,
    },
}


def check_config(part: str, path: Path, config: Config) -> None:
    """Look at the values of a network's config.json before anything uses them.

    Raises:
        ArtifactError: one is not what it may be.
    """
    record(SCHEMAS.get(part, {}))(path, "", config)


def vae_config(config: Config) -> Json:
    """vae/config.json with the keys that diffusers adds in memory and other readers miss.

    SD-1.4's has no `scaling_factor` (optimum takes 8 then), TAESD's no `block_out_channels`: its
    decoder's count.
    """
    tiny = config.get("_class_name") == "AutoencoderTiny"
    blocks = (
        config.get("decoder_block_out_channels", [64] * 4)
        if tiny
        else config.get("block_out_channels", [64])
    )
    return {"scaling_factor": 1.0 if tiny else 0.18215, **config, "block_out_channels": blocks}


@dataclass(frozen=True)
class LatentScale:
    """Between latents of unit variance, which the U-Net sees, and those of the autoencoder. Numbers
    work on arrays of numpy and of torch.
    """

    factor: float
    shift: float = 0.0

    @classmethod
    def of(cls, config: Config) -> LatentScale:
        """`config`: content of vae/config.json."""
        known = vae_config(config)
        return cls(known["scaling_factor"], known.get("shift_factor") or 0.0)

    def to_decoder(self, latents: T) -> T:
        """Latents (B, C, h, w) of the U-Net -> what the decoder takes: z / factor + shift."""
        return cast(T, cast(Any, latents) / self.factor + self.shift)

    def from_encoder(self, latents: T) -> T:
        """Latents (B, C, h, w) of the encoder -> those of the U-Net: (z - shift) * factor."""
        return cast(T, (cast(Any, latents) - self.shift) * self.factor)


def latent_channels(vae: Mapping[str, Any]) -> int:
    """Channels of the latents. `vae`: content of vae/config.json."""
    channels: int = vae.get("latent_channels", 4)  # diffusers' own default
    return channels


def inpaints(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    """Whether a UNet is made for inpainting: beside the latents it takes a mask and the latents of
    the image without what the mask covers. The arguments are contents of the two config.json.
    """
    return bool(unet.get("in_channels", 4) == 2 * latent_channels(vae) + 1)


def vae_stride(config: Config) -> int:
    """Pixels per latent: each block of a VAE but one halves the size. `config`: content of
    vae/config.json.
    """
    return int(2 ** (len(vae_config(config)["block_out_channels"]) - 1))
