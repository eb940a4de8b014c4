"""OpenVINO: models whose files are links, plain folders, and compiled networks that are kept on
disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("openvino", reason="needs the openvino extra")

from sdlite import Pipeline, io
from sdlite.backends import compiled, words_of
from sdlite.backends.openvino_network import CompiledNetwork
from sdlite.errors import ArtifactError, InputError
from tests.conftest import EMOJI

CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 3}


def pixels(model, **arguments):
    pipe = Pipeline.from_pretrained(
        model, backend="openvino", precision="fp32", threads=1, **arguments
    )
    return np.asarray(pipe("a fox", **CALL).images[0])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that keeps compiled networks."""
    monkeypatch.setenv("SDLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.SWITCH)
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path):
    """The embedded student as huggingface_hub keeps it: links into blobs/."""
    repo = tmp_path / "hub" / "models--org--student"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "blobs").mkdir(parents=True)
    for path in (p for p in EMOJI.rglob("*") if p.is_file()):
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        if not blob.exists():
            shutil.copy(path, blob)
        link = snapshot / path.relative_to(EMOJI)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("links", [True, False])
def test_a_model_of_the_hubs_cache_opens(hub, links, cache, monkeypatch, caplog):
    """Weights behind links that leave the graph's folder are refused by OpenVINO itself."""
    if not links:  # another disk, or files of another owner
        monkeypatch.setattr(
            os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link"))
        )
    monkeypatch.setenv(compiled.SWITCH, "0")
    before = {p for p in (hub.parents[1], cache) if p.exists() for p in p.rglob("*")}
    np.testing.assert_array_equal(pixels(hub), pixels(EMOJI))
    after = {p for p in (hub.parents[1], cache) if p.exists() for p in p.rglob("*")}
    assert after == before
    assert ("reads a copy" in caplog.text) is not links


def test_an_engines_words_are_those_that_say_something(hub):
    said = RuntimeError(
        "Exception from src/inference/src/cpp/core.cpp:84:\nCheck 'false' failed at"
        " src/frontends/common/src/frontend.cpp:47:\nLoading input model\nPath 'w' resolves to"
        " '/b/w' which is outside the base directory '/a'\n\n"
    )
    assert (
        words_of(said)
        == "Loading input model Path 'w' resolves to '/b/w' which is outside the base directory"
        " '/a'"
    )
    assert words_of(RuntimeError("Exception from a.cpp:1:\n")) == "Exception from a.cpp:1:"
    assert words_of(RuntimeError("")) == "RuntimeError"
    with pytest.raises(
        ArtifactError,
        match=r"cannot be loaded by openvino \(.*externally stored data.*\); run `sdlite verify`",
    ):
        CompiledNetwork(str((hub / "unet/model.onnx").resolve()), "unet", "cpu", 1, "fp32")


def network(**arguments):
    """The embedded text encoder, compiled by one call: (whether it came from the cache, its
    answer).
    """
    folder = EMOJI / "text_encoder"
    made = CompiledNetwork(
        str(folder / "model.onnx"),
        "text_encoder",
        "cpu",
        1,
        "fp32",
        weights=[folder / "model.safetensors"],
        **{"hashes": ["a", "b"], "arithmetic": None, **arguments},
    )
    answer = made(input_ids=np.arange(28)[None])["last_hidden_state"]
    return made.model.get_property("LOADED_FROM_CACHE"), answer


def test_a_compiled_network_is_found_again_and_a_damaged_one_made_again(cache):
    cold, first = network()
    warm, again = network()
    assert (cold, warm) == (False, True)
    np.testing.assert_array_equal(first, again)
    (entry,) = (cache / "openvino").iterdir()
    (blob,) = entry.glob("*.blob")
    whole = blob.read_bytes()
    blob.chmod(0o644)
    for damaged in (
        whole[:9000] + bytes(b ^ 255 for b in whole[9000:11000]) + whole[11000:],
        whole[: len(whole) // 2],
        b"",
    ):
        blob.chmod(0o644)
        blob.write_bytes(damaged)
        seen, right = network()
        assert not seen
        np.testing.assert_array_equal(first, right)
    (entry / compiled.SEAL).write_text("[]")
    assert network()[0] is False
    assert network()[0] is True
    assert [p.name for p in (cache / "openvino").iterdir()] == [entry.name]


def test_what_an_entry_depends_on(cache, monkeypatch):
    from sdlite import cpu

    assert network()[0] is False
    assert network(hashes=["a", "c"])[0] is False  # other weights
    assert network(arithmetic="bfloat16")[0] is False
    monkeypatch.setattr(cpu, "features", lambda: frozenset(["mmx"]))
    assert network()[0] is False  # another processor
    assert len(list((cache / "openvino").iterdir())) == 4


def test_the_cache_is_bounded_and_can_be_switched_off(cache, monkeypatch):
    network()
    (entry,) = (cache / "openvino").iterdir()
    size = sum(p.stat().st_size for p in entry.iterdir())
    (stale := cache / "openvino" / f"{io.WORK}blob-x").mkdir()  # of a process that was killed
    (stale / "lock").write_text("\n".join(io._machine()))
    os.utime(entry, (2, 2))
    monkeypatch.setenv(compiled.SWITCH, str(1.5 * size / 1e9))
    network(hashes=["a", "c"])
    (left,) = (cache / "openvino").iterdir()
    assert left != entry
    for given in ("0", str(size / 1e10)):  # off, and too small for one network
        monkeypatch.setenv(compiled.SWITCH, given)
        assert network()[0] is False
        assert list((cache / "openvino").iterdir()) == [left]
    for wrong in ("-1", "much", "nan"):
        monkeypatch.setenv(compiled.SWITCH, wrong)
        with pytest.raises(InputError, match=r"give the GB that it may have, 0 for no cache"):
            network()


def test_a_cache_that_cannot_be_written_costs_time_only(cache):
    cache.mkdir()
    (cache / "openvino").write_text("a file where the folder should be")
    assert network()[0] is False


TWO = """
import sys
from tests.unit.test_openvino_cache import network
print(network()[1].tobytes().hex()[:400])
"""


def test_processes_at_once(cache):
    on = {**os.environ, compiled.SWITCH: "10"}
    running = [
        subprocess.Popen([sys.executable, "-c", TWO], env=on, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = [p.communicate()[0] for p in running]
    assert all(p.returncode == 0 for p in running)
    assert len(set(answers)) == 1
    assert answers[0]
    (entry,) = (cache / "openvino").iterdir()
    assert json.loads((entry / compiled.SEAL).read_text()).keys() == {
        p.name for p in entry.glob("*.blob")
    }
    assert network()[0] is True
