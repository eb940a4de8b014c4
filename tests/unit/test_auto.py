"""`backend="auto"`: the engine that was measured to be faster, of those that are installed; and
hints that lead on.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="needs the cpu extra")

from sdlite import Pipeline, backends, cpu
from sdlite.artifact import Artifact
from sdlite.backends import auto, registry
from sdlite.cli import main
from sdlite.errors import MissingExtraError, PrecisionError
from tests import folders
from tests.conftest import EMOJI

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
EVERY = ("onnxruntime", "openvino", "torch")


@pytest.fixture
def machine(monkeypatch):
    """machine(installed, features): what is installed, and what the processor has."""

    def of(installed=EVERY, features=()):
        monkeypatch.setattr(registry, "installed", lambda name: name in installed)
        monkeypatch.setattr(cpu, "features", lambda: frozenset(features))

    return of


def student(
    folder, variants=("int8-static",), mb=600, sample_size=64, engines=("onnxruntime", "openvino")
):
    """The embedded student's folder, its manifest saying that it is large and int8; the files
    stay.
    """
    shutil.copytree(EMOJI, folder)
    folders.configure(folder / "unet/config.json", sample_size=sample_size)
    folders.relist(folder)
    manifest = json.loads((folder / "sdlite.json").read_text())
    manifest["variants"] = dict.fromkeys(variants, manifest["variants"]["fp32"])
    manifest["files"]["unet/model.onnx"]["bytes"] = int(mb * 1e6)
    manifest["quality"] = {"engines": {e: {} for e in engines}}
    (folder / "sdlite.json").write_text(json.dumps(manifest))
    return Artifact.open(folder)


def measured(rule, engine):
    """(seconds of one image, of the first with loading): medians over the rule's rows."""
    file, suite, model, side = rule.rows
    rows = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
    rows = [
        r
        for r in rows
        if r.get("suite", "") == suite
        and r["case"]["engine"].replace("sdlite-", "").replace("ort", "onnxruntime") == engine
    ]
    rows = [r for r in rows if rule.feature.removesuffix("_int8") in r["cpu"]]
    rows = [
        r
        for r in rows
        if (r["case"]["model"], r["case"]["size_px"], r["case"]["precision"])
        == (model, side, rule.precision)
    ]
    if file == "engines.jsonl":  # seconds of the processor
        seconds = [s["cpu"] for r in rows for s in r["samples_seconds"]]
        first = [
            r["load_seconds"]["cpu"] + r["first_seconds"]["cpu"]
            for r in rows
            if not (engine == "openvino" and r["round"])
        ]
        assert len(seconds) >= 5
    else:
        seconds = [r["median_seconds"] for r in rows]
        first = [r["load_seconds"] + r["first_call_seconds"] for r in rows]
    return statistics.median(seconds), statistics.median(first)


@pytest.mark.parametrize(
    "rule", auto.RULES, ids=lambda r: f"{r.precision}-{r.feature}-{r.least_mb}"
)
def test_rules_are_what_was_measured(rule):
    ort, this = measured(rule, "onnxruntime"), measured(rule, rule.engine)
    assert (ort[0], this[0]) == pytest.approx(rule.seconds, abs=0.006)
    assert (ort[1], this[1]) == pytest.approx(rule.first, abs=0.006)
    assert ort[0] > 1.1 * this[0]
    assert rule.rows[3] >= rule.least_px


@pytest.mark.parametrize(
    ("features", "more", "engine"),
    [
        (["amx_int8", "avx512_vnni"], {}, "openvino"),
        (["avx512_vnni"], {}, "openvino"),
        (["avx2"], {}, "onnxruntime"),
        ([], {}, "onnxruntime"),  # a system that does not tell
        (["amx_int8", "avx512_vnni"], {"mb": 10}, "onnxruntime"),
        (["amx_int8", "avx512_vnni"], {"sample_size": 8}, "onnxruntime"),
        (
            ["amx_int8"],
            {"engines": ["onnxruntime"]},
            "onnxruntime",
        ),  # its pictures there were never checked
        (["amx_int8"], {"variants": ["int8-dynamic"]}, "onnxruntime"),
        (["amx_int8"], {"variants": ["fp32"]}, "onnxruntime"),
        (["amx_int8"], {"variants": ["fp16"]}, "onnxruntime"),
    ],
)
def test_the_fastest_engine_by_precision_processor_and_size(
    features, more, engine, machine, tmp_path
):
    machine(features=features)
    artifact = student(tmp_path / "m", **more)
    name, reason = backends.choose(artifact, next(iter(artifact.manifest.variants)))
    assert name == engine
    assert reason.startswith("auto: ")
    if engine == "openvino":
        assert "times as fast as onnxruntime for large int8-static" in reason


