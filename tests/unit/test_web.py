"""The web export in a real headless Chromium: a click makes Python's picture; the gate can fail."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

import sdlite
from sdlite import image_input
from sdlite.artifact import Artifact
from sdlite.editing import Edit
from sdlite.errors import ExportError, InputError, MissingExtraError
from sdlite.exporters import profile, targets
from sdlite.exporters.export import export, table
from sdlite.exporters.targets import web
from sdlite.exporters.targets.web import chromium
from sdlite.families.sd import StableDiffusion, guidance_embedding
from sdlite.sampling import Noise, Schedule, get_sampler
from sdlite.spec import Tensor
from sdlite.tokenizer import ClipTokenizer
from tests import folders
from tests.conftest import EMOJI
from tests.helpers import psnr


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(folder, Browser) of an exported page."""
    if chromium.find() is None:
        pytest.skip("no Chromium on this machine")
    try:
        web.onnxruntime_web()
    except (MissingExtraError, ExportError) as e:
        pytest.skip(f"onnxruntime-web cannot be had: {e}")
    folder = tmp_path_factory.mktemp("web") / "out"
    report = export(
        EMOJI, folder, target="web", prompts=["red apple"], num_inference_steps=2, threads=1
    )
    assert report["checked_by"] == "the runtime itself"
    assert min(report["parity"]["own"]) >= 60
    assert "from prompts  PSNR" in table(report)
    assert "ort/ort-wasm-simd-threaded.asyncify.wasm" in report["files"]
    with chromium.Browser(folder) as opened:
        opened.wait("document.body?.dataset.ready === 'yes'")
        yield folder, opened


