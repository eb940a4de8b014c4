"""A model whose scheduler is not ours: every command says what to do, takes a sampler, and what it
writes keeps it.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("onnxruntime", reason="needs the cpu extra")

import sdlite
from sdlite import bench
from sdlite.artifact import Artifact
from sdlite.cli import main
from sdlite.errors import ArtifactError, InputError, UnknownNameError
from sdlite.spec import latent_size
from tests import folders

NEAREST = (
    "scheduler 'KDPM2DiscreteScheduler' is not supported; choose another with sampler= (--sampler);"
    " the nearest is 'heun-karras'"
)


@pytest.fixture
def foreign(copy):
    """The embedded model as one whose scheduler we do not have, and whose manifest names no
    sampler.
    """
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("DDIMScheduler", "KDPM2DiscreteScheduler"))
    manifest = json.loads((copy / "sdlite.json").read_text())
    del manifest["sampler"]["name"]
    (copy / "sdlite.json").write_text(json.dumps(manifest))
    folders.relist(copy)
    return copy


def test_info_never_fails_because_of_a_scheduler(foreign, capsys):
    assert main(["info", str(foreign)]) == 0
    assert NEAREST in capsys.readouterr().out
    assert main(["info", str(foreign), "--json"]) == 0
    sampler = json.loads(capsys.readouterr().out)["sampler"]
    assert (sampler["name"], sampler["num_inference_steps"]) == (None, 4)
    assert NEAREST in sampler["note"]


@pytest.mark.parametrize("command", ["generate", "quantize", "export", "bench"])
def test_every_command_offers_the_nearest_and_takes_a_sampler(foreign, command, tmp_path, capsys):
    pytest.importorskip("onnx", reason="needs the quantize extra")
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    out, prompts = str(tmp_path / "out"), ["--prompts", str(tmp_path / "prompts.txt")]
    arguments = {
        "generate": [
            "a red apple",
            "--model",
            str(foreign),
            "--steps",
            "1",
            "--seed",
            "0",
            "--out",
            str(tmp_path / "a.png"),
            "--quiet",
        ],
        "quantize": [
            str(foreign),
            "--precision",
            "int8-dynamic",
            "--steps",
            "1",
            "--engine",
            "onnxruntime",
            "--psnr-mean",
            "0",
            "--psnr-worst",
            "0",
            "--ssim-mean",
            "-1",
            "--gate-prompts",
            "1",
            "--threads",
            "1",
            "--out",
            out,
            "--quiet",
            *prompts,
        ],
        "export": [
            str(foreign),
            "--target",
            "onnx",
            "--steps",
            "1",
            "--threads",
            "1",
            "--out",
            out,
            *prompts,
        ],
        "bench": [
            str(foreign),
            "--precisions",
            "fp32",
            "--backends",
            "onnxruntime",
            "--steps",
            "1",
            "--seconds",
            "0",
            "--threads",
            "1",
        ],
    }[command]
    assert main([command, *arguments]) == 1
    assert NEAREST in capsys.readouterr().err
    assert main([command, *arguments, "--sampler", "heun-karras"]) == 0
    if command == "quantize":
        assert Artifact.open(out).sampler_name == "heun-karras"
    if command == "export":
        student = json.loads((tmp_path / "out" / "student.json").read_text())
        assert student["sampler"] == {
            "name": "heun-karras",
            "num_inference_steps": 4,
            "guidance_scale": 1.0,
        }


def test_a_wrong_sampler_is_said_before_any_work(foreign, tmp_path):
    pytest.importorskip("onnx", reason="needs the quantize extra")
    pytest.importorskip("torch", reason="needs the export extra")
    pytest.importorskip("onnx_ir", reason="needs the export extra")
    from sdlite.converter import convert
    from sdlite.exporters.export import export

    for call in (
        lambda: sdlite.quantize(foreign, "int8-dynamic", out=tmp_path / "x", sampler="nope"),
        lambda: export(foreign, tmp_path / "x", target="onnx", sampler="nope"),
        lambda: convert(foreign, tmp_path / "x", sampler={"name": "nope"}),
        lambda: bench.jobs(str(foreign), sampler="nope"),
        lambda: Artifact.open(foreign).with_sampler("nope"),
    ):
        with pytest.raises(
            UnknownNameError, match="sampler='nope' is not known; choose one of ddim"
        ):
            call()
    assert not (tmp_path / "x").exists()


def test_a_chosen_sampler_leaves_the_opened_model_alone(copy):
    opened = Artifact.open(copy)
    assert opened.with_sampler("lcm").samples_with == {
        "name": "lcm",
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
    }
    assert opened.sampler_name == "ddim"
    assert opened.with_sampler(None) is opened


def test_recipes_check_the_samplers_name_and_guidance():
    pytest.importorskip("torch", reason="needs the distill extra")
    pytest.importorskip("accelerate", reason="needs the distill extra")
    from sdlite.distill.recipe import Recipe

    text = "[sampler]\n{}\n[[stage]]\nkind = 'output'\nimages = 1\n"

    def said(line):
        import tomllib

        return Recipe.parse(tomllib.loads(text.format(line))).default_sampler("ddim")

    assert said("name = 'heun'")["name"] == "heun"
    assert said("guidance_scale = 0.0")["guidance_scale"] == 0.0
    with pytest.raises(UnknownNameError, match="sampler='hoyn'"):
        said("name = 'hoyn'")
    with pytest.raises(InputError, match="guidance_scale=-1"):
        said("guidance_scale = -1.0")


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"sample_size": 8}, (8, 8)),
        ({"sample_size": 8, "_diffusers_version": "0.39.0"}, (8, 8)),
        ({"sample_size": 32, "_diffusers_version": "0.9.0.dev0"}, (32, 32)),
        ({"sample_size": 32, "_diffusers_version": "0.8.1"}, (64, 64)),
        ({"sample_size": 32, "_diffusers_version": "0.6.0.dev0"}, (64, 64)),
        ({"sample_size": 96, "_diffusers_version": "0.6.0"}, (96, 96)),
        ({"sample_size": [16, 24], "_diffusers_version": "0.6.0"}, (16, 24)),
        ({"sample_size": [16, 24]}, (16, 24)),
    ],
)
def test_size_of_a_model_is_diffusers(config, size):
    assert latent_size(config) == size


@pytest.mark.parametrize("side", [None, 0, -8, "64", [8], [8, 0], True])
def test_a_size_that_says_nothing_is_an_error(side):
    with pytest.raises(ArtifactError, match=r"sample_size=.*Correct the file"):
        latent_size({"sample_size": side})


def test_an_old_config_is_painted_at_diffusers_size(copy):
    """`tests/parity/test_scheduler_configs.py` compares the rule with diffusers'; here it is what a
    call takes.
    """
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": "0.6.0"}))
    folders.relist(copy)
    pipe = sdlite.Pipeline.from_pretrained(copy, backend="onnxruntime", threads=1)
    assert pipe("pizza", seed=0, num_inference_steps=1).images[0].size == (512, 512)
