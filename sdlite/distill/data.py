"""Training images and captions from what people have: shards, folders, Hugging Face datasets, or
prompts alone.

`read(path)` finds out which of them a path is:

    shards/*.tar[.gz]                WebDataset: consecutive <key>.(webp|png|jpg) and <key>.json
                                     ("caption" or "text") or <key>.txt
    folder/ with <name>.png + .txt   images with a caption file each
    folder/ with metadata.jsonl      Hugging Face's image folder: {"file_name": ..., "text": ...} a
                                     line (also metadata.csv)
    folder/ with dataset_info.json   a saved Hugging Face dataset (needs the `datasets` package):
                                     columns image and text (or caption)
    prompts.txt                      captions only, one a line: the teacher makes the images

Text is UTF-8, with or without a byte order mark, or UTF-16 with one. What is bad or missing is left
out and listed with the reason, never guessed; only where nothing usable is left is that an error.
How pixels are read: `sdlite.distill.pixels`.
"""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from sdlite.distill import pixels, shards
from sdlite.errors import InputError, MissingExtraError, printable
from sdlite.io import parse_json, regular

PICTURES = ("webp", "png", "jpg", "jpeg")
CAPTION_KEYS = ("caption", "text", "prompt")
MANY = 0.01  # of the samples left out: worth a warning
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


class _Left:
    """What was left out, and why, by a name that is used once."""

    skipped: dict[str, str]

    def leave(self, key: str, why: str) -> None:
        key = printable(key, 200)
        self.skipped[key if key not in self.skipped else f"{key} ({len(self.skipped)})"] = (
            printable(why)
        )


@dataclass
class Item:
    """A caption and how to open its image (None: captions only), a file of `size` bytes."""

    key: str
    caption: str
    open: Callable[[], Image.Image] | None
    size: int = 0


@dataclass
class Captions(_Left):
    """What `read` found, and what it left out and why. Images are opened when they are used."""

    items: list[Item] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def prompts_only(self) -> bool:
        return bool(self.items) and all(i.open is None for i in self.items)

    def add(
        self, key: str, caption: str, open: Callable[[], Image.Image] | None, size: int = 0
    ) -> None:
        self.items.append(Item(printable(key, 200), caption, open, size))


def read(path: str | Path) -> Captions:
    """Captions and images of `path`, see the module's text.

    Raises:
        InputError: the path does not exist, is none of the forms, or holds no usable sample.
    """
    path, out = Path(path), Captions()
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        mode = 0
    if not mode and any(c in path.name for c in "*?["):
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise InputError(
                f"{path} matches no file; give shards, a folder of images with captions, or a"
                " prompts file."
            )
        _from_shards(found, out)
    elif stat.S_ISDIR(mode):
        _from_folder(path, out)
    elif stat.S_ISREG(mode) and path.name.endswith((".tar", ".tar.gz", ".tgz")):
        _from_shards([path], out)
    elif stat.S_ISREG(mode) and path.suffix == ".txt":
        _from_prompts(path, out)
    else:
        what = "is none of the accepted forms" if mode else "does not exist"
        raise InputError(
            f"data {printable(path)} {what}; give .tar shards, a folder of images with captions, or"
            " a .txt file of prompts."
        )
    if not out.items:
        first = next(iter(out.skipped.items()), ("", "nothing was found"))
        raise InputError(
            f"data {path} holds no usable sample ({len(out.skipped)} left out; first: {first[0]}"
            f" {first[1]})."
        )
    return out


# --- text


def _text(raw: bytes) -> str:
    """Text as its byte order mark says, else UTF-8.

    Raises:
        InputError: it is not that; the message goes on after the file's name, as those of the
            functions below do.
    """
    try:
        return _clean(raw.decode(_encoding(raw)))
    except UnicodeDecodeError as e:
        raise InputError(
            f"is not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8"
        ) from None


def _encoding(raw: bytes) -> str:
    return next((name for mark, name in _BOMS.items() if raw.startswith(mark)), "utf-8")


def _clean(text: str) -> str:
    if "\0" in text:
        raise InputError("holds null characters, as no text does; save it as UTF-8")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"is not UTF-8 text (character {e.start}); save it as UTF-8") from None
    return text


def _small(path: Path) -> str:
    """The text of a caption's file."""
    with _opened(path) as f:
        raw = f.read(shards.MOST_TEXT + 1)
    if len(raw) > shards.MOST_TEXT:
        raise InputError(f"has more than {shards.MOST_TEXT >> 10:,} KiB, which no caption needs")
    return _text(raw).strip()


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        with regular(path) as f:
            yield f
    except FileNotFoundError:
        raise InputError("is missing") from None
    except OSError as e:
        why = e.strerror or str(e)
        raise InputError(why if why.startswith("is ") else f"cannot be read ({why})") from e


