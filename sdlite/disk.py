"""Disk space: what is free, what a model takes, and what is missing for a job."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from sdlite.artifact import Artifact

MIB = 1 << 20


def free_disk(path: Path) -> int:
    """Bytes free where `path` is or will be."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def sizes(artifact: Artifact, source: str) -> dict[str, int]:
    """Bytes of each network while it is converted: float16 weights are opened to float32."""
    out = {}
    for p in artifact.held_parts(source):
        files = artifact.network_files(source, p)
        stored = sum((artifact.folder / f).stat().st_size for f in files)
        out[p] = stored * (2 if artifact.network(source, p)["storage"] == "float16" else 1)
    return out


def lacking(what: str, aside: int, made: int, out: Path) -> str:
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
                f"too little disk for {what}: about {wanted // MIB + 1:,} MiB are needed in"
                f" {where}, {have // MIB:,} MiB are free. Make room, or choose another folder"
                " (--out; TMPDIR for the scratch folder). Nothing was written."
            )
    return ""
