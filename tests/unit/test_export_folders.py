"""What an export leaves: a folder that says what it is, runs with its runtime alone, and opens
again where sdlite has the engine.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

import sdlite
from sdlite import Pipeline
from sdlite.artifact import Artifact
from sdlite.cli import main
from sdlite.errors import ArtifactError, InputError, PrecisionError, ShapeError
from tests.conftest import EMOJI
from tests.folders import relist
from tests.helpers import psnr

PROMPT = "a red apple"
NEEDS = {
    "onnx": "onnxruntime",
    "onnx-fixed": "onnxruntime",
    "onnx-fused": "onnxruntime",
    "openvino": "openvino",
    "ncnn": "ncnn",
    "mnn": "MNN",
}
TARGETS = [t for t, package in NEEDS.items() if importlib.util.find_spec(package)]
SAMPLED = ("euler-ancestral", "tcd", "unipc-karras")
OPENED = [t for t in TARGETS if t in ("onnx-fixed", "onnx-fused", "openvino")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{target: folder}: the embedded student in float32."""
    root = tmp_path_factory.mktemp("exports")
    for target in TARGETS:
        sdlite.export(
            EMOJI, root / target, target=target, prompts=[PROMPT], num_inference_steps=1, threads=1
        )
    return {target: root / target for target in TARGETS}


@pytest.fixture
def copied(folders, tmp_path):
    return lambda target: shutil.copytree(folders[target], tmp_path / target)


def pixels(pipe, prompt=PROMPT, **call):
    return np.stack([np.asarray(i) for i in pipe(prompt, **{"seed": 0, **call}).images])


@pytest.fixture(scope="module")
def original():
    return Pipeline.from_pretrained(EMOJI, precision="fp32", backend="onnxruntime", threads=1)


# --- the README's code

RUN = """
import json, os, sys, traceback
told = {}
for folder, code in json.load(sys.stdin).items():
    os.chdir(folder)
    try:
        tell = lambda *a: told.setdefault(folder, []).append(str(a[0]))
        exec(compile(code, folder, "exec"), {"__name__": "__main__", "print": tell})
    except Exception:
        told[folder] = traceback.format_exc()
assert not [m for m in sys.modules if m.split(".")[0] == "sdlite"]
sys.__stdout__.write("\\n" + json.dumps(told) + "\\n")
"""


@pytest.fixture(scope="module")
def ran(folders, tmp_path_factory):
    """{target: what its README's snippets printed}; image.png and edited.png, an edit of it, are in
    the folder's copy.
    """
    pytest.importorskip("diffusers", reason="needs the torch extra")
    root = tmp_path_factory.mktemp("ran")
    code = {}
    folders = dict(folders)
    for sampler in SAMPLED:
        folders[sampler] = tmp_path_factory.mktemp("sampled") / sampler
        sdlite.export(
            EMOJI,
            folders[sampler],
            target="onnx-fixed",
            prompts=[PROMPT],
            num_inference_steps=1,
            threads=1,
            sampler=sampler,
        )
    for target, folder in folders.items():
        copy = shutil.copytree(folder, root / target)
        every = re.findall(r"```python\n(.*?)```", (copy / "README.md").read_text(), re.S)
        assert len(every) == 3
        code[str(copy)] = "".join(every)
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(code), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return {target: (root / target, told[str(root / target)]) for target in folders}


def test_a_sampler_that_diffusers_runs_otherwise_is_said(tmp_path):
    for sampler, said in (("heun", True), ("ddim", False)):
        folder = tmp_path / sampler
        sdlite.export(
            EMOJI,
            folder,
            target="onnx-fixed",
            prompts=[PROMPT],
            num_inference_steps=1,
            threads=1,
            sampler=sampler,
        )
        assert (
            "HeunDiscreteScheduler does not rescale" in (folder / "README.md").read_text()
        ) is said


@pytest.mark.parametrize("sampler", SAMPLED)
def test_the_readmes_code_samples_as_the_export_does(sampler, ran):
    folder, told = ran[sampler]
    assert told == ["(1, 8, 8, 8)"], told
    own = pixels(Pipeline.from_pretrained(folder, threads=1))
    assert psnr(np.asarray(Image.open(folder / "image.png"))[None], own) > 80
    assert edits_alike(folder, Pipeline.from_pretrained(folder, threads=1))


