from __future__ import annotations

import importlib.util
import json
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

import sdlite
from sdlite import images
from sdlite.artifact import Artifact
from sdlite.errors import (
    Cancelled,
    InputError,
    MissingExtraError,
    PrecisionError,
    SdliteWarning,
    ShapeError,
    UnknownNameError,
)
from sdlite.sampling import Noise, guided
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


@pytest.mark.parametrize("scale", [0, 0.0, 0.5])
def test_guidance_below_one_is_none_as_in_diffusers(emoji, scale):
    """Model cards of turbo students call them with guidance_scale=0.0, and UIs send an empty
    negative prompt.
    """
    want = pixels(emoji("pizza", guidance_scale=1, seed=1, **FAST))
    assert (
        pixels(emoji("pizza", negative_prompt="", guidance_scale=scale, seed=1, **FAST)) == want
    ).all()
    with pytest.raises(InputError, match=r"guidance_scale=.*no guidance"):
        emoji("pizza", negative_prompt="ghost", guidance_scale=scale, seed=1, **FAST)


def test_a_manifests_guidance_may_be_any_whole_number_that_is_a_float():
    assert guided(10**30)
    assert not guided(0)


def test_guidance_one_calls_the_network_once_per_image(emoji, monkeypatch):
    rows = []
    unet = emoji.networks.unet
    monkeypatch.setitem(
        emoji.networks.parts, "unet", lambda **kw: rows.append(len(kw["sample"])) or unet(**kw)
    )
    emoji(["pizza", "ghost"], guidance_scale=1, seed=0, **FAST)
    emoji(["pizza", "ghost"], guidance_scale=3, seed=0, **FAST)
    assert rows == [2, 2, 4, 4]


def test_given_latents_are_the_draw(emoji):
    latents = Noise(9).normal((8, 8, 8))[None]
    assert (
        pixels(emoji("pizza", latents=latents, **FAST)) == pixels(emoji("pizza", seed=9, **FAST))
    ).all()


def test_stages_compose_to_the_call(emoji):
    from sdlite.sampling import get_sampler

    noise = [Noise(4)]
    embeds = emoji.encode_text(emoji.tokenize(["pizza"]))
    *_, x = emoji.denoise(
        emoji.init_latents(noise, 64, 64), embeds, noise, get_sampler("euler", emoji.schedule, 3)
    )
    want = pixels(emoji("pizza", seed=4, num_inference_steps=3, guidance_scale=1, sampler="euler"))
    assert (emoji.decode(x) == want).all()


