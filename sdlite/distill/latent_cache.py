"""Everything that a frozen network says about the data, computed once: latents by the VAE (or made
by the teacher) and token ids.

The cache is one safetensors file with a key of what made it; another VAE, size or data makes it
anew. While it is made, what is done lies beside it in `<name>.parts`, each part written whole and
with its hash: a pass that was interrupted or killed goes on where it stopped, and ends with the
same tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdlite.distill import tensors
from sdlite.distill.data import Captions, Item
from sdlite.distill.pixels import on_white
from sdlite.distill.train import Batch
from sdlite.errors import InputError, SdliteWarning
from sdlite.families import Conditions

PART_SECONDS = 20.0  # of encoding that a killed pass loses at most


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """`to_size`, as high as wide."""
    return to_size(image, (size, size))


def to_size(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Center crop, Lanczos resize, RGB on white: float32 (3, height, width) in [-1, 1].

    Args:
        size: height and width in pixels.

    Raises:
        InputError: pixels of a kind that is not accepted, see `sdlite.distill.pixels`.
    """
    height, width = size
    image = on_white(image)
    left, top, wide, high = _crop(image.size, size)
    image = image.crop((left, top, left + wide, top + high)).resize(
        (width, height), Image.Resampling.LANCZOS
    )
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


def _crop(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the middle of an image (width, height) that becomes `size`."""
    (across, down), (height, width) = original, size
    wide = max(1, min(across, down * width // height))
    high = max(1, min(down, across * height // width))
    return (across - wide) // 2, (down - high) // 2, wide, high


def told_sizes(original: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """What a UNet is told of an image (width, height) that `to_size` made `size` of: height and
    width of the original, top and left of the crop, height and width of the image.

    The original is upright and as it was before anything was cut off. The crop is counted in the
    pixels of the image as it was resized, as in SDXL's own training (Podell et al. 2023,
    arXiv:2307.01952, 2.2), where the shorter side is resized first and what is too long is cut off
    then.
    """
    (across, down), (height, width) = original, size
    left, top, wide, high = _crop(original, size)
    return [down, across, round(top * height / high), round(left * width / wide), height, width]


def items_hash(captions: Captions) -> str:
    """What tells one list of data from another: names, captions, and bytes of each image's file."""
    return hashlib.sha256(
        "\n".join(f"{i.key}\t{i.caption}\t{i.size}" for i in captions.items).encode()
    ).hexdigest()


Encode = Callable[[list[Any], int], Tensor]
Told = Callable[[np.ndarray], Conditions]  # sizes int64 (B, 6) -> what a UNet is told of them


class Tokenizes(Protocol):
    """A tokenizer, or several as one."""

    def __call__(self, prompts: Sequence[str]) -> np.ndarray: ...
    def digest(self) -> str: ...


class CachedLatents:
    """A `LatentSource` that reads a cache. `captions` are its first 64 different ones; `skipped`
    lists what was left out and why; `about` says what it was made of; `told` is what UNets are told
    of the images' sizes, by name.
    """

    def __init__(
        self,
        latents: Tensor,
        ids: Tensor,
        empty_ids: Tensor,
        captions: list[str],
        skipped: dict[str, str],
        about: dict[str, Any] | None = None,
        told: Mapping[str, Tensor] | None = None,
    ):
        self.latents, self.ids, self.empty_ids, self.captions, self.skipped = (
            latents,
            ids,
            empty_ids,
            captions,
            skipped,
        )
        self.about, self.told = about or {}, told or {}

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """`size` samples, uniformly, with replacement."""
        i = torch.randint(0, len(self), (size,), generator=generator)
        told = {k: v[i] for k, v in self.told.items()}
        return {"ids": i, "latents": self.latents[i].float(), "input_ids": self.ids[i], **told}

    @classmethod
    def build(
        cls,
        captions: Captions,
        tokenizer: Tokenizes,
        encode: Encode,
        path: Path,
        *,
        key: dict[str, Any],
        size: tuple[int, int],
        batch: int = 16,
        progress: bool = True,
        told: Told | None = None,
    ) -> CachedLatents:
        """Read the cache at `path`, or make it, from where an earlier pass stopped.

        Args:
            encode: list of float32 (3, *size) arrays, or of captions when there are only prompts,
                and how many samples came before -> scaled latents (B, C, h, w).
            key: what determines the latents besides the data (VAE hash, teacher, steps).
            told: of UNets that are told sizes (`told_sizes`); captions alone have `size`.

        Raises:
            InputError: no image could be read.
        """
        key = {
            **key,
            "size": size[0] if size[0] == size[1] else size,
            "tokenizer": tokenizer.digest(),
            "items": items_hash(captions),
            **({"sizes": True} if told else {}),
        }
        stamp = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        parts = path.with_name(f"{path.stem}.parts")
        kept = _kept(path, stamp)
        if kept is None:
            made = _Pass(captions, encode, parts, stamp, size, batch, told is not None)
            kept = _assembled(made.run(progress), captions, tokenizer, stamp, parts)
            tensors.save(path, *kept)
        shutil.rmtree(parts, ignore_errors=True)
        found, about = kept
        empty = torch.from_numpy(tokenizer([""]))[0]
        return cls(
            found["latents"],
            found["ids"],
            empty,
            json.loads(about["captions"]),
            json.loads(about["skipped"]),
            key,
            _named(told(found["sizes"].numpy())) if told else None,
        )


def _named(arrays: Conditions) -> dict[str, Tensor]:
    return {k: torch.from_numpy(v) for k, v in arrays.items()}