def edits_alike(folder, pipe):
    """Whether the code's edit of its image is sdlite's, and not the image."""
    first, edited = (np.asarray(Image.open(folder / n)) for n in ("image.png", "edited.png"))
    own = pixels(pipe, image=first, strength=0.6)
    return psnr(edited[None], own) > 75 and psnr(edited, first) < 60


@pytest.mark.parametrize("target", TARGETS)
def test_the_readmes_code_runs_with_the_runtime_alone(target, ran, original):
    folder, told = ran[target]
    assert told == ["(1, 8, 8, 8)"], told
    assert psnr(np.asarray(Image.open(folder / "image.png"))[None], pixels(original)) > 80
    assert edits_alike(folder, original)


@pytest.mark.parametrize("target", TARGETS)
def test_a_readme_says_what_the_networks_take(target, folders):
    text = (folders[target] / "README.md").read_text()
    report = json.loads((folders[target] / "export-report.json").read_text())
    for row in report["networks"].values():
        for tensor in (*row["inputs"], row["output"]):
            shape = ", ".join(map(str, tensor["shape"])) or "a scalar"
            assert f"| `{tensor['name']}` | {tensor['dtype']} | {shape} |" in text
        assert all(
            name in text
            for name in (row["file"], *row["weights"])
            if "unet/" not in name or "fused" not in target
        )
    assert "28 of them, padded with id 2946" in text
    assert "sampler ddim (diffusers' DDIMScheduler), 4 steps, guidance 1.0" in " ".join(
        text.split()
    )
    assert not re.search(r"@[A-Z]+@", text)


def test_readmes_of_what_does_not_run_here_are_python_too():
    from sdlite.exporters import profile, targets

    for each in profile.builtin().values():
        told = targets.of(each).runtime()
        assert told.title
        assert told.code or told.usage
        compile(told.code, told.title, "exec")


def test_each_sampler_has_a_class_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")
    from sdlite.exporters.readme import CLASSES
    from sdlite.sampling import SAMPLERS

    assert {n.removesuffix("-karras") for n in SAMPLERS} <= {*CLASSES}
    assert all(hasattr(diffusers, name) for name, _ in CLASSES.values())


# --- opening


@pytest.mark.parametrize("target", OPENED)
def test_an_export_opens_with_the_same_images(target, folders, original, tmp_path):
    pipe = Pipeline.from_pretrained(folders[target], threads=1)
    assert pipe.report.backend == ("openvino" if target == "openvino" else "onnxruntime")
    assert "auto: exported for" in pipe.report.reason
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "blue"}
    assert (
        psnr(pixels(pipe, [PROMPT, "dog"], **call), pixels(original, [PROMPT, "dog"], **call)) > 80
    )
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:32] = 255
    edit = {"image": pixels(original)[0], "mask_image": mask, "strength": 0.75}
    assert psnr(pixels(pipe, "dog", **edit), pixels(original, "dog", **edit)) > 80
    assert pipe.report.networks[-1].part == "vae_encoder"
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "again"), threads=1)
    assert psnr(pixels(again), pixels(pipe)) > 80
    assert main(["verify", str(tmp_path / "again")]) == 0


@pytest.mark.parametrize("target", [t for t in OPENED if t.startswith("onnx")])
def test_fixed_shapes_refuse_other_sizes(target, folders):
    pipe = Pipeline.from_pretrained(folders[target], threads=1)
    assert pixels(pipe).shape == (1, 64, 64, 3)
    with pytest.raises(
        ShapeError, match="height=128, width=128: this export has networks of 64x64 pixels alone"
    ):
        pipe(PROMPT, height=128, width=128)
    with pytest.raises(InputError, match="takes its 64 pixels at once"):
        pipe.enable_vae_tiling(32)


def test_fixed_graphs_open_on_openvino_too(folders, original):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    pipe = Pipeline.from_pretrained(folders["onnx-fixed"], backend="openvino", threads=1)
    assert psnr(pixels(pipe), pixels(original)) > 80


