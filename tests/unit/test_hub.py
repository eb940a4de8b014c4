"""Hub loading against a small local server that speaks the part of the hub's API that downloads
use.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

import sdlite
from sdlite import published
from sdlite.errors import ArtifactError, InputError, UnknownNameError
from sdlite.hub import resolve as open_model
from tests.conftest import EMOJI

pytest.importorskip("onnxruntime", reason="needs the cpu extra")
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


RESOLVE = """
import sys, sdlite.hub
from sdlite.errors import SdliteError
try:
    folder = sdlite.hub.resolve({repo!r}, {revision!r})
    print("OK", *sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
except SdliteError as e:
    print(type(e).__name__, e)
"""


class Hub(ThreadingHTTPServer):
    """Serves `repos`: name -> revision -> files; EMOJI is org/emoji. `cut`: file -> how many
    requests break off half way; `change`: files served with one wrong byte.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {
            p.relative_to(EMOJI).as_posix(): p.read_bytes() for p in EMOJI.rglob("*") if p.is_file()
        }
        self.files["unet/evil.bin"] = b"pickle"
        self.repos = {"org/emoji": {"main": self.files, "v1": self.files}}
        self.cut: dict[str, int] = {}
        self.change: set[str] = set()
        self.refused: set[str] = set()
        # "revision": the list of files is never answered; "resolve": the files
        self.silent: set[str] = set()
        self.served: list[tuple[str, str, str | None]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def commit(revision: str, files: dict[str, bytes]) -> str:
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    return hashlib.sha1("\n".join([revision, *sorted(files)]).encode()).hexdigest()


def refs(repo: dict[str, dict[str, bytes]]) -> dict[str, list[dict[str, str]]]:
    """Branches, tags and pull requests, as the hub lists them."""
    kinds = {"branches": "main", "tags": "v", "pullRequests": "refs/"}
    rows = {
        kind: [
            {"name": r, "ref": r, "targetCommit": commit(r, files)}
            for r, files in repo.items()
            if r.startswith(start)
        ]
        for kind, start in kinds.items()
    }
    return {**rows, "converts": []}


def tree(files: dict[str, bytes]) -> list[dict[str, object]]:
    """Files of a revision, as the hub lists them."""
    return [
        {"type": "file", "path": f, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
        for f, d in files.items()
    ]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.split("?")[0].removeprefix("/api/models").lstrip("/")
        org, name, what, *rest = path.split("/", 3) + ["revision", "main"] * (path.count("/") == 1)
        if what in self.server.silent:
            time.sleep(60)
        repo = self.server.repos.get(f"{org}/{name}")
        if repo is None:
            return self.error("RepoNotFound", body)
        if what == "refs":
            return self.json(refs(repo), body)
        revision, _, name = rest[0].partition("/") if what == "resolve" else (rest[0], "", "")
        revision = unquote(revision)
        revision = next((r for r in repo if revision in (r, commit(r, repo[r]))), None)
        if revision is None:
            return self.error("RevisionNotFound", body)
        files = repo[revision]
        if what == "revision":
            siblings = [{"rfilename": f} for f in files]
            about = {"id": path, "sha": commit(revision, files), "siblings": siblings}
            return self.json(about, body)
        if what == "tree":
            return self.json(tree(files), body)
        return self.file(name, files[unquote(name)], commit(revision, files), body)

    def file(self, name: str, data: bytes, sha: str, body: bool):
        if name in self.server.refused:
            return self.error("Forbidden", body, 403)
        tag = hashlib.sha1(data).hexdigest()
        if name in self.server.change:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if body:
            self.server.served.append((name, self.command, self.headers.get("Range")))
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.send(name, data[start:])
        return None

    def send(self, name: str, data: bytes):
        """All of it, or half where the connection breaks off."""
        if self.server.cut.get(name, 0) <= 0:
            self.wfile.write(data)
            return
        self.server.cut[name] -= 1
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.connection.close()

    def json(self, value, body):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def error(self, code, body, status=404):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def run(url, home, revision=None, code=RUN, repo="org/emoji", every=False, **env):
    env = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "3",
        **env,
    }
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.format(revision=revision, repo=repo)],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert out.stdout, out.stderr[-2000:]
    assert "Traceback" not in out.stderr, out.stderr[-2000:]
    said = out.stdout.strip().splitlines()
    return said if every else said[-1]


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


# --- which files are fetched: decided before any weights

SD = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
TEXT = {f"tokenizer/{n}": b"{}" for n in ("vocab.json", "merges.txt", "tokenizer_config.json")} | {
    "scheduler/scheduler_config.json": b"{}"
}
WEIGHTS = {
    f"{p}.safetensors": b"weights"
    for p in ("text_encoder/model", *(f"{p}/diffusion_pytorch_model" for p in ("unet", "vae")))
}


def pipeline(index=SD, unet=None, weights=WEIGHTS):
    """Files of a repository whose weights are never read."""
    configs = {
        "unet": {"in_channels": 4, "cross_attention_dim": 16, **(unet or {})},
        "vae": {},
        "text_encoder": {"hidden_size": 16},
    }
    files = {f"{p}/config.json": json.dumps(c).encode() for p, c in configs.items()}
    return {"model_index.json": json.dumps(index).encode(), **files, **TEXT, **weights}


def resolve(hub, home, files, revision=None, asked=None, **more):
    """What `hub.resolve` says of a repository that holds `files`; `asked`: a variant."""
    hub.repos["org/x"] = {"main": files, **more}
    code = RESOLVE.replace("{revision!r}", "{revision!r}, " + repr(asked))
    return run(hub.url, home, revision, code=code, repo="org/x")


CLUTTER = [
    "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/model.onnx",
    "unet/model.onnx_data",
    "vae_decoder/model.onnx",
    "vae_decoder/config.json",
    "text_encoder/model.onnx",
    "text_encoder/flax_model.msgpack",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
    "scheduler/.ipynb_checkpoints/scheduler_config-checkpoint.json",
    "README.md",
    "[odd]*.png",
]


def test_plain_pipeline_is_fetched_without_what_it_does_not_need(hub, tmp_path):
    said = resolve(hub, tmp_path, pipeline() | dict.fromkeys(CLUTTER, b"gigabytes"))
    assert said.split() == ["OK", *sorted(pipeline())]
    assert {n for n, _, _ in hub.served} <= set(pipeline())


def test_shards_are_fetched_as_the_index_lists_them(hub, tmp_path):
    stem = "unet/diffusion_pytorch_model"
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps(
        {"weight_map": {str(i): s.removeprefix("unet/") for i, s in enumerate(shards)}}
    ).encode()
    sharded = {k: v for k, v in WEIGHTS.items() if not k.startswith("unet")}
    want = (
        pipeline(weights=sharded)
        | dict.fromkeys(shards, b"w")
        | {f"{stem}.safetensors.index.json": index}
    )
    said = resolve(
        hub,
        tmp_path,
        want | {f"{stem}.safetensors": b"stale", f"{stem}-00001-of-00003.safetensors": b"stale"},
    )
    assert said.split() == ["OK", *sorted(want)]


@pytest.mark.parametrize(
    ("index", "unet", "says"),
    [
        (
            {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "X"]},
            {},
            "StableDiffusionXLPipeline",
        ),
        (
            {"_class_name": "StableUnCLIPPipeline"},
            {"class_embed_type": "projection"},
            "class embedding",
        ),
    ],
    ids=["sdxl", "unclip"],
)
def test_other_kinds_are_refused_before_their_weights_are_fetched(hub, tmp_path, index, unet, says):
    said = resolve(hub, tmp_path, pipeline(SD | index, unet))
    assert said.startswith("ArtifactError org/x is a ")
    assert says in said
    assert all(n.endswith(".json") for n, _, _ in hub.served)


