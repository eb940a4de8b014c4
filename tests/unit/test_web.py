"""The web export in a real headless Chromium: a click makes Python's picture; the gate can fail."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

import sdlite
from sdlite.artifact import Artifact
from sdlite.errors import ExportError, InputError, MissingExtraError
from sdlite.exporters import profile, targets
from sdlite.exporters.export import export, table
from sdlite.exporters.targets import web
from sdlite.exporters.targets.web import chromium
from sdlite.families.sd import StableDiffusion, guidance_embedding
from sdlite.sampling import Noise
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


def test_a_phone_does_not_scroll_sideways(page):
    _, opened = page
    opened.resize(375, 667)
    try:
        fill(opened, prompt="W" * 200, seed="9007199254740991")
        opened.evaluate("document.getElementById('warning').textContent = 'W'.repeat(200)")
        assert opened.evaluate("document.documentElement.scrollWidth") == 375
        wide = opened.evaluate(
            "Array.from(document.querySelectorAll('input, button, select, canvas')).filter("
            "(e) => e.getBoundingClientRect().right > 375).map((e) => e.id)"
        )
        assert wide == []
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
    from sdlite.sampling import Schedule, get_sampler

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
    from sdlite.sampling import Schedule, get_sampler

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
