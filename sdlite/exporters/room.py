"""Is there room for an export? Disk and memory, asked before it begins and said plainly when they
run out on the way.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdlite.artifact import PARTS, Artifact
from sdlite.errors import ExportError
from sdlite.exporters.profile import Profile

_MIB = 1 << 20


def free_disk(path: Path) -> int:
    """Bytes free where `path` is or will be."""
    return shutil.disk_usage(_existing(path)).free


def free_memory() -> int | None:
    """Bytes that Linux says a new process can have (MemAvailable); None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None
    )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def sizes(artifact: Artifact, source: str) -> dict[str, int]:
    """Bytes of each network while it is converted: float16 weights are opened to float32."""
    assert artifact.manifest is not None
    out = {}
    for p in PARTS:
        entry = artifact.manifest.variants[source][p]
        stored = sum(
            (artifact.folder / f).stat().st_size for f in (entry["file"], *entry.get("weights", ()))
        )
        out[p] = stored * (2 if entry.get("storage") == "float16" else 1)
    return out


def check(artifact: Artifact, profile: Profile, source: str, out: Path) -> None:
    """Refuse what cannot end well.

    The scratch folder holds all networks and a second copy of one of them; the folder of `out`
    holds what is made and, while a converter works, its input once more. A converter has a network
    and its copy in memory at least.

    Raises:
        ExportError: too little disk or memory, with what is needed and what is free.
    """
    size = sizes(artifact, source)
    total, largest = sum(size.values()), max(size.values())
    if said := no_room(profile.name, total + largest, 2 * total, out):
        raise ExportError(said)
    have_memory = free_memory()
    if have_memory is not None and have_memory < 2 * largest:
        raise ExportError(
            f"too little memory for {profile.name}: at least {2 * largest // _MIB + 1:,} MiB are"
            f" needed for its largest network, {have_memory // _MIB:,} MiB are free. Close other"
            " programs, or export on a larger machine. Nothing was written."
        )


def no_room(what: str, aside: int, made: int, out: Path) -> str:
    """What is missing where the disks have less free than what is needed; "" where there is enough.

    Args:
        aside, made: bytes in the system's folder for temporary files, and where `out` will be.
    """
    scratch, place = Path(tempfile.gettempdir()), _existing(out)
    need = {scratch: aside, place: made}
    if os.stat(scratch).st_dev == os.stat(place).st_dev:
        need = {place: aside + made}
    for where, wanted in need.items():
        if (have := free_disk(where)) < wanted:
            return (
                f"too little disk for {what}: about {wanted // _MIB + 1:,} MiB are needed in"
                f" {where}, {have // _MIB:,} MiB are free. Make room, or choose another folder"
                " (--out; TMPDIR for the scratch folder). Nothing was written."
            )
    return ""


@contextmanager
def watched(profile: Profile) -> Iterator[None]:
    """Errors of a full disk or memory inside, from Python or from onnxruntime, as ExportError."""
    try:
        yield
    except MemoryError as e:
        raise ExportError(_no_memory(profile)) from e
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" in {e.filename}" if e.filename else ""
        raise ExportError(
            f"the disk ran out during the export of {profile.name}{where}. Nothing was written;"
            " make room there, or choose another folder (--out; TMPDIR for temporary files)."
        ) from e
    except RuntimeError as e:  # onnxruntime's errors, torch's too
        if not is_memory(e):
            raise
        raise ExportError(_no_memory(profile)) from e


def is_memory(error: Exception) -> bool:
    """Whether an engine's error is about memory."""
    return any(
        w in str(error) for w in ("bad_alloc", "Failed to allocate memory", "not enough memory")
    )


def _no_memory(profile: Profile) -> str:
    return (
        f"the memory ran out during the export of {profile.name}. Nothing was written; make room"
        " and start again."
    )
