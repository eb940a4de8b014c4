"""A static folder for browsers: the networks as ONNX, onnxruntime-web (wasm and WebGPU), tokenizer
and sampler in JavaScript, a page.

onnxruntime-web comes from npm (`npm pack`, checked by hash) or from the profile's option
`onnxruntime_web`, a folder with its dist files. Checked in a headless Chromium, network by network
and by the picture.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sdlite.artifact import Artifact
from sdlite.errors import ExportError, InputError, MissingExtraError, UnknownNameError
from sdlite.exporters.profile import Profile, assets
from sdlite.exporters.targets import NotRunnable
from sdlite.exporters.targets import onnx as onnx_target
from sdlite.exporters.targets.web import chromium
from sdlite.families import vae_config
from sdlite.io import cache_root, scratch, write
from sdlite.sampling import Schedule, get_sampler
from sdlite.sampling.schedule import STEPS_OFFSET
from sdlite.sampling.solvers import DDIM
from sdlite.spec import SPECS
from sdlite.tokenizer import ClipTokenizer

PACKAGES = ("onnx", "onnxruntime")
PRECISIONS = ("fp32", "fp16", "int8-static")
DYNAMIC = False
OPTIONS = {"provider", "onnxruntime_web"}  # of PROVIDERS; a dist folder of onnxruntime-web
PROVIDERS = ("wasm", "webgpu")

VERSION = "1.30.0"
SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
LARGE = 128 << 20  # bytes of a network
SAMPLERS = ("ddim", "lcm", "euler")  # of sdlite.js
FILES = ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm")


def convert(part: str, graph: Path, out: Path, profile: Profile) -> list[Path]:
    """One file each: a browser fetches it in one request. The weights of a large network stay
    beside it, as it is copied while it is read.
    """
    files = onnx_target.convert(part, graph, out, profile)
    if sum(f.stat().st_size for f in files) > LARGE:
        return files
    model = onnx.load(str(files[0]))
    for path in files:
        path.unlink()
    onnx.save_model(model, str(files[0]), save_as_external_data=False)
    return files[:1]


def check(artifact: Artifact) -> None:
    """Refuse a model whose sampler the page does not have.

    Raises:
        InputError: another sampler, or an Euler with settings that the page does not read.
    """
    name, said = artifact.sampler_name, Schedule.from_config(artifact.config("scheduler")).settings
    own = {
        k: said[k]
        for k in ("interpolation_type", "final_sigmas_type")
        if name == "euler" and k in said
    }
    if name not in SAMPLERS or set(own.values()) - {"linear", "zero"}:
        raise InputError(
            f"target web samples with {', '.join(SAMPLERS)}; this model's sampler is"
            f" {name!r}{f' with {own}' if own else ''}. Export it with one of them: sampler='ddim'"
            " (--sampler ddim)."
        )


def schedule_of(artifact: Artifact) -> dict[str, Any]:
    """What sdlite.js reads of the scheduler, for its three samplers."""
    schedule = Schedule.from_config(artifact.config("scheduler"))
    own = get_sampler(artifact.sampler_name, schedule, 1)
    return {
        "num_train_timesteps": schedule.num_train_timesteps,
        "timestep_spacing": own.timestep_spacing,
        "steps_offset": STEPS_OFFSET,
        "prediction_type": schedule.prediction_type,
        "rescale_betas_zero_snr": schedule.rescale_betas_zero_snr,
        "final_alpha": float(DDIM(schedule, 1).final),
        "original_inference_steps": schedule.settings.get("original_inference_steps", 50),
        "timestep_scaling": schedule.settings.get("timestep_scaling", 10.0),
        "alphas_cumprod": schedule.alphas_cumprod().tolist(),
    }


def finish(
    out: Path, artifact: Artifact, profile: Profile, latent_shape: tuple[int, ...]
) -> list[Path]:
    """The page, the runtime, and `sdlite-*.json`: what the JavaScript reads instead of configs."""
    made = [Path(shutil.copyfile(f, out / f.name)) for f in sorted((assets() / "web").iterdir())]
    (out / "ort").mkdir()
    for name, data in runtime(profile).items():
        (out / "ort" / name).write_bytes(data)
        made.append(out / "ort" / name)
    assert artifact.manifest is not None
    vae = vae_config(artifact.config("vae"))
    settings = {
        "name": artifact.manifest.name,
        "sampler": artifact.samples_with,
        "latent_shape": latent_shape,
        "weights": {p: next((f.name for f in (out / p).glob("*.data")), None) for p in SPECS},
        "scaling_factor": vae["scaling_factor"],
        "shift_factor": vae.get("shift_factor") or 0.0,
        "schedule": schedule_of(artifact),
    }
    config = artifact.config("text_encoder")
    tokenizer = ClipTokenizer.from_pretrained(artifact.files.part("tokenizer"), config)
    for name, content in (("web", settings), ("tokenizer", tokenizer.to_json())):
        made.append(out / f"sdlite-{name}.json")
        made[-1].write_text(json.dumps(content) + "\n", encoding="utf-8")
    return made


def runtime(profile: Profile) -> dict[str, bytes]:
    """onnxruntime-web's files by name.

    Raises:
        MissingExtraError: no npm and no folder given. ExportError: npm failed, or what it gave has
            another hash.
    """
    given = profile.options.get("onnxruntime_web")
    if given is not None:
        missing = [n for n in FILES if not (Path(given) / n).is_file()]
        if missing:
            raise ExportError(
                f"onnxruntime_web={given} lacks {', '.join(missing)}; give the dist folder of"
                f" onnxruntime-web {VERSION}."
            )
        return {n: (Path(given) / n).read_bytes() for n in FILES}
    kept = cache_root() / f"onnxruntime-web-{VERSION}.tgz"
    if not kept.exists() or hashlib.sha256(kept.read_bytes()).hexdigest() != SHA256:
        _download(kept)
    with tarfile.open(kept) as tar:
        return {n: tar.extractfile(f"package/dist/{n}").read() for n in FILES}  # type: ignore[union-attr]


def _download(kept: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise MissingExtraError(
            f"target web needs onnxruntime-web {VERSION}: install npm (Node.js), or set the"
            " profile's option onnxruntime_web to its dist folder."
        )
    with scratch("npm") as tmp:
        done = subprocess.run(
            [npm, "pack", f"onnxruntime-web@{VERSION}"], cwd=tmp, capture_output=True, text=True
        )
        found = list(tmp.glob("*.tgz"))
        if done.returncode or not found:
            raise ExportError(
                f"npm could not fetch onnxruntime-web {VERSION}: {done.stderr.strip()[-300:]}"
            )
        data = found[0].read_bytes()
    if (got := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ExportError(
            f"onnxruntime-web {VERSION} has sha256 {got}, not {SHA256}; it was changed on its way."
            " Nothing was written."
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    write(kept, data)


class _Networks:
    """The exported folder in one browser, for all three networks; `run` hands out its parts."""

    def __init__(self, folder: Path, provider: str):
        large = sum(f.stat().st_size for f in folder.rglob("model.onnx*")) >> 20
        self.browser = chromium.Browser(folder, timeout=300 + 3 * large)
        self.browser.wait("document.body?.dataset.ready === 'yes'")
        self.browser.evaluate(
            f"sdlite.Pipeline.load('.', {{provider: '{provider}'}}).then((p) => (sdlite.pipe = p,"
            " true))"
        )
        self.browser.evaluate(_BRIDGE)

    def call(self, part: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        feeds = {
            k: {
                "type": v.dtype.name,
                "dims": v.shape,
                "data": base64.b64encode(v.tobytes()).decode(),
            }
            for k, v in inputs.items()
        }
        answer = self.browser.evaluate(f"bridge({json.dumps(part)}, {json.dumps(feeds)})")
        return np.frombuffer(base64.b64decode(answer["data"]), np.float32).reshape(answer["dims"])

    def clock(self, prompt: str, steps: int | None, provider: str) -> dict[str, Any]:
        """Seconds as the page has them: a pipeline loaded anew and its first picture, then two more
        pictures.
        """
        settings = json.dumps({"prompt": prompt, "seed": 0, "num_inference_steps": steps})
        found: dict[str, Any] = self.browser.evaluate(f"clock({settings}, {json.dumps(provider)})")
        return found


_BRIDGE = """
globalThis.bridge = async (part, feeds) => {
  const kinds = {float32: Float32Array, int64: BigInt64Array};
  for (const f of Object.values(feeds)) {
    const bytes = Uint8Array.from(atob(f.data), (c) => c.charCodeAt(0));
    f.data = new kinds[f.type](bytes.buffer);
  }
  const out = await sdlite.pipe.run(part, feeds);
  let text = "";
  const bytes = new Uint8Array(out.data.buffer, out.data.byteOffset, out.data.byteLength);
  for (let i = 0; i < bytes.length; i += 32768) {
    text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  }
  return {data: btoa(text), dims: out.dims};
};
globalThis.clock = async ({num_inference_steps, ...given}, provider) => {
  if (num_inference_steps !== null) given.num_inference_steps = num_inference_steps;
  await sdlite.pipe.release();
  const begin = performance.now(), pipe = await sdlite.Pipeline.load(".", {provider});
  const load = (performance.now() - begin) / 1000;
  const seconds = [];
  for (let i = 0; i < 3; i++) seconds.push((await pipe.generate(given)).seconds);
  const steps = given.num_inference_steps ?? pipe.settings.sampler.num_inference_steps;
  const guidance = pipe.settings.sampler.guidance_scale;
  return {load, first: load + seconds[0], later: seconds.slice(1), steps, guidance};
};
true
"""


def run_all(
    folder: Path, profile: Profile, threads: int | None
) -> tuple[
    dict[str, Callable[..., np.ndarray]],
    Callable[[], None],
    Callable[[str, int | None], dict[str, Any]],
]:
    """The three networks in one browser, how to close it, and how long its own pictures take."""
    provider = profile.options.get("provider", PROVIDERS[0])
    if provider not in PROVIDERS:
        raise UnknownNameError(
            f"profile {profile.name}: provider={provider!r} is not known; choose one of"
            f" {', '.join(PROVIDERS)}."
        )
    if chromium.find() is None:
        raise NotRunnable(
            f"no browser here; install one of {', '.join(chromium.NAMES)}, or name it in"
            " SDLITE_CHROMIUM"
        )
    networks = _Networks(folder, provider)

    def of(part: str) -> Callable[..., np.ndarray]:
        types = {t.name: np.dtype(t.dtype) for t in SPECS[part].inputs}
        return lambda **inputs: networks.call(
            part, {k: np.asarray(v, types[k]) for k, v in inputs.items()}
        )

    def clock(prompt: str, steps: int | None) -> dict[str, Any]:
        return networks.clock(prompt, steps, provider)

    return {p: of(p) for p in SPECS}, networks.browser.close, clock
