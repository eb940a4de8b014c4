"""Previews: what each step predicts, from a call in a thread of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import sdlite
from sdlite import preview
from sdlite.cli import main
from sdlite.errors import Cancelled, InputError
from sdlite.metrics import ssim
from sdlite.sampling import SAMPLERS, Noise, get_sampler

PROMPTS = ["a red apple on a white background", "a house on a blue background"]
STATED = 0.6  # SSIM of a preview to the decoder's image of the same latents, both at 16 px


@pytest.fixture(scope="module")
def pipe():
    with sdlite.Pipeline.from_pretrained("emoji", backend="onnxruntime", threads=1) as pipe:
        yield pipe


def test_a_stream_is_previews_and_then_the_calls_output(pipe):
    seen = []
    call = {"seed": 1, "num_inference_steps": 3}
    *previews, out = pipe.stream(PROMPTS, callback=lambda *a: seen.append(a[:2]), **call)
    assert [(p.step, p.steps) for p in previews] == seen == [(1, 3), (2, 3), (3, 3)]
    assert {i.size for p in previews for i in p.images} == {(8, 8)}
    assert [len(p.images) for p in previews] == [2, 2, 2]
    for a, b in zip(out.images, pipe(PROMPTS, **call).images, strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()


def test_a_preview_is_near_the_decoders_image_of_what_is_predicted(pipe):
    noise = [Noise(1)]
    cond, _ = pipe.conditions(PROMPTS[:1], [None], 1.0, 64, 64)
    solver, predicted = get_sampler("ddim", pipe.schedule, 4), []
    run = pipe.denoise(
        pipe.init_latents(noise, 64, 64),
        cond,
        noise,
        solver,
        watch=lambda call, x: predicted.append(x),
    )
    assert len(list(run)) == len(predicted) == 4
    *previews, _ = pipe.stream(PROMPTS[0], seed=1, sampler="ddim", num_inference_steps=4)
    for shown, latents in zip(previews, predicted, strict=True):
        [image] = pipe.decode(latents)
        right = Image.fromarray(image).resize((16, 16), Image.Resampling.BOX)
        found = ssim(np.asarray(shown.images[0].resize((16, 16))), np.asarray(right))
        assert found >= STATED, shown.step


@pytest.mark.parametrize("name", [n for n in SAMPLERS if not n.startswith("pndm")])
def test_what_a_perfect_network_predicts_is_the_image(pipe, name):
    """Every solver says x_0 from the network's output, whatever space it works in."""
    x0, noise = (np.random.default_rng(i).standard_normal((1, 8, 8, 8)) for i in (0, 1))
    x0, noise = x0.astype(np.float32), noise.astype(np.float32)
    solver = get_sampler(name, pipe.schedule, 6)
    x = solver.add_noise(2, x0, noise)
    a = pipe.schedule.alphas_cumprod()[round(float(solver.timesteps[2]))]
    v = np.sqrt(a) * noise - np.sqrt(1 - a) * x0
    assert pipe.schedule.prediction_type == "v_prediction"
    np.testing.assert_allclose(solver.predicted(2, v, x), x0, atol=0.03)


def test_a_stream_that_is_left_ends_its_call(pipe):
    before = threading.active_count()
    run = pipe.stream("a fox", seed=1, num_inference_steps=200)
    assert [next(run).step, next(run).step] == [1, 2]
    run.close()
    assert threading.active_count() == before
    assert not pipe._calls
    assert len(list(pipe.stream("a fox", seed=1, num_inference_steps=1))) == 2


def test_errors_come_out_where_the_stream_is_read(pipe):
    with pytest.raises(InputError, match="num_inference_steps=0"):
        next(pipe.stream("a fox", num_inference_steps=0))
    with pytest.raises(InputError, match="callback='x'"):
        next(pipe.stream("a fox", callback="x"))
    with pytest.raises(Cancelled, match="after step 1 of 4"):
        list(pipe.stream("a fox", num_inference_steps=4, callback=lambda *a: False))


def test_threads_stream_what_calls_make(pipe):
    call = {"num_inference_steps": 3}
    alone = [np.asarray(pipe("a fox", seed=i, **call).images[0]) for i in range(8)]

    def last(i):
        *_, out = pipe.stream("a fox", seed=i, **call)
        return np.asarray(out.images[0])

    with ThreadPoolExecutor(8) as pool:
        for a, b in zip(alone, pool.map(last, range(8)), strict=True):
            assert (a == b).all()


def test_the_map_is_exact_where_a_decoder_is_linear():
    colors = np.random.default_rng(3).standard_normal((5, 3)).astype(np.float32)

    def decode(z):
        pixels = np.einsum("bchw,cr->brhw", z, colors[:-1]) + colors[-1][None, :, None, None]
        return np.repeat(np.repeat(pixels, 4, axis=2), 4, axis=3)

    np.testing.assert_allclose(preview.fitted(decode, 4), colors, atol=1e-4)
    z = np.zeros((1, 4, 2, 2), np.float32)
    shown = np.round(np.clip((colors[-1] + 1) / 2, 0, 1) * 255).astype(np.uint8)
    assert (preview.painted(z, colors) == shown).all()


def test_the_command_writes_a_preview_after_each_step(tmp_path, monkeypatch):
    from sdlite import images

    saved, save = [], images.save

    def watched(image, path, *more):
        saved.append(path.name)
        save(image, path, *more)

    monkeypatch.setattr(images, "save", watched)
    shown, out = tmp_path / "p.png", tmp_path / "a.png"
    command = ["generate", "a fox", "--seed", "1", "--steps", "3", "--quiet"]
    assert main([*command, "--preview", str(shown), "--out", str(out)]) == 0
    assert saved == ["p.png"] * 3 + ["a.png"]
    assert Image.open(shown).size == (64, 64)
