"""A pipeline's call while it runs: cancelled from any thread, and open to signals while an engine
computes.

An engine's run cannot be left by an exception: Python sees a Ctrl-C only when it has returned. So
long runs are waited for in short pieces, in which the flag of `Pipeline.cancel` and signals are
seen, and the engine is told to stop (onnxruntime: RunOptions.terminate; OpenVINO:
InferRequest.cancel; both end with the node that they are at).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import numpy as np

from sdlite.errors import Cancelled

T = TypeVar("T")
PIECE = 0.05  # seconds until a cancel or a signal is seen
LONG = 0.2  # seconds of a run that is worth the waiting
# seconds that a run has to stop; one node of onnxruntime may take longer (attention at 2048 px: 10
# s)
GRACE = 1.0


class Call:
    """One call. `said` is what its networks have to say about it, in sentences."""

    def __init__(self) -> None:
        self.cancelled = False
        self.said: list[str] = []


_here: ContextVar[Call | None] = ContextVar("sdlite_call", default=None)


@contextmanager
def entered(call: Call) -> Iterator[Call]:
    """`call` is what `check` and `say` are about, in this thread."""
    token = _here.set(call)
    try:
        yield call
    finally:
        _here.reset(token)


def inside() -> bool:
    """Whether this thread is in a call."""
    return _here.get() is not None


def check() -> None:
    """Between two pieces of work.

    Raises:
        Cancelled: the call of this thread was cancelled.
    """
    call = _here.get()
    if call is not None and call.cancelled:
        raise Cancelled("cancelled by pipe.cancel() or pipe.close(); nothing was written.")


def say(text: str) -> None:
    """A sentence for the report of the call of this thread."""
    call = _here.get()
    if call is not None and text not in call.said:
        call.said.append(text)


def waited(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """`work()`, in a thread of its own, while this one looks for a cancel and for signals.

    Args:
        work: a run of an engine; costs 0.13 ms more than calling it here.
        stop: makes it end soon.

    Raises:
        Cancelled, KeyboardInterrupt, what a signal's handler raises: when the run has ended, or
        after `GRACE` seconds. What still
            runs then ends with its node, and the interpreter waits for it before it exits.
    """
    done, out, failed = threading.Event(), [], []

    def body() -> None:
        try:
            out.append(work())
        except BaseException as e:
            failed.append(e)
        finally:
            done.set()

    thread = threading.Thread(target=body, name="sdlite-run", daemon=False)
    try:
        thread.start()
        while not done.wait(PIECE):
            check()
    except BaseException:
        stop()
        done.wait(GRACE)
        raise
    if failed:
        raise failed[0]
    return out[0]


class Runs:
    """The runs of one network: those that will be long, or nobody knows, are waited for; the others
    are made in the caller's thread, as before there was any waiting (and as processes need it that
    are forked from one that has run).
    """

    def __init__(self) -> None:
        self._pace: float | None = None  # seconds an element of the inputs
        self.seconds = 0.0  # of the last run

    def __call__(self, work: Callable[[], T], stop: Callable[[], None], elements: int) -> T:
        """`waited`, where it takes `LONG` or more. `elements`: of the inputs."""
        start = time.perf_counter()
        try:
            if self._pace is not None and self._pace * elements < LONG:
                check()
                out = work()
            else:
                out = waited(work, stop)
        finally:
            self.seconds = time.perf_counter() - start
        self._pace = self.seconds / elements
        return out


def elements(inputs: Mapping[str, np.ndarray]) -> int:
    return sum(v.size for v in inputs.values())
