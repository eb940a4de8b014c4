"""A model whose UNet is made for inpainting (nine channels) through conversion, backends, int8,
bench and export.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

import sdlite
from sdlite import image_input
from sdlite.errors import ExportError, InputError
from sdlite.metrics import psnr

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("diffusers", reason="needs the torch extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
from sdlite.bench import Job, measure
from sdlite.exporters.export import PROMPTS
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


@pytest.mark.parametrize(
    ("target", "bar"), [("onnx", 90), ("openvino", 60), ("mnn", 40), ("ncnn", 40)]
)
def test_an_export_is_checked_by_repainting(converted, tmp_path, target, bar):
    if target in ("mnn", "ncnn"):
        pytest.importorskip(target.upper() if target == "mnn" else target, reason="needs it")
    out = tmp_path / "out"
    report = sdlite.export(
        converted, out, target=target, prompts=["a fox"], num_inference_steps=2, threads=1
    )
    assert report["parity"]["psnr"][0] >= bar
    assert not report["parity"]["edit"]
    assert not report["not_run"]
    assert any(9 in t["shape"] for t in report["networks"]["unet"]["inputs"])
    if target == "onnx":
        right = painted(converted, "onnxruntime")
        assert closeness(painted(out, "onnxruntime"), right) >= 90


def test_the_check_sees_an_export_without_the_image(converted, tmp_path, monkeypatch):
    """A network that the export's runtime gives no image of what stays fails."""
    from sdlite.exporters.targets.onnx import Onnx

    run = Onnx.run

    def blind(self, part, files, threads):
        network = run(self, part, files, threads)
        if part != "unet":
            return network

        def without(**inputs):
            sample = inputs["sample"].copy()
            sample[:, 5:] = 0
            return network(**{**inputs, "sample": sample})

        return without

    monkeypatch.setattr(Onnx, "run", blind)
    with pytest.raises(ExportError, match="unet SQNR"):
        sdlite.export(converted, tmp_path / "out", target="onnx", threads=1)


def test_the_readmes_code_repaints_as_sdlite_does(converted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    sdlite.export(converted, out, target="onnx", num_inference_steps=1, threads=1)
    text = (out / "README.md").read_text()
    assert "## Edit an image" not in text
    assert "of `photo.png` and `mask.png`" in text
    image, mask = image_input.example(64, 64)
    image.save(out / "photo.png")
    mask.save(out / "mask.png")
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.S))
    monkeypatch.chdir(out)
    exec(compile(code, str(out), "exec"), {"__name__": "__main__"})
    with sdlite.Pipeline.from_pretrained(out, threads=1) as pipe:
        right = pipe(PROMPTS[0], image=image, mask_image=mask, seed=0).images[0]
    got = np.asarray(Image.open("image.png"))
    assert psnr(got, np.asarray(right)) > 80
    kept = np.asarray(mask) < 128
    assert (got[kept] == np.asarray(image)[kept]).all()


def test_integer_ranges_for_an_npu_are_those_of_repainting(converted, tmp_path):
    """A call has to have an image and a mask; its images are edits already."""
    from sdlite.exporters.rewrites import a16w8
    from sdlite.exporters.rewrites.fixed_shapes import fix
    from sdlite.onnx_graph import Graph

    with sdlite.Pipeline.from_pretrained(converted, backend="onnxruntime", threads=1) as pipe:
        side, words = pipe.unet_config["sample_size"], pipe.tokenizer.max_length
        text = (1, words, pipe.unet_config["cross_attention_dim"])
        sample = (1, 9, side, side)
        shapes = {
            "text_encoder": {"input_ids": (1, words)},
            "unet": {"sample": sample, "timestep": (), "encoder_hidden_states": text},
            "vae_decoder": {"latent_sample": (1, pipe.channels, side, side)},
            "vae_encoder": {"sample": (1, 3, side * pipe.stride, side * pipe.stride)},
        }
        own = {p: Graph.load(pipe.artifact.graph("fp32", p)) for p in shapes}
        fixed = {p: Graph.load(fix(g, shapes[p], tmp_path / f"{p}.onnx")) for p, g in own.items()}
        layers = {p: {"first": g.layers()[0]} for p, g in fixed.items()}
        call = {"num_inference_steps": 2, "sampler": pipe.artifact.sampler_name}
        ranges = a16w8.observe(fixed, layers, pipe, ["a house"], tmp_path, 1, **call)
    assert all(low < 0 < high for found in ranges.values() for low, high in found.values())


def test_the_page_and_distilling_refuse_it(folder, converted, tmp_path):
    from sdlite.distill.teacher import Teacher

    with pytest.raises(InputError, match=r"web runs .* UNet reads an image and a mask"):
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