def test_pickles_alone_are_refused_with_the_revisions_that_have_safetensors(hub, tmp_path):
    pickles = {k.replace("safetensors", "bin"): b"p" for k in WEIGHTS}
    more = {"refs/pr/2": pipeline(weights=pickles), "refs/pr/6": pipeline()}
    said = resolve(hub, tmp_path, pipeline(weights=pickles), **more)
    assert said.startswith("HubError")
    assert "org/x/text_encoder holds only model.bin" in said
    assert "revisions have safetensors: refs/pr/6; pass revision='refs/pr/6'" in said
    assert resolve(hub, tmp_path, pipeline(weights=pickles), "refs/pr/6", **more).split() == [
        "OK",
        *sorted(pipeline()),
    ]


def variant(name):
    """The weights under the names of a variant."""
    return {k.replace(".safe", f".{name}.safe"): v for k, v in WEIGHTS.items()}


def test_a_variant_is_fetched_where_there_is_nothing_else(hub, tmp_path):
    alone = pipeline(weights=variant("fp16"))
    assert resolve(hub, tmp_path, alone).split() == ["OK", *sorted(alone)]


def test_several_variants_alone_are_named(hub, tmp_path):
    said = resolve(hub, tmp_path, pipeline(weights=variant("fp16") | variant("non_ema")))
    assert "HubError org/x/text_encoder holds only model.fp16.safetensors, model.non_ema" in said
    assert "several variants (fp16, non_ema)" in said
    assert all(n.endswith(".json") for n, _, _ in hub.served)


