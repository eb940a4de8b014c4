"""A static folder for browsers: the networks as ONNX, onnxruntime-web (wasm and WebGPU), tokenizer
and sampler in JavaScript, a page.

onnxruntime-web comes from npm (`npm pack`, checked by hash) or from the profile's option
`onnxruntime_web`, a folder with its dist files. The export is checked in a headless Chromium:
network by network, and by the images that the page makes of prompts with its own tokenizer, noise
and sampler.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from sdlite.artifact import Artifact
from sdlite.errors import ExportError, InputError, MissingExtraError
from sdlite.exporters import device
from sdlite.exporters.profile import assets
from sdlite.exporters.targets.base import NotRunnable, Running, Runtime, Target
from sdlite.exporters.targets.onnx import write_graph
from sdlite.exporters.targets.web import chromium
from sdlite.exporters.targets.web.page import Page
from sdlite.families import vae_config, vae_stride
from sdlite.io import cache_root, scratch, write
from sdlite.sampling import Schedule, get_sampler
from sdlite.sampling.schedule import STEPS_OFFSET
from sdlite.sampling.solvers import DDIM
from sdlite.settings import settings
from sdlite.tokenizer import ClipTokenizer

VERSION = "1.30.0"  # of onnxruntime-web
SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
FILES = ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
LARGE = 128 << 20  # bytes of a network
SAMPLERS = ("ddim", "lcm", "euler")  # of sdlite.js
USAGE = """
## Serve it

Any static server will do; opened as a file the page does not run. Here:

```bash
python3 -m http.server 8000
```

and open http://localhost:8000. With the headers `Cross-Origin-Opener-Policy: same-origin` and
`Cross-Origin-Embedder-Policy: require-corp` wasm has more than one thread. In a page of your own:

```js
import { Pipeline } from "./sdlite.js";

const pipe = await Pipeline.load(".");
const made = await pipe.generate({ prompt: "a red apple", seed: 0 });
// made.pixels: RGBA, made.width, made.height
```
"""
EDITED = """
An image of the visitor's is edited so. A mask is one too, with one channel; what is 128 or more is
painted anew:

