"""A function in a process of its own, with limits of time and memory.

The parent has imported everything and has made no session of any engine, so that a fork is quick
and whole: engines start their threads in the child.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 2 << 30  # bytes that a job may take beyond what the parent had
SECONDS = 20.0  # of computing; a job that waits may wait longer, as the machine does other work
PATIENCE = 3.0  # times so long
_PAGE = os.sysconf("SC_PAGE_SIZE")
_NOBODY = 65534


@dataclass
class Ended:
    """How a job ended.

    Attributes:
        why: "" where it came to its end, else "hang", "memory" or "crash".
        value: what the function returned. out, err: what it wrote.
    """

    why: str
    value: dict[str, Any] = field(default_factory=dict)
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    peak_mib: int = 0


def resident(pid: int | str = "self") -> int:
    """Bytes that a process has in memory; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def computed(pid: int) -> float:
    """Seconds of CPU time that a process has used; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Job:
    """A function that runs in a fork of this process. It returns what JSON holds."""

    def __init__(
        self,
        run: Callable[[], dict[str, Any]],
        *,
        stranger: bool = False,
        seconds: float = SECONDS,
        memory: int = MEMORY,
    ):
        """`stranger`: run as another user, where this one is root."""
        self.seconds, self.memory, self.peak = seconds, memory, 0
        self.base, self.begin = resident(), time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="sdlite-hostile-"))
        self.pid = os.fork()
        if self.pid == 0:
            self._child(run, stranger)

    def _child(self, run: Callable[[], dict[str, Any]], stranger: bool) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            for number, name in ((1, "out"), (2, "err")):
                fd = os.open(self.folder / name, os.O_CREAT | os.O_WRONLY)
                os.dup2(fd, number)
            value = os.open(self.folder / "value", os.O_CREAT | os.O_WRONLY)
            if stranger and os.getuid() == 0:
                os.setgroups([])
                os.setresgid(*[_NOBODY] * 3)
                os.setresuid(*[_NOBODY] * 3)
            os.write(value, json.dumps(run()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code)

    def poll(self) -> Ended | None:
        """How it ended; None while it runs. What goes beyond its limits is killed."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.begin
        if pid:
            return self._ended("" if status == 0 else "crash", status, seconds)
        used = resident(self.pid) - self.base
        self.peak = max(self.peak, used)
        late = seconds > PATIENCE * self.seconds or computed(self.pid) > self.seconds
        why = "memory" if used > self.memory else "hang" if late else ""
        if not why:
            return None
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return self._ended(why, 0, seconds)

    def _ended(self, why: str, status: int, seconds: float) -> Ended:
        out, err, value = (self._read(n) for n in ("out", "err", "value"))
        shutil.rmtree(self.folder)
        if why == "crash":
            err += f"\nended with status {os.waitstatus_to_exitcode(status)}"
        answer = json.loads(value) if value and not why else {}
        return Ended(why, answer, out, err, round(seconds, 2), self.peak >> 20)

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _flush() -> None:
    import sys

    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
