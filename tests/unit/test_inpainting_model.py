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


def test_optimum_opens_the_graphs_and_paints_the_same(converted):
    import torch

    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the bench extra")
    pipe = optimum.ORTStableDiffusionInpaintPipeline.from_pretrained(converted)
    pipe.set_progress_bar_config(disable=True)
    image, mask = image_input.example(64, 64)
    call = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    call |= {"guidance_scale": 7.5, "strength": 1.0, "generator": torch.Generator().manual_seed(0)}
    right = pipe("a fox", image=image, mask_image=mask, **call).images[0]
    half = np.asarray(mask) > 0
    assert closeness(painted(converted, "onnxruntime")[half], right[half]) >= 60


def test_what_a_call_needs_is_said_before_it(converted, capsys):
    from sdlite.cli import main

    assert main(["info", str(converted)]) == 0
    assert "calls: made for inpainting: a call has image and mask_image" in capsys.readouterr().out


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
