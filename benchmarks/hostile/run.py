"""Bad model folders through verify, info and pipelines: each attempt in a process of its own."""

from __future__ import annotations

import collections
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.hostile import attempts, corpus
from benchmarks.hostile.folder import MODEL, Case, Place
from benchmarks.hostile.isolate import SECONDS, Ended, Job

WAIT = 0.02  # seconds between two looks at the jobs
References = dict[str, str]
MADE_BY = (
    ("onnxruntime", "fp16"),
    ("onnxruntime", "fp32"),
    ("openvino", "fp16"),
    ("openvino", "fp32"),
    ("torch", "fp16"),
    ("torch", "fp32"),
)


def references() -> References:
    """ "backend precision" -> SHA-256 of the whole model's image."""
    out = {}
    for backend, precision in MADE_BY:
        job = Job(lambda b=backend, p=precision: attempts.picture(MODEL, b, p), seconds=120.0)
        while (ended := job.poll()) is None:
            time.sleep(WAIT)
        if ended.why:
            raise RuntimeError(f"the whole model fails on {backend} {precision}: {ended.err}")
        out[ended.value["by"]] = ended.value["image"]
    return out


class Rounds:
    """All attempts at all cases, some at a time; a folder is there while its attempts run."""

    def __init__(self, cases: list[Case], place: Place, at_once: int, limit: float = SECONDS):
        self.place, self.at_once, self.limit = place, at_once, limit
        self.waiting = collections.deque(cases)
        self.running: dict[Job, tuple[Case, str]] = {}
        self.todo: collections.deque[tuple[Case, str, Path]] = collections.deque()
        self.open: Counter[str] = Counter()
        self.folders: dict[str, Path] = {}

    def __iter__(self) -> Iterator[tuple[Case, str, Ended]]:
        while self.waiting or self.todo or self.running:
            self._start()
            for job in list(self.running):
                if (ended := job.poll()) is not None:
                    case, attempt = self.running.pop(job)
                    self._close(case)
                    yield case, attempt, ended
            time.sleep(WAIT)

    def _start(self) -> None:
        while len(self.running) < self.at_once and (self.todo or self.waiting):
            if not self.todo:
                case = self.waiting.popleft()
                folder = self.place.build(case.name, case.change, case.rehash)
                tries = attempts.attempts(case)
                self.folders[case.name], self.open[case.name] = folder, len(tries)
                self.todo.extend((case, attempt, folder) for attempt in tries)
            case, attempt, folder = self.todo.popleft()
            run = _attempt(attempt, folder, self.place.outside)
            limit = attempts.seconds(attempt, self.limit)
            self.running[Job(run, stranger=case.stranger, seconds=limit)] = (case, attempt)

    def _close(self, case: Case) -> None:
        self.open[case.name] -= 1
        if not self.open[case.name]:
            self.place.remove(self.folders.pop(case.name))


def _attempt(attempt: str, folder: Path, outside: Path) -> Callable[[], dict[str, Any]]:
    return lambda: attempts.run(attempt, folder, outside)


def try_all(cases: list[Case], at_once: int = 2) -> Iterator[dict[str, Any]]:
    """{case, kind, attempt, verdict, said, seconds, peak_mib} of every attempt."""
    attempts.preload()
    right = references()
    root = Path(tempfile.mkdtemp(prefix="sdlite-hostile-"))
    root.chmod(0o755)
    try:
        for case, attempt, ended in Rounds(cases, Place(root), at_once):
            verdict, said = attempts.judge(case, attempt, ended, right)
            yield {
                "case": case.name,
                "kind": case.kind,
                "attempt": attempt,
                "verdict": verdict,
                "said": said,
                "seconds": ended.seconds,
                "peak_mib": ended.peak_mib,
            }
    finally:
        shutil.rmtree(root, ignore_errors=True)


def counted(tried: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """One row for each kind and attempt: counts of verdicts, and the faults by name."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in tried:
        groups.setdefault((one["kind"], one["attempt"]), []).append(one)
    out = []
    for (kind, attempt), ones in groups.items():
        found = Counter(o["verdict"] for o in ones)
        faults = {
            o["case"]: f"{o['verdict']}: {o['said']}"[:300]
            for o in ones
            if o["verdict"] in attempts.FAULTS
        }
        out.append(
            {
                "corpus": seed,
                "kind": kind,
                "attempt": attempt,
                "tried": len(ones),
                **{v: found[v] for v in attempts.VERDICTS},
                "faults": faults,
            }
        )
    return out


def chosen(seed: int, only: str = "", every: int = 1) -> list[Case]:
    """Cases of a corpus whose kind or name holds `only`; one of `every`."""
    found = [c for c in corpus.cases(seed) if only in c.kind or only in c.name]
    return found[::every]
