"""Shared fixtures: the embedded student, copies of it to damage, and a small diffusers folder with
random weights.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # tests never reach a network; the hub test overrides it for its local server
os.environ.setdefault(
    "SDLITE_OPENVINO_CACHE", "0"
)  # tests leave nothing in the user's cache; those of the cache switch it on

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job ignores Ctrl-C; tests of it raise it
    signal.signal(signal.SIGINT, signal.default_int_handler)

EMOJI = Path(__file__).parent.parent / "sdlite" / "models" / "emoji"


@pytest.fixture(scope="session")
def emoji():
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    import sdlite

    return sdlite.Pipeline.from_pretrained("emoji", threads=1)


@pytest.fixture
def copy(tmp_path):
    """A copy of the embedded artefact that a test may damage."""
    out = tmp_path / "model"
    shutil.copytree(EMOJI, out)
    return out


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The embedded student as a plain diffusers folder: no manifest, no ONNX."""
    out = tmp_path_factory.mktemp("plain") / "student"
    shutil.copytree(
        EMOJI,
        out,
        ignore=shutil.ignore_patterns(
            "*.onnx", "*.data", "sdlite.json", "vae_decoder", "vae_encoder"
        ),
    )
    return out
