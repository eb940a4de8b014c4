"""Engines that report home are kept from it: no name look-up, no file in the user's home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

IMAGE = """
import sdlite, sys, time
pipe = sdlite.Pipeline.from_pretrained("emoji", backend="{}", threads=1)
pipe("pizza", num_inference_steps=1, seed=0)
"""
ENGINES = {
    "onnxruntime": IMAGE.format("onnxruntime"),
    "openvino": IMAGE.format("openvino"),
    "exporters": (
        "import sdlite; sdlite.export; import openvino.tools.ovc, onnxruntime.quantization"
    ),
}


def run(code: str, home, *before: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`code` in a new process at a user's machine: a home of its own, no CI variables (OpenVINO is
    silent where it sees them).
    """
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("CI", "TF_BUILD", "JENKINS_URL", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    }
    env |= {
        "HOME": str(home),
        "LOCALAPPDATA": str(home),
        "SDLITE_CACHE": f"{home}-cache",
        **settings,
    }
    return subprocess.run(
        [*before, sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_asks_for_a_name_or_writes_into_the_home(engine, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    if engine != "onnxruntime":
        pytest.importorskip("openvino", reason="needs the openvino extra")
    home, seen = tmp_path / "home", tmp_path / "calls"
    home.mkdir()
    strace = shutil.which("strace")  # without it, what is written into the home is the evidence
    watch = (
        [strace, "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(seen)]
        if strace
        else []
    )
    run(ENGINES[engine], home, *watch)
    if strace:
        assert [
            line
            for line in seen.read_text().splitlines()
            if "AF_INET" in line or "sendmmsg" in line
        ] == []
    assert [p for p in home.rglob("*") if p.is_file()] == []


def test_a_user_can_have_the_engines_as_they_come(tmp_path):
    code = (
        "import sdlite, os, sys; print(os.environ.get('ORT_DISABLE_TELEMETRY'),"
        " 'openvino_telemetry' in sys.modules)"
    )
    assert run(code, tmp_path).stdout.split() == ["1", "True"]
    assert run(code, tmp_path, SDLITE_TELEMETRY="1").stdout.split() == ["None", "False"]
    assert run(code, tmp_path, ORT_DISABLE_TELEMETRY="0").stdout.split() == ["0", "True"]
