"""Training pictures: WebDataset shards (plain tar, no extra package needed to read them)."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass
class Sample:
    key: str
    image: Image.Image
    meta: dict[str, Any]


@dataclass
class Shards:
    """Samples of one or more shards, and what was left out of them and why."""

    samples: list[Sample] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def read_shards(paths: list[Path] | Path) -> Shards:
    """Read `<key>.(webp|png|jpg)` + `<key>.json` pairs from tar or tar.gz files; bad pairs are skipped and listed.

    Source: WebDataset's file convention (github.com/webdataset/webdataset): consecutive files with one stem are one sample.
    """
    out = Shards()
    for path in [paths] if isinstance(paths, Path) else paths:
        parts: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    stem, _, suffix = member.name.rpartition(".")
                    f = tar.extractfile(member)
                    assert f is not None
                    parts.setdefault(stem, {})[suffix.lower()] = f.read()
        for stem, files in parts.items():
            data = next((files[s] for s in ("webp", "png", "jpg", "jpeg") if s in files), None)
            if data is None or "json" not in files:
                out.skipped[stem] = f"has {sorted(files)}, needs a picture and a .json"
                continue
            try:
                image = Image.open(io.BytesIO(data))
                image.load()
                out.samples.append(Sample(stem, image, json.loads(files["json"])))
            except (OSError, ValueError) as e:
                out.skipped[stem] = str(e)
    return out
