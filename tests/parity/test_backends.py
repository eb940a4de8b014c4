"""The same prompt and latents through every backend, diffusers and optimum: the same picture."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

import sdlite
from sdlite.sampling import Noise
from tests.conftest import EMOJI
from tests.helpers import psnr

torch = pytest.importorskip("torch", reason="needs the torch extra")
diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")
pytestmark = pytest.mark.parity

PROMPTS = ["red apple on a blue background", "pizza", "dog face"]
CALL = {"num_inference_steps": 8, "guidance_scale": 3.0}
LATENTS = np.stack([Noise(s).normal((8, 8, 8)) for s in range(3)])


def pixels(images):
    return np.stack([np.asarray(i) for i in images])


@pytest.fixture(scope="module")
def want(emoji):
    return pixels(emoji(PROMPTS, latents=LATENTS, **CALL).images)


@pytest.fixture(scope="module")
def torch_pipe():
    return sdlite.Pipeline.from_pretrained("emoji", backend="torch", precision="fp32", threads=1)


def test_torch_fp32_equals_onnxruntime(want, torch_pipe):
    assert psnr(pixels(torch_pipe(PROMPTS, latents=LATENTS, **CALL).images), want) >= 60


def test_float_pixels_of_onnxruntime_equal_torch_beyond_rounding(emoji, torch_pipe):
    """uint8 hides small errors: compare the networks themselves."""
    ids = emoji.tokenize(PROMPTS)
    a, b = emoji.encode_text(ids), torch_pipe.encode_text(ids)
    assert psnr(a, b, peak=float(np.abs(b).max())) > 90
    arguments = {
        "sample": LATENTS,
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": b,
    }
    a, b = (p.networks.unet(**arguments)["out_sample"] for p in (emoji, torch_pipe))
    assert psnr(a, b, peak=float(np.abs(b).max())) > 90
    a, b = (p.networks.vae_decoder(latent_sample=LATENTS)["sample"] for p in (emoji, torch_pipe))
    assert psnr(a, b, peak=2) > 90


def test_fp16_equals_fp32_and_is_reported_as_storage(want):
    half = sdlite.Pipeline.from_pretrained("emoji", precision="fp16", threads=1)
    assert psnr(pixels(half(PROMPTS, latents=LATENTS, **CALL).images), want) >= 40
    assert "storage" in half.report.notes[0]


def test_torch_computes_in_what_it_is_told(want):
    for told, least, most in (("bfloat16", 22, 60), ("float32", 60, 200)):
        pipe = sdlite.Pipeline.from_pretrained(
            "emoji", backend="torch", precision="fp32", threads=1, arithmetic=told
        )
        assert least < psnr(pixels(pipe(PROMPTS, latents=LATENTS, **CALL).images), want) <= most
        assert {n.arithmetic for n in pipe.report.networks} == {told}
    with pytest.raises(sdlite.errors.PrecisionError, match="leaves the other layers in float32"):
        sdlite.Pipeline.from_pretrained(
            "emoji", backend="torch", precision="int8-dynamic", arithmetic="bfloat16"
        )


def test_torchao_runs_linear_in_int8(want):
    pytest.importorskip("torchao", reason="needs the torchao extra")
    pipe = sdlite.Pipeline.from_pretrained(
        "emoji", backend="torch", precision="int8-dynamic", threads=1
    )
    assert 25 < psnr(pixels(pipe(PROMPTS, latents=LATENTS, **CALL).images), want) < 60
    assert "int8 Linear" in pipe.report.networks[1].arithmetic


def test_openvino_equals_onnxruntime(want):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    pipe = sdlite.Pipeline.from_pretrained("emoji", backend="openvino", precision="fp32", threads=1)
    assert psnr(pixels(pipe(PROMPTS, latents=LATENTS, **CALL).images), want) >= 60
    assert "openvino" in pipe.report.engine
    with pytest.raises(sdlite.errors.UnknownNameError, match=r"sees cpu"):
        sdlite.Pipeline.from_pretrained("emoji", backend="openvino", device="npu")


def test_diffusers_opens_the_artefact_and_makes_the_same_pictures(want):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(EMOJI, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder.dtype == torch.float32
    got = pipe(PROMPTS, latents=torch.from_numpy(LATENTS), **CALL).images
    assert psnr(pixels(got), want) >= 50


def test_seed_means_the_same_picture_in_diffusers(emoji):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(EMOJI, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    got = pipe("pizza", generator=torch.Generator().manual_seed(11), **CALL).images
    assert psnr(pixels(got), pixels(emoji("pizza", seed=11, **CALL).images)) >= 50


def test_optimum_opens_the_artefact_and_makes_the_same_pictures(want):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the optimum extra")
    pipe = optimum.ORTStableDiffusionPipeline.from_pretrained(EMOJI)
    pipe.set_progress_bar_config(disable=True)
    got = pipe(PROMPTS, latents=torch.from_numpy(LATENTS), **CALL).images
    assert psnr(pixels(got), want) >= 50


def test_every_sampler_runs_and_agrees_between_backends(emoji, torch_pipe):
    from sdlite.sampling import SAMPLERS

    for sampler in set(SAMPLERS) - {"pndm", "pndm-rk"}:
        a, b = (
            pixels(p("pizza", seed=2, num_inference_steps=4, sampler=sampler).images)
            for p in (emoji, torch_pipe)
        )
        assert psnr(a, b) >= 50, sampler


def test_pndm_refuses_zero_terminal_snr(emoji):
    from sdlite.errors import InputError

    with pytest.raises(InputError, match="zero terminal SNR"):
        emoji("pizza", sampler="pndm", num_inference_steps=4)


def test_a_broken_network_fails_the_parity_gate(emoji, want, monkeypatch):
    unet = emoji.networks.unet
    monkeypatch.setitem(
        emoji.networks.parts,
        "unet",
        lambda **kw: unet(**{**kw, "timestep": np.asarray(kw["timestep"] + np.float32(100))}),
    )
    assert psnr(pixels(emoji(PROMPTS, latents=LATENTS, **CALL).images), want) < 50
    monkeypatch.setitem(
        emoji.networks.parts,
        "unet",
        lambda **kw: {"out_sample": unet(**kw)["out_sample"] * np.float32(1.1)},
    )
    assert psnr(pixels(emoji(PROMPTS, latents=LATENTS, **CALL).images), want) < 50


def test_plain_diffusers_folder_runs_on_torch(plain, want):
    pipe = sdlite.Pipeline.from_pretrained(plain)
    assert pipe.report.backend == "torch"
    assert psnr(pixels(pipe(PROMPTS, latents=LATENTS, **CALL).images), want) >= 50
    assert pipe.defaults.num_inference_steps == 50


def test_plain_diffusers_folder_is_converted_once_for_both_engines(
    plain, want, tmp_path, monkeypatch, caplog
):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    monkeypatch.setenv("SDLITE_CACHE", str(tmp_path / "cache"))
    pipe = sdlite.Pipeline.from_pretrained(plain, backend="onnxruntime", threads=1)
    assert "converting it once" in caplog.text
    assert any("converted to ONNX" in n for n in pipe.report.notes)
    assert psnr(pixels(pipe(PROMPTS, latents=LATENTS, sampler="ddim", **CALL).images), want) >= 50
    caplog.clear()
    sdlite.Pipeline.from_pretrained(plain, backend="onnxruntime", threads=1)
    assert caplog.text == ""
    if importlib.util.find_spec("openvino"):  # the same copy, not a refusal
        pipe = sdlite.Pipeline.from_pretrained(
            plain, backend="openvino", precision="fp32", threads=1
        )
        assert caplog.text == ""
        assert (
            psnr(pixels(pipe(PROMPTS, latents=LATENTS, sampler="ddim", **CALL).images), want) >= 50
        )
        [made] = (p for p in (tmp_path / "cache" / "onnx").iterdir() if p.is_dir())
    assert (made / "unet/model.onnx").stat().st_size < 1_000_000, (
        "weights were written into the graph instead of shared"
    )


def test_tokenizer_gives_the_ids_of_transformers(emoji):
    from transformers import CLIPTokenizerFast

    reference = CLIPTokenizerFast.from_pretrained(EMOJI / "tokenizer")
    texts = [
        "",
        "Red  APPLE, 12 o'clock!",
        "  naïve \n café ",
        "日本 <b>",
        "woman: dark skin tone",
        "a" * 100,
    ]
    want = reference(
        texts,
        padding="max_length",
        max_length=emoji.tokenizer.max_length,
        truncation=True,
        return_tensors="np",
    ).input_ids
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (emoji.tokenize(texts) == want).all()


@pytest.mark.slow
def test_sd14_shaped_folder_runs_on_torch_at_512_and_equals_diffusers(tmp_path):
    """860M parameters with random weights, SD-1.4's own configs and PNDM scheduler."""
    from benchmarks.shapes import write_sd_folder

    folder = write_sd_folder("sd14", tmp_path / "sd14")
    latents = Noise(0).normal((4, 64, 64))[None]
    ours = sdlite.Pipeline.from_pretrained(folder)
    got = pixels(ours("a photo", latents=latents, num_inference_steps=2).images)
    del ours
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    want = pixels(pipe("a photo", latents=torch.from_numpy(latents), num_inference_steps=2).images)
    assert got.shape == (1, 512, 512, 3)
    assert psnr(got, want) >= 50
