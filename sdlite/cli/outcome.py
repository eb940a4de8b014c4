"""How a command ends: its exit code, and one line for everything that goes wrong."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from sdlite.cli.terminal import PRINTED, complain, terminable
from sdlite.errors import SdliteError
from sdlite.io import WORK


def exit_code(read: Callable[[], argparse.Namespace]) -> int:
    """Read the arguments and run the command that they name. Returns the exit code."""
    wrote: list[Path] = []
    try:
        args = read()
        wrote = args.wrote
        with terminable():
            args.run(args)
        return 0
    except BrokenPipeError:
        return nobody_reads()
    except (SdliteError, OSError, MemoryError, RecursionError) as e:
        complain(_explained(e))
    except KeyboardInterrupt as e:
        complain(f"interrupted; {e}" if e.args else _interrupted(wrote))
    return 1


def _explained(e: Exception) -> str:
    if isinstance(e, OSError) and not isinstance(e, SdliteError):
        return _system(e)
    if isinstance(e, MemoryError):
        return (
            f"the memory ran out{f' ({e})' if str(e) else ''}. Close other programs, or ask for"
            " less: a smaller size, fewer images at once."
        )
    if isinstance(e, RecursionError):
        return "a file is nested too deep to be read; fetch or save the model again."
    return str(e)


def _system(e: OSError) -> str:
    """What the system refused: the file, why, and the next step where the disk is full."""
    given = (e.filename, e.filename2)
    names = [os.fsdecode(n) for n in given if isinstance(n, str | bytes | os.PathLike)]
    name = next((n for n in names if WORK not in n), names[0] if names else "")
    said = f"{name}: {e.strerror or e}" if name else str(e.strerror or e) or type(e).__name__
    if e.errno not in (errno.ENOSPC, errno.EDQUOT) or name in ("", PRINTED):
        return said
    path = Path(name).absolute()
    disk = shutil.disk_usage(next(p for p in (path, *path.parents) if os.path.isdir(p)))
    free = (
        f"{disk.free >> 20} of {disk.total >> 20} MiB are free there now that what was half written"
        " is removed"
    )
    return (
        f"{said} ({free}). Make room, or choose another folder (--out; TMPDIR for temporary files)."
    )


def _interrupted(wrote: list[Path]) -> str:
    """What is there after an interrupt."""
    if wrote:
        return f"interrupted; {', '.join(map(str, wrote))} had been written"
    return "interrupted; nothing was written"


def nobody_reads() -> int:
    """The exit code of a program that SIGPIPE ends; what is still to be printed goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    return 141
