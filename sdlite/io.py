"""Files are checked before they are opened, read strictly, and written whole or not at all.

What is half written lies in a folder `.sdlite-work-*` beside its place. The process that writes
holds a lock in it; the system frees the lock when the process ends, however it ends. So the next
run tells a folder that was left behind from one that is in use, and `Artifact.open` refuses both.
Where nobody can tell (a file system without locks, Windows, another machine), nothing is removed.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import stat
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, Never

from sdlite.errors import ArtifactError, InputError, SdliteError, printable
from sdlite.schema import Json

try:
    import fcntl
except ImportError:  # Windows: what a killed process left is not recognized
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("sdlite")
JSON_BYTES = 32 << 20  # the largest known: a tokenizer.json of 4 MiB, a manifest of 50 kB
TOML_BYTES = 1 << 20
DEPTH = 64  # of objects and lists in one another
WORK = ".sdlite-work-"
_LOOK = f"{WORK}look-"  # is a folder that can be written; there for a moment, and empty
_LOCK = "lock"
# seconds until a work folder without a lock was left behind; it has none for a moment
_HOUR = 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_WORDS = ("No space left", "os error 28", "Disk quota", "iostream error", "inline_container")
_NEARLY = 1 << 20  # bytes that a full disk may have left
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


# --- reading


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A plain file of a model, opened for reading. A link is followed; the caller checks
    where it leads.

    Raises:
        ArtifactError: it is missing, or is a folder, pipe, socket or device. Those are not opened,
            for reading them might never end.
    """
    with _readable(path):
        f = regular(path)
    with f:
        yield f


def plain(path: Path) -> os.stat_result:
    """Status of a plain file (`os.stat`). Raises: see `opened`."""
    with _readable(path):
        about = os.stat(path)
        _refuse(path, about.st_mode)
    return about


class NotPlain(OSError):
    """A folder, pipe, socket or device where a file is wanted."""


def regular(path: Path) -> BufferedReader:
    """Any plain file, of a model or not, opened for reading.

    Raises:
        OSError: it cannot be opened, or is no plain file; `strerror` says why.
    """
    try:
        _refuse(path, os.stat(path).st_mode)
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as e:  # a name with a null byte
        raise OSError(errno.EINVAL, str(e), str(path)) from None
    f = os.fdopen(fd, "rb")
    try:
        _refuse(path, os.fstat(fd).st_mode)
    except OSError:
        f.close()
        raise
    return f


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is missing; the folder is not a whole model. Fetch or save it again."
        ) from None
    except NotPlain as e:
        raise ArtifactError(f"{path} {e.strerror}; do not use this model.") from None
    except (OSError, ValueError) as e:  # ValueError: a name with a null byte
        raise ArtifactError(
            f"{path} cannot be read ({_why(e)}); fetch or save the model again."
        ) from e


def _refuse(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS.items() if test(mode)), "no plain file")
        raise NotPlain(errno.EINVAL, f"is {kind}, not a file", str(path))


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
            raise ArtifactError(
                f"{path} cannot be read ({_why(e)}); fetch or save the model again."
            ) from e
    if len(raw) > most:
        raise ArtifactError(
            f"{path} has more than {most >> 20} MiB, which no such file needs; do not use this"
            " model."
        )
    return raw


def read_text(path: Path, most: int = JSON_BYTES) -> str:
    """The UTF-8 text of a plain file.

    Raises:
        ArtifactError: it cannot be read, is larger than `most` bytes, or not UTF-8.
    """
    return decoded(read_bytes(path, most), path)


