"""Compiled OpenVINO networks on disk: the first process that runs a model waits for the compiler.

Each network with its shapes and options has one folder in `$SDLITE_CACHE/openvino` (default
`~/.cache/sdlite`), which is OpenVINO's `CACHE_DIR` while it compiles. OpenVINO's own key sees every
weight and its version, but neither all options nor the processor, and it loads a blob whose bytes
have changed without a word (2026.4). So the folder's name is made of the model files' SHA-256,
OpenVINO's version, the processor, the options and the shapes, and a seal in it holds the blob's
SHA-256. What is left of compiling is packing the weights: about half the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sdlite.errors import ArtifactError, InputError
from sdlite.io import WORK, cache_root, read_json, sha256, working

SWITCH = "SDLITE_OPENVINO_CACHE"  # GB that all entries may have together; 0 keeps nothing
LIMIT_GB = 10.0
SEAL = "seal.json"
_GROWS = 1.25  # a blob holds weights as the file does, and the graph


def root() -> Path:
    """The folder of all entries."""
    return cache_root() / "openvino"


def limit() -> int:
    """Bytes that the cache may have.

    Raises:
        InputError: $SDLITE_OPENVINO_CACHE is not a number of GB.
    """
    given = os.environ.get(SWITCH) or str(LIMIT_GB)
    try:
        gb = float(given)
    except ValueError:
        gb = -1.0
    if not 0 <= gb < 1e9:
        raise InputError(f"{SWITCH}={given!r}: give the GB that it may have, 0 for no cache.")
    return int(gb * 1e9)


@contextmanager
def kept(key: dict[str, object], size: int) -> Iterator[Path | None]:
    """A folder for OpenVINO's CACHE_DIR while a network is compiled; None where nothing is kept.

    An entry that is whole is handed out as it is. Any other is made in a folder of this process and
    renamed when it is sealed, so that two processes at once do not see each other's halves.

    Args:
        key: what the compiled network depends on.
        size: bytes of the model's files.
    """
    if _GROWS * size > limit():
        yield None
        return
    with ExitStack() as stack:
        try:
            place = (
                root() / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
            )
            if _whole(place):
                made = None
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                if shutil.disk_usage(place.parent).free < 2 * _GROWS * size:
                    raise OSError
                made = stack.enter_context(working(place.parent, "blob")) / "blob"
                made.mkdir()
        except (
            OSError,
            InputError,
        ):  # no space, no home, or no right to write: compiled all the same
            yield None
            return
        yield made or place
        with suppress(OSError):  # another process was faster, or the disk is full
            if made:
                _keep(made, place)


def _whole(place: Path) -> bool:
    """Whether the folder holds what its seal says, and nothing else. Marks it as used now."""
    try:
        sealed = read_json(place / SEAL)
        if {p.name for p in place.iterdir()} != {SEAL, *sealed} or not sealed:
            return False
        if any(sha256(place / name) != digest for name, digest in sealed.items()):
            return False
        with suppress(OSError):  # a shared folder that only others may write
            os.utime(place)
    except (OSError, ArtifactError):
        return False
    return True


def _keep(made: Path, place: Path) -> None:
    _seal(made)
    if not _whole(place):  # damaged, or not there
        shutil.rmtree(place, ignore_errors=True)
        os.replace(made, place)
    _shrink(place)


def _seal(made: Path) -> None:
    blobs = sorted(made.iterdir())
    if not blobs:
        raise OSError("the plugin keeps nothing")
    sealed = json.dumps({p.name: sha256(p) for p in blobs})
    (made / SEAL).write_text(sealed + "\n", encoding="utf-8")


def _shrink(newest: Path) -> None:
    """Remove what was not used for longest, until the rest fits."""
    entries = []
    for folder in newest.parent.iterdir():
        with suppress(OSError):
            if not folder.name.startswith(WORK):
                entries.append(
                    (
                        folder.stat().st_mtime,
                        folder,
                        sum(p.stat().st_size for p in folder.iterdir()),
                    )
                )
    room = limit() - sum(bytes_ for _, folder, bytes_ in entries if folder == newest)
    for _, folder, bytes_ in sorted(entries, reverse=True):
        if folder == newest:
            continue
        room -= bytes_
        if room < 0:
            shutil.rmtree(folder, ignore_errors=True)
