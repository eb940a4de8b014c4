"""Tar shards, read in place: one pass finds where each file lies, then each is read when it is
used.

Memory holds names, places and captions, never a shard. A `.tar.gz` cannot be read out of order:
going on in it reads what lies between, going back begins at its front. Training encodes its images
in their order, once, so each is unpacked twice in all: for the index and for the latents.

Source: WebDataset's file convention (github.com/webdataset/webdataset): files with one stem are one
    sample.
"""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

from sdlite.errors import InputError, printable
from sdlite.io import regular

TEXTS = ("json", "txt")
MOST_TEXT = 1 << 20  # bytes of a caption or of what goes with it
MOST_FILE = 256 << 20  # bytes of an image's file
_HEADER = 1 << 20  # bytes of a header: names and attributes
_PACKED = 100  # a .tar.gz of images grows less than this when it is unpacked
_TAIL = 1 << 20  # bytes behind tar's end mark; writers fill up to 10 KiB


@dataclass(frozen=True)
class Member:
    """Where a file of a shard lies, unpacked; `text` is its content where that is small and wanted
    at once.
    """

    offset: int
    size: int
    text: bytes | None


class _Headers:
    """What `tarfile` sees of a file: it reads headers, and no header is large."""

    def __init__(self, file: Any):
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER:
            raise InputError(f"a header claims {size} bytes")
        return cast(bytes, self.file.read(size))


def _unpacked(file: BufferedReader) -> BufferedReader:
    """The file, or what its gzip holds."""
    packed = file.peek(2)[:2] == b"\x1f\x8b"
    return cast(BufferedReader, gzip.GzipFile(fileobj=file)) if packed else file


class Reader:
    """Reads members of shards; keeps the shard open that it read last."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._files: list[BufferedReader] = []

    def read(self, path: Path, member: Member) -> bytes:
        """The member's bytes.

        Raises:
            InputError: the shard is not what it was when it was indexed.
        """
        try:
            if path != self._path:
                self.close()
                self._files = [file := regular(path)]
                self._files.insert(0, _unpacked(file))
                self._path = path
            self._files[0].seek(member.offset)
            out = self._files[0].read(member.size)
        except (OSError, EOFError) as e:
            self.close()
            raise InputError(f"cannot be read from {path.name} ({e})") from e
        if len(out) < member.size:
            raise InputError(f"is cut off in {path.name}")
        return out

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._path, self._files = None, []

    def __del__(self) -> None:
        self.close()


def samples(
    path: Path, leave: Callable[[str, str], None]
) -> Iterator[tuple[str, dict[str, Member]]]:
    """(stem, {ending: member}) of a shard; what is damaged is given to `leave` with the reason."""
    found: dict[str, dict[str, Member]] = {}
    try:
        for name, member in _members(path, leave):
            stem, _, ending = name.rpartition(".")
            files = found.setdefault(stem or name, {})
            if ending.lower() in files:
                leave(f"{path.name}: {name}", "is there twice; the first is used")
            else:
                files[ending.lower()] = member
    except Exception as e:  # tarfile, gzip and zlib each raise their own
        said = getattr(e, "strerror", None) or str(e) or type(e).__name__
        why = printable(said.splitlines()[0], 200)
        leave(
            path.name,
            (
                f"is damaged or cut off after {len(found)} samples ({why})"
                if found
                else f"is no tar shard ({why})"
            ),
        )
    yield from found.items()


def _members(path: Path, leave: Callable[[str, str], None]) -> Iterator[tuple[str, Member]]:
    """Files whose data is all there. Raises what it meets, after the last of them."""
    with regular(path) as packed, _unpacked(packed) as file:
        length = os.fstat(packed.fileno()).st_size
        with tarfile.open(fileobj=cast(Any, _Headers(file)), mode="r:") as tar:
            before: tuple[str, Member] | None = None
            last = -1
            while (info := tar.next()) is not None:
                if before is not None:  # its end was reached, so it is whole
                    yield before
                cast(Any, tar).members.clear()  # one for each file, and not used again
                if info.size < 0 or info.offset <= last:
                    raise InputError("headers go backwards")
                if (
                    file is not packed
                    and info.offset_data + info.size > _PACKED * length + MOST_FILE
                ):
                    raise InputError(
                        f"{length:,} bytes claim to hold more than {_PACKED} times as many"
                    )
                last, before = info.offset, _member(file, info, path, leave)
            if before is not None:
                yield before
            _ended(file, tar.offset)


def _member(
    file: BufferedReader, info: tarfile.TarInfo, path: Path, leave: Callable[[str, str], None]
) -> tuple[str, Member] | None:
    if info.isdir():
        return None
    why = (
        "is a link or device, not a file"
        if not info.isreg()
        else "is a sparse file"
        if info.issparse()
        else None
    )
    if info.size > MOST_FILE:
        why = f"has {info.size >> 20:,} MiB; accepted: {MOST_FILE >> 20} MiB at most"
    text = None
    if why is None and info.name.lower().endswith(TEXTS):
        if info.size > MOST_TEXT:
            why = f"has {info.size >> 10:,} KiB of text; accepted: {MOST_TEXT >> 10:,} KiB at most"
        else:
            file.seek(info.offset_data)
            text = file.read(info.size)
            if len(text) < info.size:
                raise InputError(f"{info.name} is cut off")
    if why is not None:
        leave(f"{path.name}: {info.name}", why)
        return None
    return info.name, Member(info.offset_data, info.size, text)


def _ended(file: BufferedReader, at: int) -> None:
    """Whether the shard ends as tar ends: `tarfile` takes any damaged header for the end."""
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise InputError("it ends without tar's end mark")
    if any(block):
        raise InputError(f"no header at byte {at:,}")
    file.read(_TAIL)  # gzip looks at its checksum at the end
