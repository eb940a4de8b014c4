"""A model whose UNet is made for inpainting (nine channels) through conversion, backends, int8,
bench and export.
"""

from __future__ import annotations

import numpy as np
import pytest

import sdlite
from sdlite import image_input
from sdlite.errors import InputError

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("diffusers", reason="needs the torch extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
from sdlite.bench import Job, measure
from sdlite.quant import Calibration, Gate, quantize
from tests import folders

FAST = {"num_inference_steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("inpainting") / "model"
    folders.write(out, unet={"in_channels": 9})
    folders.configure(out / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    folders.configure(out / "unet" / "config.json", _diffusers_version="0.39.0")
    return out


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("inpainting") / "converted"
    sdlite.convert(folder, out)
    return out


def painted(model, backend, precision=None):
    image, mask = image_input.example(64, 64)
    with sdlite.Pipeline.from_pretrained(
        model, backend=backend, precision=precision, threads=1
    ) as pipe:
        call = {"image": image, "mask_image": mask, "output_type": "np", **FAST}
        return pipe("a fox", **call).images[0]


def closeness(a, b):
    return -10 * np.log10(np.square(a - b).mean())


def test_every_backend_paints_the_same(folder, converted):
    right = painted(folder, "torch")
    for backend in ("onnxruntime", "openvino"):
        pytest.importorskip(backend, reason=f"needs {backend}")
        assert closeness(painted(converted, backend), right) >= 60


def test_int8_is_calibrated_with_an_image_and_a_mask(converted, tmp_path):
    seen = Calibration(prompts=["a fox", "a house"], samples=2, num_inference_steps=2)
    loose = Gate(prompts=["a cat"], num_inference_steps=2, psnr_mean=25, psnr_worst=20, ssim_mean=0)
    loose.engines = ["onnxruntime"]
    quantize(converted, "int8-static", out=tmp_path / "q", calibration=seen, gate=loose)
    got = painted(tmp_path / "q", "onnxruntime", "int8-static")
    assert 25 <= closeness(got, painted(converted, "onnxruntime")) < 90


def test_bench_gives_it_what_it_needs(converted):
    row = measure(Job(str(converted), "fp32", "onnxruntime", steps=1, least=1))
    assert row["size"] == [64, 64]


def test_exports_and_distilling_refuse_it(folder, converted, tmp_path):
    from sdlite.distill.teacher import Teacher

    with pytest.raises(InputError, match=r"is an inpainting model.*ORTStableDiffusionInpaint"):
        sdlite.export(converted, tmp_path / "out", target="web")
    with pytest.raises(InputError, match=r"teacher .* is an inpainting model.* distilling"):
        Teacher(folder)
    assert not (tmp_path / "out").exists()


def test_the_example_is_an_image_and_a_half_of_it():
    image, mask = image_input.example(48, 64)
    assert image.size == mask.size == (64, 48)
    assert np.asarray(mask).mean() == 127.5
    array = np.asarray(image)
    assert array.min() < 5
    assert array.max() > 250
