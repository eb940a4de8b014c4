"""ControlNets: what fits, what is refused, and what a control image may be."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

import sdlite
from sdlite import families
from sdlite.controlling import ControlImage
from sdlite.editing import Edit
from sdlite.errors import ArtifactError, InputError, SdliteError, ShapeError
from sdlite.families.controlled import misfit, residuals
from tests import folders

SD = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}
VAE = {"block_out_channels": [128, 256, 512, 512]}
IMAGE = Image.fromarray(np.arange(96 * 64 * 3, dtype=np.uint8).reshape(64, 96, 3))


def test_feature_maps_of_published_unets_are_those_of_diffusers():
    unet = residuals({**SD, "layers_per_block": 2})
    widths = [int(s[1]) for s in unet]
    assert widths == [320] * 4 + [640] * 3 + [1280] * 5
    assert [s[2] for s in unet] == ["h"] * 3 + ["h/2"] * 3 + ["h/4"] * 3 + ["h/8"] * 3
    assert len(residuals({**SD, "layers_per_block": 1})) == 8
    assert len(residuals({**SD, "layers_per_block": [1, 2, 2, 1]})) == 10


MISFITS = [
    ({"layers_per_block": 1}, {}, "its UNet has 8 feature maps on its way down (4 blocks,"),
    (
        {"block_out_channels": [320, 640, 1280], "layers_per_block": 1},
        {},
        "has 6 feature maps on its way down (3 blocks, layers_per_block=1), its ControlNet gives"
        " 12 (4 blocks, layers_per_block=2)",
    ),
    ({"block_out_channels": [160, 320, 640, 640]}, {}, "feature map 0 of its UNet's way down has"),
    ({"cross_attention_dim": 1024}, {}, "its UNet reads text of width 1024, its ControlNet 768"),
    ({}, {"global_pool_conditions": True}, "means of its feature maps"),
    ({}, {"conditioning_channels": 1}, "control images of 1 channels instead of 3"),
    ({}, {"in_channels": 8}, "its ControlNet takes 8 channels, the latents have 4"),
    ({}, {"addition_embed_type": "text_time"}, "its ControlNet wants further embeddings"),
    ({}, {"conditioning_embedding_out_channels": [16, 32]}, "scales images down 2 times"),
]


@pytest.mark.parametrize(("unet", "hint", "said"), MISFITS)
def test_a_controlnet_of_another_base_is_refused_with_counts(unet, hint, said):
    assert misfit(SD, SD, VAE) == ""
    assert said in misfit({**SD, **unet}, {**SD, **hint}, VAE)


def test_controlnets_of_sdxl_are_one_line():
    parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
    index = {p: ["x", "y"] for p in (*parts, "controlnet")}
    said = families.refusal("m", {**index, "_class_name": "Some"}, lambda part: {})
    assert "its ControlNet is SDXL's, and only those of Stable Diffusion 1.x and 2.x run" in said


@pytest.fixture
def canny(plain, tmp_path):
    pytest.importorskip("diffusers", reason="needs the torch extra")
    from benchmarks import published_models

    return published_models.write_controlnet(plain, tmp_path / "canny")


def test_convert_refuses_what_is_no_fitting_controlnet(plain, canny, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"no config.json; give a ControlNet's folder"):
        sdlite.convert(plain, out, controlnet=tmp_path)
    config = json.loads((canny / "config.json").read_text())
    folders.configure(canny / "config.json", layers_per_block=2)
    with pytest.raises(ArtifactError, match=r"has 6 feature maps .* its ControlNet gives 9"):
        sdlite.convert(plain, out, controlnet=canny)
    folders.configure(canny / "config.json", **config)
    folders.configure(canny / "config.json", _class_name="MultiControlNetModel")
    with pytest.raises(ArtifactError, match=r"its controlnet is of class MultiControlNetModel"):
        sdlite.convert(plain, out, controlnet=canny)
    assert not out.exists()


def test_a_folder_with_a_controlnet_is_saved_whole_and_teaches_no_student(plain, canny, tmp_path):
    pytest.importorskip("accelerate", reason="needs the distill extra")
    from sdlite.checkpoints import controlnet
    from sdlite.distill.teacher import Teacher

    both = controlnet.added(plain, canny, tmp_path / "both", None)
    with sdlite.Pipeline.from_pretrained(both, backend="torch", threads=1) as pipe:
        pipe.save_pretrained(tmp_path / "saved")
    weights = "controlnet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "saved" / weights).read_bytes() == (both / weights).read_bytes()
    assert not (tmp_path / "saved" / weights).is_symlink()
    with pytest.raises(InputError, match=r"has a ControlNet, .* fits no student that is cut from"):
        Teacher(tmp_path / "saved")


BAD = [
    ({"controlnet_conditioning_scale": 1.0}, InputError, "is given without control_image"),
    ({"control_image": IMAGE, "guess_mode": 1}, InputError, "guess_mode=1; accepted: true or"),
    ({"control_image": IMAGE, "controlnet_conditioning_scale": -1}, InputError, "at least 0"),
    ({"control_image": IMAGE, "control_guidance_end": 1.5}, InputError, "0 to 1"),
    (
        {"control_image": IMAGE, "control_guidance_start": 0.5, "control_guidance_end": 0.5},
        InputError,
        "control_guidance_start=0.5 is not before control_guidance_end=0.5",
    ),
    ({"control_image": [IMAGE] * 3}, InputError, "3 control_images for 2 images"),
    ({"control_image": np.full((8, 8, 3), np.nan)}, InputError, "holds NaN"),
]


@pytest.mark.parametrize(("given", "kind", "said"), BAD)
def test_bad_control_images_are_one_line(given, kind, said):
    with pytest.raises(kind, match=re.escape(said)) as e:
        ControlImage.of(given, None, 2)
    assert "\n" not in str(e.value)


def test_models_without_a_controlnet_say_how_to_get_one(emoji):
    with pytest.raises(SdliteError, match=r"no ControlNet: convert it .* --controlnet FOLDER"):
        emoji("an apple", control_image=IMAGE)


def test_a_control_image_is_scaled_and_goes_with_the_edited_one():
    hint = ControlImage.of({"control_image": IMAGE}, None, 1)
    assert hint.own_size(32) == (64, 96)
    alone = hint.fitted(32, 32, None).images[0]
    assert alone.tobytes() == IMAGE.resize((32, 32), Image.Resampling.LANCZOS).tobytes()
    edit = Edit.of(IMAGE, None, 0.5, None, 1).fitted(32, 32)
    assert hint.fitted(32, 32, edit).images[0].tobytes() == edit.images[0].tobytes()
    assert hint.fitted(32, 32, edit).images[0].tobytes() != alone.tobytes()
    mask = np.zeros((64, 96), np.uint8)
    mask[8:20, 40:60] = 255
    part = Edit.of(IMAGE, Image.fromarray(mask), 0.5, 4, 1).fitted(32, 32)
    assert hint.fitted(32, 32, part).images[0].tobytes() == part.images[0].tobytes()
    small = ControlImage.of({"control_image": IMAGE.resize((48, 32))}, None, 1)
    with pytest.raises(ShapeError, match=r"control_image is 48x32 pixels, image 96x64"):
        small.fitted(32, 32, part)
    pixels = hint.pixels
    assert pixels.shape == (1, 3, 64, 96)
    assert (pixels.min(), pixels.max()) == (0, 1)
