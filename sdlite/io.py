"""Files: looked at before they are opened, read strictly, and written whole or not at all.

What is half written lies in a folder `.sdlite-work-*` beside its place. The process that writes
holds a lock in it; the system frees the lock when the process ends, however it ends. So the next
run tells a folder that was left behind from one that is in use, and `Artifact.open` refuses both.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, Never

from sdlite.errors import ArtifactError, InputError

try:
    import fcntl
except ImportError:  # Windows: what a killed process left is not recognized
    fcntl = None  # type: ignore[assignment]

JSON_BYTES = 32 << 20  # the largest known: a tokenizer.json of 4 MiB, a manifest of 50 kB
DEPTH = 64  # of objects and lists in one another
WORK = ".sdlite-work-"
_LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def printable(text: object, most: int = 2000) -> str:
    """Text for a terminal or a log: control characters, other line ends and lone surrogates as escapes."""
    whole = str(text)
    shown = whole if len(whole) <= most else f"{whole[:most]}... ({len(whole)} characters)"
    return "".join(_escaped(c) if unicodedata.category(c) in _UNSAFE else c for c in shown)


_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")


# --- reading -------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A plain file, opened for reading. A link is followed; where it may lead is its caller's to say.

    Raises:
        ArtifactError: it is missing, or a folder, pipe, socket or device, which would never end or
            never begin; it is not opened then.
    """
    plain(path)
    with _readable(path):
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(fd, "rb") as f:
        _refuse(path, os.fstat(fd).st_mode)
        yield f


def plain(path: Path) -> os.stat_result:
    """What the system says of a plain file. Raises: see `opened`."""
    with _readable(path):
        about = os.stat(path)
    _refuse(path, about.st_mode)
    return about


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; the folder is not a whole model. Fetch or save it again.") from None
    except (OSError, ValueError) as e:  # ValueError: a name with a null byte
        raise ArtifactError(f"{path} cannot be read ({_why(e)}); fetch or save the model again.") from e


def _refuse(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS.items() if test(mode)), "no plain file")
        raise ArtifactError(f"{path} is {kind}, not a file; do not use this model.")


def _why(e: Exception) -> str:
    return (e.strerror if isinstance(e, OSError) else None) or str(e)


def read_bytes(path: Path, most: int = JSON_BYTES) -> bytes:
    """The content of a plain file of at most `most` bytes.

    Raises:
        ArtifactError: it cannot be read, or is larger.
    """
    with opened(path) as f:
        try:
            raw = f.read(most + 1)
        except OSError as e:
            raise ArtifactError(f"{path} cannot be read ({_why(e)}); fetch or save the model again.") from e
    if len(raw) > most:
        raise ArtifactError(f"{path} has more than {most >> 20} MiB, which no such file needs; do not use this model.")
    return raw


def read_text(path: Path, most: int = JSON_BYTES) -> str:
    """The UTF-8 text of a plain file.

    Raises:
        ArtifactError: it cannot be read, is larger than `most` bytes, or not UTF-8.
    """
    return decoded(read_bytes(path, most), path)


def decoded(raw: bytes, path: Path) -> str:
    """UTF-8 text, which stands in `path`. Raises: ArtifactError."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ArtifactError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); fetch or save the model again.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ArtifactError: the file cannot be read, is no JSON by RFC 8259 (NaN and Infinity are none),
            is nested deeper than `DEPTH`, or holds something else than an object.
    """
    return json_of(read_text(path), path)


