"""The samples in C++: they compile by their own documented lines, and from a prompt and a seed they
make the image that Python makes, with stand-ins for the runtimes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sdlite.artifact import Artifact
from sdlite.errors import InputError, SdliteWarning
from sdlite.exporters import device
from sdlite.families import vae_config
from sdlite.families.sd import StableDiffusion, guidance_embedding
from sdlite.sampling import Noise, Schedule, get_sampler, guide
from sdlite.sampling.names import SAMPLERS
from sdlite.spec import Tensor
from sdlite.tokenizer import ClipTokenizer
from tests import folders
from tests.conftest import EMOJI

ROOT = Path(__file__).parents[2]
SAMPLES, HEADERS = ROOT / "export" / "samples", ROOT / "tests" / "assets" / "headers"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
PROMPT, SEED = "Dog's face, 2 cafés ☕ on a <|endoftext|> BLUE background!", 2**32 + 7


def compiled(name, folder):
    """The program that a sample's documented line makes, with stand-ins for the runtime."""
    (line,) = re.findall(r"^// +(g\+\+ .*?)(?: {2,}.*)?$", (SAMPLES / name).read_text(), re.M)
    home = folder / "home"
    (home / "lib64").mkdir(parents=True)
    (home / "include").symlink_to(HEADERS)
    for lib in ("nvinfer", "cudart"):
        subprocess.run(["ar", "rcs", str(home / "lib64" / f"lib{lib}.a")], check=True)
    config = home / "pkg-config"
    config.write_text(f"#!/bin/sh\necho -I{HEADERS}\n")
    config.chmod(0o755)
    program = folder / "image"
    done = subprocess.run(
        line.replace("-o image", f"-Wall -Werror -o {program}"),
        shell=True,
        cwd=SAMPLES,
        env={**os.environ, "PATH": f"{home}:{os.environ['PATH']}", "CUDA_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return {n: compiled(n, tmp_path_factory.mktemp("cpp")) for n in ("ncnn.cpp", "tensorrt.cpp")}


def model(copy, name="ddim", guidance=2.0, steps=3, width=None, **scheduler):
    """The embedded model with another sampler, schedule and VAE. `width`: of a guidance that its
    UNet is given.
    """
    if width:
        folders.configure(copy / "unet" / "config.json", time_cond_proj_dim=width)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
    vae = copy / "vae" / "config.json"
    scales = {"scaling_factor": 0.9, "shift_factor": 0.1}
    vae.write_text(json.dumps({**json.loads(vae.read_text()), **scales}))
    folders.relist(copy)
    opened = Artifact.open(copy)
    opened.manifest.sampler = {
        "name": name,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    return opened


def exported(folder, artifact):
    """What an export holds for the samples; the engines are names."""
    for part in artifact.parts:
        (folder / part).mkdir(parents=True)
        (folder / part / "model.engine").write_text(part)
    device.write(folder, artifact, (1, 8, 8, 8))
    return folder


def run(program, folder, prompt, seed):
    done = subprocess.run(
        [program, folder, prompt, folder / "i.ppm", str(seed)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    head, data = (folder / "i.ppm").read_bytes().split(b"255\n", 1)
    assert head == b"P6 8 8 "
    return np.frombuffer(data, np.uint8).reshape(8, 8, 3), done.stderr


def text_encoder(ids):
    """As tests/assets/headers/stand_in.h, in which the other networks are too."""
    i, d = np.arange(len(ids))[:, None], np.arange(4)
    return (np.float32(ids % 97)[:, None] / 97 - 0.5) * np.float32((i + d) % 3)


def unet(x, t, embeds, more=()):
    mean = embeds.mean(dtype=np.float32) + sum(m * i / 100 for i, m in enumerate(more))
    return x / 2 + np.float32(t / 4000) + np.float32(mean)


def image(artifact, prompt, seed):
    """Python's."""
    own = artifact.sampler_defaults
    config = artifact.config("text_encoder")
    ids = ClipTokenizer.from_pretrained(artifact.files.part("tokenizer"), config)([prompt, ""])
    cond, uncond = map(text_encoder, ids)
    schedule = Schedule.from_config(artifact.config("scheduler"))
    solver = get_sampler(artifact.sampler_name, schedule, own.num_inference_steps)
    width = artifact.config("unet").get("time_cond_proj_dim")
    more = () if width is None else guidance_embedding(own.guidance_scale, width)[0].tolist()
    noise = Noise(seed)
    x = noise.normal((8, 8, 8))[None] * np.float32(solver.init_noise_sigma)
    for i, t in enumerate(solver.timesteps):
        given = solver.scale_model_input(i, x)
        out = unet(given, t, cond, more)
        if own.guidance_scale > 1 and width is None:
            out = guide(unet(given, t, uncond), out, own.guidance_scale)
        x = solver.step(i, out.astype(np.float32), x, [noise])
    vae = vae_config(artifact.config("vae"))
    z = x[0, :3] / np.float32(vae["scaling_factor"]) + np.float32(vae["shift_factor"])
    return np.round(np.clip(z.transpose(1, 2, 0) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("program", ["ncnn.cpp", "tensorrt.cpp"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
        {"prediction_type": "sample", "name": "euler", "steps": 4},
        {"name": "lcm", "guidance": 1.0},
        {"name": "lcm", "guidance": 8.0, "width": 16},
        {"name": "euler-ancestral", "rescale_betas_zero_snr": False},
    ],
    ids=lambda g: "-".join(map(str, g.values())) or "own",
)
def test_from_the_prompt_to_pythons_image(programs, program, given, copy, tmp_path):
    artifact = model(copy, **given)
    folder = exported(tmp_path / "export", artifact)
    made, _ = run(programs[program], folder, PROMPT, SEED)
    want = image(artifact, PROMPT, SEED)
    assert np.abs(made.astype(int) - want).max() <= 1
    assert len(np.unique(want)) > 20
    other, _ = run(programs[program], folder, PROMPT, SEED + 1)
    assert np.abs(other.astype(int) - want).max() > 20


DRIVER = """
#include <iostream>
#include "sdlite.h"
int main(int, char** argv) try {
    const sdlite::Device device(argv[1]);
    const sdlite::Tokenizer tokenizer(device);
    std::string line;
    while (std::getline(std::cin, line)) {
        int dropped = 0;
        std::string out;
        try {
            for (const int id : tokenizer(line, &dropped)) out += std::to_string(id) + " ";
            std::cout << out << dropped << "\\n";
        } catch (const std::exception& e) { std::cout << e.what() << "\\n"; }
    }
    for (const size_t n : {16, 37, 64})
        for (const float x : sdlite::Noise(std::stoull(argv[2])).normal(n)) printf("%.9g ", x);
    for (const float x : sdlite::guide({1, -2.5f, 3}, {0.25f, 4, -1}, 7.3f)) printf("%.9g ", x);
    for (const float x : sdlite::unscaled(device, {1, -2.5f, 3})) printf("%.9g ", x);
} catch (const std::exception& e) { std::cout << e.what(); }
"""
PROMPTS = [
    "",
    "Red  apple!",
    "three o'clock 1234 it's they've'll 'sd !'s",
    "CAFÉ ☕ naïve 🐶🐱 日本語 Ünïcödé ①½ İ Σας",
    "<|startoftext|>x<|endoftext|> <|ENDOFTEXT|>",
    "tabs\tand\u00a0spaces\u3000 x_y",
    "a " * 60,
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(DRIVER)
    line = ["g++", "-std=c++17", "-Wall", "-Werror", f"-I{SAMPLES}", "driver.cpp", "-o", "driver"]
    subprocess.run(line, cwd=folder, check=True)
    return folder / "driver"


@pytest.mark.filterwarnings("ignore::sdlite.tokenizer.TruncationWarning")
def test_tokens_noise_and_formulas_are_pythons(driver, copy, tmp_path):
    artifact = model(copy)
    folder = exported(tmp_path / "export", artifact)
    given = "\n".join([*PROMPTS, "cafe\u0301", ""]).encode()
    done = subprocess.run([driver, folder, "99"], input=given, capture_output=True, check=True)
    *lines, composed, numbers = done.stdout.decode().split("\n")
    config = artifact.config("text_encoder")
    tokenizer = ClipTokenizer.from_pretrained(artifact.files.part("tokenizer"), config)
    for prompt, line in zip(PROMPTS, lines, strict=True):
        *ids, dropped = map(int, line.split())
        assert ids == tokenizer([prompt])[0].tolist(), prompt
        assert dropped == 60 - 26 if prompt == "a " * 60 else dropped >= 0
    assert composed == "the prompt has accents or syllables in parts; give it in Unicode's NFC form"
    numbers = np.array(numbers.split(), np.float32)
    want = [Noise(99).normal((n,)) for n in (16, 37, 64)]
    u, c = np.float32([1, -2.5, 3]), np.float32([0.25, 4, -1])
    want += [guide(u, c, 7.3), u / np.float32(0.9) + np.float32(0.1)]
    np.testing.assert_allclose(numbers, np.concatenate(want), atol=1e-5)


@pytest.mark.parametrize("damage", ["none", "cut off", "version"])
def test_a_folder_without_its_file_is_said(driver, copy, tmp_path, damage):
    folder = exported(tmp_path / "export", model(copy))
    path = folder / device.FILE
    lines = path.read_text().splitlines(True)
    words = {"none": "cannot open", "cut off": "is damaged or cut off", "version": "of another"}
    if damage == "none":
        path.unlink()
    else:
        path.write_text("".join(lines[:40] if damage == "cut off" else ["sdlite-device 1\n"]))
    done = subprocess.run([driver, folder, "1"], input=b"", capture_output=True, check=True)
    assert words[damage] in done.stdout.decode()


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_is_in_the_file_or_refused(name):
    """The numbers of a sampler are compared with the sampler itself when they are made."""
    config = json.loads((EMOJI / "scheduler" / "scheduler_config.json").read_text())
    schedule = Schedule.from_config({**config, "rescale_betas_zero_snr": False})
    known = {"ddim", "ddpm", "euler", "euler-ancestral", "euler-karras", "lcm", "tcd"}
    if name in known:
        start, steps = device.steps(name, schedule, 4)
        assert start > 0
        assert len(steps) == 4
    else:
        with pytest.raises(InputError, match=re.escape(f"sampler '{name}' remembers")):
            device.steps(name, schedule, 4)


SPACED = {"text": "<cat>", "id": 5, "lstrip": True, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"added": [{**SPACED, "normalized": False}]}, "matches '<cat>' with the spaces or words"),
        ({"vectors": [[5, "<cat>", "<cat> <cat_1>"]]}, "spells out '<cat>'"),
        ({"words": r"\w+", "added": []}, r"splits text by '\\\\w\+'"),
        ({"vocab": {"a b": 1}}, "has spaces in 'a b'"),
    ],
)
def test_a_tokenizer_that_the_samples_do_not_have_is_refused(
    changed, words, copy, tmp_path, monkeypatch
):
    right = ClipTokenizer.to_json
    monkeypatch.setattr(ClipTokenizer, "to_json", lambda self: {**right(self), **changed})
    with pytest.raises(InputError, match=f"the tokenizer {words}.*the C\\+\\+ samples do not have"):
        device.write(tmp_path, model(copy), (1, 8, 8, 8))


def test_a_unet_that_the_samples_do_not_feed_is_refused(copy, tmp_path, monkeypatch):
    pooled = Tensor("text_embeds", ("B", "16"), "float32", "pooled text")
    monkeypatch.setattr(StableDiffusion, "unet_inputs", lambda self, unet: (pooled,))
    with pytest.raises(
        InputError, match=r"UNet is given text_embeds besides .* timestep_cond alone"
    ):
        device.write(tmp_path, model(copy), (1, 8, 8, 8))


def test_an_export_holds_the_file_or_says_why_not(tmp_path):
    pytest.importorskip("ncnn", reason="needs ncnn")
    from sdlite.exporters.export import export

    given = {"target": "ncnn", "prompts": ["a fox"], "num_inference_steps": 1, "threads": 1}
    export(EMOJI, tmp_path / "a", **given)
    assert (tmp_path / "a" / device.FILE).read_text().startswith("sdlite-device 2\nlatents 8 8 8\n")
    assert "export/samples/ncnn.cpp" in (tmp_path / "a" / "README.md").read_text()
    said = r"sampler 'dpm\+\+2m' remembers earlier steps"
    with pytest.warns(SdliteWarning, match=f"no {device.FILE} was written: {said}"):
        export(EMOJI, tmp_path / "b", sampler="dpm++2m", **given)
    assert not (tmp_path / "b" / device.FILE).exists()
    assert re.search(f"does not run this model: {said}", (tmp_path / "b/README.md").read_text())


def test_android_calls_the_sample():
    jni, kotlin, cmake = (
        (SAMPLES / "android" / f).read_text() for f in ("jni.cpp", "Sdlite.kt", "CMakeLists.txt")
    )
    assert "Java_sdlite_Sdlite_image" in jni
    assert '#include "../ncnn.cpp"' in jni
    assert "make_image(text(folder), text(prompt), uint64_t(seed), text(out))" in jni
    assert "package sdlite" in kotlin
    assert "external fun image(folder: String, prompt: String, seed: Long, out: String)" in kotlin
    assert "jni.cpp" in cmake