def test_callback_sees_every_step_and_can_cancel(emoji):
    seen = []
    emoji(
        "pizza",
        seed=0,
        num_inference_steps=3,
        callback=lambda i, n, x: seen.append((i, n, x.shape)),
    )
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
    assert all(
        n["storage"] == "float16" and n["arithmetic"] == "float32" and n["bytes"] > 0
        for n in r["networks"]
    )
    assert "storage" in r["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"prompt": []}, InputError, "empty list"),
        ({"prompt": [3]}, InputError, r"prompt\[0\]=3; accepted: a string"),
        ({"prompt": "x", "sampler": "heun3"}, UnknownNameError, "choose one of ddim"),
        ({"prompt": "x", "height": 500}, ShapeError, "use 480 or 512"),
        ({"prompt": "x", "width": 0}, ShapeError, "not a positive multiple"),
        ({"prompt": "x", "num_inference_steps": 0}, InputError, "num_inference_steps=0"),
        (
            {"prompt": "x", "num_inference_steps": 4.5},
            InputError,
            "num_inference_steps=4.5; accepted: a whole number, at least 1",
        ),
        ({"prompt": "x", "num_inference_steps": 4.0}, InputError, "num_inference_steps=4.0"),
        (
            {"prompt": "x", "num_inference_steps": "4"},
            InputError,
            r"num_inference_steps='4' \(str\)",
        ),
        (
            {"prompt": "x", "num_inference_steps": True},
            InputError,
            r"num_inference_steps=True \(bool\)",
        ),
        (
            {"prompt": None},
            InputError,
            r"prompt=None \(NoneType\); accepted: a string or a list of strings",
        ),
        ({"prompt": {"prompt": "x"}}, InputError, r"\(dict\); accepted: a string"),
        ({"prompt": b"x"}, InputError, r"\(bytes\); accepted: a string"),
        ({"prompt": 3}, InputError, "prompt=3; accepted: a string"),
        (
            {"prompt": "x", "negative_prompt": 3, "guidance_scale": 2},
            InputError,
            "negative_prompt=3; accepted",
        ),
        (
            {"prompt": "x", "guidance_scale": "7"},
            InputError,
            r"guidance_scale='7' \(str\); accepted: a finite number",
        ),
        ({"prompt": "x", "guidance_scale": -1}, InputError, "guidance_scale=-1; accepted"),
        ({"prompt": "x", "seed": 1.5}, InputError, "seed=1.5; accepted: a whole number"),
        ({"prompt": "x", "seed": "7"}, InputError, r"seed='7' \(str\)"),
        ({"prompt": "x", "seed": True}, InputError, r"seed=True \(bool\)"),
        ({"prompt": "x", "seed": 2**64}, InputError, f"0 to {2**64 - 1}"),
        ({"prompt": ["x", "y"], "seed": 2**64 - 1}, InputError, f"0 to {2**64 - 2}"),
        ({"prompt": "x", "seed": [1.5]}, InputError, r"seed\[0\]=1.5"),
        ({"prompt": "x", "height": 64.0}, ShapeError, "height=64.0; accepted: a whole number"),
        ({"prompt": "x", "width": "64"}, ShapeError, r"width='64' \(str\)"),
        ({"prompt": "x", "height": 10**9}, ShapeError, "at most 16384"),
        ({"prompt": "x", "num_images_per_prompt": 1.5}, InputError, "num_images_per_prompt=1.5"),
        (
            {"prompt": "x", "latents": np.zeros((1, 8, 8, 8), object)},
            ShapeError,
            "latents are object",
        ),
        ({"prompt": "x", "sampler": 3}, InputError, "sampler=3; accepted: a string"),
        ({"prompt": "x", "callback": 3}, InputError, "callback=3; accepted: a function"),
        ({"prompt": "x", "num_inference_steps": 1001}, InputError, "1 to 1000"),
        (
            {"prompt": "x", "guidance_scale": 10**400},
            InputError,
            "guidance_scale=1000.*accepted: a finite number",
        ),
        (
            {"prompt": "x", "guidance_scale": float("nan")},
            InputError,
            "guidance_scale=nan; accepted: a finite number",
        ),
        ({"prompt": "x", "seed": -1}, InputError, "seed=-1"),
        ({"prompt": "x", "seed": [1, 2]}, InputError, "2 seeds for 1"),
        (
            {"prompt": "x", "num_images_per_prompt": 0},
            InputError,
            "num_images_per_prompt=0; accepted: a whole number, 1 to 4096",
        ),
        ({"prompt": "x", "num_images_per_prompt": 10**9}, InputError, "1 to 4096"),
        (
            {"prompt": ["x", "y"], "negative_prompt": ["a", "b", "c"], "guidance_scale": 2},
            InputError,
            "3 negative prompts for 2",
        ),
        ({"prompt": "x", "negative_prompt": "y", "guidance_scale": 1}, InputError, "no effect"),
        ({"prompt": "x", "latents": np.full((1, 8, 8, 8), np.nan, np.float32)}, InputError, "NaN"),
        (
            {"prompt": "x", "latents": np.zeros((1, 4, 8, 8), np.float32)},
            ShapeError,
            "accepted: float",
        ),
        (
            {"prompt": "x", "latents": np.zeros((1, 8, 8, 8), np.float32), "height": 128},
            ShapeError,
            "not 128x64",
        ),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_bad_call_gives_one_clear_error(emoji, arguments, error, text):
    with pytest.raises(error, match=text):
        emoji(**arguments)


def test_numpy_numbers_strings_and_iterables_are_taken(emoji):
    a = pixels(emoji("pizza", seed=3, height=64, num_images_per_prompt=2, guidance_scale=1, **FAST))
    b = emoji(
        np.array(["pizza"]),
        seed=np.uint64(3),
        height=np.int64(64),
        num_images_per_prompt=np.int32(2),
        guidance_scale=np.float32(1),
        num_inference_steps=np.int16(2),
    )
    assert (pixels(b) == a).all()
    c = emoji(
        (p for p in (np.str_("pizza"), "pizza")), seed=np.array([3, 4]), negative_prompt="", **FAST
    )
    assert (pixels(c) == a).all()
    assert (c.seeds, {type(s) for s in c.seeds}) == ([3, 4], {int})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"precision": "int4"}, UnknownNameError, "choose one of fp32"),
        pytest.param(
            {"precision": "int8-static", "backend": "torch"},
            PrecisionError,
            "has no int8-static",
            marks=pytest.mark.skipif(
                not importlib.util.find_spec("torch"), reason="needs the torch extra"
            ),
        ),
        ({"backend": "tflite"}, UnknownNameError, "choose one of auto"),
        ({"device": "tpu"}, UnknownNameError, "choose one of cpu"),
        ({"revision": "main"}, InputError, "is a local one"),
        ({"precision": 16}, InputError, "precision=16; accepted: a string"),
        ({"backend": None}, InputError, r"backend=None \(NoneType\); accepted: a string"),
        ({"device": 0}, InputError, "device=0; accepted: a string"),
        ({"revision": 5}, InputError, "revision=5"),
        ({"threads": 0}, InputError, "threads=0; accepted: a whole number, 1 to "),
        ({"threads": -2}, InputError, "threads=-2"),
        ({"threads": 100000}, InputError, "threads=100000"),
        ({"threads": 1.5}, InputError, "threads=1.5"),
    ],
)
def test_bad_load_gives_one_clear_error(arguments, error, text):
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    with pytest.raises(error, match=text):
        sdlite.Pipeline.from_pretrained("emoji", **arguments)


