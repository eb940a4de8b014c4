"""Changed files by the thousand through one reader, in forks with limits.

A fork reads many inputs. Where it dies, hangs or takes too much memory, the input it was at is the
fault, and another fork goes on behind it. Input `i` of a seed is the same bytes on every machine.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import shutil
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlite.errors import SdliteError

from benchmarks.hostile import mutate
from benchmarks.hostile.attempts import VERDICTS, unsafe
from benchmarks.hostile.isolate import PATIENCE, computed, resident
from benchmarks.hostile.readers import READERS, Reader, quiet

SECONDS = 5.0  # of computing for one input
MEMORY = 1 << 30  # bytes more than before
_SHARED = struct.Struct("qdd")  # the input, since when, and the seconds computed until then


def changed(reader: Reader, whole: list[bytes], seed: int, i: int) -> bytes:
    """Input `i` of a seed."""
    rng = mutate.Rng(f"{seed}/{reader.name}/{i}")
    return rng.choice(reader.mutators)(rng, rng.choice(whole))


def read(reader: Reader, folder: Path, raw: bytes) -> tuple[str, str]:
    """("right" | "refused" | "traceback" | "wrong", what was said)."""
    try:
        reader.target(folder, raw)
    except SdliteError as e:
        if bad := unsafe(str(e)):
            return "wrong", f"not one line of plain characters ({bad!r}): {e}"
        return "refused", f"{type(e).__name__}: {e}"
    except Exception as e:
        return "traceback", f"{type(e).__name__}: {e}"[:500]
    return "right", ""


def able(reader: Reader) -> bool:
    """Whether its modules are there."""
    return all(importlib.util.find_spec(m) for m in reader.needs)


def _whole(reader: Reader, folder: Path) -> list[bytes]:
    """Files to start from, each of which is read rightly."""
    out = reader.prepare(folder)
    for raw in out:
        verdict, said = read(reader, folder, raw)
        if verdict != "right":
            raise RuntimeError(f"{reader.name}: a whole file is {verdict}: {said}")
    return out


class Fork:
    """Reads the inputs `start` to `stop`."""

    def __init__(self, reader: Reader, seed: int, start: int, stop: int):
        self.shared = mmap.mmap(-1, _SHARED.size)
        self.said = Path(tempfile.mkdtemp(prefix="sdlite-fuzz-"))
        self.base = resident()
        self._at(start)
        self.pid = os.fork()
        if self.pid == 0:
            self._child(reader, seed, start, stop)

    def _at(self, i: int) -> None:
        self.shared.seek(0)
        self.shared.write(_SHARED.pack(i, time.monotonic(), time.process_time()))

    def _child(self, reader: Reader, seed: int, start: int, stop: int) -> None:
        code = 1
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(os.open(self.said / "err", os.O_CREAT | os.O_WRONLY), 2)
            quiet()
            folder = self.said / "folder"
            folder.mkdir()
            whole = _whole(reader, folder)
            with open(self.said / "verdicts", "w", encoding="utf-8") as f:
                for i in range(start, stop):
                    self._at(i)
                    raw, begin = changed(reader, whole, seed, i), time.monotonic()
                    verdict = read(reader, folder, raw)
                    f.write(json.dumps([i, time.monotonic() - begin, *verdict]) + "\n")
                    f.flush()
            code = 0
        except BaseException as e:
            os.write(2, f"{type(e).__name__}: {e}".encode())
        finally:
            os._exit(code)

    def wait(self) -> Iterator[tuple[int, float, str, str]]:
        """(input, seconds, verdict, what was said) of each; the last may be a hang or crash."""
        why = None
        while why is None:
            time.sleep(0.01)
            why = self._look()
        path = self.said / "verdicts"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            with suppress(ValueError):  # cut off by the end of the process
                yield tuple(json.loads(line))
        if why:
            err = (self.said / "err").read_text(errors="replace")[-300:]
            i, since, _ = _SHARED.unpack(self.shared[:])
            yield i, time.monotonic() - since, why.split()[0], f"{why}; {err}"
        shutil.rmtree(self.said, ignore_errors=True)

    def _look(self) -> str | None:
        """None while it runs, "" where it has ended well."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            return f"crash {os.waitstatus_to_exitcode(status)}" if status else ""
        _, since, before = _SHARED.unpack(self.shared[:])
        late = time.monotonic() - since > 2 * PATIENCE * SECONDS
        late |= computed(self.pid) - before > SECONDS
        used = resident(self.pid) - self.base
        if not late and used < MEMORY:
            return None
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return "memory" if used >= MEMORY else "hang"


def fuzz(name: str, count: int, seed: int = 0) -> dict[str, Any]:
    """One row: counts of verdicts, and up to 50 faults by input."""
    reader, at = READERS[name], 0
    found: Counter[str] = Counter()
    faults: dict[str, str] = {}
    begin, slowest = time.monotonic(), 0.0
    while at < count:
        for i, seconds, verdict, said in Fork(reader, seed, at, min(at + 1000, count)).wait():
            at = i + 1
            found[verdict] += 1
            slowest = max(slowest, seconds)
            if verdict not in ("right", "refused") and len(faults) < 50:
                faults[str(i)] = f"{verdict}: {said}"[:300]
    return {
        "reader": name,
        "seed": seed,
        "tried": found.total(),
        **{v: found[v] for v in VERDICTS},
        "faults": faults,
        "seconds": round(time.monotonic() - begin, 1),
        "slowest": round(slowest, 2),
    }
