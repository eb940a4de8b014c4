"""A pipeline's call while it runs: any thread can cancel it, and signals are handled while an
engine computes.

An exception cannot interrupt an engine's run: Python handles a Ctrl-C only when the run has
returned. So long runs are waited for in short pieces, between which `Pipeline.cancel` and signals
are noticed and the engine is told to stop (onnxruntime: RunOptions.terminate; OpenVINO:
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
    """One call. `said` holds sentences of its networks for the report."""

    def __init__(self) -> None:
        self.cancelled = False
        self.said: list[str] = []


_here: ContextVar[Call | None] = ContextVar("sdlite_call", default=None)


@contextmanager
def entered(call: Call) -> Iterator[Call]:
    """Make `call` the one that `check` and `say` refer to in this thread."""
    token = _here.set(call)
    try:
        yield call
    finally:
        _here.reset(token)


def inside() -> bool:
    """Whether this thread is in a call."""
    return _here.get() is not None


def check() -> None:
    """Stop a cancelled call; for use between two pieces of work.

    Raises:
        Cancelled: the call of this thread was cancelled.
    """
    call = _here.get()
    if call is not None and call.cancelled:
        raise Cancelled("cancelled by pipe.cancel() or pipe.close(); nothing was written.")


def say(text: str) -> None:
    """Add a sentence to the report of this thread's call."""
    call = _here.get()
    if call is not None and text not in call.said:
        call.said.append(text)


def waited(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """Run `work()` in a thread of its own, while this thread watches for a cancel and for signals.

    Args:
        work: a run of an engine; costs 0.13 ms more than calling it here.
        stop: makes it end soon.

    Raises:
        Cancelled, KeyboardInterrupt, what a signal's handler raises: when the run has ended, or
            after `GRACE` seconds. A run that goes on ends with its node, and the interpreter waits
            for it before it exits.
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
    """The runs of one network. A run that is expected to be long, or whose length is not known, is
    made in a thread of its own and waited for. Others are made in the caller's thread, which
    processes need that are forked from one that has run.
    """

    def __init__(self) -> None:
        self._pace: float | None = None  # seconds an element of the inputs
        self.seconds = 0.0  # of the last run

    def __call__(self, work: Callable[[], T], stop: Callable[[], None], elements: int) -> T:
        """Run `work`, by `waited` where it takes `LONG` or more. `elements`: how many numbers the
        inputs have.
        """
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
    """How many numbers the inputs have together."""
    return sum(v.size for v in inputs.values())
