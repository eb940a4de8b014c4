"""The exported page in a headless Chromium: its networks, and the images that it makes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TypedDict, cast

import numpy as np

from sdlite.backends import Network
from sdlite.exporters.targets.base import Seconds
from sdlite.exporters.targets.web import chromium
from sdlite.spec import Arrays, IOSpec


class _Array(TypedDict):
    """An array as the script hands it over: base64 of its bytes."""

    data: str
    dims: list[int]


class Page:
    """An exported folder in one browser. `provider`: "wasm" or "webgpu"."""

    def __init__(self, folder: Path, provider: str):
        large = sum(f.stat().st_size for f in folder.rglob("model.onnx*")) >> 20
        self.provider = provider
        self.browser = chromium.Browser(folder, timeout=300 + 3 * large)
        self.browser.wait("document.body?.dataset.ready === 'yes'")
        self.browser.evaluate(f"globalThis.provider = {json.dumps(provider)}")
        self.browser.evaluate(SCRIPT)
        self.browser.evaluate("open_again()")

    def close(self) -> None:
        """End the browser."""
        self.browser.close()

    def network(self, spec: IOSpec) -> Network:
        """One of the networks, called with numpy arrays."""
        part, types = spec.part, {t.name: np.dtype(t.dtype) for t in spec.inputs}

        def call(**inputs: np.ndarray) -> Arrays:
            feeds = {k: _sent(np.asarray(v, types[k])) for k, v in inputs.items()}
            script = f"run_network({json.dumps(part)}, {json.dumps(feeds)})"
            answer = cast(_Array, self.browser.evaluate(script))
            return {spec.output.name: _received(answer, np.float32)}

        return call

    def image(self, prompt: str, seed: int, steps: int | None) -> np.ndarray:
        """uint8 (H, W, 3): an image as a visitor of the page gets it."""
        given = {"prompt": prompt, "seed": seed, "num_inference_steps": steps}
        made = cast(_Array, self.browser.evaluate(f"make_image({json.dumps(given)})"))
        return _received(made, np.uint8)[..., :3]

    def edit(
        self, prompt: str, image: np.ndarray, strength: float, seed: int, steps: int | None
    ) -> np.ndarray:
        """uint8 (H, W, 3): an edit of one, as a visitor of the page gets it."""
        given = {"prompt": prompt, "seed": seed, "num_inference_steps": steps, "strength": strength}
        script = f"edit_image({json.dumps(given)}, {json.dumps(_sent(image))})"
        return _received(cast(_Array, self.browser.evaluate(script)), np.uint8)[..., :3]

    def clock(self, prompt: str, steps: int | None) -> Seconds:
        """Seconds as a visitor has them: a pipeline is opened anew, and three images follow."""
        given = {"prompt": prompt, "seed": 0, "num_inference_steps": steps}
        return cast(Seconds, self.browser.evaluate(f"clock({json.dumps(given)})"))


def _sent(x: np.ndarray) -> dict[str, object]:
    data = base64.b64encode(x.tobytes()).decode()
    return {"type": x.dtype.name, "dims": x.shape, "data": data}


def _received(answer: _Array, kind: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(answer["data"]), kind).reshape(answer["dims"])


SCRIPT = """
globalThis.open_again = async () => {
  await globalThis.pipe?.release();
  globalThis.pipe = await sdlite.Pipeline.load(".", {provider});
  return true;
};
globalThis.sent = (array, dims) => {
  let text = "";
  const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  for (let i = 0; i < bytes.length; i += 32768) {
    text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  }
  return {data: btoa(text), dims};
};
globalThis.run_network = async (part, feeds) => {
  const kinds = {float32: Float32Array, int64: BigInt64Array};
  for (const f of Object.values(feeds)) {
    const bytes = Uint8Array.from(atob(f.data), (c) => c.charCodeAt(0));
    f.data = new kinds[f.type](bytes.buffer);
  }
  const out = await pipe.run(part, feeds);
  return sent(out.data, out.dims);
};
globalThis.generate = ({num_inference_steps, ...given}) =>
  pipe.generate(num_inference_steps === null ? given : {...given, num_inference_steps});
globalThis.make_image = async (given) => {
  const made = await generate(given);
  return sent(made.pixels, [made.height, made.width, 4]);
};
globalThis.edit_image = async (given, image) => {
  const [height, width] = image.dims;
  const data = Uint8Array.from(atob(image.data), (c) => c.charCodeAt(0));
  return make_image({...given, image: {data, width, height, channels: 3}});
};
globalThis.clock = async (given) => {
  const begin = performance.now();
  await open_again();
  const load = (performance.now() - begin) / 1000;
  const seconds = [];
  for (let i = 0; i < 3; i++) seconds.push((await generate(given)).seconds);
  const own = pipe.settings.sampler, steps = given.num_inference_steps ?? own.num_inference_steps;
  const [first, ...later] = seconds;
  return {load, first: load + first, later, steps, guidance: own.guidance_scale};
};
true
"""
