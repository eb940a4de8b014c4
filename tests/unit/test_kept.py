"""Work is kept: read-only models, several processes at once, full disks, and kill -9 at any moment.
Real commands in real processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

from benchmarks import kills
from sdlite import io
from sdlite.artifact import Artifact
from tests import folders
from tests.conftest import EMOJI
from tests.unit.test_io import disk, linux, root

QUIET = [sys.executable, "-W", "ignore"]
SDLITE = [*QUIET, "-m", "sdlite"]
STEPS = [
    "--samples",
    "2",
    "--gate-prompts",
    "1",
    "--steps",
    "1",
    "--engine",
    "onnxruntime",
    "--threads",
    "1",
    "--quiet",
]
GATE = ["--psnr-mean", "5", "--psnr-worst", "5", "--ssim-mean", "0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small plain diffusers folder."""
    pytest.importorskip("diffusers", reason="needs the export extra")
    pytest.importorskip("onnxscript", reason="needs the export extra")
    return folders.write(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture
def place(tmp_path):
    """Folders for temporary files, cache and home."""
    return kills.Place(tmp_path)


def strays(folder: Path) -> list[Path]:
    return [
        p for p in folder.rglob("*") if p.name.startswith((io.WORK, "sdlite-")) or ".tmp" in p.name
    ]


# --- read-only folders


def as_others_see_it(folder: Path) -> list[str]:
    """The folder becomes another user's, read only. Returns what to put before a command that may
    not do more than its user.
    """
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
        if os.getuid() == 0:
            os.chown(path, 54321, 54321)
    if os.getuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere; giving that up needs setpriv")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner,-chown"]


def writable(folder: Path) -> None:
    if folder.exists():
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


USES = """
import os, shutil, sys
from pathlib import Path
model, plain, out = map(Path, sys.argv[1:])
assert not os.access(model, os.W_OK) and not os.access(model / "unet", os.W_OK)
import sdlite
from sdlite.cli import main
for backend in ("onnxruntime", "openvino"):
    sdlite.Pipeline.from_pretrained(plain, backend=backend, threads=1)("x", num_inference_steps=1)
model, image = str(model), str(out / "a.png")
assert main(["generate", "x", "--model", model, "--steps", "1", "--quiet", "--out", image]) == 0
integers = ["quantize", model, "--precision", "int8-dynamic", "--out", str(out / "q")]
assert main([*integers, *{quantize}]) == 0
fixed = ["export", model, "--target", "onnx-fixed", "--steps", "1", "--threads", "1"]
assert main([*fixed, "--out", str(out / "x")]) == 0
[converted] = [p for p in Path(os.environ["SDLITE_CACHE"], "onnx").iterdir() if p.name != ".lock"]
for folder in (converted, out / "q", out / "x"):
    assert list(folder.rglob("*/*"))
    for path in folder.rglob("*"):
        assert os.access(path, os.W_OK), path
shutil.rmtree(converted)
shutil.rmtree(out)
print("removed", os.path.exists(out))
"""


@linux
def test_a_read_only_model_of_another_user_is_used_and_nothing_stays(place, tiny):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    model, plain = place.root / "model", place.root / "plain"
    shutil.copytree(EMOJI, model)
    shutil.copytree(tiny, plain)
    limits = as_others_see_it(model)
    as_others_see_it(plain)
    try:
        code = USES.replace("{quantize}", repr([*STEPS, *GATE]))
        command = [*limits, *QUIET, "-c", code, model, plain, place.out]
        done = subprocess.run(command, env=place.environment(), capture_output=True, text=True)
        assert done.stdout.endswith("removed False\n"), done.stderr
        assert strays(place.root) == []
    finally:
        writable(model)
        writable(plain)


# --- at once

OPENS = """
import sys, sdlite
pipe = sdlite.Pipeline.from_pretrained(sys.argv[1], backend="onnxruntime", threads=1)
print(pipe("x", num_inference_steps=1, seed=0).images[0].tobytes().hex()[:2000])
"""


