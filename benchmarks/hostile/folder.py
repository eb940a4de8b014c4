"""A model folder to damage: hard links to a copy of the embedded model, and tools that edit it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlite.hub import EMBEDDED

MODEL = EMBEDDED / "emoji"
MANIFEST = "sdlite.json"
FILES = sorted(p.relative_to(MODEL).as_posix() for p in MODEL.rglob("*") if p.is_file())
Change = Callable[[Path], Any]

# What a pipeline may answer besides a refusal in one line.
SAME = "the same image, no refusal"
UNHARMED = "the same image"
OTHER = "any image"  # the manifest vouches for another model


@dataclass(frozen=True)
class Case:
    """A change of the embedded model.

    Attributes:
        kind: row of the table.
        rehash: the manifest vouches for what was changed.
        expect: what a pipeline may answer.
        listed: a file of the manifest was changed and not vouched for: `verify` must say so.
        torch, onnx: tried on the torch backend too; on OpenVINO and by `quantize`'s reader.
        root: only root can make it. stranger: read as another user than root.
    """

    name: str
    kind: str
    change: Change
    rehash: bool = False
    expect: str = UNHARMED
    listed: bool = False
    torch: bool = False
    onnx: bool = False
    root: bool = False
    stranger: bool = False


class Place:
    """Where bad folders are made: `source` is the whole model, `outside` what none may reach."""

    def __init__(self, root: Path):
        self.root, self.source, self.outside = root, root / "source", root / "outside"
        shutil.copytree(MODEL, self.source)
        self.outside.mkdir()
        (self.outside / "secret.bin").write_bytes(os.urandom(16 << 20))
        (self.outside / "secret.json").write_text('{"canary": 1}')

    def build(self, name: str, change: Change, rehash: bool) -> Path:
        """A new folder with a change; `rehash`: the manifest vouches for it: a stranger's."""
        folder = self.root / "made" / name
        for file in FILES:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.link(self.source / file, folder / file)
        change(folder)
        if rehash:
            vouch(folder)
        return folder

    @staticmethod
    def remove(folder: Path) -> None:
        for path in (folder, *folder.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)


def put(folder: Path, file: str, data: bytes | str) -> None:
    """Write a file anew: never through a link to the model's own."""
    path = folder / file
    if path.is_symlink() or path.exists():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))


def vouch(folder: Path) -> None:
    """Sizes and hashes of the manifest become those of the files that are there."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for file in manifest["files"]:
        if (folder / file).is_file():
            data = (folder / file).read_bytes()
            row = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            manifest["files"][file] = row
    put(folder, MANIFEST, json.dumps(manifest))


def edit_json(file: str, edit: Callable[[Any], Any]) -> Change:
    """Change the value that a JSON file holds, in place."""

    def change(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        edit(data)
        put(folder, file, json.dumps(data))

    return change


def keys(file: str, **values: Any) -> Change:
    """Set keys of a JSON file; `...` removes one."""

    def edit(data: dict[str, Any]) -> None:
        data.update(values)
        for key in [k for k, v in values.items() if v is ...]:
            del data[key]

    return edit_json(file, edit)


def text(file: str, data: bytes | str) -> Change:
    """Another content."""
    return lambda folder: put(folder, file, data)


def edit_text(file: str, edit: Callable[[str], str]) -> Change:
    """Change a file's text."""
    return lambda folder: put(folder, file, edit((folder / file).read_text()))


def edit_bytes(file: str, edit: Callable[[bytes], bytes]) -> Change:
    """Change a file's bytes."""
    return lambda folder: put(folder, file, edit((folder / file).read_bytes()))


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def gone(file: str) -> Change:
    """Without this file or folder."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()

    return change


def slug(file: str) -> str:
    return file.replace("/", "_").replace(".", "-")
