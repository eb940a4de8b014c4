"""Training pictures and captions from what people have: shards, folders, Hugging Face datasets, or prompts alone.

`read(path)` finds out which of them a path is:

    shards/*.tar[.gz]                WebDataset: consecutive <key>.(webp|png|jpg) and <key>.json ("caption" or "text") or <key>.txt
    folder/ with <name>.png + .txt   pictures with a caption file each
    folder/ with metadata.jsonl      Hugging Face's image folder: {"file_name": ..., "text": ...} a line (also metadata.csv)
    folder/ with dataset_info.json   a saved Hugging Face dataset (needs the `datasets` package): columns image and text (or caption)
    prompts.txt                      captions only, one a line: the teacher makes the pictures

Bad and missing pictures are left out and listed, never guessed.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from sdlite.errors import InputError, MissingExtraError

PICTURES = ("webp", "png", "jpg", "jpeg")
CAPTION_KEYS = ("caption", "text", "prompt")


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


@dataclass
class Item:
    """A caption and how to open its picture (None: captions only)."""

    key: str
    caption: str
    open: Callable[[], Image.Image] | None


@dataclass
class Captions:
    """What `read` found, and what it left out and why. Pictures are opened when they are used."""

    items: list[Item] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def prompts_only(self) -> bool:
        return bool(self.items) and all(i.open is None for i in self.items)


def read_shards(paths: list[Path] | Path) -> Shards:
    """Read `<key>.(webp|png|jpg)` + `<key>.json` pairs from tar or tar.gz files; bad pairs are skipped and listed.

    Source: WebDataset's file convention (github.com/webdataset/webdataset): consecutive files with one stem are one sample.
    """
    out = Shards()
    for stem, files in _tar_parts([paths] if isinstance(paths, Path) else paths):
        data = next((files[s] for s in PICTURES if s in files), None)
        if data is None or "json" not in files:
            out.skipped[stem] = f"has {sorted(files)}, needs a picture and a .json"
            continue
        try:
            out.samples.append(Sample(stem, _open(data), json.loads(files["json"])))
        except (OSError, ValueError) as e:
            out.skipped[stem] = str(e)
    return out


def read(path: str | Path) -> Captions:
    """Captions and pictures of `path`, see the module's text.

    Raises:
        InputError: the path does not exist, is none of the forms, or holds no usable sample.
    """
    path = Path(path)
    if any(c in path.name for c in "*?["):
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise InputError(f"{path} matches no file; give shards, a folder of pictures with captions, or a prompts file.")
        out = _from_shards(found)
    elif path.is_dir():
        out = _from_folder(path)
    elif path.name.endswith((".tar", ".tar.gz", ".tgz")) and path.is_file():
        out = _from_shards([path])
    elif path.suffix == ".txt" and path.is_file():
        lines = [s.strip() for s in path.read_text(encoding="utf-8").splitlines()]
        out = Captions([Item(f"line {n}", s, None) for n, s in enumerate(lines, 1) if s and not s.startswith("#")])
    else:
        what = "does not exist" if not path.exists() else "is none of the accepted forms"
        raise InputError(f"data {path} {what}; give .tar shards, a folder of pictures with captions, or a .txt file of prompts.")
    if not out.items:
        first = next(iter(out.skipped.items()), ("", "nothing was found"))
        raise InputError(f"data {path} holds no usable sample ({len(out.skipped)} left out; first: {first[0]} {first[1]}).")
    return out


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _tar_parts(paths: list[Path]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for path in paths:
        parts: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    stem, _, suffix = member.name.rpartition(".")
                    f = tar.extractfile(member)
                    assert f is not None
                    parts.setdefault(stem, {})[suffix.lower()] = f.read()
        yield from parts.items()


def _caption(meta: dict[str, Any]) -> str | None:
    return next((str(meta[k]).strip() for k in CAPTION_KEYS if meta.get(k)), None)


def _from_shards(paths: list[Path]) -> Captions:
    out = Captions()
    for stem, files in _tar_parts(paths):
        data = next((files[s] for s in PICTURES if s in files), None)
        try:
            caption = _caption(json.loads(files["json"])) if "json" in files else files.get("txt", b"").decode().strip()
        except ValueError as e:
            out.skipped[stem] = f"its .json is damaged ({e})"
            continue
        if data is None or not caption:
            out.skipped[stem] = f"has {sorted(files)}, needs a picture and a caption (.txt, or .json with {' or '.join(CAPTION_KEYS)})"
            continue
        out.items.append(Item(stem, caption, partial(_open, data)))
    return out


def _from_folder(folder: Path) -> Captions:
    if (folder / "dataset_info.json").exists():
        return _from_saved_dataset(folder)
    out = Captions()
    listed = _metadata(folder)
    if listed is not None:
        for name, caption in listed:
            if not caption:
                out.skipped[name] = f"metadata has no {' or '.join(CAPTION_KEYS)}"
            elif not (folder / name).is_file():
                out.skipped[name] = "metadata names it, the file is missing"
            else:
                out.items.append(Item(name, caption, _opener(folder / name)))
        return out
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in PICTURES):
        text, name = path.with_suffix(".txt"), path.relative_to(folder).as_posix()
        caption = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        if caption:
            out.items.append(Item(name, caption, _opener(path)))
        else:
            out.skipped[name] = f"has no caption: {text.name} is missing or empty, and there is no metadata.jsonl"
    return out


def _metadata(folder: Path) -> list[tuple[str, str | None]] | None:
    """(file name, caption) of metadata.jsonl or metadata.csv; None when there is neither."""
    path = folder / "metadata.jsonl"
    if path.exists():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif (folder / "metadata.csv").exists():
        with open(folder / "metadata.csv", newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    else:
        return None
    return [(str(r["file_name"]), _caption(r)) for r in rows if r.get("file_name")]


def _from_saved_dataset(folder: Path) -> Captions:
    try:
        from datasets import load_from_disk
    except ImportError as e:
        raise MissingExtraError(f"{folder} is a saved Hugging Face dataset: pip install datasets to read it.") from e
    table, out = load_from_disk(str(folder)), Captions()
    if not hasattr(table, "column_names") or isinstance(table.column_names, dict):
        raise InputError(f"{folder} holds several splits; give the folder of one, such as {folder}/train.")
    column = next((c for c in CAPTION_KEYS if c in table.column_names), None)
    if column is None or "image" not in table.column_names:
        raise InputError(f"{folder} has columns {table.column_names}; accepted: image, and {' or '.join(CAPTION_KEYS)}.")
    for i, caption in enumerate(table[column]):
        if caption:
            out.items.append(Item(f"row {i}", str(caption), partial(_row_image, table, i)))
        else:
            out.skipped[f"row {i}"] = f"{column} is empty"
    return out


def _row_image(table: Any, row: int) -> Image.Image:
    image: Image.Image = table[row]["image"]
    return image


def _opener(path: Path) -> Callable[[], Image.Image]:
    return lambda: _open(path.read_bytes())
