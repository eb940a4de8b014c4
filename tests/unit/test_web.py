"""The web export in a real headless Chromium: a click makes Python's picture; the gate can fail."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

import sdlite
from sdlite.errors import ExportError, MissingExtraError
from sdlite.exporters import browser, profile
from sdlite.exporters.export import export
from sdlite.exporters.targets import web
from sdlite.sampling import Noise
from sdlite.tokenizer import ClipTokenizer
from tests.conftest import EMOJI
from tests.helpers import psnr


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(folder, Browser) of an exported page."""
    if browser.find() is None:
        pytest.skip("no Chromium on this machine")
    try:
        web.runtime(profile.load("web"))
    except (MissingExtraError, ExportError) as e:
        pytest.skip(f"onnxruntime-web cannot be had: {e}")
    folder = tmp_path_factory.mktemp("web") / "out"
    report = export(EMOJI, folder, target="web", prompts=["red apple"], num_inference_steps=2, threads=1)
    assert report["checked_by"] == "the runtime itself"
    assert "ort/ort-wasm-simd-threaded.asyncify.wasm" in report["files"]
    with browser.Browser(folder) as opened:
        opened.wait("document.body?.dataset.ready === 'yes'")
        yield folder, opened


def test_a_click_makes_the_picture_that_python_makes(page):
    _, opened = page
    opened.evaluate("document.getElementById('prompt').value = 'dog face on a blue background', document.getElementById('seed').value = 7")
    opened.evaluate("document.getElementById('steps').value = 4")
    opened.click("#go")
    opened.wait("document.getElementById('status').textContent.endsWith('on wasm')", 120)
    script = "(() => { const c = document.getElementById('picture'); return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    width, height, *pixels = opened.evaluate(script)
    got = np.array(pixels, np.uint8).reshape(height, width, 4)[..., :3]
    pipe = sdlite.Pipeline.from_pretrained(EMOJI, precision="fp16", backend="onnxruntime", threads=1)
    want = np.asarray(pipe("dog face on a blue background", seed=7, num_inference_steps=4).images[0])
    assert psnr(got, want) >= 60
    other = np.asarray(pipe("dog face on a blue background", seed=8, num_inference_steps=4).images[0])
    assert psnr(got, other) < 40


def test_weights_of_a_large_network_stay_beside_it(page, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "LARGE", 8 << 20)
    report = export(EMOJI, tmp_path / "out", target="web", prompts=["red apple"], num_inference_steps=1, threads=1)
    assert {f for f in report["files"] if f.endswith(".data")} == {"unet/model.onnx.data"}
    assert report["parity"]["networks"]["unet"]["sqnr"] > 60
    assert json.loads((tmp_path / "out" / "sdlite-web.json").read_text())["weights"] == {
        "text_encoder": None, "unet": "model.onnx.data", "vae_decoder": None
    }  # fmt: skip


def test_tokenizer_and_noise_are_pythons(page):
    folder, opened = page
    prompts = ["", "Red  apple!", "three o'clock 1234", "café ☕ naïve <|endoftext|>", "a " * 60, "e\u0301t\u00e9 x_y"]
    tokenizer = ClipTokenizer.from_pretrained(folder / "tokenizer")
    opened.evaluate("import('./sdlite.js').then((m) => (globalThis.lib = m, true))")
    for prompt in prompts:
        script = f"lib.ClipTokenizer.load('sdlite-tokenizer.json').then((t) => Array.from(t.encode({json.dumps(prompt)}).ids, Number))"
        with pytest.warns(sdlite.tokenizer.TruncationWarning) if len(prompt) > 100 else contextlib.nullcontext():
            assert opened.evaluate(script) == tokenizer([prompt])[0].tolist(), prompt
    for seed in (0, 1, 2**32 + 5):
        got = opened.evaluate(f"Array.from(lib.noise('{seed}', 512))")
        np.testing.assert_allclose(got, Noise(seed).normal((512,)), atol=1e-5)


def test_a_prompt_that_does_not_fit_is_said_on_the_page(page):
    _, opened = page
    opened.evaluate("document.getElementById('steps').value = 1, document.getElementById('seed').value = 7")
    for prompt, shown in (("red apple and " * 10 + "zebra", True), ("red apple", False)):
        opened.evaluate(f"document.getElementById('prompt').value = {json.dumps(prompt)}")
        opened.evaluate("document.getElementById('status').textContent = '', true")
        opened.click("#go")
        opened.wait("document.getElementById('status').textContent.endsWith('on wasm')", 120)
        said = opened.evaluate("document.getElementById('warning').textContent")
        assert said.startswith("the text encoder reads 26 tokens; dropped: ") and said.endswith("zebra") if shown else said == ""


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_are_pythons(page, spacing):
    from sdlite.sampling import Schedule, get_sampler

    _, opened = page
    schedule = {"timestep_spacing": spacing, "num_train_timesteps": 1000, "steps_offset": 1}
    opened.evaluate("import('./sdlite.js').then((m) => (globalThis.lib = m, true))")
    for n in (1, 4, 16, 25, 50):
        want = get_sampler("ddim", Schedule(**schedule), n).timesteps.tolist()
        assert opened.evaluate(f"lib.timesteps({json.dumps(schedule)}, {n})") == want, n


def test_a_broken_sampler_is_seen_by_the_click_and_errors_are_shown(page):
    _, opened = page
    opened.evaluate("document.getElementById('steps').value = 4, document.getElementById('seed').value = 'x'")
    opened.evaluate("sdlite.pipes.wasm = {generate: async () => { throw new Error('latents are not finite'); }}, true")
    opened.click("#go")
    opened.wait("document.getElementById('status').textContent === 'latents are not finite'", 10)
    with pytest.raises(ExportError, match="in the browser: Error: no"):
        opened.evaluate("Promise.reject(new Error('no'))")


def test_runtime_from_a_folder_and_by_hash(tmp_path, monkeypatch):
    lacking = profile.Profile("w", "web", options={"onnxruntime_web": str(tmp_path)})
    with pytest.raises(ExportError, match=r"lacks ort\.webgpu"):
        web.runtime(lacking)
    for name in web.FILES:
        (tmp_path / name).write_bytes(b"x")
    assert web.runtime(lacking) == dict.fromkeys(web.FILES, b"x")
    monkeypatch.setenv("SDLITE_CACHE", str(tmp_path))
    monkeypatch.setattr(web.shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError, match="install npm"):
        web.runtime(profile.Profile("w", "web"))


def test_no_browser_means_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(browser, "find", lambda: None)
    monkeypatch.setattr(web, "runtime", lambda settings: dict.fromkeys(web.FILES, b""))
    report = export(EMOJI, tmp_path / "out", target="web", prompts=["red apple"], num_inference_steps=1, threads=1)
    assert "no browser here" in report["not_run"]["unet"]
    assert "handed to the converter" in report["checked_by"]
