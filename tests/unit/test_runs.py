"""Runs of recipes: values are checked, a run goes on with its own parts only, a failed start leaves
nothing that blocks the next.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from sdlite.cli import main  # noqa: E402
from sdlite.distill import run as running  # noqa: E402
from sdlite.distill.recipe import Recipe  # noqa: E402
from sdlite.distill.run import run  # noqa: E402
from sdlite.distill.students import StudentSpec  # noqa: E402
from sdlite.distill.tasks import student as tasks  # noqa: E402
from sdlite.errors import (  # noqa: E402
    InputError,
    SdliteError,
    SdliteWarning,
    TrainingError,
    UnknownNameError,
)
from tests.folders import change  # noqa: E402
from tests.unit.test_recipe import parse  # noqa: E402

STAGE = "[[stage]]\nkind = 'output'\nimages = 4\n"
SMALL = (
    f"[train]\nbatch_size = 2\nsample_every = 0\nlog_every = 1\n{STAGE}feature_weight ="
    " 0\n[[stage]]\nkind = 'guidance'\nimages = 2\n"
)
SMALL += "[preview]\nprompts = ['a fox']\nnum_inference_steps = 1\n"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


# --- values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("images = 0", r"\[\[stage\]\] 0 \(output\): images=0; accepted: at least 1"),
        ("images = -5", "images=-5; accepted: at least 1"),
        ("images = 'many'", r"\[\[stage\]\] 0 \(output\): images='many'; accepted: a whole number"),
        ("images = 4\nlr = 'fast'", r"\[\[stage\]\] 0 \(output\): lr='fast'; accepted: a finite"),
        ("images = 4\nfeature_weight = nan", "feature_weight=nan; accepted: a finite number"),
        ("images = 4\nbatch_size = 2.0", "batch_size=2.0; accepted: a whole number"),
        ("images = 'abc'", r"images='abc'; accepted: a whole number"),
        (
            "images = 4\nbatch_size = 0",
            r"\[\[stage\]\] 0 \(output\): batch_size=0; accepted: at least 1",
        ),
        ("images = 4\nbatch_size = -8", "batch_size=-8"),
        ("images = 4\nlr = nan", "lr=nan; accepted: a finite number"),
        ("images = 4\nlr = inf", "lr=inf; accepted: a finite number"),
        ("images = 4\nlr = -1e-4", "lr=-0.0001; accepted: at least 1e-12"),
        ("images = 4\nlog_every = 0", "log_every=0; accepted: at least 1"),
        ("images = 4\nbetas = [0.9]", r"betas.1 is missing; give it"),
        ("images = 4\nbetas = 'ab'", "betas='ab'; accepted: a list"),
        ("images = 4\ncompile = 'yes'", r"compile='yes'; accepted: true or false"),
        ("images = 4\nfeature_weight = -1", "feature_weight=-1; accepted: at least 0"),
        ("images = 4\nmask = 1", "mask=1; accepted: true or false"),
        ("images = 4\ntemperature = 4.0", r"temperature=4.0; accepted: a list"),
        ("images = 4\ntemperature = [4.0, 0]", r"temperature.1=0; accepted: at least 0.001"),
        ("images = 4\ntap_weights = 'mid'", "tap_weights='mid'; accepted: a table"),
        (
            "images = 4\ntap_weights = { mid = 'x' }",
            r"tap_weights.mid='x'; accepted: a finite number",
        ),
        ("images = 4\ncaption_dropout = 2", "caption_dropout=2; accepted: at most 1"),
        (
            "images = 4\nfeature_weight = 0\ncache_targets = 0",
            "cache_targets=0; accepted: at least 1",
        ),
        ("images = 4\nsteps = [2, 1]", "steps is not known"),
    ],
)
def test_values_of_an_output_stage(text, words):
    with pytest.raises(InputError, match=words):
        parse(f"[[stage]]\nkind = 'output'\n{text}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stage = 3", r"no \[\[stage\]\]"),
        ("stage = [1]", r"no \[\[stage\]\]"),
        ("[[stage]]\nkind = ['output']\nimages = 1", "is not known; choose one of output"),
        ("train = 3\n" + STAGE, r"recipe: train=3; accepted: a table"),
        ("student = 'bk-tiny'\n" + STAGE, "student='bk-tiny'; accepted: a table"),
        ("name = 4\n" + STAGE, r"recipe: name=4; accepted: a string"),
        ("[train]\nlr = nan\n" + STAGE, r"\[train\]: lr=nan"),
        ("[student]\nwidth = -1\n" + STAGE, r"\[student\]: width=-1; accepted: at least 0.01"),
        ("[student]\nwidth = 2\n" + STAGE, r"\[student\]: width=2; accepted: at most 1"),
        (
            "[student]\none_layer = 1\n" + STAGE,
            r"\[student\]: one_layer=1; accepted: true or false",
        ),
        (
            "[student]\npreset = ['half']\n" + STAGE,
            r"\[student\]: preset=\['half'\] \(list\); accepted: a string",
        ),
        ("[sampler]\nname = 'evil'\n" + STAGE, r"\[sampler\]: .*'evil'"),
        (
            "[sampler]\nnum_inference_steps = 0\n" + STAGE,
            r"\[sampler\]: num_inference_steps=0; accepted: at least 1",
        ),
        (
            "[sampler]\nguidance_scale = nan\n" + STAGE,
            r"\[sampler\]: guidance_scale=nan; accepted: a finite number",
        ),
        ("[sampler]\nsteps = 4\n" + STAGE, r"\[sampler\]: steps is not known"),
        (
            "[preview]\nprompts = 'a fox'\n" + STAGE,
            r"\[preview\]: prompts='a fox'; accepted: a list",
        ),
        (
            "[preview]\nprompts = []\n" + STAGE,
            r"\[preview\]: prompts=\[\]; accepted: a list of strings",
        ),
        (
            "[[stage]]\nkind = 'progressive'\nimages = 1\nsteps = []",
            r"steps=\[\]; accepted: a list that halves each time",
        ),
        ("[[stage]]\nkind = 'progressive'\nimages = 1\nsteps = 4", r"steps=4; accepted: a list"),
        (
            "[[stage]]\nkind = 'progressive'\nimages = 1\nsteps = [2, 1.0]",
            r"steps.1=1.0; accepted: a whole number",
        ),
        (
            "[[stage]]\nkind = 'progressive'\nimages = 1\nloss_type = 'l2'",
            "loss_type='l2'; accepted: 'v' or 'x0'",
        ),
        (
            "[[stage]]\nkind = 'guidance'\nimages = 1\nguidance_scale = -1",
            "guidance_scale=-1; accepted: at least 0",
        ),
        ("[[stage]]\nkind = 'consistency'\nimages = 1\ngrid = 0", "grid=0; accepted: at least 1"),
        ("[[stage]]\nkind = 'adversarial'\nimages = 1\nramp = -1", "ramp=-1; accepted: at least 0"),
        (
            "[[stage]]\nkind = 'text-encoder'\nimages = 1\nlayers = 0",
            "layers=0; accepted: at least 1",
        ),
        (
            "[[stage]]\nkind = 'tiny-decoder'\nimages = 1\nwidth = 0",
            "width=0; accepted: at least 1",
        ),
    ],
)
def test_values_of_a_recipe(text, words):
    with pytest.raises((InputError, UnknownNameError), match=words):
        parse(text)


def test_a_specification_made_in_python_is_checked_too():
    with pytest.raises(InputError, match="width=0; accepted"):
        StudentSpec(width=0)


def test_files_that_are_no_recipe(tmp_path):
    path = tmp_path / "r.toml"
    for raw, words in (
        (b"name = 'caf\xe9'", "is not UTF-8 text .* at byte 11"),
        (("\ufeff" + STAGE).encode("utf-16-le"), "is not UTF-8 text"),
        (b"a = " + b"[" * 20_000, "is not TOML"),
        (b"a = 'x\x1b[2J'", "is not TOML"),
        (b"#" * (2 << 20), "has more than 1 MiB"),
        (b"", "the recipe has no"),
    ):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=words):
            Recipe.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + STAGE.encode())
    assert len(Recipe.load(path).stages) == 1
    os.mkfifo(tmp_path / "p.toml")
    for odd, words in (
        (tmp_path / "p.toml", "is a named pipe, not a file"),
        (tmp_path, "is a folder, not a file"),
        ("x" * 5000, "name too long"),
    ):
        with pytest.raises(InputError, match=words):
            Recipe.load(odd)


# --- going on


@pytest.fixture
def begun(plain, pictures, tmp_path):
    """A run that was stopped at its first step, and the arguments to go on with it."""
    arguments = {
        "teacher": plain,
        "data": pictures,
        "out": tmp_path / "run",
        "export": False,
        "progress": False,
        "resume": True,
    }
    assert not run(parse(SMALL), **arguments, max_minutes=0)["finished"]
    return arguments


def test_a_run_goes_on_with_its_own_recipe_only(begun):
    for old, new, words in (
        ("images = 4", "images = 6", "0-output.max_images was 4, now 6"),
        (
            "feature_weight = 0",
            "feature_weight = 0\nlr = 1e-3",
            "0-output.lr was 0.0003, now 0.001",
        ),
        (
            "'guidance'",
            "'guidance'\nguidance_scale = 2",
            "1-guidance.guidance_scale was null, now 2",
        ),
        (
            "[preview]",
            "[student]\nweights = 'random'\n[preview]",
            'student.weights was "teacher", now "random"',
        ),
    ):
        with pytest.raises(InputError, match=f"was begun with another recipe .{words}"):
            run(parse(SMALL.replace(old, new, 1)), **begun)
    free = (
        "micro_batch_size = 1\ngradient_checkpointing = true\nlog_every = 2\nkeep_checkpoints ="
        " 1\ncheckpoint_minutes = 1\n"
    )
    with pytest.raises(InputError, match="already holds a run; pass resume"):
        run(parse(SMALL), **begun | {"resume": False})
    assert run(parse(SMALL.replace("log_every = 1\n", free)), **begun)["finished"]


def test_a_run_goes_on_with_its_own_data_only(begun, tmp_path):
    pictures = begun["data"]
    assert not run(parse(SMALL), **begun, max_minutes=0)["finished"]
    (pictures / "0.txt").write_text("another caption")
    with pytest.raises(
        InputError,
        match=r"begun with another data .as many samples, with other names, captions or bytes",
    ):
        run(parse(SMALL), **begun)
    (pictures / "0.txt").unlink()
    with pytest.raises(InputError, match=r"begun with another data .4 samples then, 3 now"):
        run(parse(SMALL), **begun)
    (pictures / "0.txt").write_text("picture 0")
    moved = shutil.move(pictures, tmp_path / "moved")
    assert run(parse(SMALL), **begun | {"data": moved})["finished"]


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "scheduler"])
def test_a_run_goes_on_with_its_own_teacher_only(part, begun, plain, tmp_path):
    other = shutil.copytree(plain, tmp_path / "other")
    if part == "scheduler":
        path = other / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))
    else:
        change(
            other,
            part,
            lambda tensors: {
                k: v + 0.001 if i == 0 else v for i, (k, v) in enumerate(tensors.items())
            },
        )
    with pytest.raises(InputError, match=rf"begun with another teacher .other {part}\)"):
        run(parse(SMALL), **begun | {"teacher": other})


# The hash that a version of before run.json wrote for SMALL.
OLD_HASH = "be28af391c9aa6f9da0bf570b2fcd86fb059466074f9a9b8c36e33f21a2859b8"


def test_runs_of_an_earlier_version_go_on_and_say_what_is_not_known(begun):
    out = begun["out"]
    (out / "run.json").unlink()
    (out / "recipe.sha256").write_text(OLD_HASH)
    with pytest.raises(InputError, match="another recipe"):
        run(parse(SMALL.replace("images = 4", "images = 6", 1)), **begun)
    with pytest.warns(
        SdliteWarning,
        match="was begun by an earlier version: whether teacher and data are those .* is not known",
    ):
        assert run(parse(SMALL), **begun)["finished"]


def test_run_json_has_the_keys_that_runs_of_today_were_begun_with(begun):
    said = json.loads((begun["out"] / "run.json").read_text())
    assert list(said) == ["recipe", "teacher", "data", "size"]
    assert list(said["teacher"]) == ["unet", "text_encoder", "vae", "scheduler", "tokenizer"]
    own = {k: v for k, v in said["recipe"].items() if not k.startswith("0-output.")}
    assert {k for k in own if k.startswith("student.")} == {
        f"student.{k}" for k in ["one_layer", "drop_mid", "drop_inner", "width", "weights", "score"]
    }
    assert own["1-guidance.kind"] == "guidance"
    assert own["1-guidance.max_images"] == 2
    assert said["recipe"]["0-output.feature_weight"] == 0
    assert "0-output.task_weight" not in said["recipe"]  # what the recipe says, no default
    assert "0-output.log_every" not in said["recipe"]  # free to change


def test_a_stage_whose_note_is_damaged_is_finished_again(begun):
    assert run(parse(SMALL), **begun)["finished"]
    (begun["out"] / "0-output" / "done.json").write_text("{")
    done = run(parse(SMALL), **begun)
    assert done["finished"]
    assert done["stages"]["0-output"]["images"] == 4


# --- starts that fail


def test_a_failed_start_leaves_nothing_that_blocks_the_next(plain, pictures, tmp_path, monkeypatch):
    out = tmp_path / "run"
    good = {"teacher": plain, "data": pictures, "out": out, "export": False, "progress": False}
    empty = tmp_path / "empty"
    empty.mkdir()
    wrong = [
        (
            {"teacher": tmp_path / "nothing"},
            (
                r"teacher .*nothing is no folder; give that of a diffusers .*`hf download ORG/NAME"
                r" --local-dir DIR"
            ),
        ),
        ({"teacher": empty}, "model_index.json"),
        ({"data": tmp_path / "nothing"}, "does not exist"),
        ({"data": empty}, "holds no usable sample"),
    ]
    for given, words in wrong:
        with pytest.raises(SdliteError, match=words):
            run(parse(SMALL), **good | given)
        assert not out.exists()
    with pytest.raises(InputError, match=r"width=0\.3"):
        run(parse("[student]\nwidth = 0.3\n" + SMALL), **good)
    monkeypatch.setattr(tasks.StudentTask, "loss", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        run(parse(SMALL), **good)
    monkeypatch.undo()
    assert run(parse(SMALL.replace("images = 4", "images = 2")), **good)[
        "finished"
    ]  # another recipe


def test_places_that_cannot_be_written_are_seen_first(plain, pictures, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    given = {
        "teacher": tmp_path / "never opened",
        "data": pictures,
        "export": False,
        "progress": False,
    }
    with pytest.raises(InputError, match="is a file; choose a folder"):
        run(parse(SMALL), **given, out=tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        run(parse(SMALL), **given, out=tmp_path / "file" / "run")
    monkeypatch.setattr(
        running.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 2**20)
    )
    with pytest.raises(
        InputError,
        match=r"too little disk for this run: at least \d+ MiB are needed in .*, 1 MiB are free",
    ):
        run(parse(SMALL), **given | {"teacher": plain}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_was_left_out_is_said_everywhere(plain, pictures, tmp_path, capsys):
    (pictures / "3.png").write_bytes(b"no image")
    (pictures / "4.png").write_bytes(b"x")
    (pictures / "4.txt").write_bytes(b"caf\xe9")
    with pytest.warns(SdliteWarning, match="2 of 5 samples were left out, more than 1%"):
        run(
            parse(SMALL),
            teacher=plain,
            data=pictures,
            out=tmp_path / "run",
            export=False,
            progress=False,
            max_minutes=0,
        )
    said = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert list(said) == ["4.png", "3.png"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Left out\n\n2 samples" in report
    assert "- `3.png`: is no readable PNG" in report
    assert "2 samples left out, listed in" in capsys.readouterr().out
    (tmp_path / "r.toml").write_text(STAGE)
    assert (
        main(
            [
                "distill",
                "doctor",
                str(tmp_path / "r.toml"),
                "--teacher",
                str(plain),
                "--data",
                str(pictures),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "3 samples, 2 left out" in out
    assert "warn data: left out: 4.png: has no caption: 4.txt is not UTF-8 text" in out


@pytest.mark.parametrize(
    "moment", [pytest.param("latents", marks=pytest.mark.slow), "between stages"]
)
def test_sigterm_says_the_truth_and_the_run_goes_on(moment, plain, pictures, tmp_path):
    (tmp_path / "r.toml").write_text(SMALL)
    command = [
        "distill",
        str(tmp_path / "r.toml"),
        "--teacher",
        str(plain),
        "--data",
        str(pictures),
        "--out",
        str(tmp_path / "run"),
        "--no-export",
    ]
    where = "latent_cache._Pass._step" if moment == "latents" else "run._guided"
    code = (
        "import sys, time; from pathlib import Path; from sdlite.cli import main; from"
        f" sdlite.distill import latent_cache, run\nreal = {where}\ndef slow(*args):\n   "
        f" Path({str(tmp_path / 'here')!r}).touch(); out = real(*args); time.sleep(60); return"
        f" out\n{where} = slow\nsys.exit(main({command!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    deadline = time.monotonic() + 120
    while (
        not (tmp_path / "here").exists() and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"interrupted; what was made is kept in {tmp_path / 'run'}: go on with --resume" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdliteWarning)
        assert main([*command, "--resume"]) == 0
    assert not [
        p
        for p in Path(tmp_path / "run").iterdir()
        if p.name.startswith(".") or p.suffix == ".parts"
    ]
