"""Backends: one class each, known by a registry, and what networks are made of."""

from __future__ import annotations

import numpy as np
import pytest

import sdlite
from sdlite import backends
from sdlite.backends import Backend, NetworkReport, registry
from sdlite.backends.network import close
from sdlite.errors import InputError, MissingExtraError, PrecisionError, UnknownNameError
from tests.conftest import EMOJI


class Grey(Backend):
    """Zeros of the right shapes, which are a grey image."""

    name = "grey"
    package = "numpy"
    precisions = ("fp16", "fp4")

    def engine(self):
        return "grey 1"

    def load_part(self, artifact, part, precision, device, threads, arithmetic=None):
        return getattr(self, part), NetworkReport(part, "none", 0, precision, "nothing")

    def text_encoder(self, input_ids):
        return {"last_hidden_state": np.zeros((*input_ids.shape, 192), np.float32)}

    def unet(self, sample, timestep, encoder_hidden_states):
        return {"out_sample": np.zeros_like(sample)}

    def vae_decoder(self, latent_sample):
        b, _, h, w = latent_sample.shape
        return {"sample": np.zeros((b, 3, 8 * h, 8 * w), np.float32)}


@pytest.fixture
def grey(monkeypatch):
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    backends.register(Grey())


def test_a_backend_from_outside_makes_an_image(grey):
    pipe = sdlite.Pipeline.from_pretrained(EMOJI, backend="grey", precision="fp16")
    image = np.asarray(pipe("a red apple", seed=1).images[0])
    assert image.shape == (64, 64, 3)
    assert set(image.ravel()) <= {127, 128}
    assert pipe.report.engine == "grey 1"
    assert [n.arithmetic for n in pipe.report.networks] == ["nothing"] * 3


def test_auto_takes_a_backend_from_outside_by_its_order(grey, monkeypatch):
    known = registry._BACKENDS
    assert backends.installed_with("fp16")[-1] == "grey"
    monkeypatch.setattr(Grey, "order", -1)
    assert backends.installed_with("fp16")[0] == "grey"
    monkeypatch.setattr(registry, "installed", lambda name: name == "grey")
    pipe = sdlite.Pipeline.from_pretrained(EMOJI, precision="fp16")
    assert pipe.report.backend == "grey"
    assert "grey" in known


def test_what_a_backend_says_of_itself_is_what_is_accepted(grey):
    with pytest.raises(UnknownNameError, match=r"choose one of auto, onnxruntime, .*, grey\."):
        backends.get_backend("gray")
    with pytest.raises(UnknownNameError, match="device='cuda' is not known to backend 'grey'"):
        sdlite.Pipeline.from_pretrained(EMOJI, backend="grey", device="cuda")
    with pytest.raises(
        PrecisionError, match=r"'grey' has no fp32; it has fp16, fp4; backends here .* onnxrunt"
    ):
        sdlite.Pipeline.from_pretrained(EMOJI, backend="grey", precision="fp32")
    with pytest.raises(
        PrecisionError, match="arithmetic out, or use backend='openvino' or backend="
    ):
        sdlite.Pipeline.from_pretrained(
            EMOJI, backend="grey", precision="fp16", arithmetic="float32"
        )
    with pytest.raises(UnknownNameError, match=r"choose one of .*bf16, fp4\."):
        sdlite.Pipeline.from_pretrained(EMOJI, precision="fp64")


def test_a_name_is_taken_once(grey):
    for name in ("grey", "onnxruntime", "auto"):
        other = Grey()
        other.name = name
        with pytest.raises(InputError, match=f"'{name}' is taken"):
            backends.register(other)


def test_a_missing_engine_from_outside_names_its_package(monkeypatch, grey):
    def engine(self):
        raise ModuleNotFoundError("No module named 'greys'", name="greys")

    monkeypatch.setattr(Grey, "engine", engine)
    monkeypatch.setattr(Grey, "package", "greys")
    with pytest.raises(MissingExtraError, match="'grey' needs 'greys': pip install greys"):
        backends.ready("grey")
    assert not backends.installed("grey")


def test_the_network_of_a_part_is_found_by_its_name():
    report = backends.Report("m", "b", "cpu", "fp32", "why", "e 1")
    parts = {p: (lambda **_: {}) for p in ("text_encoder", "unet", "vae_decoder")}
    networks = backends.Networks(parts, report, 8)
    assert networks.unet is parts["unet"]
    assert networks.vae_decoder is parts["vae_decoder"]


def test_closing_reaches_the_networks_inside():
    closed = []

    class Inner:
        def __call__(self, **inputs):
            return {"out_sample": inputs["sample"]}

        def close(self):
            closed.append(1)

    close(backends.RowByRow(Inner()))
    close(backends.Overflowing(Inner(), Inner))
    close(len)
    assert closed == [1, 1]
