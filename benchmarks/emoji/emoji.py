"""The emoji data as the trainings and the quality benchmark see it: pictures, captions, colours,
sampling weights.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlite.distill import pixels, shards

SHARD = Path(__file__).parent / "emoji-000000.tar.gz"
STUDENT = Path(__file__).parents[2] / "sdlite" / "models" / "emoji"
TOKENIZER = STUDENT / "tokenizer"
COLOURS = {  # background name -> sRGB
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (220, 50, 47),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 80),
    "green": (80, 180, 90),
    "blue": (70, 120, 220),
    "purple": (150, 90, 200),
    "pink": (250, 170, 200),
    "gray": (150, 150, 150),
}
NAMES = list(COLOURS)


def clean(text: str) -> str:
    """'man: medium-dark skin tone' -> 'man, medium-dark skin tone'."""
    return re.sub(
        r"\s+",
        " ",
        text.lower().replace("’", "'").replace("“", "").replace("”", "").replace(":", ","),
    ).strip()


@dataclass
class Emoji:
    rgba: Tensor  # uint8 (N, 4, 64, 64)
    captions: list[str]
    tags: list[list[str]]
    concepts: list[str]
    keys: list[str]
    heldout: Tensor  # bool (N,)

    def __len__(self) -> int:
        return len(self.keys)

    def weights(self) -> Tensor:
        """(N,) float: 0 for held-out pictures; a concept weighs sqrt(its pictures), shared equally
        among them.
        """
        counts = Counter(
            c for c, h in zip(self.concepts, self.heldout.tolist(), strict=True) if not h
        )
        return torch.tensor(
            [
                0.0 if h else counts[c] ** -0.5
                for c, h in zip(self.concepts, self.heldout.tolist(), strict=True)
            ]
        )

    def composite(self, indices: Tensor, colours: Tensor) -> Tensor:
        """Pictures on a plain background: float (B, 3, 64, 64) in [-1, 1]. `colours` are indices
        into NAMES.
        """
        table = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
        x = self.rgba[indices].float()
        alpha = x[:, 3:] / 255
        return (x[:, :3] * alpha + table[colours][:, :, None, None] * (1 - alpha)) / 127.5 - 1

    def prompt(self, index: int, colour: int, u: list[float]) -> str:
        """A caption as a person might write it. `u`: four uniforms in [0, 1) that choose the
        form.
        """
        text, tags = self.captions[index], self.tags[index]
        if tags and u[0] < 0.12:
            text = text + ", " + " ".join(self._pick(tags, 2, u[1]))
        elif tags and u[0] < 0.20:
            text = " ".join(self._pick(tags, 3, u[1]))
        if u[2] < 0.15:
            text = ("an " if text[:1] in "aeiou" else "a ") + text
        return text if colour == 0 and u[3] < 0.5 else f"{text} on a {NAMES[colour]} background"

    @staticmethod
    def _pick(tags: list[str], n: int, u: float) -> list[str]:
        return [str(t) for t in np.random.default_rng(int(u * 2**32)).permutation(tags)[:n]]


@dataclass
class Sample:
    """An image of the shard and what its .json says."""

    key: str
    image: Image.Image
    meta: dict[str, Any]


def read_shard(path: Path) -> list[Sample]:
    """Every pair of <key>.webp and <key>.json.

    Raises:
        ValueError: the shard holds anything else, or is damaged.
    """
    left: list[str] = []
    reader, out = shards.Reader(), []
    for key, files in shards.samples(path, lambda name, why: left.append(f"{name} {why}")):
        if set(files) != {"webp", "json"}:
            raise ValueError(f"{key} has {sorted(files)}, not a .webp and a .json")
        image = pixels.decode(reader.read(path, files["webp"]))
        out.append(Sample(key, image, json.loads(files["json"].text or b"")))
    if left:
        raise ValueError(f"{path}: {left[0]}")
    return out


def load(shard: Path = SHARD) -> Emoji:
    samples = read_shard(shard)
    return Emoji(
        rgba=torch.from_numpy(np.stack([np.asarray(s.image.convert("RGBA")) for s in samples]))
        .permute(0, 3, 1, 2)
        .contiguous(),
        captions=[clean(s.meta["caption"]) for s in samples],
        tags=[[clean(t) for t in s.meta["tags"]] for s in samples],
        concepts=[s.meta["concept"] for s in samples],
        keys=[s.key for s in samples],
        heldout=torch.tensor([s.meta["split"] == "heldout" for s in samples]),
    )
