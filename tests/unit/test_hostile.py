"""Hostile files: a sample of what `python -m benchmarks.hostile` tries, and what it has found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdlite import cli
from sdlite.errors import AttributeNameError, InputError, MissingExtraError
from tests import strangers

pytest.importorskip("onnxruntime", reason="needs the cpu extra")
pytest.importorskip("openvino", reason="needs the openvino extra")
pytest.importorskip("diffusers", reason="needs the torch extra")
pytest.importorskip("onnx", reason="needs the quantize extra")


ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> None:
    """In a process of its own: it forks, which no process with sessions should."""
    command = [sys.executable, "-m", "benchmarks.hostile", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize("kind", [InputError, MissingExtraError, AttributeNameError])
def test_an_error_is_one_line_that_a_terminal_can_show(kind):
    """What a file is called, or says, is in errors as it is given."""
    assert str(kind("a\n\x1b[2J\u202eb, \xe9")) == "a\\n\\x1b[2J\\u202eb, \xe9"


def test_what_info_prints_is_json_whatever_a_scheduler_holds(copy, capsys):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"v_prediction"', "-Infinity"))
    strangers.rehashed(copy)
    assert cli.main(["info", str(copy), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert shown["sampler"]["prediction_type"] is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "2"])
def test_bad_models_are_refused_or_run_rightly(seed):
    _run("corpus", "--seeds", seed, "--every", "25")


@pytest.mark.slow
def test_changed_files_are_refused_or_read():
    _run("fuzz", "--count", "150", "--seed", "3")
