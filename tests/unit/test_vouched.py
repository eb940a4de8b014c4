"""What a manifest lists is verified before it is read; what it does not list is not read; what lost
its manifest is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest

import sdlite
from sdlite.artifact import Artifact
from sdlite.cli import main
from sdlite.errors import SdliteError
from sdlite.manifest import Manifest
from tests import folders
from tests.conftest import EMOJI

PROMPT = "a red apple on a blue background"
SCHEDULER = "scheduler/scheduler_config.json"
# One file changed in a way that is valid, and once gave another image without a word.
CHANGED = {
    "tokenizer/vocab.json": (
        lambda t: t.replace('"red</w>"', '"RED</w>"')
        .replace('"blue</w>"', '"red</w>"')
        .replace('"RED</w>"', '"blue</w>"')
    ),
    "tokenizer/merges.txt": lambda t: t[: len(t) // 2].rsplit("\n", 1)[0],
    SCHEDULER: lambda t: t.replace("0.012", "0.013"),
    "unet/config.json": lambda t: t.replace("{", "{ ", 1),
    "text_encoder/config.json": lambda t: t.replace("{", "{ ", 1),
    "vae/config.json": lambda t: t.replace('"scaling_factor"', '"scaling_factor": 5.0, "x"'),
    "model_index.json": lambda t: t.replace("{", "{ ", 1),
}


def one_line(call, *args, match="", **kwargs):
    """The error of a call: one of ours, in one line."""
    with pytest.raises(SdliteError, match=match) as e:
        call(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def load(folder, **more):
    return sdlite.Pipeline.from_pretrained(
        folder, **{"backend": "onnxruntime", "threads": 1} | more
    )


# --- listed files


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_small_file_is_refused_by_its_name(copy, name):
    path = copy / name
    path.write_text(CHANGED[name](path.read_text()))
    said = one_line(load, copy, match=r"cut off or changed|it was changed")
    assert name in said


@pytest.mark.parametrize("name", CHANGED)
def test_a_missing_small_file_is_refused_by_its_name(copy, name):
    (copy / name).unlink()
    assert name.split("/")[-1] in one_line(load, copy)


@pytest.mark.parametrize("name", [*CHANGED, "unet/model.onnx", "sdlite.json"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "dangling", "zero"])
def test_a_listed_file_is_a_plain_file_in_the_folder(copy, tmp_path, name, kind):
    path = copy / name
    shutil.move(path, tmp_path / "outside")
    {
        "link": lambda: path.symlink_to(tmp_path / "outside"),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "dangling": lambda: path.symlink_to("/nowhere/x"),
        "zero": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    one_line(load, copy)


@pytest.mark.parametrize("change", ["added", "changed", "removed"])
def test_files_of_an_older_tokenizer_are_vouched_for_too(copy, change):
    folders.configure(copy / "tokenizer/tokenizer_config.json", added_tokens_decoder=...)
    folders.relist(copy)
    load(copy)
    name = "added_tokens.json" if change == "added" else "special_tokens_map.json"
    path = copy / "tokenizer" / name
    path.unlink() if change == "removed" else path.write_text("{}")
    assert name in one_line(load, copy)


@pytest.mark.parametrize(
    "name",
    ["tokenizer/tokenizer.json", "text_encoder/adapter_config.json", "unet/adapter_config.json"],
)
def test_a_file_that_is_not_listed_is_not_read(copy, name):
    (copy / name).write_text('{"a": 1}')
    said = one_line(load, copy)
    assert name in said
    assert main(["verify", str(copy)]) == 1


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "text_encoder/model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    ],
)
def test_weights_that_are_not_listed_are_not_loaded(copy, name):
    pytest.importorskip("torch", reason="needs the torch extra")
    if "00001" in name:
        (copy / "unet/diffusion_pytorch_model.safetensors").rename(copy / name)
    (copy / name).write_text('{"weight_map": {"a": "b.safetensors"}}')
    if "text_encoder" in name:  # transformers prefers the one file that is listed, and so do we
        (copy / "text_encoder/model.safetensors").unlink()
    one_line(load, copy, backend="torch")


def test_a_listed_tokenizer_is_read_again_only_where_its_list_says_so(copy):
    (copy / "tokenizer/added_tokens.json").write_text("{}")
    manifest = json.loads((copy / "sdlite.json").read_text())
    manifest["files"]["tokenizer/added_tokens.json"] = {
        "sha256": hashlib.sha256(b"{}").hexdigest().upper(),
        "bytes": 2,
    }
    (copy / "sdlite.json").write_text(json.dumps(manifest))
    load(copy)


def test_weights_are_hashed_once_for_each_state(copy, monkeypatch):
    files, counted = Artifact.open(copy).files, []
    monkeypatch.setattr(
        "sdlite.files.sha256",
        lambda p: counted.append(p) or hashlib.sha256(p.read_bytes()).hexdigest(),
    )
    name = "unet/diffusion_pytorch_model.safetensors"
    assert files.part("unet").file("diffusion_pytorch_model.safetensors") == files.file(name)
    assert len(counted) == 1
    raw = bytearray((copy / name).read_bytes())
    raw[-1] ^= 1
    (copy / name).write_bytes(raw)
    one_line(files.file, name, match="SHA-256")


# --- a folder that lost its list


def test_a_model_without_its_manifest_is_no_other_model(copy):
    (copy / "sdlite.json").unlink()
    one_line(load, copy, backend="auto", match=r"has lost sdlite\.json")
    assert main(["info", str(copy)]) == 1
    shutil.rmtree(copy / "vae_decoder")  # the other graphs say it too
    one_line(load, copy, backend="auto", match="text_encoder/model.onnx.* has lost")


@pytest.mark.parametrize("sign", ["student.json", "quantize-report.json"])
def test_signs_of_a_lost_list(plain, tmp_path, sign):
    folder = shutil.copytree(plain, tmp_path / "model")
    assert Artifact.open(folder).listing is None
    (folder / sign).write_text("{}")
    one_line(Artifact.open, folder, match=f"{sign}.* has lost")


def test_what_sdlite_writes_says_so_in_its_index(plain, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    from sdlite.converter import _copy

    out = tmp_path / "out"
    out.mkdir()
    _copy(Artifact.open(plain), out)
    one_line(Artifact.open, out, match=r"model_index\.json says so\) and has lost")


def test_optimums_graphs_make_no_lost_model(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / "unet/model.onnx").write_bytes(b"graph of model.onnx_data")
    assert Artifact.open(folder).listing is None


# --- what a manifest, a report and an index may say

UNET = ("variants", "fp16", "unet")
GRAPH = ("files", "unet/model.onnx")
BAD = [
    ((), "extra", 1),
    (("format",), 1),
    (("format",), ["1.0"]),
    (("name",), 5),
    (("name",), "\x1b[2J"),
    (("name",), "A" * 10_000),
    (("student",), [1]),
    (("student",), None),
    (("sampler",), None),
    (("sampler",), "ddim"),
    (("sampler", "name"), ["ddim"]),
    *((("sampler", "num_inference_steps"), v) for v in ("4", 0, -4, 1001, 10**9, 4.5, True, None)),
    *((("sampler", "guidance_scale"), v) for v in ("big", -1, [1], None, True, 10**400)),
    (("variants",), [1]),
    (("variants",), None),
    (("variants", "fp16"), ["unet"]),
    (("variants", "int3"), {}),
    (UNET, "x"),
    (("variants", "fp16", "evil"), {}),
    ((*UNET, "file"), ...),
    ((*UNET, "weights"), ...),
    ((*UNET, "storage"), ...),
    ((*UNET, "arithmetic"), ...),
    ((*UNET, "file"), 3),
    ((*UNET, "file"), "model_index.json"),
    ((*UNET, "file"), "vae_decoder/model.onnx"),
    ((*UNET, "file"), "unet/other.onnx"),
    ((*UNET, "weights"), "abc"),
    ((*UNET, "weights"), [3]),
    ((*UNET, "weights"), {"a": 1}),
    ((*UNET, "weights"), ["unet/other"]),
    ((*UNET, "storage"), 3),
    ((*UNET, "arithmetic"), None),
    ((*UNET, "opset"), "18"),
    (("files",), None),
    (GRAPH, None),
    (GRAPH, [1]),
    *(((*GRAPH, "sha256"), v) for v in (5, None, "", "z" * 64, "a" * 63)),
    *(((*GRAPH, "bytes"), v) for v in ("1", 1.0, -1, None, [1], True, 10**400)),
    *(
        (("files", p), {"sha256": "a" * 64, "bytes": 1})
        for p in (
            "../x",
            "/x",
            "a\0b",
            "a\nb",
            ".",
            "",
            "a/../../x",
            "//x",
            "a\\b",
            "C:x",
            "./unet/x",
            "a//b",
            "\ud800",
            "a" * 300,
            "w.PT",
            "w.pickle",
        )
    ),
    (("calibration",), [1]),
    (("calibration",), {"prompts": "x"}),
    (("calibration",), {"keep_float": [1]}),
    (("quality",), "great"),
    (("quality",), {"engines": []}),
    *((("size_multiple",), v) for v in (0, -64, "64", None, [64], 64.5, True, 10**400)),
    *((("max_pixels",), v) for v in (0, "1", 1.5)),
]


def put(data, path, value):
    *keys, last = path
    for key in keys:
        data = data[key]
    if value is ...:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    "case",
    BAD,
    ids=lambda c: f"{'.'.join(map(str, c[0])) or c[1]}={c[-1]!r}"[:60]
    .encode("ascii", "replace")
    .decode(),
)
def test_a_manifest_says_what_it_may_or_is_refused_with_the_key(case):
    data = json.loads((EMOJI / "sdlite.json").read_text())
    path = case[0] if len(case) == 2 else (case[1],)
    put(data, path, case[-1])
    said = one_line(Manifest.from_dict, data, "there/sdlite.json", match="^there/sdlite.json")
    assert len(said) < 1000
    assert said.isprintable()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("files",), ...),
        (("files",), []),
        (("files", "../x"), {"sha256": "a" * 64, "bytes": 1}),
        (("companions", "tokenizer/evil.pt"), {"sha256": "a" * 64, "bytes": 1}),
        (("companions", "a.json"), {"sha256": 1, "bytes": 1}),
        (("profile",), ...),
        (("profile", "target"), 3),
        (("profile", "options"), [1]),
        (("size",), [64]),
        (("size",), [0, 64]),
        (("size",), "64x64"),
        (("size_multiple",), "8"),
        (("networks",), [1]),
        (("networks",), {"unet": {"file": "x"}}),
        (("networks",), {"evil": {}}),
        (("parity",), [1]),
        (("model",), ["x"]),
    ],
)
def test_a_report_says_what_it_may_or_is_refused_with_the_key(plain, tmp_path, path, value):
    folder = shutil.copytree(plain, tmp_path / "export")
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    entries = {
        n: {
            "sha256": hashlib.sha256((folder / n).read_bytes()).hexdigest(),
            "bytes": (folder / n).stat().st_size,
        }
        for n in names
    }
    report = {
        "files": {},
        "companions": entries,
        "profile": {"target": "mnn", "precision": "fp32", "options": {}},
    }
    (folder / "export-report.json").write_text(json.dumps(report))
    assert Artifact.open(folder).export.target == "mnn"
    put(report, path, value)
    (folder / "export-report.json").write_text(json.dumps(report))
    one_line(Artifact.open, folder, match=r"export-report\.json")


@pytest.mark.parametrize(
    "change",
    [
        {"unet": "UNet"},
        {"unet": ["a"]},
        {"unet": ["a", 1]},
        {"unet": ["os", "sys\x1btem"]},
        {"x\n": ["a", "b"]},
        {"_class_name": "\x1b[2J"},
    ],
    ids=str,
)
def test_an_index_says_what_it_may(plain, tmp_path, change):
    folder = shutil.copytree(plain, tmp_path / "model")
    folders.configure(folder / "model_index.json", **change)
    assert one_line(Artifact.open, folder).isprintable()


# --- saving


def test_saved_is_what_the_manifest_lists(copy, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (copy / "notes.txt").symlink_to(secret)
    for name in ("w.BIN", "w.PICKLE", "w.pt", "unet/x.onnx"):
        (copy / name).write_bytes(b"x")
    os.mkfifo(copy / "pipe")
    pipe = load(copy)
    out = pipe.save_pretrained(tmp_path / "saved")
    assert {p.relative_to(out) for p in out.rglob("*") if p.is_file()} == {
        p.relative_to(EMOJI) for p in EMOJI.rglob("*") if p.is_file()
    }
    assert (out / "sdlite.json").read_bytes() == (EMOJI / "sdlite.json").read_bytes()
    inside = pipe.save_pretrained(copy / "copy")
    assert Artifact.open(inside).verify() == Artifact.open(out).verify()
    one_line(pipe.save_pretrained, copy, match="not an empty folder")
    (copy / SCHEDULER).write_text("{}")
    one_line(pipe.save_pretrained, tmp_path / "other", match="scheduler_config.json has 2 bytes")
    (copy / SCHEDULER).unlink()
    os.mkfifo(copy / SCHEDULER)
    one_line(pipe.save_pretrained, tmp_path / "other", match="named pipe")
    assert not (tmp_path / "other").exists()


def test_saved_of_a_plain_folder_is_what_sdlite_runs(plain, tmp_path):
    pytest.importorskip("torch", reason="needs the torch extra")
    folder = shutil.copytree(plain, tmp_path / "model")
    folders.configure(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
    )
    (folder / "safety_checker").mkdir()
    (folder / "LICENSE").write_text("whose")
    (folder / "README.md").symlink_to("/etc/hostname")
    for name in (
        "unet/diffusion_pytorch_model.BIN",
        "tokenizer/x.Pickle",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ):
        (folder / name).write_bytes(b"x")
    out = load(folder, backend="torch").save_pretrained(tmp_path / "saved")
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == {
        "LICENSE",
        *(p.relative_to(plain).as_posix() for p in plain.rglob("*") if p.is_file()),
    }
    assert json.loads((out / "model_index.json").read_text())["safety_checker"] == [None, None]
    load(out, backend="torch")
    (folder / "tokenizer/special_tokens_map.json").unlink()
    (tmp_path / "secret.json").write_text('{"token": "mine"}')
    (folder / "tokenizer/special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    pipe = load(folder, backend="torch")
    one_line(pipe.save_pretrained, tmp_path / "other", match="link that leaves the model folder")