def test_the_variant_that_is_asked_for_is_fetched(hub, tmp_path):
    half = {k: v for k, v in variant("fp16").items() if not k.startswith("vae")}
    everything = pipeline() | half | variant("non_ema")
    # the autoencoder has none: its default weights, as in diffusers
    want = pipeline(weights=half | {k: v for k, v in WEIGHTS.items() if k.startswith("vae")})
    done = resolve(hub, tmp_path, everything, asked="fp16")
    assert done.split() == ["OK", *sorted(want)]
    said = resolve(hub, tmp_path, everything, asked="fp8")
    assert said.startswith("UnknownNameError org/x has no weights of variant 'fp8'")
    assert "it has fp16, non_ema. " in said
    # a pinned commit that holds the default alone in the cache is asked for again
    pinned = {"0" * 40: everything}
    resolve(hub, tmp_path, everything, "0" * 40, **pinned)
    done = resolve(hub, tmp_path, everything, "0" * 40, "non_ema", **pinned)
    assert set(variant("non_ema")) <= set(done.split())


def listed(files):
    """What a manifest or a report says of files."""
    return {n: {"sha256": hashlib.sha256(d).hexdigest(), "bytes": len(d)} for n, d in files.items()}


def test_everything_that_a_manifest_lists_is_fetched(hub, tmp_path):
    named = pipeline() | {"unet/odd name [8].onnx": b"o", "README.md": b"r"}
    manifest = json.dumps({"format": "1.0", "files": listed(named)}).encode()
    files = {**named, "sdlite.json": manifest, "unet/other.onnx": b"o"}
    said = resolve(hub, tmp_path, {n: d for n, d in files.items() if n != "README.md"})
    assert (
        said
        == "HubError hub model org/x lacks README.md, which its own list names; tell its author, or"
        " take another revision."
    )
    said = resolve(hub, tmp_path, files)
    assert said == "OK " + " ".join(sorted({*named, "sdlite.json"}))


def test_exported_folder_is_fetched_as_its_report_lists_it(hub, tmp_path):
    made = {"unet/model.pte": b"m", "vae_decoder/model.pte": b"m"}
    named = pipeline(weights=made) | {"README.md": b"m", "student.json": b"{}"}
    report = {
        "profile": {"target": "executorch", "precision": "fp32"},
        "files": listed(made),
        "companions": listed({n: d for n, d in named.items() if n not in made}),
    }
    want = named | {"export-report.json": json.dumps(report).encode()}
    assert resolve(hub, tmp_path, want | {"unet/model.onnx": b"foreign"}).split() == [
        "OK",
        *sorted(want),
    ]


def test_repository_of_single_files_is_named(hub, tmp_path):
    said = resolve(hub, tmp_path, {"dreamshaper_8.safetensors": b"gigabytes", "README.md": b"r"})
    assert "no model_index.json" in said
    assert "dreamshaper_8.safetensors: fetch that file and give it to `sdlite convert`" in said
    assert hub.served == []


@pytest.mark.parametrize(
    "path", ["models/dreamshaper.safetensors", "/models/v1-5.ckpt", "sd.safetensors"]
)
def test_single_file_is_not_taken_for_a_hub_id(path):
    from sdlite import hub
    from sdlite.errors import UnknownNameError

    with pytest.raises(UnknownNameError, match=r"single file.*sdlite convert"):
        hub.resolve(path)


# --- published models by name


NAMED = """
import logging, sdlite, sdlite.hub
from sdlite.errors import SdliteError
class Said(logging.Handler):
    def emit(self, record): lines.append(record.getMessage())
lines = []
logging.getLogger("sdlite").addHandler(Said())
try:
    print("OK", sdlite.hub.resolve({repo!r}, {revision!r}).name, lines)
except SdliteError as e:
    print(type(e).__name__, e)
"""


def test_a_name_is_one_commit_and_the_license_is_said_once(hub, tmp_path):
    row = published.table()["bk-sdm-tiny"]
    hub.repos[row.repo] = {"main": pipeline(), row.revision: pipeline()}
    by_name = {"code": NAMED, "repo": "bk-sdm-tiny"}
    said = run(hub.url, tmp_path, **by_name)
    assert said.startswith(f"OK {row.revision} ['bk-sdm-tiny is {row.repo}@{row.revision}, under ")
    assert row.license.restrictions in said
    hub.served.clear()
    assert run("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1", **by_name).endswith(" []")
    other = commit("main", pipeline())
    assert run(hub.url, tmp_path, "main", **by_name).startswith(f"OK {other} [")