@pytest.mark.skipif("ncnn" not in TARGETS, reason="needs ncnn")
def test_what_opens_an_export_is_said(folders):
    for target, backend, words in (
        ("ncnn", "auto", "which sdlite does not open; its README.md shows how ncnn runs it"),
        (
            "onnx-fixed",
            "torch",
            "backend 'torch' does not open; use backend='onnxruntime' or 'openvino'",
        ),
        ("onnx-fused", "openvino", "backend 'openvino' does not open; use backend='onnxruntime'"),
    ):
        with pytest.raises(ArtifactError, match=re.escape(words)):
            Pipeline.from_pretrained(folders[target], backend=backend)
    with pytest.raises(
        PrecisionError,
        match=r"holds fp32, not fp16; leave precision out, or export the model again as fp16",
    ):
        Pipeline.from_pretrained(folders["onnx-fixed"], precision="fp16")
    for wrong in (sdlite.export, sdlite.quantize):
        more = {"target": "onnx"} if wrong is sdlite.export else {"precision": "int8-static"}
        with pytest.raises(InputError, match="is an export for onnx"):
            wrong(folders["onnx-fixed"], out=folders["onnx-fixed"].parent / "x", **more)


# --- what it says of itself


@pytest.mark.parametrize("target", TARGETS)
def test_every_file_is_verified(target, copied, capsys):
    folder = copied(target)
    every = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert main(["verify", str(folder)]) == 0
    assert "whole and unchanged" in capsys.readouterr().out
    if target != "onnx":  # which is a model: its manifest names its files
        assert {*Artifact.open(folder).verify()} == every - {"export-report.json"}
    with open(folder / "tokenizer/merges.txt", "a") as f:
        f.write("a b\n")
    assert main(["verify", str(folder)]) == 1
    assert "tokenizer/merges.txt has" in capsys.readouterr().err


@pytest.mark.parametrize("target", OPENED)
def test_a_changed_network_is_not_loaded(target, copied):
    folder = copied(target)
    weights = next(p for p in sorted((folder / "unet").iterdir()) if p.suffix in (".bin", ".data"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"SHA-256 .* export-report.json says"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["not json", "no files", "outside", "unlisted"])
def test_damaged_reports(damage, copied):
    folder = copied("onnx-fixed")
    report = json.loads((folder / "export-report.json").read_text())
    if damage == "no files":
        del report["files"]
    if damage == "outside":
        report["files"]["../x"] = {"bytes": 1, "sha256": ""}
    if damage == "unlisted":
        del report["files"]["unet/model.onnx.data"]
    (folder / "export-report.json").write_text("{" if damage == "not json" else json.dumps(report))
    with pytest.raises(ArtifactError, match=r"export-report\.json"):
        Artifact.open(folder)


@pytest.mark.parametrize("target", TARGETS)
def test_info_says_what_the_folder_is(target, folders, capsys):
    assert main(["info", str(folders[target])]) == 0
    text = capsys.readouterr().out
    if target == "onnx":
        assert "fp32 runs on: onnxruntime (auto" in text
        return
    assert (
        f"export for {target.removesuffix('-fixed').removesuffix('-fused')} (profile {target}):"
        " fp32" in text
    )
    assert "checked by the runtime itself, images at least" in text
    assert "plain diffusers folder" not in text
    runs = {
        "ncnn": "does not open; its README.md",
        "mnn": "does not open; its README.md",
        "openvino": "openvino (auto",
    }
    assert (
        f"fp32 runs on: {runs.get(target, 'onnxruntime (auto')}" in text
        or runs.get(target, "-") in text
    )
    assert main(["info", str(folders[target]), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["export"]["size"] == (None if target == "openvino" else [64, 64])
    assert said["student"]["unet_parameters"] > 5e6


def test_the_index_names_only_what_is_there(tmp_path):
    model = shutil.copytree(EMOJI, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    checker = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (model / "model_index.json").write_text(
        json.dumps(index | checker | {"requires_safety_checker": True})
    )
    relist(model)
    sdlite.export(
        model, tmp_path / "out", target="onnx", prompts=[PROMPT], num_inference_steps=1, threads=1
    )
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    named = {k for k, v in index.items() if isinstance(v, list) and v[0]}
    assert named == {"tokenizer", "scheduler", "text_encoder", "unet", "vae"}
    assert index["requires_safety_checker"] is False


def test_optimum_opens_the_onnx_export(folders, original):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the optimum extra")
    torch = pytest.importorskip("torch")
    pipe = optimum.ORTStableDiffusionPipeline.from_pretrained(folders["onnx"])
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=1.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
    )
    assert (
        psnr(
            np.asarray(made.images[0])[None],
            pixels(original, guidance_scale=1.0, num_inference_steps=4),
        )
        > 60
    )