def json_of(text: str, path: Path) -> dict[str, Any]:
    """The object of a JSON text, which stands in `path`. Raises: see `read_json`."""
    try:
        out = parse_json(text)
    except ValueError as e:
        raise ArtifactError(f"{path} cannot be read ({e}); fetch or save the model again.") from e
    if not isinstance(out, dict):
        raise ArtifactError(f"{path} holds {type(out).__name__}, not an object; fetch or save the model again.")
    return out


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: not JSON, NaN, infinity (1e999 too), or nested deeper than `DEPTH`.
    """
    try:
        out = json.loads(text, parse_constant=_no_number, parse_float=_number)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEPTH}") from None
    waiting = [(out, 1)]
    while waiting:
        value, depth = waiting.pop()
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if depth > DEPTH:
            raise ValueError(f"it is nested deeper than {DEPTH}")
        waiting += [(v, depth + 1) for v in inner if isinstance(v, (dict, list))]
    return out


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is not a number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a plain file, in hex.

    Raises:
        ArtifactError: it cannot be read.
    """
    with opened(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- writing -------------------------------------------------------------------------------------


def cache_root() -> Path:
    """Where sdlite keeps what it can make again: `$SDLITE_CACHE`, or `~/.cache/sdlite`."""
    return Path(os.environ.get("SDLITE_CACHE") or Path.home() / ".cache" / "sdlite")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new name beside `path`, with its ending; the file that the block writes there takes the place of `path`.

    Raises:
        OSError: the place cannot be written; its `filename` is `path`.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        with _named(path):
            yield tmp
            _sync(tmp)
            os.replace(tmp, path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


def write(path: str | Path, data: str | bytes) -> None:
    """Write a whole file beside its place and rename.

    Raises:
        OSError: see `replacing`.
    """
    with replacing(path) as tmp:
        tmp.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON that every reader takes: UTF-8, no NaN, no infinity.

    Raises:
        OSError: see `replacing`. ValueError: the value holds NaN or infinity.
    """
    write(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk names the file that did not fit."""
    try:
        yield
    except OSError as e:
        if e.errno in _FULL and not e.filename:
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise


def _sync(path: Path) -> None:
    """What was written there survives a power cut. Folders too, where the system can."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folder
        return
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno in (*_FULL, errno.EIO):
            raise
    finally:
        os.close(fd)


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


_own: set[Path] = set()  # work folders of this process


def left_behind(folder: Path) -> Path | None:
    """The work folder that `folder` lies in, of another process or one that was killed; None where it lies in none."""
    real = Path(os.path.realpath(folder))
    return next((p for p in (real, *real.parents) if p.name.startswith(WORK) and p not in _own), None)


@contextmanager
def working(place: Path, purpose: str = "") -> Iterator[Path]:
    """A new folder in `place` that is gone after the block. Removes those that killed processes left there.

    Raises:
        OSError: `place` cannot be written.
    """
    clean(place)
    with _named(place):
        made = Path(os.path.realpath(tempfile.mkdtemp(prefix=f"{WORK}{purpose}-", dir=place)))
    _own.add(made)
    lock = _locked(made)
    try:
        with _named(made):
            yield made
    finally:
        remove(made)
        _own.discard(made)
        if lock is not None:
            os.close(lock)


def scratch(purpose: str) -> Any:
    """`working` in the system's folder for temporary files."""
    return working(Path(tempfile.gettempdir()), purpose)


def _locked(folder: Path) -> int | None:
    if fcntl is None:
        return None
    fd = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(folder / ".lock", folder / _LOCK)  # nobody sees it before it is held
    return fd


def clean(place: Path) -> None:
    """Remove work folders in `place` whose process is gone."""
    if fcntl is None:
        return
    with suppress(OSError):
        for folder in place.iterdir():
            if folder.name.startswith(WORK) and _abandoned(folder):
                remove(folder)


def _abandoned(folder: Path) -> bool:
    try:
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
            return False
        fd = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its process lives, or the file system has no locks
        return False
    finally:
        os.close(fd)
    return True


def remove(folder: Path) -> None:
    """Remove a folder of ours, folders in it that are read only too."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def check_out(out: str | Path) -> Path:
    """Whether a new folder can be written, looked at before the work begins. Nothing is left there.

    Returns:
        `out`, with its links followed.

    Raises:
        InputError: it is no empty folder, is being written by another process, or its place cannot
            be written.
    """
    real = Path(os.path.realpath(out))
    if real.is_dir():
        clean(real)
        if other := next((p for p in real.iterdir() if p.name.startswith(WORK)), None):
            raise InputError(f"{out} is being written by another process ({other.name}); wait for it, or choose another folder.")
    if os.path.lexists(real) and (not real.is_dir() or any(real.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; choose another or remove it.")
    there = next(p for p in (real, *real.parents) if p.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f"{WORK}look-", dir=there))
    except OSError as e:
        raise InputError(f"{out} cannot be written ({there}: {e.strerror}); choose another folder.") from e
    return real


@contextmanager
def writing(out: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes when it does not.

    A folder that exists and is empty is filled: it may be the current one, or a mount point, which
    cannot be renamed to. model_index.json is moved last, so that a half-filled folder is no model.

    Raises:
        InputError: see `check_out`.
    """
    real = check_out(out)
    new = [p for p in real.parents if not p.exists()]
    real.parent.mkdir(parents=True, exist_ok=True)
    try:
        with working(real if real.is_dir() else real.parent, real.name[:40]) as work:
            tmp = work / "model"
            tmp.mkdir()
            yield tmp
            _sync_all(tmp)
            _move(tmp, real, out)
    except BaseException:
        for parent in new:
            with suppress(OSError):
                parent.rmdir()
        raise


def _move(made: Path, real: Path, out: str | Path) -> None:
    if not real.is_dir() or made.parent.parent != real:
        try:
            os.rename(made, real)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise InputError(f"{out} was written by another process meanwhile; nothing was changed.") from e
        _sync(real.parent)
        return
    for path in sorted(made.iterdir(), key=lambda p: (p.name == "model_index.json", p.name)):
        os.rename(path, real / path.name)
    _sync(real)
