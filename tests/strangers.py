"""The embedded model as a stranger may send it: a file changed, and the manifest's hashes made to
fit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.conftest import EMOJI


def copied(out: Path) -> Path:
    return Path(shutil.copytree(EMOJI, out))


def rehashed(folder: Path) -> Path:
    """The folder, its manifest with the sizes and hashes of the files that are there."""
    path = folder / "sdlite.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            manifest["files"][name] = {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(manifest))
    return folder


def with_json(folder: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """A JSON file holds what `change` returns, or what it did to the content where it returns
    None.
    """
    data = json.loads((folder / name).read_text())
    changed = change(data)
    (folder / name).write_text(json.dumps(data if changed is None else changed))
    return rehashed(folder)