```js
import { editing } from "./sdlite.js";

const image = await editing.read(file); // a File or Blob
const edited = await pipe.generate({ prompt: "a green apple", image, strength: 0.6, seed: 0 });
// edited.calls: how many steps were made
```
"""


@settings
@dataclass(frozen=True)
class Options:
    """`provider`: what the check runs on. `onnxruntime_web`: dist folder of that npm package, in
    place of the one that is fetched.
    """

    provider: Literal["wasm", "webgpu"] = "wasm"
    onnxruntime_web: str | None = None


class Web(Target[Options]):
    """Browsers, by onnxruntime-web."""

    name = "web"
    packages = ("onnx", "onnxruntime")
    precisions = ("fp32", "fp16", "int8-static")
    opened_by = ("onnxruntime", "openvino")
    options_type = Options

    def runtime(self) -> Runtime:
        """The page, and a module for other pages."""
        edited = EDITED if "vae_encoder" in self.specs else ""
        return Runtime("browsers, by onnxruntime-web", usage=USAGE + edited)

    def check(self, artifact: Artifact) -> None:
        """Refuse a model that the page does not run, and batches.

        Raises:
            InputError: another sampler, an Euler with settings that the page does not read, more
                than one text encoder, further inputs of the UNet than its guidance, or a batch.
        """
        if self.profile.rows != 1:
            raise InputError(
                f"profile {self.profile.name}: batch={self.profile.batch}; the page of target web"
                " makes one image at a time: set batch = 1."
            )
        if why := device.unfed(artifact):
            raise InputError(
                f"the page of target web runs one text encoder and feeds timestep_cond alone;"
                f" {artifact.name} is another model: {why}. Choose another target, such as onnx."
            )
        name = artifact.sampler_name
        said = Schedule.from_config(artifact.config("scheduler")).settings
        read = ("interpolation_type", "final_sigmas_type") if name == "euler" else ()
        own = {k: said[k] for k in read if k in said}
        if name not in SAMPLERS or set(own.values()) - {"linear", "zero"}:
            raise InputError(
                f"target web samples with {', '.join(SAMPLERS)}; this model's sampler is"
                f" {name!r}{f' with {own}' if own else ''}. Export it with one of them:"
                " sampler='ddim' (--sampler ddim)."
            )

    def convert(self, part: str, graph: Path, out: Path) -> list[Path]:
        """One file for each network: a browser fetches it in one request. The weights of a large
        network stay beside it, as it is copied while it is read.
        """
        files = write_graph(graph, out, self.precision(part))
        if sum(f.stat().st_size for f in files) > LARGE:
            return files
        model = onnx.load(str(files[0]))
        for path in files:
            path.unlink()
        onnx.save_model(model, str(files[0]), save_as_external_data=False)
        return files[:1]

    def finish(self, out: Path, artifact: Artifact, latent_shape: tuple[int, ...]) -> list[Path]:
        """The page, onnxruntime-web, and what the JavaScript reads instead of configs:
        `sdlite-web.json` and `sdlite-tokenizer.json`.
        """
        made = [
            Path(shutil.copyfile(f, out / f.name)) for f in sorted((assets() / "web").iterdir())
        ]
        (out / "ort").mkdir()
        for name, data in onnxruntime_web(self.options.onnxruntime_web).items():
            (out / "ort" / name).write_bytes(data)
            made.append(out / "ort" / name)
        config = artifact.config("text_encoder")
        tokenizer = ClipTokenizer.from_pretrained(artifact.files.part("tokenizer"), config)
        for name, content in (
            ("web", page_settings(artifact, tuple(self.specs), out, latent_shape)),
            ("tokenizer", tokenizer.to_json()),
        ):
            made.append(out / f"sdlite-{name}.json")
            made[-1].write_text(json.dumps(content) + "\n", encoding="utf-8")
        return made

    def run_all(self, folder: Path, threads: int | None) -> Running:
        """The page in a headless Chromium."""
        if why := chromium.lacking():
            raise NotRunnable(why)
        page = Page(folder, self.options.provider)
        networks = {part: page.network(spec) for part, spec in self.specs.items()}
        return Running(networks, page.close, page.image, page.clock, page.edit)


def page_settings(
    artifact: Artifact, parts: Sequence[str], folder: Path, latent_shape: Sequence[int]
) -> dict[str, object]:
    """What `sdlite-web.json` holds, for the networks in `folder`."""
    vae = vae_config(artifact.config("vae"))
    stride = vae_stride(artifact.config("vae"))
    beside = {p: next((f.name for f in (folder / p).glob("*.data")), None) for p in parts}
    return {
        "name": artifact.name,
        "sampler": artifact.samples_with,
        "latent_shape": latent_shape,
        "size": [side * stride for side in latent_shape[2:]],
        "preview": artifact.manifest.preview if artifact.manifest else None,
        "spreads": artifact.family.spreads(artifact.index),
        "guidance_embedding": artifact.config("unet").get("time_cond_proj_dim"),
        "weights": beside,
        "bytes": {
            f"{p}/{f.name}": f.stat().st_size
            for p in parts
            for f in sorted((folder / p).glob("model.onnx*"))
        },
        "scaling_factor": vae["scaling_factor"],
        "shift_factor": vae.get("shift_factor") or 0.0,
        "schedule": schedule_of(artifact),
    }


def schedule_of(artifact: Artifact) -> dict[str, object]:
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


def onnxruntime_web(given: str | None = None) -> dict[str, bytes]:
    """onnxruntime-web's files by name, from the dist folder `given` or from npm.

    Raises:
        MissingExtraError: no npm and no folder given. ExportError: npm failed, or what it gave has
            another hash.
    """
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
