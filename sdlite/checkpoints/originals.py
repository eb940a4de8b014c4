"""Configurations as the models were published: what a file in the original layout does not say.

Widths, blocks and depths are not here: `unet_shape` and `layouts` read them from the file.

Sources: stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1 (-base) and
stabilityai/stable-diffusion-xl-base-1.0 on the hub.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]  # content of a config.json
UNET_1: Config = {"_class_name": "UNet2DConditionModel", "attention_head_dim": 8, "sample_size": 64}
UNET_2: Config = UNET_1 | {
    "attention_head_dim": [5, 10, 20, 20],
    "sample_size": 96,
    "upcast_attention": True,  # its attention overflows in float16
}
BASE_2: Config = {"sample_size": 64, "upcast_attention": False}  # 2.1-base's UNet differs
UNET_XL: Config = UNET_1 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "sample_size": 128,
    "upcast_attention": None,
}
VAE: Config = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_XL: Config = VAE | {
    "force_upcast": True,  # its decoder overflows in float16
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TEXT_1: Config = {
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
TEXT_2: Config = TEXT_1 | {"hidden_act": "gelu", "num_attention_heads": 16, "projection_dim": 512}
TEXT_XL_2: Config = TEXT_1 | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_BETAS: Config = {
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
PNDM: Config = {"_class_name": "PNDMScheduler", **_BETAS}
EULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    **_BETAS,
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
