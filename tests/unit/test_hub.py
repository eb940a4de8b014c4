"""Hub loading against a small local server that speaks the part of the hub's API that downloads use."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conftest import EMOJI

pytest.importorskip("onnxruntime", reason="needs the cpu extra")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RUN = """
import sys, sdlite
from sdlite.errors import SdliteError
try:
    pipe = sdlite.Pipeline.from_pretrained("org/emoji", revision={revision!r}, threads=1)
    pipe("pizza", seed=0, num_inference_steps=1)
    print("OK", pipe.artifact.folder)
except SdliteError as e:
    print(type(e).__name__, e)
"""


class Hub(ThreadingHTTPServer):
    """Serves EMOJI as org/emoji. `cut`: file -> how many requests break off half way; `change`: files served with one wrong byte."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {p.relative_to(EMOJI).as_posix(): p.read_bytes() for p in EMOJI.rglob("*") if p.is_file()}
        self.files["unet/evil.bin"] = b"pickle"
        self.cut: dict[str, int] = {}
        self.change: set[str] = set()
        self.served: list[tuple[str, str, str | None]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/emoji/revision/"):
            revision = path.rsplit("/", 1)[1]
            if revision not in ("main", "v1", COMMIT):
                return self.error("RevisionNotFound", body)
            return self.json({"id": "org/emoji", "sha": COMMIT, "siblings": [{"rfilename": f} for f in self.server.files]}, body)
        if path.startswith("/api/models/org/emoji/tree/"):
            rows = [{"type": "file", "path": f, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for f, d in self.server.files.items()]
            return self.json(rows, body)
        prefix = "/org/emoji/resolve/"
        if not path.startswith(prefix):
            return self.error("RepoNotFound", body)
        name = path[len(prefix) :].split("/", 1)[1]
        data = self.server.files[name]
        if name in self.server.change:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        if body:
            self.server.served.append((name, self.command, self.headers.get("Range")))
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha1(self.server.files[name]).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            if self.server.cut.get(name, 0) > 0:
                self.server.cut[name] -= 1
                self.wfile.write(data[start : start + (len(data) - start) // 2])
                self.wfile.flush()
                self.connection.close()
                return None
            self.wfile.write(data[start:])
        return None

    def json(self, value, body):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def error(self, code, body):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def run(url, home, revision=None, **env):
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "3", **env}  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN.format(revision=revision)], capture_output=True, text=True, env=env, timeout=120
    )
    assert out.stdout, out.stderr[-2000:]
    return out.stdout.strip().splitlines()[-1]


def test_model_is_fetched_once_then_served_from_the_cache_even_offline(hub, tmp_path):
    assert run(hub.url, tmp_path, "v1").startswith("OK")
    assert not any(name.endswith(".bin") for name, _, _ in hub.served), "a pickle was fetched"
    hub.served.clear()
    assert run(hub.url, tmp_path, "v1").startswith("OK")
    assert hub.served == []
    assert run("http://127.0.0.1:9", tmp_path, "v1", HF_HUB_OFFLINE="1").startswith("OK")


def test_offline_without_cache_says_so(tmp_path):
    said = run("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert said.startswith("HubError")
    assert "not in the cache" in said


def test_unknown_revision_and_repository_are_named(hub, tmp_path):
    assert "no revision 'v9'" in run(hub.url, tmp_path, "v9")
    hub.files.clear()


def test_download_that_breaks_off_is_taken_up_again(hub, tmp_path):
    hub.cut["unet/diffusion_pytorch_model.safetensors"] = 1
    first = run(hub.url, tmp_path)
    said = first if first.startswith("OK") else run(hub.url, tmp_path)
    assert said.startswith("OK")
    tries = [r for n, _, r in hub.served if n == "unet/diffusion_pytorch_model.safetensors"]
    assert len(tries) == 2


def test_changed_file_is_refused_by_its_hash(hub, tmp_path):
    hub.change.add("unet/diffusion_pytorch_model.safetensors")
    said = run(hub.url, tmp_path)
    assert said.startswith("ArtifactError")
    assert "SHA-256" in said
