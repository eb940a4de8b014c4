from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from sdlite import hub, io
from sdlite.cli import COMMANDS, main, parser
from sdlite.cli.terminal import terminable
from sdlite.errors import SdliteError

pytest.importorskip("onnxruntime", reason="needs the cpu extra")
FAST = ["--steps", "1", "--threads", "1", "--quiet"]


def test_generate_writes_a_png_with_its_generation_data(tmp_path, capsys):
    out = tmp_path / "a.png"
    assert main(["generate", "red apple", "--seed", "0", "--out", str(out), *FAST]) == 0
    image = Image.open(out)
    assert image.size == (64, 64)
    assert {k: image.text[k] for k in ("prompt", "seed", "model", "precision", "steps")} == {
        "prompt": "red apple",
        "seed": "0",
        "model": "emoji",
        "precision": "fp16",
        "steps": "1",
    }
    assert str(out) in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_several_images_are_numbered_files_or_one_grid(tmp_path):
    assert (
        main(
            [
                "generate",
                "pizza",
                "--num",
                "3",
                "--seed",
                "1",
                "--out",
                str(tmp_path / "p.png"),
                *FAST,
            ]
        )
        == 0
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p-0.png", "p-1.png", "p-2.png"]
    assert Image.open(tmp_path / "p-2.png").text["seed"] == "3"
    assert (
        main(
            [
                "generate",
                "pizza",
                "--num",
                "3",
                "--seed",
                "1",
                "--grid",
                "--out",
                str(tmp_path / "g.png"),
                *FAST,
            ]
        )
        == 0
    )
    assert Image.open(tmp_path / "g.png").size == (128, 128)


def test_tiles_of_a_size_are_taken(tmp_path):
    for name, more in (
        ("whole", []),
        ("own", ["--vae-tiling"]),
        ("tiled", ["--vae-tile-size", "48"]),
    ):
        assert (
            main(
                [
                    "generate",
                    "pizza",
                    "--seed",
                    "1",
                    "--out",
                    str(tmp_path / f"{name}.png"),
                    *more,
                    *FAST,
                ]
            )
            == 0
        )
    whole, own, tiled = (
        Image.open(tmp_path / f"{n}.png").tobytes() for n in ("whole", "own", "tiled")
    )
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
        (
            ["generate", "x", "--out", "{}/a.png", "--vae-tile-size", "0"],
            "size_px=0 is not a positive multiple",
        ),
        (["verify", "{}"], "model_index.json"),
        (
            ["generate", "x", "--out", "{}/a.png", "--threads", "0"],
            "--threads=0; accepted: a whole number, 1 to ",
        ),
        (
            ["generate", "x", "--out", "{}/a.png", "--threads", "-2"],
            "--threads=-2; accepted: a whole number, 1 to ",
        ),
        (
            ["generate", "x", "--out", "{}/a.png", "--threads", "100000"],
            "--threads=100000; accepted: a whole number, 1 to ",
        ),
        (
            ["generate", "x", "--out", "{}/a.png", "--steps", "0"],
            "--steps=0; accepted: a whole number, at least 1",
        ),
        (["generate", "x", "--out", "{}/a.png", "--steps", "2000"], "1 to 1000"),
        (
            ["generate", "x", "--out", "{}/a.png", "--num", "0"],
            "--num=0; accepted: a whole number, 1 to 4096",
        ),
        (
            ["generate", "x", "--out", "{}/a.png", "--seed", "-1"],
            "--seed=-1; accepted: a whole number, 0 to ",
        ),
        (
            ["generate", "x", "--out", "{}/a.png", "--seed", str(2**64)],
            "accepted: a whole number, 0 to ",
        ),
        (
            ["generate", "x", "--out", "{}/a.png", "--guidance", "nan"],
            "--guidance=nan; accepted: a finite number",
        ),
        (["generate", "x", "--out", "{}/a.png", "--guidance", "-1"], "--guidance=-1.0; accepted"),
        (["generate", "x", "--out", "{}/a.png", "--width", "1000000"], "--width=1000000; accepted"),
        (["generate", "x", "--out", "{}/a.png", "--arithmetic", "float8"], "float8"),
        (
            ["quantize", "emoji", "--precision", "int8-static", "--out", "{}/q", "--samples", "0"],
            "--samples=0; accepted",
        ),
        (
            ["quantize", "emoji", "--precision", "int8-static", "--out", "{}/q", "--threads", "0"],
            "--threads=0; accepted",
        ),
        (
            [
                "quantize",
                "emoji",
                "--precision",
                "int8-static",
                "--out",
                "{}/q",
                "--max-float",
                "2",
            ],
            "--max-float=2.0; accepted",
        ),
        (
            [
                "quantize",
                "emoji",
                "--precision",
                "int8-static",
                "--out",
                "{}/q",
                "--psnr-mean",
                "nan",
            ],
            "--psnr-mean=nan; accepted",
        ),
        (
            [
                "quantize",
                "emoji",
                "--precision",
                "int8-static",
                "--out",
                "{}/q",
                "--gate-prompts",
                "0",
            ],
            "--gate-prompts=0; accepted",
        ),
        (
            ["export", "emoji", "--target", "onnx", "--out", "{}/e", "--steps", "0"],
            "--steps=0; accepted",
        ),
        (
            ["export", "emoji", "--target", "onnx", "--out", "{}/e", "--threads", "100000"],
            "--threads=100000; accepted",
        ),
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


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate"],
        ["generate", "x"],
        ["nope"],
        ["generate", "x", "--seed", "y", "--out", "a.png"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2


def test_help_shows_every_option_with_its_text_and_no_empty_default(capsys):
    for command in (["--help"], *([*words, "--help"] for words, _ in commands(parser()))):
        with pytest.raises(SystemExit):
            main(command)
        text = capsys.readouterr().out
        assert "default: None" not in text
        assert "default: False" not in text
        assert text.count("default: the model's own") == 0  # a heading says it
        assert " ".join(["examples:\n  sdlite", *command[:-1]]) in text
    every = [
        (words, action)
        for words, p in commands(parser())
        for action in p._actions
        if not isinstance(action.choices, dict)
    ]
    assert len(every) > 100
    assert [(words, a.dest) for words, a in every if not a.help] == []


def commands(p, words=()):
    """(words, parser) of every command, subcommands included."""
    for action in p._actions:
        if isinstance(action.choices, dict):
            for name, inner in action.choices.items():
                yield [*words, name], inner
                yield from commands(inner, [*words, name])


def test_help_lists_what_the_registries_hold(capsys):
    from sdlite import backends
    from sdlite.distill.advise import DEVICES, WISHES
    from sdlite.manifest import PRECISIONS
    from sdlite.quant.insert import SCHEMES
    from sdlite.quant.observe import OBSERVERS
    from sdlite.sampling import SAMPLERS

    listed = {
        "generate": (SAMPLERS, PRECISIONS, backends.names()),
        "bench": (SAMPLERS, PRECISIONS, backends.names()),
        "quantize": (SAMPLERS, SCHEMES, OBSERVERS),
        "distill advise": (DEVICES, WISHES),
    }
    for command, registries in listed.items():
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        text = re.sub(r"(?<=-)\s+", "", capsys.readouterr().out)
        assert [n for names in registries for n in names if n not in text] == []


def test_convert_hands_on_what_it_is_given(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="needs the export extra")
    from sdlite import converter

    asked = []

    def convert(folder, out, **given):
        asked.append((folder, given))
        out.mkdir()
        (out / "model.onnx").write_bytes(bytes(1_500_000))
        return out

    monkeypatch.setattr(converter, "convert", convert)
    (tmp_path / "source").mkdir()
    (tmp_path / "prompts.txt").write_text("a fox\n\na house\n")
    words = ["convert", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--steps", "4"]
    words += ["--guidance", "0", "--sampler", "lcm", "--name", "mine"]
    assert main([*words, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    ((folder, given),) = asked
    assert folder == tmp_path / "source"
    assert given["name"] == "mine"
    assert given["calibration_prompts"] == ["a fox", "a house"]
    assert given["sampler"] == {"name": "lcm", "num_inference_steps": 4, "guidance_scale": 0.0}
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'} (1.50 MB)\n"
    assert main(words) == 1  # OUT is there: said before the model is opened
    assert len(asked) == 1


def test_every_command_is_in_a_file_of_its_name():
    for command in COMMANDS:
        module = importlib.import_module(f"sdlite.cli.{command.name}")
        assert getattr(module, command.name.upper()) is command


def test_distill_without_a_subcommand_is_run(tmp_path, capsys):
    recipe = str(tmp_path / "none.toml")
    said = []
    for words in (["distill", recipe], ["distill", "run", recipe]):
        assert main([*words, "--teacher", "t", "--data", "d", "--dry-run"]) == 1
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert recipe in said[0]


def test_the_help_of_all_commands_loads_no_backends_and_samplers():
    code = (
        "import sys, sdlite.cli\ntry: sdlite.cli.main(['--help'])\n"
        "except SystemExit: print({'sdlite.sampling', 'sdlite.backends'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_what_is_probably_not_wanted_is_said(tmp_path, capsys):
    arguments = [
        "generate",
        "x",
        "--guidance",
        "7.5",
        "--height",
        "192",
        "--width",
        "64",
        "--out",
        str(tmp_path / "a.png"),
        *FAST,
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("sdlite: warning: emoji was trained ") for line in said] == [True, True]


def test_jpeg_keeps_how_it_was_made(tmp_path):
    assert (
        main(["generate", "red apple", "--seed", "7", "--out", str(tmp_path / "a.jpg"), *FAST]) == 0
    )
    kept = json.loads(Image.open(tmp_path / "a.jpg").getexif().get_ifd(0x8769)[0x9286][8:])
    assert (kept["prompt"], kept["seed"]) == ("red apple", "7")


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("text_encoder/model.safetensors", "text encoder"),
        ("vae_decoder/model.onnx.data", "VAE decoder"),
    ],
)
def test_weights_that_hold_nan_are_an_error_not_a_black_picture(
    copy, tmp_path, capsys, file, stage
):
    """As a merged VAE in float16 does."""
    from sdlite.artifact import Artifact
    from sdlite.manifest import write_manifest

    with open(copy / file, "r+b") as weights:
        weights.seek(-4096, 2)
        weights.write(b"\x00\x7e" * 2048)  # float16's NaN
    write_manifest(copy, Artifact.open(copy).manifest)
    assert (
        main(["generate", "x", "--model", str(copy), "--out", str(tmp_path / "black.png"), *FAST])
        == 1
    )
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


# --- bench


def test_bench_measures_each_precision_in_its_own_process(capsys, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    arguments = [
        "bench",
        "emoji",
        "--backends",
        "onnxruntime",
        "--steps",
        "2",
        "--guidance",
        "1",
        "--seconds",
        "0",
        "--threads",
        "1",
    ]
    assert main([*arguments, "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["precision"], r["also"]) for r in rows] == [
        ("fp16", "fp32")
    ]  # the same files and arithmetic, measured once
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

    assert [j.precision for j in jobs("emoji", ["fp16", "fp32"], ["onnxruntime"])] == [
        "fp16",
        "fp32",
    ]
    if importlib.util.find_spec("openvino"):  # where fp16 is another arithmetic
        assert [(j.precision, j.also) for j in jobs("emoji", None, ["openvino"])] == [
            ("fp16", ""),
            ("fp32", ""),
        ]


def test_bench_rows_without_seconds_share_the_budget(monkeypatch):
    import subprocess

    from sdlite import bench

    asked = []

    def ran(command, **_):
        asked.append(json.loads(command[-1]))
        return subprocess.CompletedProcess(command, 0, '{"samples_seconds": [1.0]}\n', "")

    monkeypatch.setattr(bench, "BUDGET", 30.0)
    monkeypatch.setattr(bench.subprocess, "run", ran)
    bench.bench(
        [bench.Job("m", "fp32", "onnxruntime")] * 3
        + [bench.Job("m", "fp32", "onnxruntime", seconds=7.0)]
    )
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
            (
                "runs int8-static of emoji, which holds fp16, fp32: make one: sdlite quantize emoji"
                " --precision int8-static"
            ),
        ),
    ],
)
def test_bench_refuses_what_cannot_run(arguments, words, capsys):
    assert main(["bench", "emoji", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_bench_row_that_fails_says_why(capsys):
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    assert (
        main(
            [
                "bench",
                "emoji",
                "--precisions",
                "fp32",
                "--backends",
                "onnxruntime",
                "--height",
                "60",
            ]
        )
        == 1
    )
    out = capsys.readouterr()
    assert "failed: " in out.out
    assert "height=60" in out.out
    assert "every row failed" in out.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_termination_that_a_library_turns_into_its_own_error_is_one_still():
    """OpenVINO, while it is imported: ImportError("initialization failed")."""

    def importing(terminated):
        with terminable():
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
        "gate.images = gate.calls = lambda *a: None\n"
        "gate.compare = lambda *a: time.sleep(600)\n"  # the folder is half written
        "sys.exit(cli.main(['quantize', 'emoji', '--precision', 'int8-dynamic', '--out',"
        f" {str(tmp_path / 'out')!r}]))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.PIPE, text=True
    )
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


# --- what comes from files and users, and what the system refuses


def sdlite(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "sdlite", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)  # type: ignore[call-overload]


HOSTILE = "\x1b[2J\x1b]0;x\x07EVIL\n\rsdlite: ok\u202e\x9b1m"


@pytest.fixture
def hostile(copy):
    """A whole model that clears a screen, writes a line of its own and turns the text around."""
    from sdlite.artifact import Artifact
    from sdlite.manifest import write_manifest

    manifest = Artifact.open(copy).manifest
    manifest.student = {**manifest.student, HOSTILE: HOSTILE}
    write_manifest(copy, manifest)
    return copy


def moves_a_cursor(text: str) -> bool:
    return (
        bool(set(text) & set("\x1b\x07\r\u202e\x9b"))
        or re.search(r"EVIL$|^sdlite: ok", text, re.MULTILINE) is not None
    )


def test_texts_out_of_files_move_no_cursor(hostile, capsys):
    assert main(["info", str(hostile)]) == 0
    said = "".join(capsys.readouterr())
    assert "EVIL" in said
    assert not moves_a_cursor(said)


@pytest.mark.parametrize("command", ["info", "verify", "generate", "quantize"])
def test_names_out_of_files_move_no_cursor(command, copy, tmp_path, capsys):
    said = json.loads((copy / "sdlite.json").read_text())
    (copy / "sdlite.json").write_text(json.dumps({**said, "name": HOSTILE}))
    more = {
        "generate": ["--out", str(tmp_path / "a.png"), "--steps", "1"],
        "quantize": ["--precision", "int8-dynamic", "--out", str(tmp_path / "q"), *GATE],
    }
    given = ["x", "--model", str(copy)] if command == "generate" else [str(copy)]
    main([command, *given, *more.get(command, [])])
    said = capsys.readouterr()
    assert "EVIL" in "".join(said)
    assert not moves_a_cursor(said.out + said.err.replace("\r", "")), (
        "progress bars begin with a return"
    )


GATE = [
    "--gate-prompts",
    "1",
    "--steps",
    "1",
    "--engine",
    "onnxruntime",
    "--psnr-mean",
    "9",
    "--psnr-worst",
    "9",
    "--ssim-mean",
    "0",
]


def test_names_in_json_are_json(hostile, capsys):
    assert main(["info", str(hostile), "--json"]) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text)["student"][HOSTILE] == HOSTILE


@pytest.mark.skipif(sys.platform == "win32", reason="bytes of a POSIX shell")
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", b"\xff"],
        ["generate", "x", "--model", b"\xff"],
        ["quantize", b"\xff\x1b", "--precision", "int8-static"],
    ],
)
def test_bytes_that_are_no_text_are_one_line(arguments, tmp_path):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "sdlite",
        *arguments,
        "--out",
        str(tmp_path / "a.png"),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(b"sdlite: ")
    assert done.stderr.count(b"\n") == 1
    assert b"\x1b" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_wrong_usage_moves_no_cursor(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "\x1b[2J", "b", "c"])
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("unknown"), "unknown"),
        (OSError(), "OSError"),
        (OSError(errno.EIO, "Input/output error", b"a\n\xff"), r"a\n\udcff: Input/output error"),
        (
            OSError(errno.EACCES, "Permission denied", f"x/{io.WORK}abc/model", None, "x/out"),
            "x/out: Permission denied",
        ),
        (
            MemoryError("Unable to allocate 9.00 GiB"),
            "the memory ran out (Unable to allocate 9.00 GiB). Close other programs",
        ),
        (RecursionError("maximum recursion depth exceeded"), "a file is nested too deep"),
        (SdliteError("two\nlines"), r"two\nlines"),
    ],
)
def test_every_error_of_the_system_is_one_line(error, words, monkeypatch, capsys):
    def fail() -> None:
        raise error

    monkeypatch.setattr(hub, "embedded_models", fail)
    assert main(["models"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"sdlite: {words}")
    assert said.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a POSIX shell")
def test_a_reader_that_goes_away_is_no_error():
    for command in (
        "info emoji | true",
        "info emoji | head -1",
        "info emoji --json | true",
        "models 2>&1 | true",
        "--help | true",
    ):
        done = subprocess.run(
            [
                "bash",
                "-c",
                f"{sys.executable} -W ignore -m sdlite {command}; echo ${{PIPESTATUS[0]}}",
            ],
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        assert done.stdout.splitlines()[-1] in ("0", "141"), command


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors of a POSIX shell")
def test_closed_and_full_outputs_and_narrow_encodings(tmp_path):
    run = f"{sys.executable} -W ignore -m sdlite"
    done = subprocess.run(
        ["bash", "-c", f"{run} generate x --steps 1 --out {tmp_path}/a.png <&- >&- 2>&-"],
        timeout=60,
    )
    assert done.returncode == 0
    Image.open(tmp_path / "a.png").load()
    if os.path.exists("/dev/full"):
        done = subprocess.run(
            ["bash", "-c", f"{run} info > /dev/full"], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (
            1,
            "sdlite: what is printed: No space left on device\n",
        )
    done = sdlite("info", f"{tmp_path}/häuser", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1
    assert "h\\xe4user" in done.stderr


def test_places_are_looked_at_before_the_work(tmp_path, capsys, monkeypatch):
    """No model is loaded for what cannot be written."""
    monkeypatch.setattr("sdlite.pipeline.Pipeline.from_pretrained", None)
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").write_text("x")
    commands = {
        f"generate x --out {tmp_path}/a.png": "is a folder; name a file in it",
        f"generate x --out {tmp_path}/none/a.png": "does not exist; make it first",
        f"quantize emoji --precision int8-static --out {tmp_path}/file": "not an empty folder",
        f"quantize emoji --precision int8-static --out {tmp_path}/file/q": "cannot be written",
        f"export emoji --target onnx --out {tmp_path}": "not an empty folder",
        f"bench --out {tmp_path}": "is a folder; name a file in it",
        f"distill advise --out {tmp_path}/none/r.toml": "does not exist; make it first",
    }
    for command, words in commands.items():
        assert main(command.split()) == 1, command
        said = capsys.readouterr().err
        assert words in said, command
        assert said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "file"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_every_signal_ends_a_command_in_one_true_line(name, tmp_path):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "sdlite",
        "generate",
        "x",
        "--num",
        "64",
        "--steps",
        "1000",
        "--out",
        str(tmp_path / "a.png"),
    ]

    def default() -> None:  # a background job ignores SIGINT
        signal.signal(getattr(signal, name), signal.SIG_DFL)

    run = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=default
    )
    try:
        while "/1000" not in (said := run.stderr.readline(200)):  # the progress bar: it is at work
            assert run.poll() is None, said
        run.send_signal(getattr(signal, name))
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 1
    assert said.splitlines()[-1] == "sdlite: interrupted; nothing was written"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP is under nohup."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGHUP, signal.SIGTERM)}
    try:
        with terminable():
            for s in before:
                os.kill(os.getpid(), s)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_what_was_written_before_an_interrupt_is_said(tmp_path, monkeypatch, capsys):
    from sdlite import images

    saved = images.save

    def save(image: object, path: object) -> None:
        if str(path).endswith("2.png"):
            raise KeyboardInterrupt
        saved(image, path)

    monkeypatch.setattr(images, "save", save)
    assert (
        main(
            [
                "generate",
                "x",
                "--num",
                "4",
                "--steps",
                "1",
                "--quiet",
                "--out",
                str(tmp_path / "a.png"),
            ]
        )
        == 1
    )
    assert (
        capsys.readouterr().err
        == f"sdlite: interrupted; {tmp_path}/a-0.png, {tmp_path}/a-1.png had been written\n"
    )