@pytest.mark.parametrize("model", [None, 3, b"emoji"])
def test_model_that_is_no_name_is_one_clear_error(model):
    with pytest.raises(
        InputError, match=r"^model=.*accepted: a name that `sdlite models` lists, a folder"
    ):
        sdlite.Pipeline.from_pretrained(model)


def test_stages_and_folders_are_checked_too(emoji):
    assert (emoji.tokenize("pizza") == emoji.tokenize(["pizza"])).all()  # not its letters
    for call, text in (
        (lambda: emoji.tokenize(None), "prompts=None"),
        (lambda: emoji.save_pretrained(3), "folder=3; accepted: a path"),
    ):
        with pytest.raises(InputError, match=text):
            call()


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
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else real(name, *a)
    )
    with pytest.raises(PrecisionError, match=r"pip install 'sdlite\[torch\]'"):
        sdlite.Pipeline.from_pretrained(plain)


@pytest.mark.parametrize(
    ("network", "stage"),
    [
        ("text_encoder", "text encoder"),
        ("unet", "not finite after step 1"),
        ("vae_decoder", "VAE decoder"),
    ],
)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_network_that_gives_nan_is_an_error_not_a_black_picture(
    emoji, monkeypatch, network, stage, number
):
    right = emoji.networks.parts[network]

    def broken(**inputs):
        [(name, out)] = right(**inputs).items()
        out = out.copy()
        out.flat[7] = number
        return {name: out}

    monkeypatch.setitem(emoji.networks.parts, network, broken)
    with pytest.raises(InputError, match=stage):
        emoji("pizza", seed=0, **FAST)


def test_tile_that_is_nan_is_an_error_too(emoji, monkeypatch):
    right = emoji.networks.vae_decoder
    monkeypatch.setitem(
        emoji.networks.parts,
        "vae_decoder",
        lambda latent_sample: {
            "sample": right(latent_sample=latent_sample)["sample"] * np.float32("nan")
        },
    )
    emoji.enable_vae_tiling(48)
    try:
        with pytest.raises(InputError, match="VAE decoder"):
            emoji("pizza", seed=0, **FAST)
    finally:
        emoji.disable_vae_tiling()


# --- what is done and probably not wanted


@pytest.fixture
def fresh(emoji):
    """The same networks in a pipeline that has not warned yet."""
    return sdlite.Pipeline(emoji.artifact, emoji.networks)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"height": 512, "width": 512}, "trained at 64x64 pixels: an image of 512x512 is 64 times"),
        ({"guidance_scale": 7.5}, "trained to need no guidance"),
    ],
)
def test_what_the_student_was_not_trained_for_is_warned_about_once(fresh, arguments, text):
    with pytest.warns(SdliteWarning, match=text) as caught:
        fresh("pizza", seed=0, num_inference_steps=1, **arguments)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdliteWarning)
        fresh("ghost", seed=0, num_inference_steps=1, **arguments)


@pytest.mark.parametrize(
    "arguments", [{}, {"height": 96, "width": 96}, {"guidance_scale": 1.0}, {"guidance_scale": 0.0}]
)
def test_what_it_was_trained_for_is_not(fresh, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdliteWarning)
        fresh("pizza", seed=0, num_inference_steps=1, **arguments)


def test_plain_folder_has_guidance_without_a_warning(plain, emoji):
    pipe = sdlite.Pipeline(Artifact.open(plain), emoji.networks)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdliteWarning)
        pipe("pizza", seed=0, num_inference_steps=1, guidance_scale=7.5)


# --- how an image was made


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_image_knows_how_it_was_made_and_files_keep_it(emoji, tmp_path, ending):
    out = emoji(["pizza", "ghost"], seed=5, **FAST)
    assert out.images[1].info["prompt"] == "ghost"
    images.save(out.images[1], tmp_path / f"a.{ending}")
    with Image.open(tmp_path / f"a.{ending}") as image:
        kept = (
            image.text
            if ending == "png"
            else json.loads(image.getexif().get_ifd(0x8769)[0x9286][8:])
        )
    assert kept == out.metadata[1]
    assert {k: kept[k] for k in ("prompt", "seed", "steps", "guidance", "model", "sampler")} == {
        "prompt": "ghost",
        "seed": "6",
        "steps": "2",
        "guidance": "1.0",
        "model": "emoji",
        "sampler": "ddim",
    }
