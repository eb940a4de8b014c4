"""Released weights: files of known size and SHA-256, fetched into the cache.

`assets.json` beside this file lists them: name -> {about, make, url, files: name -> {bytes,
sha256}}. `url` is the folder that the files are fetched from, null where none is published; `make`
says how else one comes to them.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdlite.errors import HubError, UnknownNameError, printable
from sdlite.io import alone, cache_root, sha256

TABLE = Path(__file__).parent / "assets.json"
TIMEOUT = 10.0  # seconds without an answer
CHUNK = 1 << 20


@dataclass(frozen=True)
class File:
    """What a file must be: its bytes and its SHA-256 in hex."""

    bytes: int
    sha256: str

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` is this one."""
        return path.is_file() and path.stat().st_size == self.bytes and sha256(path) == self.sha256


@dataclass(frozen=True)
class Asset:
    """A folder of released files."""

    name: str
    about: str
    make: str
    url: str | None
    files: Mapping[str, File]

    @property
    def key(self) -> str:
        """The name of its folder in the cache, another one for other contents."""
        said = json.dumps({n: f.sha256 for n, f in sorted(self.files.items())})
        return f"{self.name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def table() -> dict[str, Asset]:
    """Every released asset by name."""
    return {
        name: Asset(
            name,
            row["about"],
            row["make"],
            row["url"],
            {n: File(f["bytes"], f["sha256"]) for n, f in row["files"].items()},
        )
        for name, row in json.loads(TABLE.read_text(encoding="utf-8")).items()
    }


def asset(name: str) -> Path:
    """See `sdlite.hub.asset`."""
    known = table()
    if name not in known:
        raise UnknownNameError(
            f"asset {printable(repr(name), 200)} is not known; choose one of {', '.join(known)}."
        )
    wanted = known[name]
    if root := os.environ.get("SDLITE_ASSETS"):
        return _given(wanted, Path(root) / name)
    folder = cache_root() / "assets" / wanted.key
    with alone(folder):
        missing = [n for n, f in wanted.files.items() if not f.is_at(folder / n)]
        if missing and wanted.url is None:
            raise HubError(
                f"asset {name!r} is not in the cache, and no address of it is published: set"
                f" SDLITE_ASSETS to the folder that holds {name}/, or {wanted.make}."
            )
        for file in missing:
            fetch(f"{wanted.url}/{file}", folder / file, wanted.files[file], f"{name}/{file}")
    return folder


def _given(wanted: Asset, folder: Path) -> Path:
    for name, file in wanted.files.items():
        if not file.is_at(folder / name):
            what = "is missing" if not (folder / name).exists() else "is another file"
            raise HubError(
                f"SDLITE_ASSETS: {folder / name} {what} (SHA-256 {file.sha256[:16]}... is asked"
                f" for); name the folder that holds {wanted.name}/, or {wanted.make}."
            )
    return folder


def fetch(url: str, path: Path, file: File, label: str) -> None:
    """Fetch a file, going on where an earlier call broke off. Bytes gather in `PATH.part`; the file
    gets its name when its SHA-256 is right.

    Args:
        label: what errors call it.

    Raises:
        HubError: the address does not answer, breaks off, or gives another file. OSError: the
            place cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    if _size(part) > file.bytes:
        part.unlink()
    if _size(part) < file.bytes:
        _offline(label)
        _receive(url, part, file, label)
    if not file.is_at(part):
        found = sha256(part)
        part.unlink()
        raise HubError(
            f"what {url} gives is not the released {label}: its SHA-256 is {found[:16]}..., not"
            f" {file.sha256[:16]}...; it was removed. Run again, or tell the authors."
        )
    os.replace(part, path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _offline(label: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"HF_HUB_OFFLINE is set and {label} is not in the cache; connect once, or set"
            " SDLITE_ASSETS."
        )


def _receive(url: str, part: Path, file: File, label: str) -> None:
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with _explained(part, file, label):
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    goes_on = have > 0 and response.status == 206
    with response, open(part, "ab" if goes_on else "wb") as out:
        while out.tell() <= file.bytes:
            with _explained(part, file, label):
                chunk = response.read(CHUNK)
            if not chunk:
                break
            out.write(chunk)
    if _size(part) < file.bytes:
        with _explained(part, file, label):
            raise ConnectionError("the answer ended early")


@contextmanager
def _explained(part: Path, file: File, label: str) -> Iterator[None]:
    """What the network raises, as one line that says what is kept."""
    try:
        yield
    except (OSError, http.client.HTTPException) as e:
        why = f"{type(e).__name__}: {printable((str(e).splitlines() or [''])[0], 160)}"
        kept = f"{_size(part):,} of {file.bytes:,} bytes are kept"
        raise HubError(f"fetching {label} failed ({why}); run again: {kept}.") from e
