"""Ten images of the embedded student are what they were: bit by bit on the CPU that made them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime", reason="needs the cpu extra")

from tests import golden_images

ABOUT = json.loads((golden_images.FOLDER / "emoji-ten.json").read_text())
LEVELS = 2  # of 255: what other kernels than those of the CPU that made them may change


@pytest.mark.filterwarnings("ignore")
def test_ten_images_are_what_they_were():
    images = golden_images.made()
    strip = np.asarray(Image.open(golden_images.FOLDER / "emoji-ten.png"))
    for i, image in enumerate(images):
        old = strip[: image.shape[0], 64 * i : 64 * i + 64].astype(int)
        assert np.abs(old - image).max() <= LEVELS, golden_images.PROMPTS[i]
    if golden_images.signature() == ABOUT["signature"]:
        assert [golden_images.digest(x) for x in images] == ABOUT["sha256"]
    assert len(set(ABOUT["sha256"])) == len(images) == 10
