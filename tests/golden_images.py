"""Ten images of the embedded student on onnxruntime, as they were before the code was moved.

    python -m tests.golden_images     # writes them anew, from the code that is there

The images are one lossless strip; their hashes hold on the CPU that made them, since engines choose
their kernels by CPU.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

import sdlite
from sdlite import cpu

FOLDER = Path(__file__).parent / "golden"
PROMPTS = (
    "a red apple on a blue background",
    "pizza",
    "a fox on a green background",
    "a house",
    "grinning face on a yellow background",
    "a cat",
    "a rocket on a black background",
    "a tree",
    "a snowman on a white background",
    "a bicycle",
)


def made() -> list[np.ndarray]:
    """Image i is prompt i from seed i: four with the model's own steps, then other calls."""
    more: list[dict[str, object]] = [{}] * 4 + [
        {"num_inference_steps": 1},
        {"sampler": "euler", "num_inference_steps": 3},
        {"guidance_scale": 2.0, "negative_prompt": "a dog"},
        {"height": 96, "width": 64},
        {"sampler": "dpm++2m", "num_inference_steps": 5},
        {"sampler": "lcm"},
    ]
    with sdlite.Pipeline.from_pretrained("emoji", backend="onnxruntime", threads=1) as pipe:
        return [
            np.asarray(pipe(p, seed=i, **call).images[0])
            for i, (p, call) in enumerate(zip(PROMPTS, more, strict=True))
        ]


def digest(image: np.ndarray) -> str:
    """SHA-256 of shape and pixels."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def signature() -> dict[str, object]:
    """What the hashes depend on besides the code."""
    import onnxruntime

    return {
        "cpu": [cpu.name(), sorted(cpu.features())],
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    images = made()
    strip = np.zeros((96, 64 * len(images), 3), np.uint8)
    for i, image in enumerate(images):
        strip[: image.shape[0], 64 * i : 64 * i + 64] = image
    Image.fromarray(strip).save(FOLDER / "emoji-ten.png", optimize=True)
    about = {"signature": signature(), "sha256": [digest(x) for x in images]}
    (FOLDER / "emoji-ten.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
