from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

import sdlite
from sdlite.errors import InputError, MissingExtraError, PrecisionError, ShapeError, UnknownNameError
from sdlite.pipeline import Cancelled
from sdlite.sampling import Noise
from sdlite.tokenizer import TruncationWarning

FAST = {"num_inference_steps": 2}


def pixels(out):
    return np.stack([np.asarray(i) for i in out.images])


def test_image_of_a_batch_equals_its_seed_alone(emoji):
    batch = pixels(emoji(["red apple", "pizza", "ghost"], seed=5, **FAST))
    alone = pixels(emoji("ghost", seed=7, **FAST))[0]
    assert np.abs(batch[2].astype(int) - alone).max() <= 1  # batched matmuls may round another way


def test_images_per_prompt_are_in_prompt_order_with_rising_seeds(emoji):
    out = emoji(["red apple", "pizza"], num_images_per_prompt=2, seed=3, **FAST)
    assert out.seeds == [3, 4, 5, 6]
    assert np.abs(pixels(out)[3].astype(int) - pixels(emoji("pizza", seed=6, **FAST))[0]).max() <= 1


def test_seed_zero_is_a_seed(emoji):
    a, b = (pixels(emoji("pizza", seed=0, **FAST)) for _ in range(2))
    assert (a == b).all()
    assert emoji("pizza", seed=0, **FAST).seeds == [0]
    assert (pixels(emoji("pizza", seed=1, **FAST)) != a).any()


def test_no_seed_draws_one_and_reports_it(emoji):
    out = emoji("pizza", **FAST)
    assert (pixels(emoji("pizza", seed=out.seeds[0], **FAST)) == pixels(out)).all()


def test_guidance_zero_is_the_negative_prompts_picture(emoji):
    zero = pixels(emoji("pizza", negative_prompt="ghost", guidance_scale=0, seed=1, **FAST))
    ghost = pixels(emoji("ghost", guidance_scale=1, seed=1, **FAST))
    assert np.abs(zero.astype(int) - ghost).max() <= 1


def test_guidance_one_calls_the_network_once_per_image(emoji, monkeypatch):
    rows = []
    unet = emoji.networks.unet
    monkeypatch.setattr(emoji.networks, "unet", lambda **kw: rows.append(len(kw["sample"])) or unet(**kw))
    emoji(["pizza", "ghost"], guidance_scale=1, seed=0, **FAST)
    emoji(["pizza", "ghost"], guidance_scale=3, seed=0, **FAST)
    assert rows == [2, 2, 4, 4]


def test_given_latents_are_the_draw(emoji):
    latents = Noise(9).normal((8, 8, 8))[None]
    assert (pixels(emoji("pizza", latents=latents, **FAST)) == pixels(emoji("pizza", seed=9, **FAST))).all()


def test_stages_compose_to_the_call(emoji):
    from sdlite.sampling import get_sampler

    noise = [Noise(4)]
    embeds = emoji.encode_text(emoji.tokenize(["pizza"]))
    *_, x = emoji.denoise(emoji.init_latents(noise, 64, 64), embeds, noise, get_sampler("euler", emoji.schedule, 3))
    want = pixels(emoji("pizza", seed=4, num_inference_steps=3, guidance_scale=1, sampler="euler"))
    assert (emoji.decode(x) == want).all()


def test_callback_sees_every_step_and_can_cancel(emoji):
    seen = []
    emoji("pizza", seed=0, num_inference_steps=3, callback=lambda i, n, x: seen.append((i, n, x.shape)))
    assert seen == [(1, 3, (1, 8, 8, 8)), (2, 3, (1, 8, 8, 8)), (3, 3, (1, 8, 8, 8))]
    with pytest.raises(Cancelled, match="step 2 of 3"):
        emoji("pizza", seed=0, num_inference_steps=3, callback=lambda i, n, x: i < 2)


def test_other_sizes_follow_height_and_width(emoji):
    assert emoji("pizza", seed=0, height=96, width=128, **FAST).images[0].size == (128, 96)


