"""Data as people have it: what is bad is left out by its name and reason, the rest is used, nothing
hangs.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import tarfile
import tracemalloc

import pytest
from PIL import Image

from sdlite.distill import data, shards
from sdlite.errors import InputError


def shard(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_bad_and_missing_images_are_skipped_and_listed(tmp_path):
    meta = json.dumps({"caption": "x"}).encode()
    files = {"a.png": picture(), "a.json": meta, "c.json": meta, "d.png": picture(), "d.json": b"{"}
    shard(tmp_path / "s.tar.gz", files)
    captions, skipped = found(tmp_path / "s.tar.gz")
    assert captions == ["x"]
    assert set(skipped) == {"s.tar.gz: c", "s.tar.gz: d"}
    assert "needs an image" in skipped["s.tar.gz: c"]


def picture(color="red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


def folder(root, **files):
    """Files by name, with `__` for the dot; beside them a good pair."""
    for name, content in {"good__png": picture(), "good__txt": b"good", **files}.items():
        (root / name.replace("__", ".")).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return root


def found(path):
    out = data.read(path)
    return [i.caption for i in out.items], out.skipped


@pytest.mark.parametrize(
    "raw",
    [
        b"\xef\xbb\xbfcaf\xc3\xa9",
        "caf\xe9".encode("utf-16"),
        b"\xfe\xff" + "caf\xe9".encode("utf-16-be"),
    ],
)
def test_a_byte_order_mark_says_what_text_is_and_is_no_part_of_it(raw, tmp_path):
    assert found(folder(tmp_path, a__png=picture(), a__txt=raw)) == (["caf\xe9", "good"], {})


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"caf\xe9", "is not UTF-8 text (unexpected end of data at byte 3)"),
        ("hello".encode("utf-16-le"), "holds null characters"),
        ("hello".encode("utf-32"), "holds null characters"),
        (b"\xff\xfeh", "is not UTF-8 text"),
        (b" \n", "is empty"),
        (b"x" * (shards.MOST_TEXT + 1), "has more than 1,024 KiB"),
    ],
)
def test_text_that_is_not_what_it_should_be_is_never_guessed(raw, why, tmp_path):
    captions, skipped = found(folder(tmp_path, a__png=picture(), a__txt=raw))
    assert captions == ["good"]
    assert why in skipped["a.png"]


@pytest.mark.parametrize("name", ["a.png", "a.txt"])
@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a folder", "missing", "a device"])
def test_what_is_no_file_is_not_opened(name, kind, tmp_path):
    path = (
        folder(
            tmp_path,
            **{"a__txt" if name == "a.png" else "a__png": b"hi" if name == "a.png" else picture()},
        )
        / name
    )
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's name is short
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.bind(name)
        finally:
            os.chdir(here)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else tmp_path / "nowhere")
    captions, skipped = found(tmp_path)
    assert captions == ["good"]
    assert kind in skipped["a.png"]


GOOD = '{"file_name": "good.png", "text": "one"}\n'


@pytest.mark.parametrize(
    ("line", "key", "why"),
    [
        ("{broken", "metadata.jsonl line 2", "is no JSON"),
        ('{"file_name": "b.p', "metadata.jsonl line 2", "is no JSON"),
        ("[1, 2]", "metadata.jsonl line 2", "holds a list, not an object"),
        ("7", "metadata.jsonl line 2", "holds a number, not an object"),
        ("[" * 50_000, "metadata.jsonl line 2", "is no JSON (it is nested deeper than 64)"),
        ('{"text": "x", "score": NaN}', "metadata.jsonl line 2", "NaN is not a number"),
        ('{"text": "x"}', "metadata.jsonl line 2", "has no file_name"),
        ('{"file_name": ["x"], "text": "x"}', "metadata.jsonl line 2", "has a list as file_name"),
        (
            b'{"file_name": "good.png", "text": "\xe9"}',
            "metadata.jsonl line 2",
            "is not UTF-8 text",
        ),
        (b"x" * (3 * shards.MOST_TEXT), "metadata.jsonl line 2", "is longer than 1,024 KiB"),
        ('{"file_name": "good.png", "text": "\\ud800"}', "good.png", "line 2: is not UTF-8 text"),
        (
            '{"file_name": "good.png", "text": 5}',
            "good.png",
            "line 2: has a number as text, not a string",
        ),
        ('{"file_name": "good.png", "text": " "}', "good.png", "line 2: has an empty text"),
        ('{"file_name": "none.png", "text": "x"}', "none.png", "line 2: the file is missing"),
        (
            '{"file_name": "a\\u0000.png", "text": "x"}',
            "a\\x00.png",
            "line 2: the file cannot be read",
        ),
        (
            json.dumps({"file_name": "a" * 5000, "text": "x"}),
            "a" * 200 + "... (5000 characters)",
            "File name too long",
        ),
        (
            '{"file_name": "../good.png", "text": "x"}',
            "../good.png",
            "names a file outside the folder",
        ),
        (
            '{"file_name": "/etc/passwd", "text": "x"}',
            "/etc/passwd",
            "names a file outside the folder",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_line_of_metadata_is_named_by_its_number(line, key, why, tmp_path):
    raw = line if isinstance(line, bytes) else line.encode()
    folder(
        tmp_path,
        metadata__jsonl=b"\xef\xbb\xbf"
        + GOOD.encode()
        + raw
        + b"\n"
        + GOOD.replace("one", "two").encode(),
    )
    captions, skipped = found(tmp_path)
    assert captions == ["one", "two"]
    assert list(skipped) == [key]
    assert why in skipped[key]


def test_metadata_in_utf16(tmp_path):
    raw = ("\ufeff" + GOOD + GOOD).encode("utf-16-le")
    assert found(folder(tmp_path, metadata__jsonl=raw)) == (["one", "one"], {})
    captions, skipped = found(
        folder(tmp_path, metadata__jsonl=raw + b"\x00\xd8\n\0" + GOOD.encode("utf-16-le") + b"x")
    )
    assert captions == ["one"] * 3
    assert "is not UTF-8 text" in skipped["metadata.jsonl line 3"]
    assert "is not the UTF-16 text" in skipped["metadata.jsonl line 5"]


def test_csv_of_spreadsheets(tmp_path):
    long = "x" * 200_000
    rows = (
        f"\ufefffile_name,text\ngood.png,hi\ngood.png,{long}\ngood.png,a red, round"
        ' apple\ngood.png,"a red, round apple"\n'
    )
    captions, skipped = found(folder(tmp_path, metadata__csv=rows.encode() + b"good.png,caf\xe9\n"))
    assert captions == ["hi", "a red, round apple"]
    assert "field larger" in skipped["metadata.csv line 3"]
    assert (
        "has 3 fields, the header 2; put captions with commas in quotes"
        in skipped["metadata.csv line 4"]
    )
    assert "is not UTF-8 text" in skipped["metadata.csv line 6"]
    with pytest.raises(InputError, match="has columns file_name;text; accepted: file_name, and"):
        data.read(folder(tmp_path, metadata__csv="file_name;text\ngood.png;hi\n"))


def test_prompts_that_are_no_text_are_named_by_their_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa fox\ncaf\xe9\na\0b\na house")
    captions, skipped = found(tmp_path / "prompts.txt")
    assert captions == ["a fox", "a house"]
    assert list(skipped) == ["prompts.txt line 2", "prompts.txt line 3"]


# --- shards

PAIR = {"a.png": picture(), "a.json": b'{"caption": "a"}'}


def tar(path, files, mode="w"):
    with tarfile.open(path, mode) as out:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if isinstance(content, tarfile.TarInfo) else len(content)
            out.addfile(info, None if isinstance(content, tarfile.TarInfo) else io.BytesIO(content))
    return path


def test_damaged_shards_among_good_ones_are_named(tmp_path):
    many = {f"{i}.{s}": PAIR[f"a.{s}"] for i in range(9) for s in ("png", "json")}
    whole = tar(tmp_path / "0.tar", many).read_bytes()
    packed = gzip.compress(whole)
    header = whole.index(b"4.png")
    for name, raw in {
        "cut.tar": whole[: header + 600],
        "empty.tar": b"",
        "html.tar": b"<html>404</html>" * 100,
        "hole.tar": whole[:header] + b"\xff" * 512 + whole[header + 512 :],
        "end.tar": whole.rstrip(b"\0") + b"\0" * (-len(whole.rstrip(b"\0")) % 512),
        "cut.tar.gz": packed[: len(packed) // 2],
        "flip.tar.gz": packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:],
    }.items():
        (tmp_path / name).write_bytes(raw)
    out = data.read(tmp_path / "*.tar*")
    of = {
        name: sum(i.key.startswith(f"{name}: ") for i in out.items) for name in os.listdir(tmp_path)
    }
    assert of["0.tar"] == of["end.tar"] == of["flip.tar.gz"] == 9
    assert of["cut.tar"] == of["hole.tar"] == 4
    assert of["empty.tar"] == of["html.tar"] == 0
    assert "is no tar shard (empty file)" in out.skipped["empty.tar"]
    assert "is no tar shard (invalid header)" in out.skipped["html.tar"]
    assert "cut off after 4 samples (unexpected end of data)" in out.skipped["cut.tar"]
    assert f"no header at byte {header:,}" in out.skipped["hole.tar"]
    assert "without tar's end mark" in out.skipped["end.tar"]
    assert "CRC" in out.skipped["flip.tar.gz"]
    assert "cut.tar.gz" in out.skipped


@pytest.mark.parametrize(
    ("files", "key", "why"),
    [
        (
            {"b.png": PAIR["a.png"], "b.json": b"[1]"},
            "s.tar: b",
            "its .json holds a list, not an object",
        ),
        (
            {"b.png": PAIR["a.png"], "b.json": b"5"},
            "s.tar: b",
            "its .json holds a number, not an object",
        ),
        ({"b.png": PAIR["a.png"], "b.json": b"[" * 50_000}, "s.tar: b", "nested deeper"),
        (
            {"b.png": PAIR["a.png"], "b.json": b'{"caption": {}}'},
            "s.tar: b",
            "has an object as caption, not a string",
        ),
        ({"b.png": PAIR["a.png"], "b.txt": b"caf\xe9"}, "s.tar: b", "is not UTF-8 text"),
        (
            {"b.png": PAIR["a.png"], "b.txt": b"x" * (shards.MOST_TEXT + 1)},
            "s.tar: b.txt",
            "has 1,024 KiB of text",
        ),
        ({"b.txt": b"alone"}, "s.tar: b", "needs an image and a caption"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_sample_of_a_shard_is_named(files, key, why, tmp_path):
    captions, skipped = found(tar(tmp_path / "s.tar", {**files, **PAIR}))
    assert captions == ["a"]
    assert why in skipped[key]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_of_a_shard_are_left_out(kind, tmp_path):
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = kind, "/etc/passwd"
    captions, skipped = found(tar(tmp_path / "s.tar", {"b.png": link, **PAIR}))
    assert captions == ["a"]
    assert "is a link or device" in skipped["s.tar: b.png"]


@pytest.mark.parametrize("size", [10 << 40, -512])
def test_a_member_of_a_wrong_size(size, tmp_path):
    info = tarfile.TarInfo("b.png")
    info.size = size
    good = tar(tmp_path / "0.tar", PAIR).read_bytes().rstrip(b"\0")
    good += b"\0" * (-len(good) % 512)
    (tmp_path / "s.tar").write_bytes(good + info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    captions, skipped = found(tmp_path / "s.tar")
    assert captions == ["a"]
    assert skipped


def test_a_small_gzip_that_claims_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_FILE", 8 << 20)
    info = tarfile.TarInfo("b.png")
    info.size = 7 << 20
    with gzip.open(tmp_path / "s.tar.gz", "wb", 1) as out:
        out.write(tar(tmp_path / "0.tar", PAIR).read_bytes()[:2048])
        for _ in range(4):
            out.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(info.size))
    captions, skipped = found(tmp_path / "s.tar.gz")
    assert captions == ["a"]
    assert "claim to hold more than 100 times" in skipped["s.tar.gz"]


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_memory_does_not_grow_with_the_shard(name, tmp_path):
    """24 MiB of shard: what is held stays below one."""
    noise = os.urandom(1 << 20)
    files = {}
    for i in range(24):
        files |= {f"{i}.png": noise, f"{i}.txt": f"number {i}".encode()}
    tar(tmp_path / name, files | PAIR, "w:gz" if name.endswith("gz") else "w")
    tracemalloc.start()
    out = data.read(tmp_path / name)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(out.items) == 25
    assert held < 1 << 20
    assert most < 4 << 20
    assert out.items[-1].open().size == (8, 8)  # in another order than the file's
    with pytest.raises(InputError, match="is no readable"):
        out.items[0].open()
    assert out.items[-1].open().getpixel((0, 0)) == (255, 0, 0)


def test_a_shard_that_changed_since_it_was_looked_into(tmp_path):
    out = data.read(tar(tmp_path / "s.tar", PAIR))
    (tmp_path / "s.tar").write_bytes(b"short")
    with pytest.raises(InputError, match=r"is cut off in s\.tar"):
        out.items[0].open()


def test_names_that_are_no_path(tmp_path):
    for bad in (tmp_path / ("x" * 5000), "a\0b", tmp_path / "x.zip"):
        with pytest.raises(InputError, match="does not exist"):
            data.read(bad)
    os.mkfifo(tmp_path / "p.tar")
    with pytest.raises(InputError, match="none of the accepted forms"):
        data.read(tmp_path / "p.tar")
    (tmp_path / "data[1]").mkdir()
    assert found(folder(tmp_path / "data[1]"))[0] == ["good"]


def test_the_benchmark_of_memory_reads_every_image(tmp_path):
    from benchmarks import data_memory

    row = data_memory.measure(data_memory.write_shard(tmp_path / "s.tar", 3))
    assert (row["images"], row["skipped"]) == (2, 0)
    assert 2 < row["shard_mib"] < 3.1
    assert row["started_mib"] <= row["indexed_mib"] <= row["opened_mib"]