_Kept = tuple[dict[str, Tensor], dict[str, str]]


def _kept(path: Path, stamp: str) -> _Kept | None:
    """What a file holds, if it has this key and is whole."""
    try:
        return tensors.load(path, stamp=stamp)
    except tensors.Damaged as e:
        warnings.warn(f"{path} {e}; it is made anew.", SdliteWarning, stacklevel=4)
        return None


def _assembled(
    parts: list[_Kept], captions: Captions, tokenizer: Tokenizes, stamp: str, folder: Path
) -> _Kept:
    skipped = dict(captions.skipped)
    for _, about in parts:
        skipped |= json.loads(about["skipped"])
    used = torch.cat([p["used"] for p, _ in parts]) if parts else []
    if not len(used):
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"no image of {len(captions.items)} could be read; first:"
            f" {' '.join(next(iter(skipped.items()), ('', '')))}."
        )
    texts = [captions.items[i].caption for i in used]
    filled = [p for p, _ in parts if len(p["used"])]
    found = {k: torch.cat([p[k] for p in filled]) for k in filled[0] if k != "used"}
    found["ids"] = torch.from_numpy(tokenizer(texts))
    shown = list(dict.fromkeys(texts))[:64]
    return found, {"stamp": stamp, "captions": json.dumps(shown), "skipped": json.dumps(skipped)}


class _Pass:
    """One pass over the items. A part ends where a batch ends, so that the batches, and so the
    latents, are the same however often the pass is stopped.
    """

    def __init__(
        self,
        captions: Captions,
        encode: Encode,
        folder: Path,
        stamp: str,
        size: tuple[int, int],
        batch: int,
        sizes: bool,
    ):
        self.keeps_sizes = sizes
        self.items, self.encode, self.folder, self.stamp = captions.items, encode, folder, stamp
        self.size, self.batch = size, batch
        self.parts: list[_Kept] = []
        self._clear()
        self.at = self.first = self._read()
        # samples that were encoded
        self.before = int(self.parts[-1][1]["before"]) if self.parts else 0
        self.names = {
            *captions.skipped,
            *(k for _, about in self.parts for k in json.loads(about["skipped"])),
        }

    def _clear(self) -> None:
        self.latents: list[Tensor] = []
        self.sizes: list[list[int]] = []
        self.used: list[int] = []
        self.skipped: dict[str, str] = {}

    def _read(self) -> int:
        """Take the parts that are whole and follow each other; remove the others. Returns the item
        to go on with.
        """
        at, whole = 0, True
        for path in sorted(self.folder.glob("*.safetensors")):
            part = _kept(path, self.stamp) if whole else None
            whole = part is not None and part[1]["first"] == str(at)
            if part is not None and whole:
                self.parts.append(part)
                at = int(part[1]["next"])
            else:
                path.unlink()
        return at

    def _write(self) -> None:
        if self.at == self.first:
            return
        latents = torch.cat(self.latents) if self.latents else torch.zeros(0, dtype=torch.float16)
        about = {
            "stamp": self.stamp,
            "first": str(self.first),
            "next": str(self.at),
            "before": str(self.before),
        }
        about["skipped"] = json.dumps(self.skipped)
        part = {"latents": latents, "used": torch.tensor(self.used, dtype=torch.int64)}
        if self.keeps_sizes:
            part["sizes"] = torch.tensor(self.sizes, dtype=torch.int64).view(len(self.sizes), 6)
        tensors.save(self.folder / f"{self.first:010d}.safetensors", part, about)
        self.parts.append((part, about))
        self.first = self.at
        self._clear()

    def run(self, progress: bool) -> list[_Kept]:
        """The parts of the whole pass."""
        bar = tqdm(
            total=len(self.items), initial=self.at, desc="latents", unit="img", disable=not progress
        )
        written = time.monotonic()
        try:
            with bar:
                while self.at < len(self.items):
                    done = self.at
                    self._step()
                    bar.update(self.at - done)
                    if time.monotonic() - written >= PART_SECONDS:
                        self._write()
                        written = time.monotonic()
        finally:
            self._write()
        return self.parts

    def _read_item(self, item: Item) -> tuple[np.ndarray | str, list[int]]:
        """What is encoded, and the sizes that a UNet is told."""
        if item.open is None:
            return item.caption, told_sizes((self.size[1], self.size[0]), self.size)
        image = on_white(item.open())
        return to_size(image, self.size), told_sizes(image.size, self.size)

    def _step(self) -> None:
        """Read and encode one batch."""
        end, used, sizes = self.at, list[int](), dict[int, list[int]]()
        waiting: list[Any] = []
        skipped: dict[int, str] = {}
        while end < len(self.items) and len(waiting) < self.batch:
            item = self.items[end]
            try:
                made, sizes[end] = self._read_item(item)
                waiting.append(made)
                used.append(end)
            except InputError as e:
                skipped[end] = str(e)
            end += 1
        if waiting:
            latents = self.encode(waiting, self.before).half()
            finite = latents.flatten(1).isfinite().all(1)
            skipped |= {
                n: "its latents are not finite"
                for n, ok in zip(used, finite, strict=True)
                if not ok
            }
            self.latents.append(latents[finite].contiguous())
            self.used += [n for n in used if n not in skipped]
            self.sizes += [sizes[n] for n in used if n not in skipped]
            self.before += len(waiting)
        self.at = end
        for n, why in skipped.items():
            key = self.items[n].key
            key = key if key not in self.names else f"{key} ({n})"
            self.names.add(key)
            self.skipped[key] = why
