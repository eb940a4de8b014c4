"""Published folders (their configs and layouts, narrow random networks): the images that diffusers
makes of them, or one line.
"""

from __future__ import annotations

import pytest

from sdlite.errors import SdliteError

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("diffusers", reason="needs the torch extra")
from benchmarks import published, published_models
from benchmarks.published import PROMPTS, Run, diffusers_images, psnr, sdlite_images

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::sdlite.errors.SdliteWarning"
    ),  # 128 px of models that were made for 512
    pytest.mark.parity,
    pytest.mark.skipif(
        published_models.merges_file() is None,
        reason="CLIP's merges: pip install --no-deps open_clip_torch",
    ),
]
REFUSED = {  # model -> what the line must name
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline",
    "x4-upscaler": "StableDiffusionUpscalePipeline",
}
RUN = [m for m in published_models.MODELS if m not in REFUSED]
# bk-sdm-base: its blocks are small-sd's; of SDXL's class, base and the two outermost shapes
TWICE = (
    *("bk-sdm-base", "sdxl-inpainting", "sdxl-turbo", "sdxl-lightning"),
    *("vega", "vega-fp16-vae", "koala-1b"),
)
CONVERTED = ("bk-sdm-v2-tiny",)  # all traits of SD-2.x in few layers; the others with -m slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Writes each folder once."""
    root = tmp_path_factory.mktemp("published")

    def folder(name):
        out = root / name
        return out if out.exists() else published_models.write(name, out)

    return folder


@pytest.fixture(scope="module")
def wanted(folders):
    """diffusers' images of each folder, made once."""
    made = {}

    def images(name):
        if name not in made:
            made[name] = diffusers_images(folders(name), name, PROMPTS[:2])
        return made[name]

    return images


def closeness(folders, wanted, name, backend):
    got = sdlite_images(folders(name), name, PROMPTS[:2], Run(backend, "fp32"))
    return [psnr(a, b) for a, b in zip(got, wanted(name), strict=True)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in TWICE else []) for n in RUN]
)
def test_torch_makes_the_images_of_diffusers(folders, wanted, name):
    assert min(closeness(folders, wanted, name, "torch")) >= 60


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in CONVERTED else pytest.mark.slow) for n in RUN]
)
def test_converted_it_makes_the_images_of_diffusers(
    folders, wanted, name, tmp_path_factory, monkeypatch
):
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    pytest.importorskip("openvino", reason="needs the openvino extra")
    monkeypatch.setenv("SDLITE_CACHE", str(tmp_path_factory.getbasetemp() / "published-cache"))
    for backend in ("onnxruntime", "openvino"):
        assert min(closeness(folders, wanted, name, backend)) >= 60, backend


OPTIONS = {  # calls of SDXL's pipeline besides the plain one
    "sizes": {
        "original_size": (256, 192),
        "crops_coords_top_left": (8, 16),
        "target_size": (120, 96),
    },
    "negative sizes": {
        "negative_original_size": (64, 64),
        "negative_crops_coords_top_left": (4, 0),
        "negative_target_size": (96, 96),
    },
    "second prompts": {"prompt_2": "a blue door", "negative_prompt_2": "fog"},
    "an empty negative prompt, which is not none": {"negative_prompt": ""},
    "a negative prompt": {"negative_prompt": "blurred, dark"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_sdxl_is_told_besides_the_prompt(folders, options):
    """Each changes the image, as in diffusers."""
    import numpy as np
    import torch
    from diffusers import StableDiffusionXLPipeline

    import sdlite

    folder, call = folders("vega"), {"height": 64, "width": 64, "num_inference_steps": 2}
    call |= {"guidance_scale": 5.0, "output_type": "np"}
    theirs = StableDiffusionXLPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    if "negative_prompt_2" in options:
        options = options | {"negative_prompt": "dark"}
    with sdlite.Pipeline.from_pretrained(folder, backend="torch", threads=1) as ours:
        plain, got = (ours("a fox", seed=3, **call, **more).images[0] for more in ({}, options))
    draws = torch.Generator().manual_seed(3)
    right = theirs("a fox", generator=draws, **call, **options).images[0]
    assert 10 * np.log10(1 / np.square(right.astype(float) - got).mean()) >= 60
    assert np.abs(got - plain).max() > 0.02


def test_another_prompt_is_another_image(wanted):
    """Or else the other tests would pass with any text encoder."""
    assert psnr(*wanted("sd21")) < 20


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_run_is_refused_in_one_line(folders, name, backend):
    pytest.importorskip(backend, reason=f"needs {backend}")
    with pytest.raises(SdliteError) as said:
        published.sdlite_images(folders(name), name, PROMPTS[:1], Run(backend, "fp32"))
    assert REFUSED[name] in str(said.value)
    assert "\n" not in str(said.value)
