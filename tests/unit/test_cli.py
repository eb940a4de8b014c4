from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from sdlite.cli import _parser, main

pytest.importorskip("onnxruntime", reason="needs the cpu extra")
FAST = ["--steps", "1", "--threads", "1", "--quiet"]


def test_generate_writes_a_png_with_its_generation_data(tmp_path, capsys):
    out = tmp_path / "a.png"
    assert main(["generate", "red apple", "--seed", "0", "--out", str(out), *FAST]) == 0
    image = Image.open(out)
    assert image.size == (64, 64)
    assert {k: image.text[k] for k in ("prompt", "seed", "model", "precision", "steps")} == {
        "prompt": "red apple", "seed": "0", "model": "emoji", "precision": "fp16", "steps": "1",
    }  # fmt: skip
    assert str(out) in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_several_images_are_numbered_files_or_one_grid(tmp_path):
    assert main(["generate", "pizza", "--num", "3", "--seed", "1", "--out", str(tmp_path / "p.png"), *FAST]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p-0.png", "p-1.png", "p-2.png"]
    assert Image.open(tmp_path / "p-2.png").text["seed"] == "3"
    assert main(["generate", "pizza", "--num", "3", "--seed", "1", "--grid", "--out", str(tmp_path / "g.png"), *FAST]) == 0
    assert Image.open(tmp_path / "g.png").size == (128, 128)


def test_tiles_of_a_size_are_taken(tmp_path):
    for name, more in (("whole", []), ("own", ["--vae-tiling"]), ("tiled", ["--vae-tile-size", "48"])):
        assert main(["generate", "pizza", "--seed", "1", "--out", str(tmp_path / f"{name}.png"), *more, *FAST]) == 0
    whole, own, tiled = (Image.open(tmp_path / f"{n}.png").tobytes() for n in ("whole", "own", "tiled"))
    assert whole == own != tiled


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["generate", "x", "--out", "{}/a.bmp"], "is not one of .png"),
        (["generate", "x", "--out", "{}/no/a.png"], "does not exist"),
        (["generate", "x", "--out", "{}/a.png", "--model", "nope"], "is not an existing folder"),
        (["generate", "x", "--out", "{}/a.png", "--precision", "int4"], "choose one of fp32"),
        (["generate", "x", "--out", "{}/a.png", "--height", "500"], "use 480 or 512"),
        (["generate", "x", "--out", "{}/a.png", "--vae-tile-size", "60"], "use 56 or 64"),
        (["generate", "x", "--out", "{}/a.png", "--vae-tile-size", "0"], "size_px=0 is not a positive multiple"),
        (["verify", "{}"], "model_index.json"),
        (["generate", "x", "--out", "{}/a.png", "--threads", "0"], "--threads=0; accepted: a whole number, 1 to "),
        (["generate", "x", "--out", "{}/a.png", "--threads", "-2"], "--threads=-2; accepted: a whole number, 1 to "),
        (["generate", "x", "--out", "{}/a.png", "--threads", "100000"], "--threads=100000; accepted: a whole number, 1 to "),
        (["generate", "x", "--out", "{}/a.png", "--steps", "0"], "--steps=0; accepted: a whole number, at least 1"),
        (["generate", "x", "--out", "{}/a.png", "--steps", "2000"], "1 to 1000"),
        (["generate", "x", "--out", "{}/a.png", "--num", "0"], "--num=0; accepted: a whole number, 1 to 4096"),
        (["generate", "x", "--out", "{}/a.png", "--seed", "-1"], "--seed=-1; accepted: a whole number, 0 to "),
        (["generate", "x", "--out", "{}/a.png", "--seed", str(2**64)], "accepted: a whole number, 0 to "),
        (["generate", "x", "--out", "{}/a.png", "--guidance", "nan"], "--guidance=nan; accepted: a finite number"),
        (["generate", "x", "--out", "{}/a.png", "--guidance", "-1"], "--guidance=-1.0; accepted"),
        (["generate", "x", "--out", "{}/a.png", "--width", "1000000"], "--width=1000000; accepted"),
        (["generate", "x", "--out", "{}/a.png", "--arithmetic", "float8"], "float8"),
        (["quantize", "emoji", "--precision", "int8-static", "--out", "{}/q", "--samples", "0"], "--samples=0; accepted"),
        (["quantize", "emoji", "--precision", "int8-static", "--out", "{}/q", "--threads", "0"], "--threads=0; accepted"),
        (["quantize", "emoji", "--precision", "int8-static", "--out", "{}/q", "--max-float", "2"], "--max-float=2.0; accepted"),
        (["quantize", "emoji", "--precision", "int8-static", "--out", "{}/q", "--psnr-mean", "nan"], "--psnr-mean=nan; accepted"),
        (["quantize", "emoji", "--precision", "int8-static", "--out", "{}/q", "--gate-prompts", "0"], "--gate-prompts=0; accepted"),
        (["export", "emoji", "--target", "onnx", "--out", "{}/e", "--steps", "0"], "--steps=0; accepted"),
        (["export", "emoji", "--target", "onnx", "--out", "{}/e", "--threads", "100000"], "--threads=100000; accepted"),
        (["bench", "emoji", "--threads", "0"], "--threads=0; accepted"),
        (["bench", "emoji", "--seconds", "inf"], "--seconds=inf; accepted"),
        (["bench", "emoji", "--guidance", "-2"], "--guidance=-2.0; accepted"),
        (["distill", "advise", "--minutes", "nan"], "--minutes=nan; accepted"),
    ],
)
def test_error_is_one_line_and_exit_code_1(tmp_path, capsys, arguments, text):
    assert main([a.format(tmp_path) for a in arguments]) == 1
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["generate"], ["generate", "x"], ["nope"], ["generate", "x", "--seed", "y", "--out", "a.png"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2


def test_help_shows_every_option_with_its_text_and_no_empty_default(capsys):
    for command in ("generate", "quantize", "export", "distill", "bench", "info", "verify", "models"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert "default: None" not in text
        assert "default: False" not in text
        assert "examples:\n  sdlite " + command in text
    parsers = next(a.choices for a in _parser()._actions if isinstance(a.choices, dict))
    assert [(c, a.dest) for c, p in parsers.items() for a in p._actions if not a.help] == []


def test_what_is_probably_not_wanted_is_said(tmp_path, capsys):
    arguments = ["generate", "x", "--guidance", "7.5", "--height", "192", "--width", "64", "--out", str(tmp_path / "a.png"), *FAST]
    assert main(arguments) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("sdlite: warning: emoji was trained ") for line in said] == [True, True]


def test_jpeg_keeps_how_it_was_made(tmp_path):
    assert main(["generate", "red apple", "--seed", "7", "--out", str(tmp_path / "a.jpg"), *FAST]) == 0
    kept = json.loads(Image.open(tmp_path / "a.jpg").getexif().get_ifd(0x8769)[0x9286][8:])
    assert (kept["prompt"], kept["seed"]) == ("red apple", "7")


@pytest.mark.parametrize(
    ("file", "stage"), [("text_encoder/model.safetensors", "text encoder"), ("vae_decoder/model.onnx.data", "VAE decoder")]
)
def test_weights_that_hold_nan_are_an_error_not_a_black_picture(copy, tmp_path, capsys, file, stage):
    """As a merged VAE in float16 does."""
    from sdlite.artifact import Artifact, write_manifest

    with open(copy / file, "r+b") as weights:
        weights.seek(-4096, 2)
        weights.write(b"\x00\x7e" * 2048)  # float16's NaN
    write_manifest(copy, Artifact.open(copy).manifest)
    assert main(["generate", "x", "--model", str(copy), "--out", str(tmp_path / "black.png"), *FAST]) == 1
    assert f"{stage} are not finite" in capsys.readouterr().err
    assert not (tmp_path / "black.png").exists()


def test_info_json_has_the_student_the_sampler_and_the_variants(capsys):
    assert main(["info", "emoji", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert 0 < info["student"]["unet_parameters"] < 10e6
    assert info["sampler"]["num_inference_steps"] >= 1
    assert set(info["variants"]) >= {"fp16", "fp32"}
    assert info["variants"]["fp16"]["unet"]["bytes"] > 1e6


def test_verify_and_models(capsys):
    assert main(["verify", "emoji"]) == 0
    assert main(["models"]) == 0
    assert "emoji" in capsys.readouterr().out


# --- bench -----------------------------------------------------------------------------------------------------------


def test_bench_measures_each_precision_in_its_own_process(capsys, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    arguments = ["bench", "emoji", "--backends", "onnxruntime", "--steps", "2", "--guidance", "1", "--seconds", "0", "--threads", "1"]
    assert main([*arguments, "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["precision"], r["also"]) for r in rows] == [("fp16", "fp32")]  # the same files and arithmetic, measured once
    for r in rows:
        assert len(r["samples_seconds"]) == 2
        assert (r["steps"], r["guidance"], r["size"]) == (2, 1.0, [64, 64])
        assert r["stage_seconds"]["total"] >= r["stage_seconds"]["unet"] > 0
        assert r["arithmetic"]["unet"] == "float32"
        assert r["cpu"]
    out = capsys.readouterr().out
    assert "64x64 px, 2 steps, guidance 1" in out
    assert "fp16, fp32   onnxruntime" in out


def test_bench_measures_what_is_asked_for_apart():
    from sdlite.bench import jobs

    assert [j.precision for j in jobs("emoji", ["fp16", "fp32"], ["onnxruntime"])] == ["fp16", "fp32"]
    if importlib.util.find_spec("openvino"):  # where fp16 is another arithmetic
        assert [(j.precision, j.also) for j in jobs("emoji", None, ["openvino"])] == [("fp16", ""), ("fp32", "")]


def test_bench_rows_without_seconds_share_the_budget(monkeypatch):
    import subprocess

    from sdlite import bench

    asked = []

    def ran(command, **_):
        asked.append(json.loads(command[-1]))
        return subprocess.CompletedProcess(command, 0, '{"samples_seconds": [1.0]}\n', "")

    monkeypatch.setattr(bench, "BUDGET", 30.0)
    monkeypatch.setattr(bench.subprocess, "run", ran)
    bench.bench([bench.Job("m", "fp32", "onnxruntime")] * 3 + [bench.Job("m", "fp32", "onnxruntime", seconds=7.0)])
    assert [j["least"] for j in asked] == [1, 1, 1, 2]
    assert asked[0]["seconds"] < 4
    assert sum(j["seconds"] for j in asked[:3]) <= 30
    assert asked[3]["seconds"] == 7.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--precisions", "fp8"], "fp8"),
        (["--backends", "tflite"], "tflite"),
        (["--batch", "0"], "--batch=0; accepted: a whole number, 1 to 4096"),
        (
            ["--precisions", "int8-static"],
            "runs int8-static of emoji, which holds fp16, fp32: make one: sdlite quantize emoji --precision int8-static",
        ),
    ],
)
def test_bench_refuses_what_cannot_run(arguments, words, capsys):
    assert main(["bench", "emoji", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_bench_row_that_fails_says_why(capsys):
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    assert main(["bench", "emoji", "--precisions", "fp32", "--backends", "onnxruntime", "--height", "60"]) == 1
    out = capsys.readouterr()
    assert "failed: " in out.out
    assert "height=60" in out.out
    assert "every row failed" in out.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_termination_that_a_library_turns_into_its_own_error_is_one_still():
    """OpenVINO, while it is imported: ImportError("initialization failed")."""
    from sdlite.cli import _terminable

    def importing(terminated):
        with _terminable():
            try:
                if terminated:
                    signal.getsignal(signal.SIGTERM)(
                        signal.SIGTERM, None
                    )  # no real signal: with OpenVINO in the process one ends it, see tests/run.sh
            except KeyboardInterrupt:
                pass
            raise ImportError("initialization failed")

    with pytest.raises(KeyboardInterrupt):
        importing(True)
    with pytest.raises(ImportError):
        importing(False)


def test_terminated_half_way_nothing_is_left(tmp_path):
    code = (
        "import sys, time, sdlite.quant.gate as gate, sdlite.cli as cli\n"
        "gate.pictures = gate.calls = lambda *a: None\n"
        "gate.compare = lambda *a: time.sleep(600)\n"  # the folder is half written
        f"sys.exit(cli.main(['quantize', 'emoji', '--precision', 'int8-dynamic', '--out', {str(tmp_path / 'out')!r}]))\n"
    )
    run = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            if any(tmp_path.glob(".sdlite-work-out-*/model/unet/*.onnx")):
                break
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.1)
        run.terminate()
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 1
    assert "interrupted; nothing was written" in said
    assert not list(tmp_path.iterdir())
