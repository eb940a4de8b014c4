"""Everything that a frozen network says about the data, computed once: latents by the VAE (or made by the teacher) and token ids.

The cache is one safetensors file, written beside and renamed, with a key of what made it; another VAE, size or data makes it anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sdlite.distill.data import Captions
from sdlite.distill.train import Batch
from sdlite.errors import InputError
from sdlite.tokenizer import ClipTokenizer


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """`to_size`, as high as wide."""
    return to_size(image, (size, size))


def to_size(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Centre crop, Lanczos resize, RGB on white: float32 (3, height, width) in [-1, 1].

    Args:
        size: height and width in pixels.
    """
    height, width = size
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    wide = min(image.width, image.height * width // height)
    high = min(image.height, image.width * height // width)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    image = image.crop((left, top, left + wide, top + high)).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


class CachedLatents:
    """A `LatentSource` that reads a cache. `captions` are its first 64 different ones; `skipped` lists what was left out and why."""

    def __init__(self, latents: Tensor, ids: Tensor, empty_ids: Tensor, captions: list[str], skipped: dict[str, str]):
        self.latents, self.ids, self.empty_ids, self.captions, self.skipped = latents, ids, empty_ids, captions, skipped

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """`size` samples, uniformly, with replacement."""
        i = torch.randint(0, len(self), (size,), generator=generator)
        return {"ids": i, "latents": self.latents[i].float(), "input_ids": self.ids[i]}

    @classmethod
    def build(cls, captions: Captions, tokenizer: ClipTokenizer, encode: Callable[[list[Any]], Tensor], path: Path, *, key: dict[str, Any],
              size: tuple[int, int], batch: int = 16, progress: bool = True) -> CachedLatents:  # fmt: skip
        """Read the cache at `path`, or make it.

        Args:
            encode: list of float32 (3, *size) arrays, or of captions when there are only prompts -> scaled latents (B, C, h, w).
            key: what determines the latents besides the data (VAE hash, teacher, steps).

        Raises:
            InputError: no picture could be read.
        """
        key = {
            **key,
            "size": size[0] if size[0] == size[1] else size,
            "tokenizer": tokenizer.digest(),
            "items": hashlib.sha256("\n".join(f"{i.key}\t{i.caption}" for i in captions.items).encode()).hexdigest(),
        }
        stamp = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        empty = torch.from_numpy(tokenizer([""]))[0]
        if path.exists():
            with safe_open(path, framework="pt") as f:
                about = f.metadata() or {}
                if about.get("stamp") == stamp:
                    return cls(
                        f.get_tensor("latents"), f.get_tensor("ids"), empty, json.loads(about["captions"]), json.loads(about["skipped"])
                    )
        skipped, texts, latents = dict(captions.skipped), [], []
        waiting: list[Any] = []

        def flush() -> None:
            if waiting:
                latents.append(encode(waiting).half())
                waiting.clear()

        for item in tqdm(captions.items, desc="latents", unit="img", disable=not progress):
            try:
                waiting.append(item.caption if item.open is None else to_size(item.open(), size))
            except (OSError, ValueError, SyntaxError) as e:  # Pillow raises all three for damaged files
                skipped[item.key] = str(e)
                continue
            texts.append(item.caption)
            if len(waiting) == batch:
                flush()
        flush()
        if not latents:
            raise InputError(f"no picture of {len(captions.items)} could be read; first: {next(iter(skipped.items()), None)}.")
        tensors = {"latents": torch.cat(latents).contiguous(), "ids": torch.from_numpy(tokenizer(texts))}
        shown = list(dict.fromkeys(texts))[:64]
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(path.name + ".tmp")
        save_file(tensors, tmp, metadata={"stamp": stamp, "captions": json.dumps(shown), "skipped": json.dumps(skipped)})
        os.replace(tmp, path)
        return cls(tensors["latents"], tensors["ids"], empty, shown, skipped)
