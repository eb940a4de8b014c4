"""Memory of this process. Weights that an engine has read through a memory map need not stay in
memory: the engine keeps a packed copy, and the file keeps the original.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Linux 5.4, <sys/mman.h>. Not MADV_DONTNEED: that empties memory which took a map's place while its
# line was read
_PAGEOUT = 21
_EVERY = 0.03  # seconds
_WORTH = (
    192 << 20
    # bytes of file pages more than at the start: what is let go is read from the disk again, so not
    # before it matters
)


def release(folder: Path) -> int:
    """Let go of the pages of read-only maps of files in `folder`; they are read again from the file
    when they are touched.

    Returns:
        Bytes of address space that were released. 0 where there is no /proc (not Linux).
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return 0
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    root, total = f"{folder.resolve()}/", 0
    for line in maps:
        addresses, rights, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith(root) and rights.startswith("r-"):
            start, end = (int(a, 16) for a in addresses.split("-"))
            if madvise(start, end - start, _PAGEOUT) == 0:
                total += end - start
    return total


def resident() -> int:
    """Bytes of file pages that this process has in memory; 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile:")), 0)


def trim() -> None:
    """Give the heap's free pages back to the system. Only glibc needs to be asked; other C
    libraries do so by themselves.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def released(*folders: Path) -> Iterator[None]:
    """While an engine compiles, `release` file pages whenever they become many, so that they and
    the packed weights are not both in memory; and once more at the end, then `trim`.
    """
    done, before = threading.Event(), resident()  # other libraries' pages are not ours to count

    def work() -> None:
        while not done.wait(_EVERY):
            if resident() - before > _WORTH:
                for folder in folders:
                    release(folder)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for folder in folders:
            release(folder)
        trim()


def free_memory() -> int | None:
    """Bytes that Linux says a new process can have (MemAvailable); None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None
    )


def is_memory(error: Exception) -> bool:
    """Whether an engine's error is about memory."""
    return any(
        w in str(error) for w in ("bad_alloc", "Failed to allocate memory", "not enough memory")
    )


def peak_mib(children: bool = False) -> float | None:
    """Largest resident set of this process, or of the largest process that it waited for, where the
    system tells. Of the latter Linux counts what this process had when it started it.
    """
    status = Path("/proc/self/status")
    if not children and status.exists():  # `ru_maxrss` begins with what the parent process had
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) / 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(
        resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    ).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
