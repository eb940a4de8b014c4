"""The files of a model folder. Listed files are verified before they are read.

Every file that a model consists of is read through `Files`, so that none can be forgotten. Where a
manifest or an export's report lists the files, one that it does not list is an error, and so is
one of another size or SHA-256, or a link that leads out of the folder. A plain diffusers folder
lists nothing; its files are looked at before they are opened (`sdlite.io`), and read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdlite.errors import ArtifactError
from sdlite.io import JSON_BYTES, decoded, json_of, opened, plain, read_bytes, read_json, sha256
from sdlite.schema import Json

# of a tokenizer, in every layout that CLIP's comes in
VOCAB, MERGES, FAST = "vocab.json", "merges.txt", "tokenizer.json"
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TOKENIZER_FILES = (VOCAB, MERGES, FAST, CONFIG, SPECIAL, ADDED)


@dataclass(frozen=True)
class Files:
    """A folder of a model. Names are relative to it.

    Attributes:
        root: the model folder.
        listed: path from `root` -> {sha256, bytes}; None for a plain folder.
        listing: name of the file that lists them.
        under: "" or "unet/": which folder of the model this is.
        variant: of weights, such as "fp16", where a plain folder has several; "" is the default.
    """

    root: Path
    listed: Mapping[str, Mapping[str, Any]] | None = None
    listing: str = ""
    under: str = ""
    variant: str = ""
    _whole: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, folder: str | Path | Files) -> Files:
        """`folder`, or a plain one at that path."""
        return folder if isinstance(folder, Files) else cls(Path(folder))

    def part(self, name: str) -> Files:
        """A folder in this one."""
        return replace(self, under=f"{self.under}{name}/")

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.root / self.under

    @property
    def name(self) -> str:
        """Last part of the folder's path."""
        return self.folder.name

    def path(self, name: str) -> Path:
        """Path of a file, for messages; `file` is for opening it."""
        return self.root / (self.under + name)

    def has(self, name: str) -> bool:
        """Whether the file is listed or exists; a broken link exists."""
        return self.under + name in (self.listed or ()) or os.path.lexists(self.path(name))

    def names(self) -> list[str]:
        """Names of files that are listed or exist, sorted."""
        try:
            there = {e.name for e in os.scandir(self.folder) if not e.is_dir()}
        except (FileNotFoundError, NotADirectoryError):
            there = set()
        except OSError as e:
            raise ArtifactError(f"{self.folder} cannot be read ({e.strerror}).") from e
        return sorted(there.union(n for n in self._listed() if "/" not in n))

    def read(self, name: str, most: int = JSON_BYTES) -> bytes:
        """The content of a file of at most `most` bytes. The returned bytes are the verified ones.

        Raises:
            ArtifactError: the file is missing, no plain file, larger, changed or not listed.
        """
        path, entry = self._entry(name)
        raw = read_bytes(path, most)
        if entry is not None:
            self._compare(path, entry, len(raw))
            self._compare(path, entry, len(raw), hashlib.sha256(raw).hexdigest())
        return raw

    def read_text(self, name: str) -> str:
        """UTF-8 text. Raises: see `read`, and what is not UTF-8."""
        return decoded(self.read(name), self.path(name))

    def read_json(self, name: str, infinity: bool = False) -> Json:
        """The object that a JSON file holds. Raises: see `read_text` and `io.parse_json`."""
        return json_of(self.read_text(name), self.path(name), infinity)

    def copy(self, name: str, out: Path) -> None:
        """Write the file's content to a new file `out`. The written bytes are the verified ones.

        Raises:
            ArtifactError: see `read`. OSError: `out` cannot be written.
        """
        path, entry = self._entry(name)
        if not name.endswith(
            ".safetensors"
        ):  # weights of one's own plain folder may lie elsewhere, other texts are nobody's
            _stay(self.root, path)
        digest, size = hashlib.sha256(), 0
        out.parent.mkdir(parents=True, exist_ok=True)
        with opened(path) as f, open(out, "xb") as made:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
                made.write(chunk)
        if entry is not None:
            self._compare(path, entry, size, digest.hexdigest())

    def file(self, name: str) -> Path:
        """The path of a verified file, for engines that open weights and graphs themselves.

        A file that was verified and has not been written since is not hashed again.

        Raises:
            ArtifactError: see `read`.
        """
        return self.verified(name, again=False)

    def verified(self, name: str, *, again: bool = True) -> Path:
        """As `file`; `again` hashes the file even if that was done before."""
        path, entry = self._entry(name)
        about = plain(path)
        now = (about.st_ino, about.st_size, about.st_mtime_ns)
        if entry is not None and (again or self._whole.get(self.under + name) != now):
            self._compare(path, entry, about.st_size)
            self._compare(path, entry, about.st_size, sha256(path))
            self._whole[self.under + name] = now
        return path

    def copy_configs(self, out: Path) -> None:
        """The JSON and text files of the model into `out`, which is made where it is missing: those
        that are listed, of a plain folder those that are read. Raises: see `copy`.
        """
        out.mkdir(exist_ok=True)
        own = (
            ("config.json", "scheduler_config.json", *TOKENIZER_FILES)
            if self.listed is None
            else self._listed()
        )
        for name in self.names():
            if (
                name in own
                and name.endswith((".json", ".txt"))
                and not name.endswith(".index.json")
            ):
                self.copy(name, out / name)

    def _listed(self) -> set[str]:
        """Files that are listed, by their names here; of folders in this one their paths."""
        return {p.removeprefix(self.under) for p in self.listed or () if p.startswith(self.under)}

    def _entry(self, name: str) -> tuple[Path, Mapping[str, Any] | None]:
        path = self.path(name)
        if self.listed is None:
            return path, None
        entry = self.listed.get(self.under + name)
        if entry is None:
            there = "is there and" if os.path.lexists(path) else "is missing, and"
            raise ArtifactError(
                f"{path} {there} {self.listing} does not list it: it is not of this model. Remove"
                " it, or fetch or save the model again."
            )
        _stay(self.root, path)
        return path, entry

    def _compare(self, path: Path, entry: Mapping[str, Any], size: int, sha: str = "") -> None:
        """Size first: a file that was cut off need not be hashed."""
        if size != entry["bytes"]:
            raise ArtifactError(
                f"{path} has {size} bytes, {self.listing} says {entry['bytes']}; it is cut off or"
                " changed. Fetch or save the model again."
            )
        if sha and sha != entry["sha256"].lower():
            raise ArtifactError(
                f"{path} has SHA-256 {sha[:12]}..., {self.listing} says {entry['sha256'][:12]}...; "
                "it was changed. Fetch or save the model again."
            )


def read_listing(folder: Path, name: str) -> Json:
    """The manifest or report of a folder: a file of its own, as what it lists.

    Raises:
        ArtifactError: it is a link that leaves the folder, or see `io.read_json`.
    """
    _stay(folder, folder / name)
    return read_json(folder / name)


def _stay(root: Path, path: Path) -> None:
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)) and not _in_hub_cache(root, real):
        raise ArtifactError(
            f"{path} is a link that leaves the model folder; do not use this model, or put the file"
            " in its place."
        )


def _in_hub_cache(root: Path, real: Path) -> bool:
    """huggingface_hub links snapshots/<commit>/file to blobs/<hash>: a link into that folder is its
    own.
    """
    snapshot = Path(os.path.abspath(root))
    blobs = os.path.realpath(snapshot.parent.parent / "blobs")
    return snapshot.parent.name == "snapshots" and real.is_relative_to(blobs)