def test_long_prompt_is_truncated_with_one_warning_that_shows_the_rest(emoji):
    with pytest.warns(TruncationWarning, match="zebra") as caught:
        emoji(["red " * 30 + "zebra", "pizza"], seed=0, **FAST)
    assert len([w for w in caught if w.category is TruncationWarning]) == 1


def test_report_says_what_runs(emoji):
    r = emoji.report.to_dict()
    assert (r["backend"], r["device"], r["precision"]) == ("onnxruntime", "cpu", "fp16")
    assert [n["part"] for n in r["networks"]] == ["text_encoder", "unet", "vae_decoder"]
    assert all(n["storage"] == "float16" and n["arithmetic"] == "float32" and n["bytes"] > 0 for n in r["networks"])
    assert "storage" in r["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"prompt": []}, InputError, "empty list"),
        ({"prompt": [3]}, InputError, "a prompt is a str"),
        ({"prompt": "x", "sampler": "heun3"}, UnknownNameError, "choose one of ddim"),
        ({"prompt": "x", "height": 500}, ShapeError, "use 480 or 512"),
        ({"prompt": "x", "width": 0}, ShapeError, "not a positive multiple"),
        ({"prompt": "x", "num_inference_steps": 0}, InputError, "num_inference_steps=0"),
        ({"prompt": "x", "num_inference_steps": 1001}, InputError, "1 to 1000"),
        ({"prompt": "x", "guidance_scale": float("nan")}, InputError, "finite"),
        ({"prompt": "x", "seed": -1}, InputError, "seed=-1"),
        ({"prompt": "x", "seed": [1, 2]}, InputError, "2 seeds for 1"),
        ({"prompt": "x", "num_images_per_prompt": 0}, InputError, "at least 1"),
        ({"prompt": ["x", "y"], "negative_prompt": ["a", "b", "c"], "guidance_scale": 2}, InputError, "3 negative prompts for 2"),
        ({"prompt": "x", "negative_prompt": "y", "guidance_scale": 1}, InputError, "no effect"),
        ({"prompt": "x", "latents": np.full((1, 8, 8, 8), np.nan, np.float32)}, InputError, "NaN"),
        ({"prompt": "x", "latents": np.zeros((1, 4, 8, 8), np.float32)}, ShapeError, "accepted: float"),
        ({"prompt": "x", "latents": np.zeros((1, 8, 8, 8), np.float32), "height": 128}, ShapeError, "not 128x64"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_bad_call_gives_one_clear_error(emoji, arguments, error, text):
    with pytest.raises(error, match=text):
        emoji(**arguments)


def test_misspelt_argument_fails(emoji):
    with pytest.raises(TypeError):
        emoji("x", steps=3)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"precision": "int4"}, UnknownNameError, "choose one of fp32"),
        ({"precision": "int8-static", "backend": "torch"}, PrecisionError, "has no int8-static"),
        ({"backend": "tflite"}, UnknownNameError, "choose one of auto"),
        ({"device": "tpu"}, UnknownNameError, "choose one of cpu"),
        ({"revision": "main"}, InputError, "is a local one"),
    ],
)
def test_bad_load_gives_one_clear_error(arguments, error, text):
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    with pytest.raises(error, match=text):
        sdlite.Pipeline.from_pretrained("emoji", **arguments)


def test_unknown_model_names_the_embedded_ones():
    with pytest.raises(UnknownNameError, match="emoji"):
        sdlite.Pipeline.from_pretrained("emojy")


def test_missing_engine_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "sdlite.backends.ort", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'sdlite\[cpu\]'"):
        sdlite.Pipeline.from_pretrained("emoji", backend="onnxruntime")


def test_plain_folder_without_torch_says_what_to_install(monkeypatch, plain):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else real(name, *a))
    with pytest.raises(PrecisionError, match=r"pip install 'sdlite\[torch\]'"):
        sdlite.Pipeline.from_pretrained(plain)


def test_network_that_gives_nan_is_an_error_not_a_black_picture(emoji, monkeypatch):
    monkeypatch.setattr(emoji.networks, "unet", lambda **kw: np.full_like(kw["sample"], np.nan))
    with pytest.raises(InputError, match="not finite after step 1"):
        emoji("pizza", seed=0, **FAST)