def decoded(raw: bytes, path: Path) -> str:
    """Decode UTF-8 text that was read from `path`. Raises: ArtifactError."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ArtifactError(
            f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); fetch or save the model"
            " again."
        ) from None


def read_json(path: Path) -> Json:
    """The object that a JSON file holds.

    Raises:
        ArtifactError: the file cannot be read, is no JSON by RFC 8259 (NaN and Infinity are none),
            is nested deeper than `DEPTH`, or holds something else than an object.
    """
    return json_of(read_text(path), path)


def json_of(text: str, path: Path, infinity: bool = False) -> Json:
    """Parse the JSON object that was read from `path`. Raises: see `read_json`."""
    try:
        out = parse_json(text, infinity)
    except ValueError as e:
        raise ArtifactError(f"{path} cannot be read ({e}); fetch or save the model again.") from e
    if not isinstance(out, dict):
        raise ArtifactError(
            f"{path} holds {type(out).__name__}, not an object; fetch or save the model again."
        )
    return out


def parse_json(text: str, infinity: bool = False) -> Any:
    """A JSON value.

    Args:
        infinity: take -Infinity, which diffusers writes for its DPM solvers' `lambda_min_clipped`.

    Raises:
        ValueError: not JSON, NaN, infinity (1e999 too), or nested deeper than `DEPTH`.
    """
    try:
        out = json.loads(
            text, parse_constant=_lowest if infinity else _no_number, parse_float=_number
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEPTH}") from None
    waiting = [(out, 1)]
    while waiting:
        value, depth = waiting.pop()
        inner: Iterable[Any] = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        )
        if depth > DEPTH:
            raise ValueError(f"it is nested deeper than {DEPTH}")
        waiting += [(v, depth + 1) for v in inner if isinstance(v, (dict, list))]
    return out


def _lowest(name: str) -> float:
    return -math.inf if name == "-Infinity" else _no_number(name)


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is not a number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def read_toml(path: str | Path, kind: str, hint: str) -> Json:
    """Read a TOML file that a user wrote.

    Args:
        kind: what errors call it. hint: what they say is accepted.

    Raises:
        InputError: it is missing, larger than `TOML_BYTES`, no UTF-8 text, or not TOML.
    """
    try:
        with regular(Path(path)) as f:
            raw = f.read(TOML_BYTES + 1)
        if len(raw) > TOML_BYTES:
            raise InputError(f"{kind} {path} has more than {TOML_BYTES >> 20} MiB; {hint}.")
        return tomllib.loads(raw.decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{kind} {path} does not exist; {hint}.") from None
    except OSError as e:
        raise InputError(f"{kind} {path}: {e.strerror}; {hint}.") from e
    except UnicodeDecodeError as e:
        why = f"({e.reason} at byte {e.start}); save it as UTF-8, as TOML is"
        raise InputError(f"{kind} {path} is not UTF-8 text {why}.") from None
    except (ValueError, RecursionError, OverflowError) as e:
        raise InputError(f"{kind} {path} is not TOML: {printable(e, 200)}.") from e


def sha256(path: Path) -> str:
    """SHA-256 of a plain file, in hex.

    Raises:
        ArtifactError: it cannot be read.
    """
    with opened(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- writing


def cache_root() -> Path:
    """Folder of what sdlite can make again: `$SDLITE_CACHE`, or `~/.cache/sdlite`.

    Raises:
        InputError: the user has no home folder.
    """
    if given := os.environ.get("SDLITE_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "sdlite"
    except RuntimeError as e:  # a user whom the system does not know, as in containers
        raise InputError(
            "this user has no home folder to keep a cache in; name one in $SDLITE_CACHE."
        ) from e


@contextmanager
def replacing(path: str | Path, *, lasting: bool = True) -> Iterator[Path]:
    """Yield a temporary file of the same name, which replaces `path` when the block ends.

    Args:
        lasting: flush it to disk, so that it survives a power cut; this costs about 10 ms.

    Raises:
        OSError: the place cannot be written; its `filename` is `path`.
    """
    path = Path(path)
    with _working(path.parent, "file", path, _clean_once) as work:
        tmp = work / path.name
        try:
            yield tmp
            if lasting:
                _sync(tmp)
            os.replace(tmp, path)
        except OSError as e:
            if e.filename is None or os.fsdecode(e.filename) != str(tmp):
                raise
            raise OSError(e.errno, e.strerror, str(path)) from e
        if lasting:
            _sync(path.parent)


def write(path: str | Path, data: str | bytes) -> None:
    """Write a whole file beside its place and rename.

    Raises:
        OSError: see `replacing`.
    """
    with replacing(path) as tmp:
        tmp.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def append(path: str | Path, text: str) -> None:
    """Add text to a file, all of it or nothing.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`.
    """
    rest, new = text.encode("utf-8"), not os.path.exists(path)
    with open(path, "ab", buffering=0) as f:
        size = f.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[f.write(rest) :]
        except OSError as e:
            f.truncate(size)
            if new:
                os.unlink(path)
            raise OSError(e.errno, e.strerror, str(path)) from e


def write_json(path: str | Path, value: object) -> None:
    """Write JSON that every reader takes: UTF-8, no NaN, no infinity.

    Raises:
        OSError: see `replacing`. ValueError: the value holds NaN or infinity.
    """
    write(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def _named(path: Path, made: Path) -> Iterator[None]:
    """A full disk is an OSError that names `path`, whoever found it: Python, safetensors, torch or
    an engine.

    Args:
        made: the folder that the block writes into; another disk may be the one that is full.
    """
    try:
        yield
    except SdliteError:
        raise
    except Exception as e:
        if not _is_full(e, made):
            raise
        code = e.errno if isinstance(e, OSError) and e.errno in _FULL else errno.ENOSPC
        raise OSError(code, os.strerror(code), str(path)) from e


def _is_full(e: Exception, made: Path) -> bool:
    if isinstance(e, OSError) and e.errno is not None:
        if e.errno not in _FULL or (e.filename and str(made) not in str(e.filename)):
            return False
        return bool(e.filename) or _free(made) < _NEARLY
    # numpy's and Pillow's OSErrors have no number
    said = isinstance(e, OSError) or any(words in str(e) for words in _FULL_WORDS)
    return said and _free(made) < _NEARLY


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _sync(path: Path) -> None:
    """Flush a file to disk, so that it survives a power cut; a folder too, where the system can."""
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
    for name, _, files in os.walk(folder):
        for file in files:
            if stat.S_ISREG(os.lstat(path := Path(name, file)).st_mode):
                _sync(path)
        _sync(Path(name))


_own: set[Path] = set()  # work folders of this process


def left_behind(folder: Path) -> Path | None:
    """The work folder that `folder` lies in, which is not of this process; None where it lies in
    none.
    """
    real = Path(os.path.realpath(folder))
    return next(
        (p for p in (real, *real.parents) if p.name.startswith(WORK) and p not in _own), None
    )


def clean(place: Path) -> None:
    """Remove work folders in `place` whose process is gone."""
    with suppress(OSError):
        for folder in place.iterdir():
            if folder.name.startswith(WORK) and _abandoned(folder):
                remove(folder)


_clean_once = functools.lru_cache(maxsize=64)(clean)  # a folder may hold 100,000 images


def working(place: Path, purpose: str = "") -> AbstractContextManager[Path]:
    """Yield a new folder in `place` and remove it after the block. Folders that killed processes
    left there are removed first.

    Raises:
        OSError: `place` cannot be written, or is full; its `filename` is `place`.
    """
    return _working(place, purpose, place, clean)


def scratch(purpose: str) -> AbstractContextManager[Path]:
    """`working` in the system's folder for temporary files."""
    return working(Path(tempfile.gettempdir()), purpose)


@contextmanager
def _working(
    place: Path, purpose: str, named: Path, tidy: Callable[[Path], None]
) -> Iterator[Path]:
    tidy(place)
    try:
        made = Path(os.path.realpath(tempfile.mkdtemp(prefix=f"{WORK}{purpose}-", dir=place)))
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(named)) from e
    lock = None
    try:
        _own.add(made)
        with _named(named, made):
            lock = _locked(made)
            yield made
    finally:
        remove(made)
        _own.discard(made)
        if lock is not None:
            os.close(lock)


def _machine() -> list[str]:
    """This boot of this machine, then its name. All processes of one boot see a lock, containers
    too.
    """
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, platform.node()]


def _locked(folder: Path) -> int | None:
    """Lock a new work folder. The descriptor is not inherited by other programs (PEP 446)."""
    if fcntl is None:
        return None
    fd = os.open(folder / ".lock", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(fd, "\n".join(_machine()).encode())
        os.rename(folder / ".lock", folder / _LOCK)  # nobody sees it before it is held
    except BaseException:
        os.close(fd)
        raise
    return fd


def _abandoned(folder: Path) -> bool:
    """Whether a work folder is ours, of this machine, and its process is gone."""
    if fcntl is None:
        return False
    try:
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
            return False
        fd = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:  # killed in the moment before it had one
        return time.time() - about.st_mtime > _HOUR and not set(os.listdir(folder)) - {".lock"}
    except OSError:
        return False
    try:
        boot, name = _machine()
        held = os.read(fd, 1000).decode("utf-8", "replace").split("\n")
        if held != [boot, name] and (held[0] != boot or not boot) and held[-1] != name:
            return False  # of another machine, whose locks may not be seen here
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its process lives, or the file system has no locks
        return False
    finally:
        os.close(fd)
    return True


def remove(folder: Path) -> None:
    """Remove a folder of ours, including read-only folders in it. What cannot be removed stays."""
    with suppress(OSError):
        folder.chmod(0o700)
    for name, folders, _ in os.walk(folder):
        for inner in folders:
            with suppress(OSError, NotImplementedError):
                if not os.path.islink(path := os.path.join(name, inner)):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Wait until no other process or thread that calls this holds `place`, a folder that may be
    missing yet.

    The hold ends with the process, however that ends. Without file locks this does not wait.

    Raises:
        OSError: `place` cannot be written.
    """
    place.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    fd = os.open(place / ".lock", os.O_CREAT | os.O_RDONLY | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is writing into %s: waiting for it", place)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(fd)


def check_file(path: str | Path) -> None:
    """Check that a file can be written, before the work begins.

    Raises:
        InputError: it is a folder, or its folder is not there or cannot be written.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name a file in it.")
    if not os.path.isdir(path.parent):
        raise InputError(
            f"{path} cannot be written: the folder {path.parent} does not exist; make it first."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{path} cannot be written: you may not write into {path.parent}; choose another"
            " folder."
        )


def check_out(out: str | Path) -> Path:
    """Check that a new folder can be written, before the work begins. Nothing is left there.

    Returns:
        `out`, with its links followed.

    Raises:
        InputError: it is no empty folder, is being written by another process, or its place cannot
            be written.
    """
    try:
        real = Path(os.path.realpath(out))
        inside = os.path.isdir(real)
        with suppress(FileNotFoundError):
            os.lstat(real)  # a name that no file system takes
        _not_being_written(real, out)
        if os.path.lexists(real) and (
            not inside or any(not x.startswith(WORK) for x in os.listdir(real))
        ):
            raise InputError(
                f"{out} exists and is not an empty folder; choose another or remove it."
            )
        _probe(real)
    except InputError:
        raise
    except OSError as e:
        raise _unwritable(out, e) from e
    except ValueError as e:  # a null byte
        raise InputError(f"{str(out)!r} cannot be a folder ({e}); choose another.") from e
    return real


def check_writable(out: str | Path) -> None:
    """Check that files can be made in `out`, a folder that exists or can be made. Nothing is left
    there.

    Raises:
        InputError: they cannot.
    """
    try:
        _probe(Path(os.path.realpath(out)))
    except (OSError, ValueError) as e:
        raise _unwritable(out, e) from e


def _probe(real: Path) -> None:
    there = next(p for p in (real, *real.parents) if os.path.lexists(p))
    os.rmdir(tempfile.mkdtemp(prefix=_LOOK, dir=there))


def _unwritable(out: str | Path, e: Exception) -> InputError:
    name = getattr(e, "filename", None)
    at = Path(os.path.dirname(name)) if name and _LOOK in str(name) else name
    where = f"{at}: " if at and str(at) != str(out) else ""
    return InputError(f"{out} cannot be written ({where}{_why(e)}); choose another folder.")


def _not_being_written(real: Path, out: str | Path) -> None:
    """Raises InputError where a work folder of `real` stands in it or beside it and was not left
    behind.
    """
    mine = f"{WORK}{_purpose(real)}-"
    for place in (real, real.parent):
        clean(place)
        for name in _names(place):
            own = name.startswith(mine) and len(name) == len(mine) + 8 and "-" not in name[-8:]
            if own or (place == real and name.startswith(WORK) and not name.startswith(_LOOK)):
                raise InputError(
                    f"{out} is being written by another process; wait for it, or choose another"
                    f" folder. If none is at work, remove {place / name}."
                )


def _names(place: Path) -> list[str]:
    """What is in a folder; nothing where it is none, or may be written and not read."""
    with suppress(OSError):
        return os.listdir(place)
    return []


def _purpose(real: Path) -> str:
    """The folder's name, as a part of its work folder's."""
    name = os.fsencode(real.name)
    return real.name if len(name) < 100 else hashlib.sha256(name).hexdigest()[:32]


@contextmanager
def writing(out: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends without an error, and is
    removed otherwise.

    A folder that exists and is empty is filled: it may be the current one, or a mount point, which
    cannot be renamed to. model_index.json is moved last, so that a half-filled folder is no model.

    Raises:
        InputError: see `check_out`; or another process was faster. OSError: the disk is full; its
            `filename` is `out`.
    """
    real = check_out(out)
    inside = os.path.isdir(real)
    new = [p for p in real.parents if not os.path.lexists(p)]
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with _working(real if inside else real.parent, _purpose(real), Path(out), clean) as work:
            tmp = work / "model"
            tmp.mkdir()
            yield tmp
            _sync_all(tmp)
            if inside:
                _move_in(tmp, real, out)
            else:
                _rename(tmp, real, out)
    except BaseException:
        for parent in new:
            with suppress(OSError):
                parent.rmdir()
        raise


def _taken(out: str | Path) -> InputError:
    return InputError(
        f"{out} was written by another process meanwhile, and is as that one left it; use it, or"
        " choose another folder."
    )


def _rename(made: Path, real: Path, out: str | Path) -> None:
    if os.path.lexists(real):  # an empty folder would be replaced
        raise _taken(out)
    try:
        os.rename(made, real)
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _taken(out) from e
        raise
    _sync(real.parent)


def _move_in(made: Path, real: Path, out: str | Path) -> None:
    if any(p != made.parent for p in real.iterdir() if not p.name.startswith(_LOOK)):
        raise _taken(out)
    for path in sorted(made.iterdir(), key=lambda p: (p.name == "model_index.json", p.name)):
        os.rename(path, real / path.name)
    _sync(real)
