"""Is there room for an export? Disk and memory, asked before it begins and said plainly when they
run out on the way.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdlite import disk, memory
from sdlite.artifact import Artifact
from sdlite.errors import ExportError
from sdlite.exporters.profile import Profile


def check(artifact: Artifact, profile: Profile, source: str, out: Path) -> None:
    """Refuse what cannot end well.

    The scratch folder holds all networks and a second copy of one of them; the folder of `out`
    holds what is made and, while a converter works, its input once more. A converter has a network
    and its copy in memory at least.

    Raises:
        ExportError: too little disk or memory, with what is needed and what is free.
    """
    size = disk.sizes(artifact, source)
    total, largest = sum(size.values()), max(size.values())
    if said := disk.lacking(profile.name, total + largest, 2 * total, out):
        raise ExportError(said)
    have_memory = memory.free_memory()
    if have_memory is not None and have_memory < 2 * largest:
        raise ExportError(
            f"too little memory for {profile.name}: at least {2 * largest // disk.MIB + 1:,} MiB"
            f" are needed for its largest network, {have_memory // disk.MIB:,} MiB are free. Close"
            " other programs, or export on a larger machine. Nothing was written."
        )


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
        if not memory.is_memory(e):
            raise
        raise ExportError(_no_memory(profile)) from e


def _no_memory(profile: Profile) -> str:
    return (
        f"the memory ran out during the export of {profile.name}. Nothing was written; make room"
        " and start again."
    )
