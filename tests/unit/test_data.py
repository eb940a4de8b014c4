from __future__ import annotations

import io
import json
import tarfile

from PIL import Image

from sdlite.distill.data import read_shards


def shard(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_bad_and_missing_pictures_are_skipped_and_listed(tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    meta = json.dumps({"caption": "x"}).encode()
    files = {
        "a.png": png.getvalue(),
        "a.json": meta,
        "b.png": b"no picture",
        "b.json": meta,
        "c.json": meta,
        "d.png": png.getvalue(),
        "d.json": b"{",
    }
    shard(tmp_path / "s.tar.gz", files)
    out = read_shards(tmp_path / "s.tar.gz")
    assert [s.key for s in out.samples] == ["a"]
    assert set(out.skipped) == {"b", "c", "d"}
    assert "needs a picture" in out.skipped["c"]
