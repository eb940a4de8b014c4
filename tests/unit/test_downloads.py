"""Released weights against a local server."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sdlite import downloads, hub
from sdlite.errors import HubError, SdliteError, UnknownNameError

FILES = {"config.json": b"{}", "weights.safetensors": bytes(range(256)) * 5000}
BIG = "weights.safetensors"


class Server(ThreadingHTTPServer):
    """Serves FILES below /a/. `cut`: bytes after which an answer ends; `ranges`: understands Range;
    `change`: gives another file; `asked`: (path, Range) of every request.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut, self.ranges, self.change, self.asked = None, True, False, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        wanted = self.headers["Range"]
        self.server.asked.append((self.path, wanted))
        body = FILES.get(self.path.removeprefix("/a/"))
        if body is None:
            self.send_error(404)
            return
        start = int(wanted[len("bytes=") : -1]) if wanted and self.server.ranges else 0
        body = (bytes(len(body)) if self.server.change else body)[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut])


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SDLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SDLITE_ASSETS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads, "TIMEOUT", 5.0)
    out = Server()
    write_table(tmp_path, monkeypatch, f"http://127.0.0.1:{out.server_port}/a")
    yield out
    out.shutdown()
    out.server_close()


def write_table(folder, monkeypatch, url):
    files = {
        n: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in FILES.items()
    }
    row = {"about": "a test", "make": "train it", "url": url, "files": files}
    (folder / "table.json").write_text(json.dumps({"tiny": row}))
    monkeypatch.setattr(downloads, "TABLE", folder / "table.json")


def held(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_an_asset_is_fetched_once_and_checked_each_time(server):
    folder = hub.asset("tiny")
    assert held(folder) == FILES
    assert hub.asset("tiny") == folder
    assert len(server.asked) == 2
    (folder / BIG).write_bytes(b"x" * len(FILES[BIG]))  # damaged in the cache: fetched again
    assert held(hub.asset("tiny")) == FILES
    assert len(server.asked) == 3


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_ended(server, ranges):
    server.cut, server.ranges = 1000, ranges
    with pytest.raises(HubError, match=r"tiny/weights.*1,000 of 1,280,000 bytes are kept"):
        hub.asset("tiny")
    server.cut = None
    assert held(hub.asset("tiny")) == FILES
    assert server.asked[-1] == (f"/a/{BIG}", "bytes=1000-")


def test_another_file_is_refused_and_not_kept(server):
    server.change = True
    with pytest.raises(HubError, match=r"is not the released tiny/config.json: its SHA-256 is"):
        hub.asset("tiny")
    server.change = False
    assert held(hub.asset("tiny")) == FILES


def test_every_failure_is_one_line_that_says_the_next_step(server, tmp_path, monkeypatch):
    def said(kind=HubError, name="tiny"):
        with pytest.raises(kind) as e:
            hub.asset(name)
        assert isinstance(e.value, SdliteError)
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "choose one of tiny" in said(UnknownNameError, "none")
    write_table(tmp_path, monkeypatch, f"http://127.0.0.1:{server.server_port}/b")
    assert "404" in said()
    server.shutdown()
    server.server_close()
    assert "run again: 0 of 2 bytes are kept" in said()
    write_table(tmp_path, monkeypatch, None)
    assert "set SDLITE_ASSETS to the folder that holds tiny/, or train it." in said()
    write_table(tmp_path, monkeypatch, "http://127.0.0.1:9/a")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in said()
    monkeypatch.setenv("SDLITE_ASSETS", str(tmp_path))
    assert "config.json is missing" in said()


def test_the_folder_of_assets_is_taken_as_it_is(server, tmp_path, monkeypatch):
    place = tmp_path / "shared" / "tiny"
    place.mkdir(parents=True)
    for name, raw in FILES.items():
        (place / name).write_bytes(raw)
    monkeypatch.setenv("SDLITE_ASSETS", str(tmp_path / "shared"))
    assert hub.asset("tiny") == place
    assert server.asked == []
    (place / BIG).write_bytes(b"another")
    with pytest.raises(HubError, match="is another file"):
        hub.asset("tiny")


def test_the_committed_table_can_be_read():
    assert list(downloads.table()) == ["emoji-teacher"]
    for asset in downloads.table().values():
        assert asset.about
        assert all(len(f.sha256) == 64 and f.bytes > 0 for f in asset.files.values())
