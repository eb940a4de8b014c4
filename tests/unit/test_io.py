"""Files are written whole or not at all, and what killed processes leave is recognized: real
processes, locks, disks and users.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from sdlite import io
from sdlite.artifact import Artifact
from sdlite.errors import ArtifactError, InputError
from sdlite.files import Files

linux = pytest.mark.skipif(sys.platform != "linux", reason="locks and disks of Linux")
root = pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="mounts and other users need root"
)


@contextmanager
def disk(place: Path, mib: int):
    """A disk of its own in memory."""
    place.mkdir(parents=True, exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", place], capture_output=True
    ).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def strays(*places: Path) -> list[str]:
    return [p.name for place in places for p in place.rglob(f"{io.WORK}*")]


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


HOLDS = """
import sys, time
from pathlib import Path
from sdlite import io
with io.writing(sys.argv[1]) as tmp:
    (tmp / "model_index.json").write_text("{}")
    print("in", flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
"""


def killed(out: Path) -> None:
    process = run(HOLDS, out, "wait")
    assert process.stdout.readline() == "in\n"
    process.kill()
    process.communicate()


# --- whole or not at all


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "a.txt"
    io.write(path, "old")

    def half(tmp: Path) -> None:
        assert tmp.name == "a.txt", "encoders choose by the ending"
        tmp.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), io.replacing(path) as tmp:
        half(tmp)
    assert path.read_text() == "old"
    io.write(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_of_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("é" * 125 + ".json")
    io.write_json(path, {"a": 1})
    assert io.read_json(path) == {"a": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_that_is_none_is_not_written(tmp_path, value):
    io.write_json(tmp_path / "a.json", {})
    with pytest.raises(ValueError, match="JSON"):
        io.write_json(tmp_path / "a.json", {"a": value})
    assert io.read_json(tmp_path / "a.json") == {}


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "taken", tmp_path / "missing" / "a.txt"):
        with pytest.raises(OSError, match=re.escape(f"'{path}'")):
            io.write(path, "x")


def test_rows_are_added(tmp_path):
    path = tmp_path / "rows.jsonl"
    io.append(path, "one\n")
    io.append(path, "two\n")
    assert path.read_text() == "one\ntwo\n"


@linux
@root
def test_rows_that_do_not_fit_leave_those_before(tmp_path):
    with disk(tmp_path / "d", 1) as place:
        io.append(place / "rows.jsonl", "one\n")
        with pytest.raises(OSError, match=f"No space left on device: '{place}/rows.jsonl'"):
            io.append(place / "rows.jsonl", "x" * (2 << 20))
        assert (place / "rows.jsonl").read_text() == "one\n"


def test_copies_are_content_alone(tmp_path):
    source = tmp_path / "from"
    source.mkdir()
    for name in ("config.json", "merges.txt", "c.bin"):
        (source / name).write_text(name)
        (source / name).chmod(0o444)
    source.chmod(0o555)
    Files.of(source).copy_configs(tmp_path / "to")
    source.chmod(0o755)
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["config.json", "merges.txt"]
    assert os.access(tmp_path / "to" / "config.json", os.W_OK)
    assert (tmp_path / "to" / "config.json").stat().st_mode & 0o200


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_not_copied(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match="a named pipe"):
        Files.of(tmp_path).copy("a.json", tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


# --- where a folder may be written


def fill(tmp: Path) -> None:
    (tmp / "unet").mkdir()
    (tmp / "unet" / "w").write_text("weights")
    (tmp / "model_index.json").write_text("{}")


def whole(out: Path) -> bool:
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*")) == [
        "model_index.json",
        "unet",
        "unet/w",
    ]


def test_a_folder_a_missing_parent_the_current_folder_and_a_link(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "here")
    for out in (tmp_path / "a" / "b" / "c", Path(), tmp_path / "link"):
        with io.writing(out) as tmp:
            fill(tmp)
        assert whole(out)
    assert (tmp_path / "link").is_symlink()
    assert strays(tmp_path) == []


def test_what_fails_leaves_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "a" / "b", tmp_path / "empty"):
        with pytest.raises(FileExistsError), io.writing(out) as tmp:
            fill(tmp), fill(tmp)
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


@linux
@root
def test_a_mount_point(tmp_path):
    with disk(tmp_path / "d", 4) as out:
        with io.writing(out) as tmp:
            fill(tmp)
        assert whole(out)


def test_what_cannot_be_written_is_said_first(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "dangling").symlink_to("file/x")
    said = {
        "file": "not an empty folder",
        "full": "not an empty folder",
        "file/x": "Not a directory",
        "a\0b": "null byte",
        "x" * 300: "too long",
    }
    for name, words in {**said, "dangling": "Not a directory"}.items():
        with pytest.raises(InputError, match=words) as e:
            io.check_out(tmp_path / name)
        assert "\n" not in str(e.value)
        assert "choose another" in str(e.value)
        assert io.WORK not in str(e.value)


@linux
@root
def test_a_folder_of_another_user_is_said_first(tmp_path):
    for p in (tmp_path, *(p for p in tmp_path.parents if "pytest-" in str(p))):
        p.chmod(0o755)
    code = (
        "import os, sys\nfrom sdlite import io\nos.setuid(65534)\ntry:"
        " io.check_out(sys.argv[1])\nexcept Exception as e: print(type(e).__name__, e)"
    )
    (tmp_path / "mine").mkdir(mode=0o700)
    for out in (tmp_path / "out", tmp_path / "mine" / "out", tmp_path / "mine"):
        said, errors = run(code, out).communicate()
        assert said.startswith(f"InputError {out} cannot be written"), errors
        assert "Permission denied" in said
    assert os.listdir(tmp_path) == ["mine"]


# --- at once


@linux
@pytest.mark.parametrize("existing", [False, True])
def test_a_second_process_is_told_before_it_works(tmp_path, existing):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    first = run(HOLDS, out, "wait")
    try:
        assert first.stdout.readline() == "in\n"
        with pytest.raises(
            InputError,
            match=r"is being written by another process; wait for it, or choose another folder",
        ):
            io.check_out(out)
        io.check_out(tmp_path / "other")
        io.check_out(tmp_path / "out-2")
    finally:
        first.kill()
        first.communicate()
    with io.writing(out) as tmp:
        fill(tmp)
    assert whole(out)
    assert strays(tmp_path) == []


def test_of_two_that_end_at_once_one_is_whole(tmp_path):
    def theirs(tmp: Path, out: Path, files: list[str]) -> None:
        fill(tmp)
        out.mkdir(exist_ok=True)
        for name in files:
            (out / name).write_text("x")

    (tmp_path / "existing").mkdir()
    for name, files in (("new", ["theirs"]), ("empty", []), ("existing", ["theirs"])):
        with (
            pytest.raises(InputError, match="was written by another process meanwhile"),
            io.writing(tmp_path / name) as tmp,
        ):
            theirs(tmp, tmp_path / name, files)
        assert os.listdir(tmp_path / name) == files
    assert strays(tmp_path) == []


@linux
def test_one_at_a_time_in_processes_and_threads(tmp_path):
    code = """
import sys, time
from pathlib import Path
from sdlite import io
with io.alone(Path(sys.argv[1])):
    begin = time.monotonic(); time.sleep(0.2); print(begin, time.monotonic())
"""
    processes = [run(code, tmp_path / "cache") for _ in range(3)]
    spans = [tuple(map(float, p.communicate()[0].split())) for p in processes]

    def hold() -> None:
        with io.alone(tmp_path / "cache"):
            begin = time.monotonic()
            time.sleep(0.05)
            spans.append((begin, time.monotonic()))

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    spans.sort()
    assert len(spans) == 7
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


# --- what killed processes leave


@linux
def test_what_a_killed_process_leaves_is_no_model_and_is_removed_by_the_next(tmp_path):
    out = tmp_path / "out"
    killed(out)
    [stray] = tmp_path.iterdir()
    assert not out.exists()
    for folder in (stray, stray / "model"):
        with pytest.raises(ArtifactError, match="half written"):
            Artifact.open(folder)
    io.check_out(tmp_path / "other")
    assert not stray.exists(), "any run with its output beside it"
    killed(out)
    io.write(tmp_path / "a.txt", "x")
    with io.working(tmp_path):
        assert len(strays(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["a.txt"]


@linux
def test_an_empty_folder_that_a_killed_process_was_filling_is_filled_by_the_next(tmp_path):
    killed(tmp_path)
    with io.writing(tmp_path) as tmp:
        fill(tmp)
    assert whole(tmp_path)


@linux
def test_a_living_process_keeps_its_folder(tmp_path):
    first = run(HOLDS, tmp_path / "out", "wait")
    first.stdout.readline()
    os.kill(first.pid, signal.SIGSTOP)  # neither does one that sleeps lose it
    io.clean(tmp_path)
    with io.working(tmp_path):
        pass
    assert len(strays(tmp_path)) == 1
    first.kill()
    first.communicate()
    io.clean(tmp_path)
    assert strays(tmp_path) == []


@linux
def test_folders_of_this_process_are_kept_too(tmp_path):
    with io.working(tmp_path) as a, io.working(tmp_path) as b:
        io.clean(tmp_path)
        assert a.is_dir()
        assert b.is_dir()
        assert io.left_behind(a / "x") is None
    assert os.listdir(tmp_path) == []


@linux
def test_what_others_made_is_not_removed(tmp_path):
    """Names are no proof: links, files, folders without a lock, of another user, of another
    machine.
    """
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "lock").write_text("\n".join(io._machine()))
    (tmp_path / f"{io.WORK}link").symlink_to(victim)
    (tmp_path / f"{io.WORK}file").write_text("x")
    (tmp_path / f"{io.WORK}young").mkdir()
    (tmp_path / f"{io.WORK}full").mkdir()
    (tmp_path / f"{io.WORK}full" / "theirs").write_text("x")
    (tmp_path / f"{io.WORK}else").mkdir()
    (tmp_path / f"{io.WORK}else" / "lock").write_text("another boot\nanother machine")
    (tmp_path / f"{io.WORK}hostile").mkdir()
    (tmp_path / f"{io.WORK}hostile" / "lock").symlink_to(victim / "lock")
    for name in ("young", "full"):
        os.utime(tmp_path / f"{io.WORK}{name}", (0, 0) if name == "full" else None)
    if os.getuid() == 0:
        (tmp_path / f"{io.WORK}user").mkdir()
        (tmp_path / f"{io.WORK}user" / "lock").write_text("\n".join(io._machine()))
        os.chown(tmp_path / f"{io.WORK}user", 65534, 65534)
    before = sorted(os.listdir(tmp_path))
    io.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    assert (victim / "lock").exists()


@linux
def test_a_process_killed_before_it_had_its_lock(tmp_path):
    for name, inside in (("a", None), ("b", ".lock")):
        folder = tmp_path / f"{io.WORK}{name}"
        folder.mkdir()
        if inside:
            (folder / inside).touch()
        os.utime(folder, (0, 0))
    io.clean(tmp_path)
    assert os.listdir(tmp_path) == []


@linux
def test_a_child_that_outlives_its_parent_does_not_keep_the_folder(tmp_path):
    code = HOLDS.replace(
        "if sys",
        "import subprocess; subprocess.Popen(['sleep', '30'], stdout=subprocess.DEVNULL)\n   "
        " if sys",
    )
    process = run(code, tmp_path / "out", "wait")
    process.stdout.readline()
    time.sleep(0.2)
    process.kill()
    process.wait()
    io.clean(tmp_path)
    assert strays(tmp_path) == []


@linux
@root
def test_read_only_folders_of_another_user_are_removed(tmp_path):
    """As the user that made them: root may all."""
    for p in (tmp_path, *(p for p in tmp_path.parents if "pytest-" in str(p))):
        p.chmod(0o777)
    code = """
import os, sys
from pathlib import Path
from sdlite import io
os.setuid(65534)
with io.working(Path(sys.argv[1])) as work:
    (work / "a/b/c").mkdir(parents=True); (work / "a/b/c/f").write_text("x")
    for p in ("a/b/c/f", "a/b/c", "a/b", "a"): (work / p).chmod(0o444 if p[-1] == "f" else 0o000)
    work.chmod(0o500)
print(os.listdir(sys.argv[1]))
"""
    said, errors = run(code, tmp_path).communicate()
    assert said == "[]\n", errors


# --- a full disk


def no_space(tmp: Path) -> None:
    (tmp / "f").write_bytes(bytes(2 << 20))


def no_space_safetensors(tmp: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(2 << 20, np.uint8)}, tmp / "f.safetensors")


def no_space_numpy(tmp: Path) -> None:
    import numpy as np

    np.zeros(2 << 20, np.uint8).tofile(tmp / "f")


def no_space_onnx(tmp: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [], "g", [], [], [onnx.helper.make_tensor("w", 1, [1 << 19], bytes(2 << 20), True)]
        )
    )
    onnx.save_model(model, tmp / "f.onnx")


def no_space_torch(tmp: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(2 << 20, dtype=torch.uint8), tmp / "f.pt")


def no_space_pillow(tmp: Path) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (1000, 1000, 3), np.uint8)).save(
        tmp / "f.png"
    )


@linux
@root
@pytest.mark.parametrize(
    "write",
    [
        no_space,
        no_space_safetensors,
        no_space_numpy,
        no_space_onnx,
        no_space_torch,
        no_space_pillow,
    ],
)
def test_a_full_disk_names_what_was_asked_for_whoever_found_it_full(tmp_path, write):
    with disk(tmp_path / "d", 1) as place:
        for out in (place / "out", place):
            with (
                pytest.raises(OSError, match=f"No space left on device: '{out}'"),
                io.scratch("elsewhere"),
                io.writing(out) as tmp,
            ):
                write(tmp)
        assert os.listdir(place) == []


@linux
@root
def test_the_disk_that_is_full_is_the_one_that_is_named(tmp_path):
    with (
        disk(tmp_path / "d", 1) as d,
        pytest.raises(OSError, match=f"'{d}'"),
        io.working(d) as aside,
        io.writing(tmp_path / "out"),
    ):
        no_space(aside)


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (
        OSError(errno.EIO, "I/O error", "x"),
        RuntimeError("boom"),
        InputError("No space left for this"),
        KeyError("a"),
    ):
        with pytest.raises(type(error)) as e, io.working(tmp_path):
            raise error
        assert e.value is error


# --- names


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jevil\n\rok", "\\x1b[2Jevil\\n\\rok"),
        ("a\u202eb", "a\\u202eb"),
        ("\udcff", "\\udcff"),
        ("\x9b1m", "\\x9b1m"),
        ("a\u2028b", "a\\u2028b"),
        ("Fuchs 狐 é 🦊", "Fuchs 狐 é 🦊"),
        ("x" * 3000, "x" * 2000 + "... (3000 characters)"),
    ],
)
def test_names_are_printed_without_what_moves_a_cursor(text, shown):
    assert io.printable(text) == shown