def test_a_pipeline_by_name_has_the_steps_and_guidance_of_its_card(hub, tmp_path):
    row = published.table()["sd-turbo"]
    hub.repos[row.repo] = {row.revision: hub.files}
    code = """
import sdlite
pipe = sdlite.Pipeline.from_pretrained({repo!r}, backend="onnxruntime", threads=1)
print(pipe.defaults.num_inference_steps, pipe.defaults.guidance_scale)
"""
    assert run(hub.url, tmp_path, code=code, repo="sd-turbo") == "1 0.0"
    at = f"{row.repo}', revision='{row.revision}"
    assert run(hub.url, tmp_path, code=code.replace("{repo!r}", f"'{at}'")) == "4 1.0"


def test_a_name_without_a_pin_whose_main_branch_holds_pickles_says_where_to_look(hub, tmp_path):
    row = published.table()["small-sd"]
    assert row.revision is None
    pickles = {k.replace("safetensors", "bin"): b"p" for k in WEIGHTS}
    hub.repos[row.repo] = {"main": pipeline(weights=pickles), "refs/pr/3": pipeline()}
    said = run(hub.url, tmp_path, code=NAMED, repo="small-sd")
    assert said.startswith("HubError segmind/small-sd/text_encoder holds only model.bin")
    assert "pass revision='refs/pr/3' after looking at it" in said
    assert "refs/pr/3" in row.note
    assert run(hub.url, tmp_path, "refs/pr/3", code=NAMED, repo="small-sd").startswith("OK ")


# --- a hub that is silent, hostile or damaged


SAID = """
import time, warnings, sdlite.hub
from sdlite.errors import SdliteError, SdliteWarning
begin = time.monotonic()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", SdliteWarning)
    try:
        folder = sdlite.hub.resolve({repo!r}, {revision!r})
        took, said = int(time.monotonic() - begin), [str(w.message) for w in caught]
        print("OK", len(list(folder.rglob("*"))), took, said)
    except SdliteError as e:
        print(type(e).__name__, int(time.monotonic() - begin), repr(str(e)))
"""