def _lines(path: Path) -> Iterator[tuple[int, str | InputError]]:
    """Number and content of each line, or why it cannot be read."""
    with _opened(path) as f:
        kind = _encoding(f.peek(3))
        text = io.TextIOWrapper(
            f, kind, errors="surrogatepass" if kind == "utf-16" else "surrogateescape"
        )
        number = 0
        try:
            while line := text.readline(shards.MOST_TEXT):
                number, long = number + 1, False
                while len(line) == shards.MOST_TEXT and not line.endswith("\n"):
                    line, long = text.readline(shards.MOST_TEXT), True
                if long:
                    yield number, InputError(f"is longer than {shards.MOST_TEXT >> 10:,} KiB")
                    continue
                try:
                    yield number, _clean(line)
                except InputError as e:
                    yield number, e
        except UnicodeError as e:
            yield (
                number + 1,
                InputError(f"is not the UTF-16 text that the file's first bytes promise ({e})"),
            )


def _json(text: str) -> dict[str, Any]:
    try:
        out = parse_json(text)
    except ValueError as e:
        raise InputError(f"is no JSON ({e})") from None
    if not isinstance(out, dict):
        raise InputError(f"holds {_kind(out)}, not an object")
    return out


def _kind(value: object) -> str:
    """What JSON calls a value."""
    kinds = {
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        return _json(_text(raw))
    except InputError as e:
        raise InputError(f"its .json {e}") from None


def _caption(meta: dict[str, Any]) -> str:
    key = next((k for k in CAPTION_KEYS if meta.get(k) not in (None, "")), None)
    if key is None:
        raise InputError(f"has no {' or '.join(CAPTION_KEYS)}")
    if not isinstance(meta[key], str):
        raise InputError(f"has {_kind(meta[key])} as {key}, not a string")
    if not (out := _clean(meta[key]).strip()):
        raise InputError(f"has an empty {key}")
    return out


# --- forms


def _from_prompts(path: Path, out: Captions) -> None:
    try:
        for number, line in _lines(path):
            if isinstance(line, InputError):
                out.leave(f"{path.name} line {number}", str(line))
            elif (prompt := line.strip()) and not prompt.startswith("#"):
                out.add(f"line {number}", prompt, None)
    except InputError as e:
        out.leave(path.name, str(e))


def _from_shards(paths: list[Path], out: Captions) -> None:
    reader = shards.Reader()
    for path in paths:
        for stem, files in shards.samples(path, out.leave):
            key, image = (
                f"{path.name}: {stem}",
                next((files[s] for s in PICTURES if s in files), None),
            )
            if image is None or not ("json" in files or "txt" in files):
                out.leave(
                    key,
                    f"has {sorted(files)}, needs an image and a caption (.txt, or .json with"
                    f" {' or '.join(CAPTION_KEYS)})",
                )
                continue
            try:
                caption = _caption(
                    _object(files["json"].text or b"")
                    if "json" in files
                    else {"text": _text(files["txt"].text or b"")}
                )
            except InputError as e:
                out.leave(key, str(e))
                continue
            out.add(key, caption, partial(_in_shard, reader, path, image), image.size)


def _in_shard(reader: shards.Reader, path: Path, member: shards.Member) -> Image.Image:
    return pixels.decode(reader.read(path, member))


def open_image(path: Path) -> Image.Image:
    """The image of a plain file: RGB or RGBA, 8 bits, upright.

    Raises:
        InputError: it cannot be read or is not accepted; the message goes on after the file's name.
    """
    with _opened(path) as f:
        return pixels.decode(f.read(shards.MOST_FILE))


def _size(path: Path) -> int:
    """Bytes of an image's file, which can be opened."""
    with _opened(path) as f:
        size = os.fstat(f.fileno()).st_size
    if size > shards.MOST_FILE:
        raise InputError(f"has {size >> 20:,} MiB; accepted: {shards.MOST_FILE >> 20} MiB at most")
    return size


def _from_folder(folder: Path, out: Captions) -> None:
    if (folder / "dataset_info.json").exists():
        _from_saved_dataset(folder, out)
    elif os.path.lexists(folder / "metadata.jsonl"):
        _from_metadata(folder, "metadata.jsonl", _jsonl(folder / "metadata.jsonl"), out)
    elif os.path.lexists(folder / "metadata.csv"):
        _from_metadata(folder, "metadata.csv", _csv(folder / "metadata.csv"), out)
    else:
        _from_caption_files(folder, out)


def _from_caption_files(folder: Path, out: Captions) -> None:
    def unlisted(e: OSError) -> None:
        out.leave(str(e.filename), f"cannot be listed ({e.strerror})")

    names = [
        Path(root, n)
        for root, folders, files in os.walk(folder, onerror=unlisted)
        for n in (*folders, *files)
    ]
    for path in sorted(p for p in names if p.suffix.lower().lstrip(".") in PICTURES):
        name, text = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
        try:
            size = _size(path)
            try:
                caption = _small(text)
            except InputError as e:
                raise InputError(f"has no caption: {text.name} {e}") from None
            if not caption:
                raise InputError(
                    f"has no caption: {text.name} is empty, and there is no metadata.jsonl"
                )
        except InputError as e:
            out.leave(name, str(e))
        else:
            out.add(name, caption, partial(open_image, path), size)


_Row = tuple[int, dict[str, Any] | InputError]


def _jsonl(path: Path) -> Iterator[_Row]:
    for number, line in _lines(path):
        if isinstance(line, InputError):
            yield number, line
        elif line.strip():
            try:
                yield number, _json(line)
            except InputError as e:
                yield number, e


def _csv(path: Path) -> Iterator[_Row]:
    bad: dict[int, InputError] = {}
    at = [0]

    def good() -> Iterator[str]:
        for number, line in _lines(path):
            at[0] = number
            if isinstance(line, InputError):
                bad[number] = line
            else:
                yield line

    reader, header = csv.reader(good(), strict=True), None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as e:
            yield at[0], InputError(f"is no CSV ({e})")
            continue
        if header is None:
            header = row
            if "file_name" not in header:
                raise InputError(
                    f"has columns {', '.join(header)[:200]}; accepted: file_name, and"
                    f" {' or '.join(CAPTION_KEYS)}"
                )
        elif len(row) > len(header):
            yield (
                at[0],
                InputError(
                    f"has {len(row)} fields, the header {len(header)}; put captions with commas in"
                    " quotes"
                ),
            )
        elif row:
            yield at[0], dict(zip(header, row, strict=False))
    yield from bad.items()


def _from_metadata(folder: Path, listing: str, rows: Iterator[_Row], out: Captions) -> None:
    try:
        for number, row in rows:
            where = f"{listing} line {number}"
            if isinstance(row, InputError):
                out.leave(where, str(row))
                continue
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                out.leave(
                    where,
                    (
                        "has no file_name"
                        if not name
                        else f"has {_kind(name)} as file_name, not a string"
                    ),
                )
                continue
            try:
                out.add(name, *_named(folder, name, row))
            except InputError as e:
                out.leave(name, f"{where}: {e}")
    except InputError as e:
        out.leave(listing, str(e))


def _named(
    folder: Path, name: str, row: dict[str, Any]
) -> tuple[str, Callable[[], Image.Image], int]:
    """Caption, image and bytes of what a line of metadata names."""
    caption = _caption(row)
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise InputError("it names a file outside the folder")
    try:
        return caption, partial(open_image, folder / name), _size(folder / name)
    except InputError as e:
        raise InputError(f"the file {e}") from None


def _from_saved_dataset(folder: Path, out: Captions) -> None:
    try:
        from datasets import Image as Column
        from datasets import load_from_disk
    except ImportError as e:
        raise MissingExtraError(
            f"{folder} is a saved Hugging Face dataset: pip install datasets to read it."
        ) from e
    try:
        table = load_from_disk(str(folder))
    except Exception as e:  # pyarrow and datasets raise their own
        raise InputError(
            f"{folder} cannot be read as a saved dataset ({type(e).__name__}: {printable(e, 200)})."
        ) from e
    if not hasattr(table, "column_names") or isinstance(table.column_names, dict):
        raise InputError(
            f"{folder} holds several splits; give the folder of one, such as {folder}/train."
        )
    column = next((c for c in CAPTION_KEYS if c in table.column_names), None)
    if column is None or "image" not in table.column_names:
        raise InputError(
            f"{folder} has columns {table.column_names}; accepted: image, and"
            f" {' or '.join(CAPTION_KEYS)}."
        )
    if not isinstance(table.features["image"], Column):
        raise InputError(
            f"{folder} has a column image of {table.features['image']}; accepted: datasets.Image."
        )
    stored = table.cast_column("image", Column(decode=False))  # bytes: decoded here, as everywhere
    for i, caption in enumerate(table[column]):
        try:
            out.add(f"row {i}", _caption({column: caption}), partial(_row_image, stored, i))
        except InputError as e:
            out.leave(f"row {i}", str(e))


def _row_image(table: Any, row: int) -> Image.Image:
    try:
        image = table[row]["image"] or {}
    except Exception as e:
        raise InputError(f"cannot be read ({type(e).__name__}: {printable(e, 200)})") from e
    if image.get("bytes"):
        return pixels.decode(image["bytes"])
    if image.get("path"):
        return open_image(Path(image["path"]))
    raise InputError("has no image")