def test_a_faster_engine_that_is_not_installed_is_named(machine, tmp_path):
    machine(["onnxruntime"], ["amx_int8"])
    name, reason = backends.choose(student(tmp_path / "m"), "int8-static")
    assert name == "onnxruntime"
    assert "openvino would be faster (2.8 times as fast" in reason
    assert "pip install 'sdlite[openvino]'" in reason


@pytest.mark.parametrize(
    ("installed", "precision", "name"),
    [
        (["openvino"], "fp16", "openvino"),
        (["openvino", "torch"], "fp32", "openvino"),
        (["torch"], "fp16", "torch"),
    ],
)
def test_what_is_installed_is_used(installed, precision, name, machine):
    machine(installed)
    assert backends.choose(Artifact.open(EMOJI), precision)[0] == name


def test_nothing_that_could_run_it(machine, tmp_path):
    machine([])
    with pytest.raises(
        MissingExtraError, match=r"pip install 'sdlite\[cpu\]' or 'sdlite\[openvino\]'"
    ):
        backends.choose(Artifact.open(EMOJI), "fp16")
    machine(["openvino"])
    with pytest.raises(
        MissingExtraError,
        match=r"no engine for int8-dynamic is installed: pip install 'sdlite\[cpu\]'\.$",
    ):
        backends.choose(student(tmp_path / "m", variants=["int8-dynamic"]), "int8-dynamic")


def test_auto_does_not_take_another_arithmetic_unasked(monkeypatch):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    monkeypatch.setattr(registry, "installed", lambda name: name == "openvino")
    pipe = Pipeline.from_pretrained(EMOJI, precision="fp16", threads=1)
    assert {n.arithmetic for n in pipe.report.networks} == {"float32"}
    assert "arithmetic='bfloat16' is faster" in pipe.report.reason
    pipe = Pipeline.from_pretrained(EMOJI, precision="fp16", threads=1, arithmetic="bfloat16")
    assert {n.arithmetic for n in pipe.report.networks} == {"bfloat16"}


def test_arithmetic_picks_the_engine_that_has_it():
    pytest.importorskip("openvino", reason="needs the openvino extra")
    pipe = Pipeline.from_pretrained(EMOJI, threads=1, arithmetic="bfloat16")
    assert pipe.report.backend == "openvino"
    assert "arithmetic='bfloat16'" in pipe.report.reason


def test_data_of_backends_is_read_without_their_engines():
    code = """if True:
        import sys
        from sdlite import backends
        for name in backends.names():
            b = backends.get_backend(name)
            assert b.name == name and b.precisions and b.devices and b.install
        assert not {"onnxruntime", "openvino", "torch", "tensorrt"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# --- hints


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
@pytest.mark.parametrize("installed", [EVERY, ("onnxruntime",)])
def test_int8_that_a_model_lacks_is_made_by_quantize(backend, installed, machine):
    machine(installed)
    with pytest.raises(
        PrecisionError,
        match=(
            r"emoji holds fp16, fp32, not int8-static; make it: sdlite quantize .* --precision"
            r" int8-static"
        ),
    ):
        Pipeline.from_pretrained("emoji", precision="int8-static", backend=backend)


def test_the_command_line_says_the_same(capsys):
    assert main(["generate", "a", "--precision", "int8-static", "--out", "x.png"]) == 1
    assert "sdlite quantize" in capsys.readouterr().err
    assert main(["bench", "emoji", "--precisions", "int8-static"]) == 1
    err = capsys.readouterr().err
    assert "sdlite quantize emoji --precision int8-static" in err
    assert "pip install" not in err


def test_an_int8_model_asked_for_a_float_precision_says_what_it_holds(tmp_path):
    artifact = student(tmp_path / "m")
    for folder in ("text_encoder", "unet", "vae"):
        for path in (artifact.folder / folder).glob("*.safetensors"):
            path.unlink()
    for precision in ("fp16", "fp32", "int8-dynamic"):
        with pytest.raises(
            PrecisionError,
            match=(
                rf"was quantized and holds int8-static, not {precision}; leave precision out, or"
                r" load the float model"
            ),
        ):
            Pipeline.from_pretrained(artifact.folder, precision=precision)


def test_fp16_of_a_float32_model_is_made_by_export(tmp_path, machine):
    machine(["onnxruntime"])
    with pytest.raises(
        PrecisionError,
        match=r"holds fp32, not fp16; make it: sdlite export .* --target onnx-fp16 --out NEW",
    ):
        backends.choose(student(tmp_path / "m", variants=["fp32"]), "fp16")