@pytest.fixture
def silence():
    """URL of a socket that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


TIMEOUTS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")  # seconds
PATIENT = dict.fromkeys(TIMEOUTS, "10")  # with a hub that answers, on a busy machine


def asked(url, home, revision=None, **env):
    """(kind, seconds, what was said) of `hub.resolve("org/emoji", revision)`."""
    said = run(url, home, revision, code=SAID, **{**dict.fromkeys(TIMEOUTS, "1"), **env})
    kind, *rest = said.split(" ", 3 if said.startswith("OK") else 2)
    return kind, int(rest[-2]), rest[-1]


def test_a_silent_hub_does_not_hold_what_is_in_the_cache(hub, silence, tmp_path):
    assert asked(hub.url, tmp_path, **PATIENT)[::2] == ("OK", "[]")
    pinned = commit("main", hub.files)
    kind, seconds, said = asked(silence, tmp_path)
    assert kind == "OK"
    assert seconds < 10
    assert "the hub cannot be reached" in said
    assert f"org/emoji is the copy in the cache, commit {pinned[:12]}" in said
    assert asked(silence, tmp_path, pinned) == (
        "OK",
        0,
        "[]",
    )  # a commit cannot change: nobody is asked
    assert asked("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")[::2] == ("OK", "[]")
    kind, seconds, said = asked(silence, tmp_path / "other")
    assert kind == "HubError"
    assert seconds < 10
    assert "org/emoji is not in the cache" in said


@pytest.mark.slow  # the hub's library tries again for half a minute
def test_a_hub_that_falls_silent_in_a_download_ends_it(hub, tmp_path):
    hub.silent.add("resolve")
    kind, seconds, said = asked(hub.url, tmp_path)
    assert kind == "HubError"
    assert "fetching org/emoji failed" in said
    assert seconds < 60


def test_a_cache_that_is_not_whole_is_not_taken_for_a_model(hub, silence, tmp_path):
    assert asked(hub.url, tmp_path, **PATIENT)[0] == "OK"
    pinned = commit("main", hub.files)
    [link] = tmp_path.rglob("merges.txt")
    link.unlink()
    for revision in (None, pinned):
        kind, _, said = asked(silence, tmp_path, revision)
        assert kind == "HubError"
        assert "is not whole in the cache: tokenizer/merges.txt is missing" in said
    assert asked(hub.url, tmp_path, pinned, **PATIENT)[0] == "OK"
    assert link.exists()


def test_a_plain_model_that_was_broken_off_is_not_taken_for_whole(hub, silence, tmp_path):
    hub.repos["org/emoji"]["main"] = pipeline()
    hub.refused.add("vae/diffusion_pytorch_model.safetensors")
    assert asked(hub.url, tmp_path)[0] == "HubError"
    assert not list(tmp_path.rglob("refs/main"))
    assert asked(silence, tmp_path, commit("main", pipeline()))[0] == "HubError"
    hub.refused.clear()
    assert asked(hub.url, tmp_path)[0] == "OK"
    assert asked(silence, tmp_path, commit("main", pipeline())) == ("OK", 0, "[]")


def test_a_damaged_blob_in_the_cache_is_named(hub, tmp_path):
    folder = Path(run(hub.url, tmp_path).removeprefix("OK "))
    for name in ("tokenizer/vocab.json", "sdlite.json", "model_index.json", "unet/model.onnx"):
        blob = (folder / name).resolve()
        whole = blob.read_bytes()
        blob.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtifactError, match=re.escape(name)) as e:
            sdlite.Pipeline.from_pretrained(folder, threads=1)
        assert "\n" not in str(e.value)
        blob.write_bytes(whole)
    assert sdlite.Pipeline.from_pretrained(folder, threads=1).artifact.verify()


@pytest.mark.parametrize(
    "repo", ["a/b..c", "a/..", "org/m.", "org/" + "m" * 97, "org/-m", "org/m--x", "org/m.git"]
)
def test_ids_that_the_hub_refuses_are_one_line(repo):
    with pytest.raises(
        UnknownNameError, match=f"model {re.escape(repr(repo))} is no hub id: "
    ) as e:
        open_model(repo)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("revision", ["../../x", "", "a b", "x" * 300, "/main", "a\x1b"])
def test_revisions_that_git_refuses_are_one_line(revision):
    with pytest.raises(InputError, match=r"revision=.* is no name of a branch") as e:
        open_model("org/m", revision)
    assert str(e.value).isprintable()


OUTSIDE = [
    "unet/../../../../../evil.json",
    "../evil.index.json",
    "/etc/evil.json",
    "unet/a\nb.json",
    "unet\\..\\evil.json",
    "tokenizer/\x1b[2J.json",
]


def test_names_that_lead_out_of_the_cache_are_one_line(hub, tmp_path):
    for i, name in enumerate(OUTSIDE):
        hub.repos[f"org/x{i}"] = {"main": {**pipeline(), name: b"{}"}}
    each = (
        RESOLVE.replace("try:", "for i in range(6):\n  try:")
        .replace("\n    ", "\n      ")
        .replace("\nexcept", "\n  except")
    )
    said = run(hub.url, tmp_path, code=each.replace("{repo!r}", '"org/x" + str(i)'), every=True)
    assert len(said) == 6
    assert all(
        line.startswith("HubError the hub says that model org/x") and line.isprintable()
        for line in said
    )
    assert hub.served == []


def test_nothing_that_no_model_needs_is_fetched(hub, tmp_path):
    names = [
        "tokenizer/evil.pt",
        "tokenizer/evil.json",
        "tokenizer/x.txt",
        "scheduler/evil.bin",
        "unet/adapter_config.json",
    ]
    assert resolve(hub, tmp_path, {**pipeline(), **dict.fromkeys(names, b"{}")}).split() == [
        "OK",
        *sorted(pipeline()),
    ]


def test_a_quantized_model_of_the_hub_is_verified_and_saved(hub, tmp_path):
    """Whatever its manifest lists is fetched: reports, images of them."""
    more = {"quantize-report.json": b"{}", "quantize-grid.png": b"png", "student.json": b"{}"}
    manifest = json.loads(hub.files["sdlite.json"])
    manifest["files"] |= listed(more)
    hub.repos["org/emoji"]["main"] = {
        **hub.files,
        **more,
        "sdlite.json": json.dumps(manifest).encode(),
    }
    save = RUN.replace(
        'print("OK"',
        f'pipe.artifact.verify(); pipe.save_pretrained({str(tmp_path / "saved")!r}); print("OK"',
    )
    assert run(hub.url, tmp_path / "home", code=save).startswith("OK")
    assert (tmp_path / "saved/quantize-grid.png").read_bytes() == b"png"
