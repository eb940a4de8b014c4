"""What a command prints, and the streams and signals of its process."""

from __future__ import annotations

import contextlib
import io as streams
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TypeVar, cast

from sdlite.errors import printable

T = TypeVar("T")
PRINTED = "what is printed"  # in place of a file's name


def say(*lines: object) -> None:
    """Print lines, which may hold names out of files, as a terminal can take them."""
    write("".join(f"{printable(line, 100_000)}\n" for line in lines))


def write(text: str) -> None:
    """Print text that holds no control characters.

    Raises:
        OSError: the output cannot be written; its file's name is `PRINTED`.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise OSError(e.errno, e.strerror, PRINTED) from e


def complain(text: object) -> None:
    """Print one line on stderr."""
    with contextlib.suppress(BrokenPipeError):
        print(f"sdlite: {printable(text, 10_000)}", file=sys.stderr)


def shown(report: T) -> T:
    """A report with each of its texts on one line."""
    return cast(T, _shown(report))


def _shown(value: object) -> object:
    if isinstance(value, Mapping):
        return {printable(k): _shown(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(v) for v in value]
    return printable(value) if isinstance(value, str) else value


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Print warnings and log in one line each, and text that the terminal's encoding lacks as
    escapes; a file that is opened takes no closed stream's place.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, streams.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
    log, handler = logging.getLogger("sdlite"), _Log()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that what was half written is removed.

    A signal that is ignored stays so, as SIGHUP is under nohup.
    """
    asked = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked and number != signal.SIGINT:
            return  # what is half written is being removed
        asked = True
        raise KeyboardInterrupt

    try:
        before = {n: signal.signal(n, stop) for n in _heeded()}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    except Exception as e:
        if asked:  # a C++ library that was being imported makes an error of its own of it
            raise KeyboardInterrupt from e
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heeded() -> list[signal.Signals]:
    """The signals of a user that are not ignored. Windows has no SIGHUP."""
    there = [getattr(signal, n, None) for n in ("SIGINT", "SIGTERM", "SIGHUP")]
    return [n for n in there if n is not None and signal.getsignal(n) is not signal.SIG_IGN]