@linux
def test_processes_that_convert_a_model_at_once_all_open_it(place, tiny):
    command = [*QUIET, "-c", OPENS, str(tiny)]
    running = [
        subprocess.Popen(
            command,
            env=place.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    done = [p.communicate() for p in running]
    assert [p.returncode for p in running] == [0, 0], done
    assert len({images for images, _ in done}) == 1
    assert sum("converting it once" in said for _, said in done) == 1
    cache = place.root / "home" / "cache" / "onnx"
    [made] = [p for p in cache.iterdir() if p.name != ".lock"]
    assert Artifact.open(made).verify()


def test_threads_that_convert_a_model_at_once_all_open_it(place, tiny, monkeypatch):
    from sdlite import converter as exporting

    monkeypatch.setenv("SDLITE_CACHE", str(place.root / "cache"))
    converted, right = [], exporting.convert
    monkeypatch.setattr(exporting, "convert", lambda *a, **k: converted.append(right(*a, **k)))
    found: list[object] = []

    def use() -> None:
        try:
            found.append(exporting.convert_cached(Artifact.open(tiny)).verify())
        except BaseException as e:
            found.append(e)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(converted) == 1
    assert found[0] == found[1]
    assert len(found[0]) > 10


@linux
def test_of_two_exports_into_one_folder_one_wins_and_the_other_says_what_to_do(place):
    command = [
        *SDLITE,
        "export",
        "emoji",
        "--target",
        "onnx",
        "--steps",
        "1",
        "--threads",
        "1",
        "--out",
        str(place.out / "x"),
    ]
    running = [
        subprocess.Popen(
            command,
            env=place.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [p.communicate()[1] for p in running]
    assert sorted(p.returncode for p in running) == [0, 1], said
    [line] = [s for p, s in zip(running, said, strict=True) if p.returncode]
    assert "choose another folder" in line
    assert line.count("\n") == 1
    assert Artifact.open(place.out / "x").verify()
    assert strays(place.root) == []


# --- full disks

CONVERT = "import sys; from sdlite.converter import convert; convert(sys.argv[1], sys.argv[2])"
SAVE = "import sys, sdlite; sdlite.Pipeline.from_pretrained('emoji').save_pretrained(sys.argv[1])"
ON_8_MIB = {
    "quantize-dynamic": [
        *SDLITE,
        "quantize",
        "emoji",
        "--precision",
        "int8-dynamic",
        "--out",
        "{}/q",
        *STEPS,
        *GATE,
    ],
    "quantize-static": [
        *SDLITE,
        "quantize",
        "emoji",
        "--precision",
        "int8-static",
        "--out",
        "{}/q",
        *STEPS,
        *GATE,
    ],
    "export": [*SDLITE, "export", "emoji", "--target", "onnx", "--out", "{}/x"],
    "save": [*QUIET, "-c", SAVE, "{}/s"],
    "convert": [*QUIET, "-c", CONVERT, str(EMOJI), "{}/c"],
}
WHEN_FULL = {
    "png": [*SDLITE, "generate", "x", "--steps", "1", "--num", "2", "--quiet", "--out", "{}/a.png"],
    "jpg": [*SDLITE, "generate", "x", "--steps", "1", "--quiet", "--out", "{}/a.jpg"],
    "webp": [*SDLITE, "generate", "x", "--steps", "1", "--quiet", "--out", "{}/a.webp"],
    "advise": [*SDLITE, "distill", "advise", "--out", "{}/r.toml"],
    "bench": [
        *SDLITE,
        "bench",
        "--backends",
        "onnxruntime",
        "--steps",
        "1",
        "--seconds",
        "0.1",
        "--out",
        "{}/rows.jsonl",
    ],
}


def full(place: Path, command: list[str]) -> None:
    """The command ends in a line that names the place, and the disk holds what it held."""
    before = sorted(place.rglob("*"))
    env = {
        **os.environ,
        "TMPDIR": str(place / "tmp"),
        "SDLITE_CACHE": str(place / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": "/tmp",
    }
    done = subprocess.run(
        [x.format(place) for x in command], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert str(place) in line
    assert any(x in line for x in ("No space left on device", "too little disk")), line
    if "-c" not in command:
        assert line.startswith("sdlite: ")
        assert "Make room" in line
    assert sorted(place.rglob("*")) == before


@linux
@root
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x == "convert" else x for x in ON_8_MIB]
)
def test_a_disk_of_8_mib_is_named_and_nothing_half_written_stays(tmp_path, name):
    with disk(tmp_path / "d", 8) as d:
        (d / "tmp").mkdir()
        full(d, ON_8_MIB[name])


@linux
@root
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x == "advise" else x for x in WHEN_FULL]
)
def test_a_disk_that_is_full_is_named_and_nothing_half_written_stays(tmp_path, name):
    with disk(tmp_path / "d", 1) as d:
        (d / "tmp").mkdir()
        with open(d / "fill", "wb", buffering=0) as f:
            while f.write(bytes(4096)) and shutil.disk_usage(d).free:
                pass
        full(d, WHEN_FULL[name])


# --- kill -9


@linux
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("generate", 4),
        ("save_pretrained", 4),
        ("quantize int8-dynamic", 2),
        pytest.param("convert", 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_command_loses_nothing_and_leaves_nothing_that_looks_whole(name, number, tmp_path):
    row = kills.run(
        name, kills.Place(tmp_path), number, 1 if name in kills.CAUGHT else 0, random.Random(3)
    )
    assert row.faults == []
    assert row.kills + row.ended + sum(row.signals.values()) >= number


@linux
def test_the_harness_sees_what_is_wrong(place):
    """Half a model under a model's name, half an image, a work folder."""
    assert kills.wrong(place) == []
    shutil.copytree(EMOJI, place.out / "half")
    (place.out / "half" / "unet" / "model.onnx").write_bytes(b"x")
    (place.out / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    plain = shutil.copytree(
        EMOJI,
        place.root / "tmp" / "plain",
        ignore=shutil.ignore_patterns("sdlite.json", "*.onnx*", "vae_decoder"),
    )
    (plain / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    (place.root / "home" / f"{io.WORK}x").mkdir()
    assert sorted(kills.wrong(place)) == [
        "out/a.png is damaged",
        "out/half is damaged",
        "tmp/plain opens and is half written",
    ]
    assert kills.strays(place) == [f"home/{io.WORK}x"]


# --- a gate that does not hold


def test_a_quantized_model_whose_gate_fails_is_kept_when_asked_and_passes_nowhere_as_whole(
    tmp_path,
):
    out = tmp_path / "q"
    command = [
        *SDLITE,
        "quantize",
        "emoji",
        "--precision",
        "int8-dynamic",
        "--out",
        str(out),
        *STEPS,
        "--psnr-mean",
        "99",
        "--keep-failed",
    ]
    for _ in range(2):  # the second takes the place of the first
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"the model, marked as failed, in {out}.failed/model" in done.stderr
    kept = tmp_path / "q.failed" / "model"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.failed"]
    assert json.loads((kept / "sdlite.json").read_text())["quality"]["failed"]
    said = {
        c: subprocess.run([*SDLITE, c, str(kept)], capture_output=True, text=True)
        for c in ("verify", "info")
    }
    assert said["verify"].returncode == 1
    assert "failed its quality check (onnxruntime: psnr_mean" in said["verify"].stderr
    assert "failed its quality check: onnxruntime: psnr_mean" in said["info"].stdout
    made = subprocess.run(
        [
            *QUIET,
            "-m",
            "sdlite",
            "generate",
            "x",
            "--model",
            str(kept),
            "--steps",
            "1",
            "--quiet",
            "--out",
            str(tmp_path / "a.png"),
        ],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0
    assert (kept / "mine.txt").write_text("x")
    shutil.rmtree(kept)
    kept.mkdir()
    (kept / "mine.txt").write_text("a user's")
    done = subprocess.run(command, capture_output=True, text=True)
    assert "the model could not be kept" in done.stderr
    assert (kept / "mine.txt").read_text() == "a user's"


def test_what_is_written_is_json(tmp_path):
    """Networks that are equal are infinitely close, which no JSON holds."""
    out = tmp_path / "q"
    subprocess.run(
        [
            *SDLITE,
            "quantize",
            "emoji",
            "--precision",
            "int8-dynamic",
            "--out",
            str(out),
            *STEPS,
            *GATE,
        ],
        check=True,
    )
    for name in ("sdlite.json", "quantize-report.json"):
        found = io.read_json(out / name)  # refuses NaN and infinity
        engines = (found.get("quality") or found)["engines"]
        networks = (engines["onnxruntime"] if isinstance(engines, dict) else engines[0])["networks"]
        assert networks["vae_decoder"] is None
