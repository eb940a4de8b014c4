"""The on-device samples compile, name what exports hold, and their shared header does what Python's
sampler does.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sdlite.sampling import Noise, Schedule, get_sampler
from sdlite.spec import SPECS
from tests.conftest import EMOJI

ROOT = Path(__file__).parents[2]
SAMPLES, HEADERS = ROOT / "export" / "samples", ROOT / "tests" / "assets" / "headers"
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")


def _inputs():
    spec = importlib.util.spec_from_file_location("samples_inputs", SAMPLES / "inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.inputs


@pytest.fixture
def exported(tmp_path):
    """What an export leaves beside its networks, as inputs.py reads it."""
    folder = tmp_path / "export"
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(EMOJI / part, folder / part)
    for part in ("text_encoder", "unet", "vae"):
        (folder / part).mkdir()
        shutil.copy(EMOJI / part / "config.json", folder / part / "config.json")
    (folder / "student.json").write_text(
        '{"sampler": {"name": "ddim", "num_inference_steps": 3, "guidance_scale": 2.0}}'
    )
    return folder


@needs_compiler
@pytest.mark.parametrize("sample", ["ncnn.cpp", "tensorrt.cpp"])
def test_samples_are_valid_cpp(sample):
    done = subprocess.run(
        [
            COMPILER,
            "-std=c++17",
            "-Wall",
            "-Werror",
            "-fsyntax-only",
            f"-I{HEADERS}",
            str(SAMPLES / sample),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_a_misspelt_call_does_not_compile(tmp_path):
    shutil.copy(SAMPLES / "picture.h", tmp_path)
    text = (SAMPLES / "ncnn.cpp").read_text()
    (tmp_path / "ncnn.cpp").write_text(text.replace("load_param", "load_params"))
    done = subprocess.run(
        [COMPILER, "-std=c++17", "-fsyntax-only", f"-I{HEADERS}", str(tmp_path / "ncnn.cpp")],
        capture_output=True,
        text=True,
    )
    assert "load_params" in done.stderr


def test_samples_name_what_the_exports_hold():
    """tensorrt.cpp names each tensor of the spec; ncnn.cpp passes as many inputs to each network,
    in the spec's order.
    """
    named = set(re.findall(r'"([a-z_]+)"', (SAMPLES / "tensorrt.cpp").read_text()))
    assert {t.name for s in SPECS.values() for t in (*s.inputs, s.output)} <= named
    ncnn = (SAMPLES / "ncnn.cpp").read_text()
    calls = {
        "text_encoder": r"text\(\{(.*)\}\);",
        "unet": r"v = from_mat\(unet\(\{(.*?)\}\)\)",
        "vae_decoder": r"decoder\(\{(.*)\}\);",
    }
    counts = {
        p: len(re.sub(r"\([^()]*(\([^()]*\)[^()]*)*\)", "", re.search(c, ncnn)[1]).split(","))
        for p, c in calls.items()
    }
    assert counts == {p: len(s.inputs) for p, s in SPECS.items()}
    assert [t.name for t in SPECS["unet"].inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert re.search(calls["unet"], ncnn)[1] == "sample, t, embeds"
    for text, file in (
        (ncnn, "model.param"),
        (ncnn, "model.bin"),
        ((SAMPLES / "tensorrt.cpp").read_text(), "model.engine"),
    ):
        assert f"/{file}" in text
        for part in SPECS:
            assert f'"/{part}"' in text
    android = [
        (SAMPLES / "android" / f).read_text() for f in ("jni.cpp", "Sdlite.kt", "CMakeLists.txt")
    ]
    assert "Java_sdlite_Sdlite_picture" in android[0]
    assert "package sdlite" in android[1]
    assert "external fun picture" in android[1]
    assert "jni.cpp" in android[2]


_DRIVER = """
#include "picture.h"
// a "network" that anyone can compute: v = x / 2 + t / 1000, guided by u = x / 4
int main(int, char** argv) {
    const Inputs in = load_inputs(argv[1]);
    std::vector<float> x = in.latents;
    for (int i = 0; i < in.steps; i++) {
        std::vector<float> v = x, u = x;
        for (size_t k = 0; k < x.size(); k++)
            v[k] = x[k] / 2 + in.timesteps[i] / 1000, u[k] = x[k] / 4;
        guide(in, u, v);
        ddim(in, i, v, x);
    }
    for (float value : x) printf("%.9g\\n", value);
    printf("%d %d\\n", in.ids[0], in.no_ids[1]);
    save(argv[2], std::vector<float>{-1, 1, 0, 2, -3, 1}, 2, 1);
}
"""


@needs_compiler
def test_shared_header_samples_as_python_does(exported, tmp_path):
    (tmp_path / "inputs.bin").write_bytes(_inputs()(exported, "red apple", seed=5))
    (tmp_path / "driver.cpp").write_text(_DRIVER)
    subprocess.run(
        [COMPILER, "-std=c++17", f"-I{SAMPLES}", "driver.cpp", "-o", "driver"],
        cwd=tmp_path,
        check=True,
    )
    out = subprocess.run(
        ["./driver", "inputs.bin", "p.ppm"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    import json

    config = json.loads((EMOJI / "scheduler" / "scheduler_config.json").read_text())
    sampler = get_sampler("ddim", Schedule.from_config(config), 3)
    x = Noise(5).normal((8, 8, 8))[None]
    for i, t in enumerate(sampler.timesteps):
        u = x / 4
        x = sampler.step(i, u + np.float32(2) * (x / 2 + np.float32(t / 1000) - u), x, [])
    np.testing.assert_allclose(np.array(out[:-1], np.float32), x.reshape(-1), atol=1e-4)
    vocab = json.loads((EMOJI / "tokenizer" / "vocab.json").read_text())
    assert out[-1].split() == [str(vocab["<|startoftext|>"]), str(vocab["<|endoftext|>"])]
    assert (tmp_path / "p.ppm").read_bytes() == b"P6 2 1 255\n" + bytes([0, 128, 0, 255, 255, 255])


@pytest.mark.parametrize("name", ["lcm", "euler"])
def test_inputs_refuse_another_sampler_than_the_headers(exported, name):
    (exported / "student.json").write_text(
        f'{{"sampler": {{"name": "{name}", "num_inference_steps": 3, "guidance_scale": 1.0}}}}'
    )
    with pytest.raises(ValueError, match=f"sampler is '{name}', and picture.h has ddim alone"):
        _inputs()(exported, "red apple")


def test_samples_take_guidance_up_to_one_for_none(exported):
    """As everywhere: 0 to 1 is one network call a step; out of range is said where inputs.bin is
    made.
    """
    for sample in ("ncnn.cpp", "tensorrt.cpp"):
        assert "if (in.guidance > 1.f) guide(" in (SAMPLES / sample).read_text()
    (exported / "student.json").write_text(
        '{"sampler": {"name": "ddim", "num_inference_steps": 3, "guidance_scale": -1.0}}'
    )
    with pytest.raises(ValueError, match="0 to 1 is no guidance"):
        _inputs()(exported, "red apple")


def test_inputs_refuse_a_student_that_the_header_cannot_sample(exported):
    path = exported / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("v_prediction", "epsilon"))
    with pytest.raises(ValueError, match="'prediction_type': 'epsilon'"):
        _inputs()(exported, "red apple")