def test_a_click_makes_the_image_that_python_makes(page):
    _, opened = page
    opened.evaluate(
        "document.getElementById('prompt').value = 'dog face on a blue background',"
        " document.getElementById('seed').value = 7"
    )
    opened.evaluate("document.getElementById('steps').value = 4")
    opened.click("#go")
    opened.wait("document.getElementById('status').textContent.endsWith('on wasm')", 120)
    script = (
        "(() => { const c = document.getElementById('image'); return [c.width, c.height,"
        " ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    width, height, *pixels = opened.evaluate(script)
    got = np.array(pixels, np.uint8).reshape(height, width, 4)[..., :3]
    pipe = sdlite.Pipeline.from_pretrained(
        EMOJI, precision="fp16", backend="onnxruntime", threads=1
    )
    want = np.asarray(
        pipe("dog face on a blue background", seed=7, num_inference_steps=4).images[0]
    )
    assert psnr(got, want) >= 60
    other = np.asarray(
        pipe("dog face on a blue background", seed=8, num_inference_steps=4).images[0]
    )
    assert psnr(got, other) < 40


def text(opened, id):
    return opened.evaluate(f"document.getElementById('{id}').textContent")


def fill(opened, **fields):
    for id, value in fields.items():
        opened.evaluate(f"document.getElementById('{id}').value = {json.dumps(value)}")


# --- editing on the page


@pytest.fixture(scope="module")
def python(page):
    """The model as the page has it."""
    return sdlite.Pipeline.from_pretrained(
        EMOJI, precision="fp16", backend="onnxruntime", threads=1
    )


@pytest.fixture
def opened(page):
    """The page's browser; no image to edit is left there."""
    yield page[1]
    page[1].evaluate("document.getElementById('remove').click()")


@pytest.fixture(scope="module")
def wide_image(python, tmp_path_factory):
    """The file of an apple, larger than the networks take and not square, partly transparent."""
    apple = python("a red apple on a white background", seed=1).images[0]
    image = apple.resize((150, 100), Image.Resampling.BICUBIC).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((0, 0, 0, 0), (0, 0, 40, 30))
    path = tmp_path_factory.mktemp("image") / "wide.png"
    image.save(path)
    return path


def shown(opened, canvas):
    """uint8 (H, W, 4) of a canvas."""
    width, height, *pixels = opened.evaluate(
        f"(() => {{ const c = document.getElementById('{canvas}'); return [c.width, c.height,"
        " ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    return np.array(pixels, np.uint8).reshape(height, width, 4)


def edit(opened, path, **fields):
    """Choose a file; what the page then shows of it, without a mask: uint8 (H, W, 3)."""
    opened.evaluate("document.getElementById('status').textContent = ''")
    opened.upload("#file", path)
    opened.wait(f"document.getElementById('status').textContent.startsWith('{path.name}')", 20)
    fill(opened, **fields)
    for id in ("strength", "steps"):
        script = f"document.getElementById('{id}').dispatchEvent(new Event('input'))"
        opened.evaluate(script)
    return shown(opened, "source")[..., :3]


def click_and_wait(opened):
    """uint8 (H, W, 3) of the image that a click makes."""
    opened.evaluate("document.getElementById('status').textContent = ''")
    opened.click("#go")
    opened.wait(
        "document.getElementById('status').textContent.endsWith('on wasm')"
        " || document.getElementById('error').textContent",
        120,
    )
    assert text(opened, "error") == ""
    return shown(opened, "image")[..., :3]


def array_of(images):
    return np.asarray(images.images[0])


@pytest.mark.parametrize("strength", ["0", "0.5", "1"])
def test_an_edit_on_the_page_is_pythons(opened, python, wide_image, strength):
    prompt = "a green apple on a white background"
    fields = {"prompt": prompt, "seed": "4", "steps": "4", "guidance": "1"}
    source = edit(opened, wide_image, **fields, strength=strength)
    right = image_input.covering(image_input.images("image", wide_image, 1)[0], 64, 64)
    np.testing.assert_array_equal(source, np.asarray(right))
    made = click_and_wait(opened)
    given = {"image": wide_image, "height": 64, "width": 64, "strength": float(strength)}
    want = array_of(python(prompt, seed=4, num_inference_steps=4, **given))
    assert psnr(made, want) >= 60
    another = array_of(python(prompt, seed=5, num_inference_steps=4, **given))
    assert psnr(made, another) < 60 or strength == "0"
    said = {"0": "0.00: the image as it is", "0.5": "0.50: 2 of 4 steps", "1": "1.00: 4 of 4 steps"}
    assert text(opened, "share").startswith(said[strength])


@pytest.mark.parametrize("touch", [False, True])
def test_a_painted_mask_is_pythons_and_keeps_the_rest(opened, python, wide_image, touch):
    prompt = "a red apple on a blue background"
    fields = {"prompt": prompt, "seed": "2", "steps": "3", "guidance": "1", "brush": "8"}
    source = edit(opened, wide_image, **fields, strength="1" if touch else "0.7")
    opened.drag("#source", [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9)], touch=touch)
    painted = (shown(opened, "source")[..., :3] != source).any(-1)
    assert 0.3 < painted.mean() < 0.5
    assert painted[:10, 8:50].all()
    assert not painted[20:, :50].any()
    label = opened.evaluate("document.getElementById('source').getAttribute('aria-label')")
    assert label == f"image to edit, and mask, {round(100 * painted.mean())}% painted"
    made = click_and_wait(opened)
    np.testing.assert_array_equal(made[~painted], source[~painted])
    mask = Image.fromarray(painted.astype(np.uint8) * 255)
    given = {"image": Image.fromarray(source), "mask_image": mask, "num_inference_steps": 3}
    want = array_of(python(prompt, seed=2, strength=1 if touch else 0.7, **given))
    assert psnr(made[painted], want[painted]) >= 60
    assert psnr(made[painted], source[painted]) < 30  # it was painted


def test_the_mask_can_be_made_by_keys_and_buttons(opened, wide_image):
    source = edit(opened, wide_image, brush="4")

    def painted():
        return (shown(opened, "source")[..., :3] != source).any(-1).mean()

    opened.click("#all")
    assert painted() == 1
    opened.click("#invert")
    assert painted() == 0
    opened.evaluate("document.getElementById('source').focus()")
    for key, write in [("ArrowLeft", ""), ("ArrowUp", ""), (" ", " "), ("ArrowDown", "")]:
        opened.press(key, write)
    opened.evaluate("document.getElementById('source').blur()")  # hides the keys' brush
    assert 40 / 4096 < painted() < 60 / 4096  # a disc of radius 4
    opened.click("#erase")
    opened.drag("#source", [(0.5, 0.4), (0.4, 0.5)])
    assert painted() < 20 / 4096
    opened.click("#erase")
    opened.click("#clear")
    assert painted() == 0
    opened.click("#remove")
    assert opened.evaluate("document.getElementById('editor').hidden")


def test_each_step_shows_the_preview_that_python_paints(opened, python):
    opened.evaluate("globalThis.previews = []")
    seen = """
      sdlite.pipes.wasm.generate({prompt: "red apple", seed: 3, num_inference_steps: 3,
        onStep: (step, steps, p) => { previews.push([step, steps, p.width, ...p.pixels]); }})
      .then(() => previews)
    """
    made = opened.evaluate(seen)
    *right, _ = python.stream("red apple", seed=3, num_inference_steps=3)
    assert len(right) == len(made) == 3
    for (step, steps, width, *pixels), want in zip(made, right, strict=True):
        assert (step, steps, width) == (want.step, want.steps, 8)
        got = np.array(pixels, np.int16).reshape(8, 8, 4)[..., :3]
        assert np.abs(got - np.asarray(want.images[0])).max() <= 1
    # and on the page: the canvas is small until the image is there
    opened.evaluate("""globalThis.sizes = [];
      new MutationObserver(() => sizes.push([
        document.getElementById('status').textContent, document.getElementById('image').width,
        document.getElementById('image').getAttribute('aria-label')])).observe(
        document.getElementById('image'), {attributes: true, attributeFilter: ['aria-label']}), 1
    """)
    fill(opened, prompt="red apple", seed="3", steps="3", guidance="1")
    click_and_wait(opened)
    sizes = opened.evaluate("sizes")
    previews = [f"preview after step {i} of 3" for i in (1, 2, 3)]
    assert [label for _, width, label in sizes if width == 8] == previews
    assert sizes[-1][1:] == [64, "generated image: red apple"]


def test_the_result_can_be_edited_and_a_cancelled_edit_keeps_it(opened):
    fill(opened, prompt="red apple", seed="3", steps="2", guidance="1")
    made = click_and_wait(opened)
    opened.click("#again")
    np.testing.assert_array_equal(shown(opened, "source")[..., :3], made)
    fill(opened, steps="400", strength="1")
    opened.click("#all")
    opened.evaluate("document.getElementById('go').focus()")
    opened.click("#go")
    opened.wait("document.getElementById('status').textContent.startsWith('step 2 ')", 120)
    assert opened.evaluate("document.activeElement.id") == "cancel"
    opened.click("#cancel")
    opened.wait("document.getElementById('status').textContent === 'cancelled'", 30)
    np.testing.assert_array_equal(shown(opened, "image")[..., :3], made)
    assert opened.evaluate("document.activeElement.id") == "go"


def test_files_that_are_no_images_and_strengths_that_make_no_step(opened, wide_image, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    opened.upload("#file", bad)
    opened.wait("document.getElementById('error').textContent", 10)
    said = "bad.png cannot be read as an image; give a PNG, JPEG or WebP file"
    assert text(opened, "error") == said
    edit(opened, wide_image, steps="4", seed="1", strength="0.2", prompt="apple")
    assert text(opened, "error") == ""
    assert text(opened, "share") == "0.20: strength 0.2 of 4 steps is not one step"
    opened.click("#go")
    opened.wait("document.getElementById('error').textContent", 30)
    assert "accepted: 0, or at least 0.250" in text(opened, "error")


def test_a_photo_stands_as_its_exif_says(opened, tmp_path):
    image = Image.new("RGB", (96, 64), "white")
    image.paste("red", (0, 0, 48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    made = edit(opened, tmp_path / "photo.jpg").astype(int)
    [right] = image_input.images("image", tmp_path / "photo.jpg", 1)
    want = np.asarray(image_input.covering(right, 64, 64)).astype(int)
    assert np.abs(made - want).max() <= 3  # two decoders of JPEG
    assert made[5, 32, 1] < 60  # the red part is above
    assert made[60, 32, 1] > 200


def test_a_dropped_file_is_the_image(opened, wide_image):
    data = base64.b64encode(wide_image.read_bytes()).decode()
    opened.evaluate(f"""(() => {{
      const bytes = Uint8Array.from(atob({json.dumps(data)}), (c) => c.charCodeAt(0));
      const held = new DataTransfer();
      held.items.add(new File([bytes], "dropped.png", {{type: "image/png"}}));
      const about = {{dataTransfer: held, bubbles: true, cancelable: true}};
      document.getElementById("drop").dispatchEvent(new DragEvent("drop", about));
    }})()""")
    opened.wait("document.getElementById('status').textContent.startsWith('dropped.png is')", 20)
    assert not opened.evaluate("document.getElementById('editor').hidden")


def test_an_export_without_an_encoder_hides_the_edit_and_says_why(page, tmp_path):
    folder = shutil.copytree(page[0], tmp_path / "out", ignore=lambda *_: {"model.onnx"})
    settings = json.loads((folder / "sdlite-web.json").read_text())
    del settings["bytes"]["vae_encoder/model.onnx"]
    (folder / "sdlite-web.json").write_text(json.dumps(settings))
    with chromium.Browser(folder) as opened:
        opened.wait("document.body?.dataset.ready === 'yes'")
        assert (
            opened.evaluate("getComputedStyle(document.getElementById('edit')).display") == "none"
        )
        assert "No editing: this export has no VAE encoder" in text(opened, "noedit")


def test_everything_has_a_name_for_screen_readers_and_an_order_for_the_keyboard(opened, wide_image):
    edit(opened, wide_image)
    nameless = opened.evaluate("""
      Array.from(document.querySelectorAll("input, select, button, canvas, progress"))
        .filter((e) => !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label")))
        .map((e) => e.id)
    """)
    assert nameless == []
    assert (
        opened.evaluate("document.querySelectorAll('[tabindex]:not([tabindex=\"0\"])').length") == 0
    )
    opened.evaluate("document.getElementById('prompt').focus()")
    order = ["prompt"]
    while order[-1] != "go":
        opened.press("Tab")
        order.append(opened.evaluate("document.activeElement.id"))
        assert len(order) < 30
    assert order[:2] == ["prompt", "file"]
    inner = ["remove", "source", "brush", "erase", "all", "invert", "clear", "strength", "seed"]
    assert [o for o in order if o in inner] == inner
    assert (
        opened.evaluate("document.getElementById('status').getAttribute('aria-live')") == "polite"
    )


def test_an_empty_field_is_an_error(page):
    _, opened = page
    good = {"prompt": "red apple", "seed": "3", "steps": "1", "guidance": "1"}
    for id, name in (("prompt", "Prompt"), ("seed", "Seed"), ("steps", "Steps")):
        fill(opened, **{**good, id: ""})
        opened.click("#go")
        opened.wait(
            f"document.getElementById('error').textContent.startsWith('{name} is empty')", 5
        )
    fill(opened, **{**good, "steps": "0"})
    opened.click("#go")
    opened.wait("document.getElementById('error').textContent.startsWith('Steps is 0: ')", 5)
    fill(opened, **good)
    opened.evaluate("document.getElementById('status').textContent = ''")
    opened.click("#go")
    opened.wait("document.getElementById('status').textContent.endsWith('on wasm')", 120)
    assert text(opened, "error") == ""


def test_cancel_random_seed_and_save(page):
    _, opened = page
    fill(opened, prompt="red apple", seed="3", steps="400", guidance="1")
    opened.click("#go")
    opened.wait("document.getElementById('status').textContent.startsWith('step ')", 120)
    opened.click("#cancel")
    opened.wait("document.getElementById('status').textContent === 'cancelled'", 30)
    assert text(opened, "error") == ""
    opened.click("#random")
    seed = opened.evaluate("document.getElementById('seed').value")
    assert seed != "3"
    fill(opened, steps="1")
    opened.click("#go")
    opened.wait("document.getElementById('status').textContent.endsWith('on wasm')", 120)
    saved = opened.evaluate("document.getElementById('save').download")
    assert saved == f"sdlite-{seed}.png"
    first = opened.evaluate(
        "fetch(document.getElementById('save').href).then((a) => a.arrayBuffer())"
        ".then((b) => Array.from(new Uint8Array(b).slice(0, 8)))"
    )
    assert bytes(first) == b"\x89PNG\r\n\x1a\n"


def test_the_download_shows_its_progress_and_can_be_cancelled(page):
    _, opened = page
    seen = opened.evaluate("""(async () => {
      const seen = [], onProgress = (text, share) => seen.push([text, share]);
      await (await sdlite.Pipeline.load(".", {onProgress})).release();
      const stop = new AbortController();
      const said = await sdlite.Pipeline.load(".", {
        signal: stop.signal, onProgress: () => stop.abort(),
      }).catch((e) => e.name);
      return [seen, said];
    })()""")
    shares = [share for _, share in seen[0]]
    assert len(shares) >= 3
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert re.fullmatch(r"loading vae_decoder, (\S+) of \1 MB", seen[0][-1][0])
    assert seen[1] == "AbortError"


def test_a_cut_off_network_is_said(page):
    _, opened = page
    said = opened.evaluate("""(async () => {
      const right = globalThis.fetch;
      globalThis.fetch = async (url, given) => {
        const answer = await right(url, given);
        if (!`${url}`.endsWith("unet/model.onnx")) return answer;
        return new Response((await answer.arrayBuffer()).slice(0, 1000));
      };
      try { return await sdlite.Pipeline.load(".").catch((e) => e.message); }
      finally { globalThis.fetch = right; }
    })()""")
    assert re.search(r"unet/model.onnx ended after 1000 of \d+ bytes; load the page again", said)


def test_a_phone_does_not_scroll_sideways(opened, wide_image):
    opened.resize(375, 667)
    try:
        fill(opened, prompt="W" * 200, seed="9007199254740991")
        opened.evaluate("document.getElementById('warning').textContent = 'W'.repeat(200)")
        edit(opened, wide_image)
        assert opened.evaluate("document.documentElement.scrollWidth") == 375
        wide = opened.evaluate(
            "Array.from(document.querySelectorAll('input, button, select, canvas')).filter("
            "(e) => e.getBoundingClientRect().right > 375).map((e) => e.id)"
        )
        assert wide == []
        small = opened.evaluate(
            "Array.from(document.querySelectorAll('button, label.button, select')).filter("
            "(e) => e.offsetParent && e.getBoundingClientRect().height < 44).map((e) => e.id)"
        )
        assert small == []  # a finger hits them
    finally:
        opened.resize(1024, 768)


def test_opened_as_a_file_the_page_says_what_to_do(page):
    folder, _ = page
    with chromium.Browser(folder) as opened:
        opened.open((folder / "index.html").as_uri())
        opened.wait("location.protocol === 'file:' && document.readyState === 'complete'")
        assert "python3 -m http.server 8000" in text(opened, "error")
        shown = opened.evaluate(
            "document.body.innerText.trim().split('\\n').filter(Boolean).length"
        )
        assert shown == 2  # the title and the message


@pytest.mark.parametrize("wrong", ["padding", "noise"])
def test_the_check_starts_from_the_prompt(page, tmp_path, monkeypatch, wrong):
    """A page with right networks and another tokenizer or sampler is not kept."""
    if wrong == "padding":
        right = ClipTokenizer.to_json
        monkeypatch.setattr(ClipTokenizer, "to_json", lambda self: {**right(self), "pad": 0})
    else:
        schedule = web.schedule_of
        monkeypatch.setattr(
            web, "schedule_of", lambda model: {**schedule(model), "timestep_spacing": "leading"}
        )
    given = {"prompts": ["red apple"], "num_inference_steps": 2, "threads": 1}
    with pytest.raises(ExportError, match=r"PSNR of the target's own images \d") as refused:
        export(EMOJI, tmp_path / "out", target="web", **given)
    assert "image PSNR" not in str(refused.value)


def test_a_batch_is_refused_before_any_work():
    target = targets.of(profile.Profile("p", "web", batch=2))
    with pytest.raises(InputError, match="one image at a time: set batch = 1"):
        target.check(Artifact.open(EMOJI))


def test_weights_of_a_large_network_stay_beside_it(page, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "LARGE", 8 << 20)
    report = export(
        EMOJI,
        tmp_path / "out",
        target="web",
        prompts=["red apple"],
        num_inference_steps=1,
        threads=1,
    )
    assert {f for f in report["files"] if f.endswith(".data")} == {"unet/model.onnx.data"}
    assert report["parity"]["networks"]["unet"]["sqnr"] > 60
    assert json.loads((tmp_path / "out" / "sdlite-web.json").read_text())["weights"] == {
        "text_encoder": None,
        "unet": "model.onnx.data",
        "vae_decoder": None,
        "vae_encoder": None,
    }


def test_tokenizer_and_noise_are_pythons(page):
    folder, opened = page
    prompts = [
        "",
        "Red  apple!",
        "three o'clock 1234",
        "café ☕ naïve <|endoftext|>",
        "a " * 60,
        "e\u0301t\u00e9 x_y",
    ]
    tokenizer = ClipTokenizer.from_pretrained(folder / "tokenizer")
    opened.evaluate("import('./sdlite.js').then((m) => (globalThis.lib = m, true))")
    for prompt in prompts:
        script = (
            "lib.ClipTokenizer.load('sdlite-tokenizer.json').then((t) =>"
            f" Array.from(t.encode({json.dumps(prompt)}).ids, Number))"
        )
        with (
            pytest.warns(sdlite.tokenizer.TruncationWarning)
            if len(prompt) > 100
            else contextlib.nullcontext()
        ):
            assert opened.evaluate(script) == tokenizer([prompt])[0].tolist(), prompt
    for seed in (0, 1, 2**32 + 5):
        got = opened.evaluate(f"Array.from(lib.noise('{seed}', 512))")
        np.testing.assert_allclose(got, Noise(seed).normal((512,)), atol=1e-5)


def test_a_prompt_that_does_not_fit_is_said_on_the_page(page):
    _, opened = page
    opened.evaluate(
        "document.getElementById('steps').value = 1, document.getElementById('seed').value = 7"
    )
    for prompt, shown in (("red apple and " * 10 + "zebra", True), ("red apple", False)):
        opened.evaluate(f"document.getElementById('prompt').value = {json.dumps(prompt)}")
        opened.evaluate("document.getElementById('status').textContent = '', true")
        opened.click("#go")
        opened.wait("document.getElementById('status').textContent.endsWith('on wasm')", 120)
        said = opened.evaluate("document.getElementById('warning').textContent")
        assert (
            said.startswith("the text encoder reads 26 tokens; dropped: ")
            and said.endswith("zebra")
            if shown
            else said == ""
        )


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_are_pythons(page, spacing):
    _, opened = page
    schedule = {"timestep_spacing": spacing, "num_train_timesteps": 1000, "steps_offset": 1}
    opened.evaluate("import('./sdlite.js').then((m) => (globalThis.lib = m, true))")
    for n in (1, 4, 16, 25, 50):
        want = get_sampler("ddim", Schedule.from_config(schedule), n).timesteps.tolist()
        assert opened.evaluate(f"lib.timesteps({json.dumps(schedule)}, {n})") == want, n


# --- the page's code in Node.js, without a browser

_ORT = (
    "export const env = { wasm: {} }; export class Tensor {}; export const InferenceSession = {};"
)
_LOOPS = """
import { readFileSync } from "node:fs";
import { sampler, noise } from "./sdlite.js";
const out = JSON.parse(readFileSync("cases.json")).map(({ name, schedule, steps }) => {
  const size = 256, solver = sampler(name, schedule, steps), draws = noise(7, size * 60);
  let at = 0;
  const draw = () => draws.slice(at, (at += size));
  let x = draw().map((v) => v * solver.start);
  solver.times.forEach((t, i) => {
    const given = solver.scaled(i, x);
    x = solver.step(i, given.map((v) => Math.sin(v + t / 400) * 0.7), x, draw);
  });
  return { times: Array.from(solver.times), x: Array.from(x) };
});
console.log(JSON.stringify(out));
"""
_CALLS = """
import { Pipeline, guided, sampler } from "./sdlite.js";
const tell = (f) => { try { return f(); } catch (e) { return e.message; } };
const said = [
  tell(() => sampler("pndm", {}, 4)),
  tell(() => guided(NaN)), tell(() => guided(-1)), tell(() => guided(0.5, "blue")),
  guided(0, ""), guided(1), guided(1.01, "blue"),
];
const pipe = new Pipeline();
pipe.settings = {
  sampler: { name: "ddim", num_inference_steps: 2, guidance_scale: 1 },
  latent_shape: [1, 4, 2, 2], scaling_factor: 1, shift_factor: 0,
  schedule: {
    num_train_timesteps: 1000, timestep_spacing: "trailing", steps_offset: 1,
    prediction_type: "epsilon", final_alpha: 1,
    alphas_cumprod: Array.from({ length: 1000 }, (_, i) => 0.999 - i * 0.0009),
  },
};
const calls = [];
pipe.tokenizer = { encode: () => ({ ids: [1n], dropped: "" }) };
pipe.run = async (part, feeds) => {
  calls.push(part);
  if (part === "unet") return { data: feeds.sample.data.map((v) => v / 2) };
  return { data: new Float32Array(48), dims: [1, 3, 4, 4] };
};
for (const guidance_scale of [undefined, 0, 0.5, 1, 2]) {
  calls.length = 0;
  await pipe.generate({ prompt: "x", seed: 1, guidance_scale });
  said.push(calls.filter((c) => c === "unet").length);
}
console.log(JSON.stringify(said));
"""


@pytest.fixture
def node(tmp_path):
    """Run a module beside the page's sdlite.js; its one line of JSON."""
    if shutil.which("node") is None:
        pytest.skip("no Node.js on this machine")
    (tmp_path / "ort").mkdir()
    (tmp_path / "ort" / "ort.webgpu.bundle.min.mjs").write_text(_ORT)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    for file in ("sdlite.js", "tokenizer.js", "editing.js"):
        shutil.copy(profile.assets() / "web" / file, tmp_path)

    def run(script, cases=()):
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        (tmp_path / "script.js").write_text(script)
        done = subprocess.run(["node", "script.js"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def _with_scheduler(copy, name, config):
    """The embedded model with another sampler and scheduler config."""
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    folders.relist(copy)
    opened = Artifact.open(copy)
    opened.manifest.sampler = {
        **opened.manifest.sampler,
        **({} if name is None else {"name": name}),
    }
    if name is None:
        opened.manifest.sampler.pop("name")
    return opened


def test_the_pages_samplers_are_pythons(node, copy):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    cases, want = [], []
    for name, kind, spacing, zero, steps in itertools.product(
        ("ddim", "lcm", "euler"),
        ("epsilon", "v_prediction", "sample"),
        ("trailing", "leading", "linspace"),
        (False, True),
        (1, 3, 4, 25),
    ):
        if zero and kind == "epsilon":
            continue  # says nothing about x_0 there
        config = {
            **betas,
            "prediction_type": kind,
            "timestep_spacing": spacing,
            "rescale_betas_zero_snr": zero,
            "set_alpha_to_one": False,
        }
        cases.append(
            {
                "name": name,
                "steps": steps,
                "schedule": web.schedule_of(_with_scheduler(copy, name, config)),
            }
        )
        solver, draws = (
            get_sampler(name, Schedule.from_config(config), steps),
            Noise(7).normal((256 * 60,)),
        )
        x, at = draws[:256].reshape(1, 1, 16, 16) * np.float32(solver.init_noise_sigma), [256]

        class Drawn:
            def normal(self, shape, draws=draws, at=at):
                at[0] += 256
                return draws[at[0] - 256 : at[0]].reshape(shape)

        for i, t in enumerate(solver.timesteps):
            given = solver.scale_model_input(i, x)
            x = solver.step(
                i, (np.sin(given + np.float32(t / 400)) * 0.7).astype(np.float32), x, [Drawn()]
            )
        want.append((solver.timesteps, x.reshape(-1)))
    for case, made, (times, x) in zip(cases, node(_LOOPS, cases), want, strict=True):
        what = str(
            {
                **case,
                "schedule": {k: v for k, v in case["schedule"].items() if k != "alphas_cumprod"},
            }
        )
        np.testing.assert_allclose(made["times"], times, rtol=1e-6, err_msg=what)
        exact = (
            2e-3 if case["name"] == "euler" and case["schedule"]["rescale_betas_zero_snr"] else 2e-4
        )  # float32 at sigma = 4096
        np.testing.assert_allclose(
            made["x"], x, atol=exact * max(1.0, float(np.abs(x).max())), err_msg=what
        )


_PARTS = """
import { readFileSync } from "node:fs";
import { part, noise, preview } from "./sdlite.js";
const say = (f) => { try { return f(); } catch (e) { return e.message; } };
const [x0, z] = [noise(1, 256), noise(2, 256)];
const made = ({ steps, strength, ...settings }) => {
  const { solver, first } = part(settings, steps, strength);
  if (first === steps) return { first, times: Array.from(solver.times) };
  const x = solver.noised(first, x0, z), seen = solver.predicted(first, z, x);
  return { first, times: Array.from(solver.times), x: Array.from(x), seen: Array.from(seen) };
};
const out = JSON.parse(readFileSync("cases.json")).map((given) => say(() => made(given)));
console.log(JSON.stringify(out));
"""


def test_an_edit_begins_where_pythons_does(node, copy):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    cases, want, known = [], [], {}
    for name, kind, steps, strength, spreads in itertools.product(
        ("ddim", "lcm", "euler"),
        ("epsilon", "v_prediction", "sample"),
        (1, 4, 25),
        (0.0, 0.29, 0.5, 0.6, 1.0),
        (False, True),
    ):
        if spreads and name != "lcm":
            continue
        config = {**betas, "prediction_type": kind, "timestep_spacing": "leading"}
        schedule = Schedule.from_config(config)
        if (name, kind) not in known:
            known[name, kind] = web.schedule_of(_with_scheduler(copy, name, config))
        settings = known[name, kind]
        own = {"sampler": {"name": name}, "schedule": settings, "spreads": spreads}
        cases.append({"steps": steps, "strength": strength, **own})
        solver = get_sampler(name, schedule, steps)
        try:
            Edit([], None, strength).schedule(solver, spreads)
        except InputError:
            want.append(None)
            continue
        x0, z = (Noise(s).normal((1, 1, 16, 16)) for s in (1, 2))
        first = solver.begin
        x = None if first == steps else solver.add_noise(first, x0, z)
        seen = None if first == steps else solver.predicted(first, z, x)
        want.append((first, solver.timesteps, x, seen))
    assert None in want
    for case, made, right in zip(cases, node(_PARTS, cases), want, strict=True):
        what = str({k: v for k, v in case.items() if k != "schedule"})
        if right is None:
            assert "step" in made, what
            assert isinstance(made, str), what
            continue
        first, times, x, seen = right
        assert made["first"] == first, what
        np.testing.assert_allclose(made["times"], times, rtol=1e-6, err_msg=what)
        for name, value in (("x", x), ("seen", seen)):
            if value is not None:
                scale = max(1.0, float(np.abs(value).max()))
                np.testing.assert_allclose(
                    made[name], value.ravel(), atol=2e-4 * scale, err_msg=what
                )


_EDITS = """
import { readFileSync } from "node:fs";
import { Pipeline } from "./sdlite.js";
const pipe = new Pipeline(), out = [];
let z = null;
pipe.tokenizer = { encode: () => ({ ids: [1n], dropped: "" }) };
const networks = {
  text_encoder: () => ({ data: [], dims: [] }),
  unet: ({ sample, timestep }) => {
    const mean = sample.data.reduce((a, b) => a + b, 0) / sample.data.length;
    return { data: sample.data.map((v) => Math.sin(v + 9 * mean + timestep.data[0] / 400) * 0.7) };
  },
  vae_encoder: ({ sample }) => {
    const data = new Float32Array(1024);
    for (let i = 0; i < 1024; i++) {
      const [k, y, x] = [i >> 6, ((i >> 3) & 7) * 8, (i & 7) * 8];
      data[i] = sample.data[(k % 3) * 4096 + y * 64 + x] * (k < 8 ? 1 : 2);
    }
    return { data };
  },
  vae_decoder: ({ latent_sample }) =>
    ((z = Array.from(latent_sample.data)), { data: new Float32Array(12288), dims: [1, 3, 64, 64] }),
};
pipe.run = async (part, feeds) => networks[part](feeds);
for (const { settings, data, painted, ...given } of JSON.parse(readFileSync("cases.json"))) {
  pipe.settings = settings;
  const image = { data: Uint8Array.from(data), width: 64, height: 64, channels: 3 };
  const mask = { data: Uint8Array.from(painted), width: 64, height: 64, channels: 1 };
  const { calls } = await pipe.generate({
    prompt: "x", seed: 5, image, mask_image: painted.length ? mask : undefined, ...given,
  });
  out.push({ calls, z });
}
console.log(JSON.stringify(out));
"""


class Wave:
    """Networks that are the same few lines in JavaScript above."""

    @staticmethod
    def unet(sample, timestep, encoder_hidden_states):
        mean = np.float32(9 * sample.mean(dtype=np.float64))
        return {"out_sample": np.sin(sample + mean + timestep / np.float32(400)) * np.float32(0.7)}

    @staticmethod
    def vae_encoder(sample):
        corners = np.tile(sample[:, :, ::8, ::8], (1, 6, 1, 1))[:, :16]
        corners[:, 8:] *= 2
        return {"latent_parameters": corners}


def test_whole_edits_draw_what_python_draws(node, copy):
    """Of samplers that draw in each step too: posterior, noise, and what a mask passes over."""
    artifact = Artifact.open(copy)
    settings = web.page_settings(artifact, (), copy, (1, 8, 8, 8))
    settings |= {"bytes": {"vae_encoder/model.onnx": 1}, "scaling_factor": 0.5, "shift_factor": 0.1}
    configure = folders.configure
    configure(copy / "vae" / "config.json", scaling_factor=0.5, shift_factor=0.1)
    folders.relist(copy)
    pipe = sdlite.Pipeline.from_pretrained(copy, backend="onnxruntime", threads=1)
    pipe.networks.parts |= {"unet": Wave.unet, "vae_encoder": Wave.vae_encoder}
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8), np.zeros((64, 64), np.uint8)
    mask[:32, 16:] = 255
    cases, want = [], []
    for name, strength, masked in itertools.product(
        ("ddim", "lcm", "euler"), (0.0, 0.5, 1.0), (False, True)
    ):
        own = {**settings, "sampler": {"name": name, "guidance_scale": 1}}
        own["schedule"] = web.schedule_of(artifact.with_sampler(name))
        painted = mask.ravel().tolist() if masked else []
        given = {"strength": strength, "num_inference_steps": 4}
        cases.append({"settings": own, "data": image.ravel().tolist(), "painted": painted, **given})
        given |= {"mask_image": Image.fromarray(mask)} if masked else {}
        out = pipe("x", seed=5, image=image, sampler=name, output_type="latent", **given)
        want.append((out.calls, out.images / np.float32(0.5) + np.float32(0.1)))
    for case, made, (calls, z) in zip(cases, node(_EDITS, cases), want, strict=True):
        what = f"{case['settings']['sampler']}, {case['strength']}, mask {bool(case['painted'])}"
        assert made["calls"] == calls, what
        scale = max(1.0, float(np.abs(z).max()))
        np.testing.assert_allclose(made["z"], z.ravel(), atol=2e-3 * scale, err_msg=what)


def test_images_are_scaled_as_pillow_does(node):
    """Bit by bit: larger, smaller, one side, photographs of odd sizes; and masks."""
    rng, script = (
        np.random.default_rng(0),
        """
      import { readFileSync } from "node:fs";
      import { covering } from "./editing.js";
      console.log(JSON.stringify(JSON.parse(readFileSync("cases.json")).map(
        ({ data, to, ...sides }) =>
          Array.from(covering({ data: Uint8Array.from(data), ...sides }, ...to).data))));
    """,
    )
    cases, want = [], []
    for width, height, to in [
        (64, 64, (64, 64)),
        (31, 17, (64, 64)),
        (150, 101, (64, 64)),
        (64, 99, (64, 64)),
        (333, 47, (32, 64)),
        (129, 128, (64, 64)),  # 64.5 is 64 to Python
        (1, 1, (16, 16)),
    ]:
        for channels in (3, 1):
            array = rng.integers(0, 2, (height, width, channels)).astype(np.uint8) * 255
            if channels == 3:
                array = rng.integers(0, 256, array.shape).astype(np.uint8)
            sides = {"width": width, "height": height, "channels": channels, "to": to}
            cases.append({"data": array.ravel().tolist(), **sides})
            image = image_input.from_array(array if channels == 3 else array[..., 0])
            want.append(np.asarray(image_input.covering(image, *to)))
    for case, made, right in zip(cases, node(script, cases), want, strict=True):
        sides = str({k: v for k, v in case.items() if k != "data"})
        np.testing.assert_array_equal(np.uint8(made), right.ravel(), err_msg=sides)


def test_the_pages_guidance_and_latent_scaling_are_pythons(node, copy):
    from sdlite.sampling import guide

    rng = np.random.default_rng(0)
    u, c = rng.standard_normal((2, 1, 4, 8, 8)).astype(np.float32)
    vae = {"scaling_factor": 0.18215, "shift_factor": 0.1159}
    script = """
      import { readFileSync } from "node:fs";
      import { guide, unscaled } from "./sdlite.js";
      const { u, c, vae } = JSON.parse(readFileSync("cases.json"));
      const made = [guide(Float32Array.from(u), Float32Array.from(c), 7.3),
        unscaled(Float32Array.from(u), vae)];
      console.log(JSON.stringify(made.map((x) => Array.from(x))));
    """
    made = node(script, {"u": u.ravel().tolist(), "c": c.ravel().tolist(), "vae": vae})
    np.testing.assert_allclose(made[0], guide(u, c, 7.3).ravel(), rtol=1e-5, atol=1e-6)
    config = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps({**config, **vae}))
    folders.relist(copy)
    pipe = sdlite.Pipeline.from_pretrained(copy, threads=1)
    latents = rng.standard_normal((1, 8, 8, 8)).astype(np.float32)
    seen = []
    pipe.networks.parts["vae_decoder"] = lambda latent_sample: (
        seen.append(latent_sample) or {"sample": np.zeros((1, 3, 64, 64), np.float32)}
    )
    pipe.decode(latents)
    given = {"u": latents.ravel().tolist(), "c": [], "vae": vae}
    np.testing.assert_allclose(node(script, given)[1], seen[0].ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("guidance", "width"), [(8.5, 256), (1.0, 8), (0.0, 7), (7.3, 32)])
def test_the_pages_guidance_of_an_lcm_is_pythons(node, guidance, width):
    script = """
      import { readFileSync } from "node:fs";
      import { embedded } from "./sdlite.js";
      const [scale, width] = JSON.parse(readFileSync("cases.json"));
      console.log(JSON.stringify(Array.from(embedded(scale, width))));
    """
    made = np.float32(node(script, [guidance, width]))[None]
    right = guidance_embedding(guidance, width)
    np.testing.assert_allclose(made, right, atol=1e-3)  # ulp of an angle of 7500: 5e-4


def test_an_lcm_has_one_call_a_step_and_no_negative_prompt(node):
    lcm = """
pipe.settings.guidance_embedding = 8;
const fed = [];
const run = pipe.run;
pipe.run = (part, feeds) => (fed.push(feeds.timestep_cond?.dims ?? null), run(part, feeds));
calls.length = 0;
await pipe.generate({ prompt: "x", seed: 1, guidance_scale: 8 });
const negative = { prompt: "x", negative_prompt: "y", guidance_scale: 8 };
const why = await pipe.generate(negative).catch((e) => e.message);
console.log(JSON.stringify([calls, fed, why]));
"""
    script = _CALLS.replace("console.log(JSON.stringify(said));", lcm)
    calls, fed, why = node(script)
    assert calls == ["text_encoder", "unet", "unet", "vae_decoder"]
    assert fed == [None, [1, 8], [1, 8], None]
    assert "takes its guidance as an input: a negative prompt has no effect" in why


def test_a_model_of_two_text_encoders_is_refused_before_any_work(copy, monkeypatch):
    pooled = Tensor("text_embeds", ("B", "16"), "float32", "pooled text")
    monkeypatch.setattr(StableDiffusion, "unet_inputs", lambda self, unet: (pooled,))
    with pytest.raises(InputError, match=r"is given text_embeds besides .* such as onnx"):
        targets.of(profile.load("web")).check(Artifact.open(copy))


def test_the_page_refuses_other_samplers_and_takes_guidance_as_python_does(node):
    pndm, nan, negative, blue, *rest = node(_CALLS)
    assert "ddim, lcm, euler, not pndm: export the model with --sampler ddim" in pndm
    assert "0 to 1 is none" in nan
    assert "0 to 1 is none" in negative
    assert "no effect at guidance 0.5" in blue
    assert rest == [False, False, True, 2, 2, 2, 2, 4]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("pndm", {"_class_name": "DDIMScheduler"}),
        (None, {"_class_name": "UniPCMultistepScheduler"}),
        (None, {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}),
        ("euler-karras", {"_class_name": "EulerDiscreteScheduler"}),
    ],
)
def test_an_export_of_another_sampler_is_refused_before_any_work(copy, name, config):
    with pytest.raises(
        InputError, match=r"target web samples with ddim, lcm, euler; .*--sampler ddim"
    ):
        targets.of(profile.load("web")).check(_with_scheduler(copy, name, config))
    targets.of(profile.load("web")).check(_with_scheduler(copy, "ddim", config))


def test_a_broken_sampler_is_seen_by_the_click_and_errors_are_shown(page):
    _, opened = page
    opened.evaluate(
        "document.getElementById('steps').value = 4, document.getElementById('seed').value = 1"
    )
    opened.evaluate(
        "sdlite.pipes.wasm = {generate: async () => { throw new Error('latents are not finite');"
        " }}, true"
    )
    opened.click("#go")
    opened.wait("document.getElementById('error').textContent === 'latents are not finite'", 10)
    with pytest.raises(ExportError, match="in the browser: Error: no"):
        opened.evaluate("Promise.reject(new Error('no'))")


def test_the_target_is_imported_where_fcntl_is_not():
    code = (
        "import sys; sys.modules['fcntl'] = None; import sdlite.exporters.targets.web as w;"
        "import os; os.name = 'nt'; print(w.chromium.lacking())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "only Linux and macOS have" in done.stdout, done.stderr


def test_runtime_from_a_folder_and_by_hash(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"lacks ort\.webgpu"):
        web.onnxruntime_web(str(tmp_path))
    for name in web.FILES:
        (tmp_path / name).write_bytes(b"x")
    assert web.onnxruntime_web(str(tmp_path)) == dict.fromkeys(web.FILES, b"x")
    monkeypatch.setenv("SDLITE_CACHE", str(tmp_path))
    monkeypatch.setattr(web.shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError, match="install npm"):
        web.onnxruntime_web()


def test_the_page_scales_latents_as_the_pipeline_does(copy, tmp_path, monkeypatch):
    """TAESD's config as its authors publish it may lack the factor, which is 1 then, not Stable
    Diffusion's 0.18215.
    """
    path = copy / "vae" / "config.json"
    config = json.loads(path.read_text()) | {"_class_name": "AutoencoderTiny"}
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "scaling_factor"}))
    folders.relist(copy)
    monkeypatch.setattr(web, "onnxruntime_web", lambda given: {})
    targets.of(profile.load("web")).finish(tmp_path, Artifact.open(copy), (1, 8, 8, 8))
    assert json.loads((tmp_path / "sdlite-web.json").read_text())["scaling_factor"] == 1.0


def test_no_browser_means_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(chromium, "find", lambda: None)
    monkeypatch.setattr(web, "onnxruntime_web", lambda given: dict.fromkeys(web.FILES, b""))
    report = export(
        EMOJI,
        tmp_path / "out",
        target="web",
        prompts=["red apple"],
        num_inference_steps=1,
        threads=1,
    )
    assert "no browser here" in report["not_run"]["unet"]
    assert "handed to the converter" in report["checked_by"]
