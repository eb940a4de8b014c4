"""The latent cache: written as it is made, the same however often it is stopped, and never read
when it is damaged.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")

from sdlite.distill import data, latent_cache  # noqa: E402
from sdlite.distill.latent_cache import CachedLatents  # noqa: E402
from sdlite.errors import InputError, SdliteWarning  # noqa: E402
from sdlite.tokenizer import ClipTokenizer  # noqa: E402
from tests.conftest import EMOJI  # noqa: E402

BAD = {3: b"no image", 4: b"", 9: b"\x89PNG\r\n\x1a\n cut"}


def pictures(folder, count=11):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            folder / f"{i:02d}.png"
        )
        (folder / f"{i:02d}.txt").write_text(f"image {i}")
        if i in BAD:
            (folder / f"{i:02d}.png").write_bytes(BAD[i])
    return folder


def encode(given, before):
    """What depends on the batch, on its place, and on each image: as a network's rounding may."""
    x = torch.from_numpy(np.stack(given))[:, :1, :4, :4]
    return x + before + 0.01 * x.mean()


def build(folder, path, encoder=encode, **options):
    tokenizer = ClipTokenizer.from_pretrained(EMOJI / "tokenizer")
    return CachedLatents.build(
        data.read(folder),
        tokenizer,
        encoder,
        path,
        key={},
        size=(8, 8),
        batch=2,
        progress=False,
        **options,
    )


def same(a, b):
    return (
        torch.equal(a.latents, b.latents)
        and torch.equal(a.ids, b.ids)
        and a.skipped == b.skipped
        and a.captions == b.captions
    )


class Stop:
    """An encoder that is interrupted in its n-th batch."""

    def __init__(self, at, error=KeyboardInterrupt):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, given, before):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return encode(given, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_goes_on_where_it_stopped_and_ends_with_the_same(error, tmp_path):
    folder = pictures(tmp_path / "data")
    whole = build(folder, tmp_path / "whole.safetensors")
    assert (len(whole), list(whole.skipped)) == (8, ["03.png", "04.png", "09.png"])
    for at in (2, 1, 2):
        with pytest.raises(error):
            build(folder, tmp_path / "run" / "latents.safetensors", Stop(at, error))
    rest = Stop(99)
    assert same(build(folder, tmp_path / "run" / "latents.safetensors", rest), whole)
    assert rest.calls == 2  # of 4
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["latents.safetensors"]
    again = Stop(1)
    assert same(build(folder, tmp_path / "run" / "latents.safetensors", again), whole)


def test_a_killed_pass_keeps_its_parts(tmp_path):
    folder = pictures(tmp_path / "data")
    code = (
        "import time; from tests.unit.test_latents import *; latent_cache.PART_SECONDS = 0\n"
        "def slow(given, before):\n    time.sleep(0.3); return encode(given, before)\n"
        f"build({str(folder)!r}, Path({str(tmp_path / 'run' / 'latents.safetensors')!r}), slow)"
    )
    start = f"from pathlib import Path\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", start], env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    deadline = time.monotonic() + 120
    while (
        len(list(tmp_path.glob("run/latents.parts/*.safetensors"))) < 2
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rest = Stop(99)
    assert same(
        build(folder, tmp_path / "run" / "latents.safetensors", rest),
        build(folder, tmp_path / "whole.safetensors"),
    )
    assert rest.calls <= 2
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["latents.safetensors"]


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda p: p.write_bytes(p.read_bytes()[:100]),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"\xff" * 99),
    ],
)
def test_damaged_parts_and_caches_are_noticed_and_made_anew(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "PART_SECONDS", 0)
    folder, path = pictures(tmp_path / "data"), tmp_path / "run" / "latents.safetensors"
    with pytest.raises(KeyboardInterrupt):
        build(folder, path, Stop(4))
    parts = sorted(path.with_name("latents.parts").iterdir())
    assert len(parts) == 3
    damage(parts[1])
    rest = Stop(99)
    with pytest.warns(SdliteWarning, match=rf"{parts[1].name} .*; it is made anew"):
        first = build(folder, path, rest)
    assert rest.calls == 3
    damage(path)
    with pytest.warns(SdliteWarning, match=r"latents\.safetensors .*; it is made anew"):
        assert same(build(folder, path), first)


def test_other_data_is_another_key(tmp_path):
    folder, path = pictures(tmp_path / "data", 3), tmp_path / "latents.safetensors"
    assert len(build(folder, path)) == 3
    pictures(folder, 4)
    (folder / "03.png").write_bytes((folder / "02.png").read_bytes())
    assert len(build(folder, path)) == 4
    Image.new("RGB", (8, 8)).save(folder / "03.png")  # the same name and caption
    changed = build(folder, path)
    assert not torch.equal(changed.latents[3], build(folder, tmp_path / "b", Stop(99)).latents[2])
    assert same(changed, build(folder, tmp_path / "c"))


def test_a_sample_whose_latents_are_not_finite_is_left_out(tmp_path):
    def encoder(given, before):
        out = encode(given, before)
        if before == 0:
            out[1] = torch.nan
        return out

    found = build(pictures(tmp_path / "data"), tmp_path / "l", encoder)
    assert len(found) == 7
    assert found.latents.isfinite().all()
    assert found.skipped["01.png"] == "its latents are not finite"


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path):
    folder = pictures(tmp_path / "data", 2)
    for i in (0, 1):
        (folder / f"{i:02d}.png").write_bytes(b"no image")
    with pytest.raises(
        InputError, match=r"no image of 2 could be read; first: 00\.png is no readable PNG"
    ):
        build(folder, tmp_path / "run" / "l.safetensors")
    assert not list((tmp_path / "run").iterdir())
