"""Exports: every runtime that runs here gives the same pictures, gates can fail, nothing
half-written.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

from sdlite import exported, instrument
from sdlite.artifact import Artifact
from sdlite.backends import RowByRow
from sdlite.backends.ort import Session
from sdlite.cli import main
from sdlite.errors import (
    ArtifactError,
    ExportError,
    InputError,
    PrecisionError,
    SdliteWarning,
    UnknownNameError,
)
from sdlite.exporters import profile, targets
from sdlite.exporters.export import export, table
from sdlite.exporters.targets.base import Runtime, Target
from sdlite.io import sha256
from sdlite.onnx_graph import Graph, constant
from sdlite.pipeline import Pipeline
from sdlite.settings import At, settings
from sdlite.spec import SPECS, Tensor
from tests.conftest import EMOJI
from tests.folders import configure, relist

PROMPTS = ["red apple", "dog face on a blue background"]
NEEDS = {
    "openvino": "openvino",
    "openvino-fp16": "openvino",
    "mnn": "MNN",
    "mnn-fp16": "MNN",
    "ncnn": "ncnn",
    "ncnn-fp16": "ncnn",
    "executorch": "executorch",
}


@pytest.mark.parametrize(
    "target",
    [
        "onnx",
        "onnx-fp16",
        "onnx-fixed",
        "openvino",
        "openvino-fp16",
        "mnn",
        "mnn-fp16",
        "ncnn",
        "ncnn-fp16",
        "executorch",
    ],
)
def test_export_runs_on_its_runtime_and_holds_its_gate(target, tmp_path):
    if target in NEEDS:
        pytest.importorskip(NEEDS[target], reason=f"needs {NEEDS[target]}")
    report = export(
        EMOJI, tmp_path / "out", target=target, prompts=PROMPTS, num_inference_steps=3, threads=1
    )
    assert report["checked_by"] == "the runtime itself"
    assert min(report["parity"]["psnr"]) >= profile.load(target).gate.psnr
    assert report["parity"]["networks"]["unet"]["calls"] == 6 + 1  # an edit makes half of its steps
    assert report["parity"]["edit"][0] >= profile.load(target).gate.psnr
    assert report["left_out"] == {}
    if target in ("openvino-fp16", "mnn-fp16"):  # EMOJI's weights are float16: no others are
        assert report["parity"]["networks"]["unet"]["sqnr"] > 100
    on_disk = json.loads((tmp_path / "out/export-report.json").read_text())
    assert on_disk["files"].keys() == report["files"].keys()
    for name, about in on_disk["files"].items():
        assert (tmp_path / "out" / name).stat().st_size == about["bytes"]
    assert (tmp_path / "out/tokenizer/vocab.json").exists()
    assert 50 < report["peak_mib"] < 20_000
    assert "SQNR" in table(report)
    if profile.load(target).dynamic and target.startswith("onnx"):  # a model as any other
        pipe = Pipeline.from_pretrained(tmp_path / "out", threads=1)
        assert pipe.report.precision == profile.load(target).precision
        assert pipe.artifact.verify()
        original = Pipeline.from_pretrained(EMOJI, threads=1)
        a, b = (
            np.asarray(p(PROMPTS, seed=3, num_inference_steps=2).images) for p in (pipe, original)
        )
        np.testing.assert_array_equal(a, b)
    elif not target.startswith(("onnx", "openvino")):  # which open: test_export_folders.py
        with pytest.raises(
            ArtifactError, match=r"which sdlite does not open; its README\.md shows how"
        ):
            Pipeline.from_pretrained(tmp_path / "out", threads=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_fixed_shapes_have_numbers_only(tmp_path):
    from sdlite.exporters.rewrites.fixed_shapes import input_shapes

    export(
        EMOJI,
        tmp_path / "out",
        target="onnx-fixed",
        prompts=PROMPTS[:1],
        num_inference_steps=1,
        threads=1,
    )
    shapes = input_shapes(tmp_path / "out/unet/model.onnx")
    assert shapes["sample"] == (1, 8, 8, 8)
    assert shapes["timestep"] == ()
    kinds = {n.op_type for n in Graph.load(tmp_path / "out/unet/model.onnx").nodes}
    assert "Shape" not in kinds


def test_fixed_graphs_have_at_most_four_axes_and_no_group_norm(tmp_path):
    """Mobile runtimes take no more."""
    import onnx

    export(
        EMOJI,
        tmp_path / "out",
        target="onnx-fixed",
        prompts=PROMPTS[:1],
        num_inference_steps=1,
        threads=1,
    )
    for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        proto = onnx.load(str(tmp_path / "out" / part / "model.onnx"), load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
        axes = {
            v.name: len(v.type.tensor_type.shape.dim)
            for v in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        assert {o for n in proto.graph.node for o in n.output} <= set(axes)
        assert max(axes.values()) <= 4
        assert not {n.op_type for n in proto.graph.node} & {"GroupNormalization", "GroupNorm"}


@pytest.mark.parametrize("opset", [17, 18, 20, 21, 23])
def test_opset_of_the_profile(opset, tmp_path):
    import onnx

    (tmp_path / "p.toml").write_text(
        f"target = 'onnx'\ndynamic = true\n[gate]\npsnr = 60\n[options]\nopset = {opset}\n"
    )
    report = export(
        EMOJI,
        tmp_path / "out",
        target=tmp_path / "p.toml",
        prompts=PROMPTS[:1],
        num_inference_steps=1,
        threads=1,
    )
    assert report["opset"] == opset
    for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        proto = onnx.load(str(tmp_path / "out" / part / "model.onnx"), load_external_data=False)
        assert [o.version for o in proto.opset_import] == [opset]
    assert report["parity"]["psnr"] == [100.0]


def test_opsets_that_cannot_be_written(tmp_path):
    from onnx import TensorProto, helper, save

    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", (2, 3)), ("y", (2, 1)))
    )
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"])], "g", [x], [y], [axes]
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        str(tmp_path / "m.onnx"),
    )
    for opset, words in ((16, "at least 17"), (24, "at most 23")):
        with pytest.raises(InputError, match=f"options: opset={opset}; accepted: {words}"):
            targets.of(profile.Profile("p", "onnx", options={"opset": opset}))
    seventeen = targets.of(profile.Profile("p", "onnx", options={"opset": 17}))
    with pytest.raises(ExportError, match="cannot be written in opset 17"):
        seventeen.prepare("unet", tmp_path / "m.onnx")


@pytest.mark.parametrize("name", sorted(targets.names()))
def test_options_that_a_target_does_not_know(name, tmp_path):
    precision = "fp16" if name == "qnn" else "fp32"
    (tmp_path / "p.toml").write_text(
        f"target = '{name}'\nprecision = '{precision}'\n[options]\nsped = 1\n"
    )
    with pytest.raises(
        InputError, match=r"options: sped is not known; (known: |target .* has no options)"
    ):
        export(EMOJI, tmp_path / "x", target=tmp_path / "p.toml")


def test_compute_capabilities_are_for_tensorrt_rtx_alone(tmp_path):
    (tmp_path / "p.toml").write_text(
        "target = 'tensorrt'\n[options]\ncompute_capabilities = ['SM89']\n"
    )
    with pytest.raises(InputError, match="compute_capabilities is not known; known: min, opt, max"):
        export(EMOJI, tmp_path / "x", target=tmp_path / "p.toml")


def test_a_broken_graph_fails_the_gate_and_nothing_is_written(tmp_path, monkeypatch):
    from sdlite.exporters.targets.onnx import Onnx as target

    right = target.convert

    def wrong(self, part, graph, out):
        files = right(self, part, graph, out)
        if part == "unet":
            broken = Graph.load(files[0])
            name = next(
                k for k, w in broken.weights.items() if "conv_out" in w.origin and len(w.shape) == 4
            )
            weight = broken.weights[name].array()
            broken.weights[name] = type(broken.weights[name])(
                weight.shape, weight.dtype, lambda: weight * 1.1
            )
            broken.save(files[0])
        return files

    monkeypatch.setattr(target, "convert", wrong)
    with pytest.raises(
        ExportError,
        match=(
            r"gate of onnx does not hold.*worst network unet.*No model was written; its report and"
            r" images"
        ),
    ):
        export(
            EMOJI,
            tmp_path / "out",
            target="onnx",
            prompts=PROMPTS[:1],
            num_inference_steps=2,
            threads=1,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["out.failed"]
    failed = tmp_path / "out.failed"
    assert sorted(p.name for p in failed.iterdir()) == ["export-grid.png", "export-report.json"]
    said = json.loads((failed / "export-report.json").read_text())["failed"]
    assert any("unet SQNR" in line for line in said)
    _keeps_the_candidate(tmp_path, "onnx", "onnxruntime")


def _keeps_the_candidate(place, target, backend):
    """An export whose gate does not hold, kept when asked: it opens and says so, and passes nowhere
    as whole.
    """
    with pytest.raises(ExportError, match=r"marked as failed, in .*/out.failed/model\.$"):
        export(
            EMOJI,
            place / "out",
            target=target,
            prompts=PROMPTS[:1],
            num_inference_steps=2,
            threads=1,
            keep_failed=True,
        )
    kept = place / "out.failed" / "model"
    with pytest.warns(SdliteWarning, match="failed its quality check: image PSNR .*unet SQNR"):
        pipe = Pipeline.from_pretrained(kept, backend=backend, threads=1)
    assert pipe("a fox", seed=1, num_inference_steps=1, height=64, width=64).images
    with pytest.raises(ArtifactError, match="failed its quality check"):
        Artifact.open(kept).verify()
    with pytest.raises(InputError, match=r"failed its quality check|is an export"):
        export(kept, place / "again", target="onnx")
    assert not (place / "out").exists()


EVERY_GATE = {  # a profile of each runtime -> the package that it needs
    "onnx-fixed": "onnxruntime",
    "openvino": "openvino",
    "mnn": "MNN",
    "ncnn": "ncnn",
    "web": "onnxruntime",
    "coreml": "coremltools",
    "tensorrt-rtx-fp16": "tensorrt_rtx",
    "tensorrt-rtx-bf16": "tensorrt_rtx",
    "executorch": "executorch",
    "executorch-vulkan": "executorch",
    "qnn-fp16": "onnxruntime_qnn",
}
SLOW = ("executorch", "executorch-vulkan", "qnn-fp16")


@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=pytest.mark.slow) if t in SLOW else t for t in EVERY_GATE]
)
def test_the_gate_of_every_runtime_sees_a_network_that_changed_on_its_way(
    target, tmp_path, monkeypatch
):
    """What the converter is given has one layer a tenth too large; the rest of the way is the real
    one.
    """
    from sdlite.exporters import handed

    pytest.importorskip(EVERY_GATE[target], reason=f"needs {EVERY_GATE[target]}")
    if target == "web":
        from sdlite.exporters.targets.web import chromium

        if chromium.find() is None:
            pytest.skip("no Chromium on this machine")
    right_graph, right_torch = handed.shaped_graph, handed.torch_networks

    def wrong_graph(artifact, part, *rest):
        path = right_graph(artifact, part, *rest)
        if part == "unet":
            graph = Graph.load(path)
            layer = graph.layers()[-1]  # the last convolution
            graph.weights[layer.weight] = constant(
                graph.weights[layer.weight].array() * np.float32(1.1)
            )
            graph.save(path)
        return path

    def wrong_torch(*given):
        for part, network in right_torch(*given):
            if part == "unet":
                network.module.module.conv_out.weight.mul_(1.1)
            yield part, network

    if target.startswith(
        ("coreml", "executorch")
    ):  # made from the torch network; the ONNX graph stays right
        monkeypatch.setattr(handed, "torch_networks", wrong_torch)
    else:
        monkeypatch.setattr(handed, "shaped_graph", wrong_graph)
    with pytest.raises(
        ExportError,
        match=rf"gate of {target} does not hold.*worst network unet.*No model was written",
    ):
        export(
            EMOJI,
            tmp_path / "out",
            target=target,
            prompts=PROMPTS[:1],
            num_inference_steps=1,
            threads=1,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["out.failed"]
    if target == "openvino":
        _keeps_the_candidate(tmp_path, target, target)


def with_changed_mean(path):
    """An encoder's graph whose latents' mean is a tenth too large; log variances stay."""
    graph = Graph.load(path)
    layer = graph.layers()[-1]  # a 1x1 convolution to both
    weight = graph.weights[layer.weight].array().copy()
    assert layer.name.startswith("quant_conv")
    assert weight.shape == (16, 16, 1, 1)
    weight[:8] *= np.float32(1.1)
    graph.weights[layer.weight] = constant(weight)
    return graph


def test_the_gate_sees_an_encoder_with_a_wrong_mean(tmp_path, monkeypatch):
    """Its log variances are some ten times larger, and right; the image changes little."""
    from sdlite.exporters import handed

    right = handed.shaped_graph

    def wrong(artifact, part, *rest):
        path = right(artifact, part, *rest)
        if part == "vae_encoder":
            with_changed_mean(path).save(path)
        return path

    monkeypatch.setattr(handed, "shaped_graph", wrong)
    given = {"prompts": PROMPTS[:1], "num_inference_steps": 1, "threads": 1}
    with pytest.raises(ExportError, match=r"PSNR of an edited image 4.*; vae_encoder SQNR 19"):
        export(EMOJI, tmp_path / "out", target="onnx-fixed", **given)
    assert [p.name for p in tmp_path.iterdir()] == ["out.failed"]


def test_a_model_without_an_encoder_is_exported_and_it_is_said(copy, tmp_path):
    manifest = json.loads((copy / "sdlite.json").read_text())
    for parts in manifest["variants"].values():
        del parts["vae_encoder"]
    (copy / "sdlite.json").write_text(json.dumps(manifest))
    out, given = tmp_path / "out", {"prompts": PROMPTS[:1], "num_inference_steps": 1, "threads": 1}
    report = export(copy, out, target="onnx-fixed", **given)
    assert report["parity"]["edit"] is None
    assert "vae_encoder" not in report["networks"]
    assert report["left_out"]["vae_encoder"].startswith("emoji holds none, so the export edits no")
    assert "left out      vae_encoder: emoji holds none" in table(report)
    text = (out / "README.md").read_text()
    assert "`vae_encoder` is not here: emoji holds none" in text
    assert "## Edit an image" not in text
    pipe = Pipeline.from_pretrained(out, threads=1)
    with pytest.raises(InputError, match="emoji holds no vae_encoder, which edits need"):
        pipe(PROMPTS[0], image=np.zeros((64, 64, 3), np.uint8))


def test_a_sampler_that_makes_no_part_of_a_schedule_exports_the_encoder_still(copy, tmp_path):
    configure(copy / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=False)
    relist(copy)
    report = export(
        copy,
        tmp_path / "out",
        target="onnx-fixed",
        sampler="pndm-rk",
        prompts=PROMPTS[:1],
        num_inference_steps=4,
        threads=1,
    )
    assert report["parity"]["edit"] is None
    assert report["parity"]["networks"]["vae_encoder"]["calls"] == 1
    assert "## Edit an image" not in (tmp_path / "out" / "README.md").read_text()


def test_pictures_of_the_reference_and_the_memory_ceiling(tmp_path, plain):
    (tmp_path / "p.toml").write_text("target = 'onnx'\ndynamic = true\n[gate]\nreference = 40\n")
    arguments = {
        "target": tmp_path / "p.toml",
        "prompts": PROMPTS[:1],
        "num_inference_steps": 2,
        "threads": 1,
    }
    report = export(EMOJI, tmp_path / "out", reference=EMOJI, **arguments)
    assert report["parity"]["reference"] == [100.0]
    other = shutil.copytree(
        EMOJI, tmp_path / "other"
    )  # draws other pictures: the model was not made of this one
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("trailing", "leading"))
    relist(other)
    with pytest.raises(ExportError, match=r"PSNR to the reference .* wanted 40"):
        export(EMOJI, tmp_path / "x", reference=other, **arguments)
    with pytest.raises(PrecisionError, match="no float ONNX graphs"):
        export(EMOJI, tmp_path / "x", reference=plain, **arguments)
    (tmp_path / "p.toml").write_text("target = 'onnx'\ndynamic = true\nmemory_mib = 10\n")
    with pytest.raises(ExportError, match=r"networks have 2\d\.\d MiB, wanted at most 10"):
        export(EMOJI, tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The student with float32 weights that float16 does not hold, and no fp16 variant: as a
    fine-tuned model often is.
    """
    out = shutil.copytree(EMOJI, tmp_path_factory.mktemp("wide") / "student")
    manifest = json.loads((out / "sdlite.json").read_text())
    del manifest["variants"]["fp16"]
    for part, about in manifest["variants"]["fp32"].items():
        graph = Graph.load(out / about["file"])
        changed = {
            k: (
                constant(w.array() * np.float32(0.9999))
                if w.dtype == np.float32 and len(w.shape) > 1
                else w
            )
            for k, w in graph.weights.items()
        }
        graph = Graph(graph.proto, changed)
        files = graph.save(out / part / "model.onnx")
        about |= {
            "file": f"{part}/model.onnx",
            "weights": [f"{part}/{f.name}" for f in files[1:]],
            "storage": "float32",
        }
        for f in files:
            manifest["files"][f"{part}/{f.name}"] = {"bytes": f.stat().st_size, "sha256": sha256(f)}
    (out / "sdlite.json").write_text(json.dumps(manifest))
    return out


@pytest.mark.parametrize("target", ["onnx-fp16", "openvino-fp16", "mnn-fp16", "ncnn-fp16"])
def test_float16_of_a_model_that_holds_float32_only(target, wide, tmp_path):
    if target in NEEDS:
        pytest.importorskip(NEEDS[target], reason=f"needs {NEEDS[target]}")
    report = export(
        wide, tmp_path / "out", target=target, prompts=PROMPTS[:1], num_inference_steps=1, threads=1
    )
    assert report["source"] == "fp32"
    assert (
        sum(f["bytes"] for name, f in report["files"].items() if name.startswith("unet")) < 13e6
    )  # 5.4 million weights of two bytes
    assert report["parity"]["networks"]["unet"]["sqnr"] < 100  # rounded
    assert min(report["parity"]["psnr"]) >= 40
    with pytest.raises(PrecisionError, match="wants int8-static: quantize it first"):
        export(wide, tmp_path / "x", target="onnx-int8")


def test_networks_of_a_large_export_are_not_all_open_while_it_is_checked(tmp_path, monkeypatch):
    asked = {"prompts": PROMPTS[:1], "num_inference_steps": 2, "threads": 1, "target": "onnx"}
    opened, most = [], []
    run = targets.get("onnx").run

    def counted(self, part, files, threads):
        network = run(self, part, files, threads)
        opened.append(weakref.ref(network))
        most.append(sum(o() is not None for o in opened))
        return network

    monkeypatch.setattr(targets.get("onnx"), "run", counted)
    usual = export(EMOJI, tmp_path / "usual", **asked)
    assert most == [1, 2, 3, 4]
    opened.clear(), most.clear()
    monkeypatch.setattr(instrument, "LARGE", 0)
    report = export(EMOJI, tmp_path / "large", **asked)
    assert max(most) < 4
    assert len(most) > 4, "closed ones are opened again"
    for part, figures in usual["parity"]["networks"].items():
        assert report["parity"]["networks"][part]["calls"] == figures["calls"]
        assert report["parity"]["networks"][part]["sqnr"] >= 80
    assert min(report["parity"]["psnr"] + report["parity"]["edit"]) >= 60
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@settings
@dataclass(frozen=True)
class Level:
    """Options of the target below."""

    level: Annotated[int, At(1, 9)] = 6


class Copied(Target[Level]):
    """A target that somebody else wrote: the graphs as they are, run by onnxruntime."""

    name = "copied"
    opened_by = ("onnxruntime",)
    options_type = Level

    def runtime(self):
        return Runtime("copies", usage="Open `model.onnx`.")

    def convert(self, part, graph, out):
        return Graph.load(graph).save(out / "model.onnx")

    def run(self, part, files, threads):
        return Session(str(files[0]), "cpu", threads)


def test_a_target_from_outside_is_one_class(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "_CLASSES", dict(targets._CLASSES))
    path = tmp_path / "p.toml"
    path.write_text("target = 'copied'\n[options]\nlevel = 3\n")
    with pytest.raises(UnknownNameError, match=r"target='copied' is not known; choose one of onnx"):
        profile.load(path)
    targets.register(Copied)
    with pytest.raises(InputError, match="target name 'copied' is taken"):
        targets.register(Copied)
    given = {"prompts": PROMPTS[:1], "num_inference_steps": 1, "threads": 1}
    report = export(EMOJI, tmp_path / "out", target=path, **given)
    assert report["checked_by"] == "the runtime itself"
    assert report["parity"]["psnr"][0] >= 60
    assert "Open `model.onnx`." in (tmp_path / "out" / "README.md").read_text()
    assert main(["verify", str(tmp_path / "out")]) == 0
    pipe = Pipeline.from_pretrained(tmp_path / "out", threads=1)
    assert pipe.report.backend == "onnxruntime"
    assert pipe(PROMPTS[0], num_inference_steps=1).images
    path.write_text("target = 'copied'\n[options]\nlevel = 10\n")
    with pytest.raises(InputError, match="profile p, options: level=10; accepted: at most 9"):
        export(EMOJI, tmp_path / "x", target=path, **given)


def test_the_code_names_what_the_model_has():
    target = targets.of(profile.load("ncnn"))
    pooled = Tensor("text_embeds", ("B", "16"), "float32", "pooled text")
    spec = dataclasses.replace(SPECS["text_encoder"], outputs=(pooled, *SPECS["unet"].outputs))
    target.specs = {"text_encoder_2": spec}
    names = {}
    exec(target.named("i, o = @INPUTS@, @OUTPUTS@"), names)
    assert names["i"] == {"text_encoder_2": ["input_ids"]}
    assert names["o"] == {"text_encoder_2": ["text_embeds", "out_sample"]}
    assert "text_encoder_2" in target.runtime().code
    with pytest.raises(InputError, match=r"ncnn cannot run text_encoder_2 .* such as mnn or onnx"):
        target.check(Artifact.open(EMOJI))


def test_every_target_says_which_backends_open_it():
    opened = {n: targets.get(n).opened_by for n in targets.names()}
    assert {n: b for n, b in opened.items() if b} == exported.OPENED_BY


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": None}, r"model=None \(NoneType\); accepted: a name that"),
        ({"target": 3}, "target=3; accepted: a profile's name or file"),
        ({"reference": 3}, "reference=3; accepted: a name that"),
        ({"prompts": "a fox"}, r"prompts='a fox' \(str\); accepted: a list of strings"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5; accepted: a whole number"),
        ({"threads": 100000}, "threads=100000; accepted: a whole number, 1 to"),
        ({"sampler": 3}, "sampler=3; accepted: a string"),
    ],
)
def test_argument_that_is_not_accepted_is_one_line_before_any_work(tmp_path, arguments, text):
    given = {"model": EMOJI, "target": "onnx", **arguments}
    with pytest.raises(InputError, match=text):
        export(given.pop("model"), tmp_path / "x", **given)


def test_errors(tmp_path, plain):
    with pytest.raises(UnknownNameError, match=r"choose one of .*onnx"):
        export(EMOJI, tmp_path / "x", target="gameboy")
    with pytest.raises(PrecisionError, match="sdlite quantize"):
        export(EMOJI, tmp_path / "x", target="onnx-int8")
    with pytest.raises(InputError, match="no fp32 ONNX graphs"):
        export(plain, tmp_path / "x", target="onnx")
    with pytest.raises(InputError, match="does not exist"):
        export(EMOJI, tmp_path / "x", target=tmp_path / "none.toml")
    bad = (
        ("target = 'onnx'\nspeed = 1", "speed is not known"),
        ("target = 'onnx'\n[gate]\nvae = 1", "gate.vae is not known"),
        ("x = [", "not TOML"),
    )
    for text, words in bad:
        (tmp_path / "p.toml").write_text(text)
        with pytest.raises(InputError, match=words):
            profile.load(tmp_path / "p.toml")
    (tmp_path / "p.toml").write_text("target = 'mnn'\ndynamic = true")
    if importlib.util.find_spec("MNN"):
        with pytest.raises(InputError, match="fixed shapes only"):
            export(EMOJI, tmp_path / "x", target=tmp_path / "p.toml")


def test_mnns_converter_works_in_a_folder_of_its_own(tmp_path, monkeypatch):
    """It keeps weights in a file of its working folder: of two exports at once one got the
    other's.
    """
    pytest.importorskip("MNN", reason="needs MNN")
    from sdlite.exporters.targets import mnn

    seen, right = [], mnn.subprocess.run
    monkeypatch.setattr(
        mnn.subprocess, "run", lambda *a, **k: seen.append(k.get("cwd")) or right(*a, **k)
    )
    monkeypatch.chdir(tmp_path)
    export(EMOJI, "out", target="mnn", prompts=PROMPTS[:1], num_inference_steps=1, threads=1)
    folders = [c for c in seen if c is not None]
    assert len(folders) == len(set(folders)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


IN_PLACE = """
import sys
from pathlib import Path
import numpy as np
from onnx import TensorProto, helper, save
from sdlite.exporters import profile, targets

x, y = (
    helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 4, 8, 8))
    for n in ("latent_sample", "sample")
)
third = helper.make_tensor("third", TensorProto.FLOAT, [], [3.0])
nodes = [helper.make_node("Div", ["latent_sample", "third"], ["d"])]
nodes += [helper.make_node("Tanh", ["d"], ["sample"])]
graph = helper.make_graph(nodes, "g", [x], [y], [third])
out = Path(sys.argv[1])
version = helper.make_opsetid("", 18)
save(helper.make_model(graph, opset_imports=[version], ir_version=9), str(out / "m.onnx"))
target = targets.of(profile.load("ncnn"))
network = target.run("vae_decoder", target.convert("vae_decoder", out / "m.onnx", out), 1)
given = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
want = np.tanh(given / 3)
for _ in range(2):
    np.testing.assert_allclose(network(latent_sample=given)["sample"], want, atol=1e-5)
"""


def test_ncnn_is_given_memory_of_its_own(tmp_path):
    """TAESD's first layer works in place; on numpy's memory ncnn ended the process."""
    pytest.importorskip("ncnn", reason="needs ncnn")
    command = [sys.executable, "-c", IN_PLACE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_rows_are_called_one_by_one():
    seen = []

    def network(**inputs):
        seen.append({k: v.shape for k, v in inputs.items()})
        return {"out_sample": inputs["sample"] * 2}

    out = RowByRow(network)(sample=np.ones((3, 4)), timestep=np.array(1.0))["out_sample"]
    assert out.shape == (3, 4)
    assert seen == [{"sample": (1, 4), "timestep": ()}] * 3


def test_command_line(tmp_path, capsys):
    assert main(["export", "--list"]) == 0
    assert "onnx-fixed" in capsys.readouterr().out
    assert (
        main(
            [
                "export",
                str(EMOJI),
                "--target",
                "onnx",
                "--steps",
                "1",
                "--out",
                str(tmp_path / "out"),
                "--threads",
                "1",
            ]
        )
        == 0
    )
    assert "SQNR" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        main(["export", str(EMOJI)])
    assert e.value.code == 2


def test_fused_schedule_computes_time_and_prompt_once(tmp_path):
    report = export(
        EMOJI,
        tmp_path / "out",
        target="onnx-fixed",
        fuse_schedule=True,
        prompts=PROMPTS[:1],
        num_inference_steps=3,
        threads=1,
    )
    assert min(report["parity"]["psnr"]) >= 60
    assert {f"unet/{n}.onnx" for n in ("time", "prompt", "step")} <= set(report["files"])
    whole = Graph.load(EMOJI / "unet/model.onnx")
    parts = {n: Graph.load(tmp_path / f"out/unet/{n}.onnx") for n in ("time", "prompt", "step")}
    layers = {n: [x.name for x in g.layers()] for n, g in parts.items()}
    names = [x.name for x in whole.layers()]
    assert sum(len(x) for x in layers.values()) == len(names)
    assert len(layers["time"]) == sum("time_emb" in n for n in names)
    assert len(layers["prompt"]) == sum("attn2.to_k" in n or "attn2.to_v" in n for n in names)
    assert {i.name for i in parts["step"].proto.graph.input} & {
        "timestep",
        "encoder_hidden_states",
    } == set()
    with pytest.raises(InputError, match="needs fixed shapes"):
        export(
            EMOJI,
            tmp_path / "x",
            target="onnx",
            fuse_schedule=True,
            prompts=PROMPTS[:1],
            num_inference_steps=1,
        )
    with pytest.raises(InputError, match="for onnx profiles"):
        export(EMOJI, tmp_path / "x", target="mnn", fuse_schedule=True)


def test_fused_graphs_are_opened_as_every_network_is(tmp_path, monkeypatch):
    """Threads that spin between calls slow the other sessions down."""
    from sdlite.backends import ort
    from sdlite.backends.ort import runner

    assert ort.session_options(1).get_session_config_entry("session.force_spinning_stop") == "1"
    opened, right = [], ort.session_options
    monkeypatch.setattr(
        ort,
        "session_options",
        lambda threads, size: opened.append((threads, size)) or right(threads, size),
    )
    runner(EMOJI / "vae_decoder/model.onnx", 1)
    assert [t for t, _ in opened] == [1]
    assert opened[0][1] > 3e6  # graph and weights


def test_hoisted_asks_again_for_another_prompt_or_step():
    from sdlite.backends.fused import Hoisted

    asked = []

    def part(name):
        return lambda given: asked.append(name) or {name: next(iter(given.values()))}

    def step(given):
        return {"out": given["sample"] + given["time"] + given["prompt"]}

    network = Hoisted(
        part("time"), part("prompt"), step, ["sample", "time", "prompt"], "out", keep=1
    )
    for t, e in ((1.0, 5.0), (1.0, 5.0), (2.0, 5.0), (1.0, 6.0), (1.0, 5.0)):
        out = network(sample=np.ones(1), timestep=np.array(t), encoder_hidden_states=np.array([e]))
        assert out["out"] == 1 + t + e
    assert asked == ["time", "prompt", "time", "prompt", "prompt"]


def test_half_arithmetic_keeps_a_timesteps_angles_in_float32(tmp_path):
    """Of a model that computes them itself, and casts its timestep before; a product beside them
    is rounded.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from sdlite.exporters.rewrites.float16 import to_half

    frequencies = np.linspace(0.5, 1, 8, dtype=np.float32)
    nodes = [
        helper.make_node("Cast", ["whole"], ["cast"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Add", ["cast", "timestep"], ["time"], name="time"),
        helper.make_node("Mul", ["time", "f"], ["angle"], name="angle"),
        helper.make_node("Sin", ["angle"], ["sine"], name="sine"),
        helper.make_node("Mul", ["sine", "g"], ["product"], name="product"),
    ]
    given = [
        helper.make_tensor_value_info("whole", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [1]),
    ]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [8]) for n in ("sine", "product")]
    initializer = [numpy_helper.from_array(frequencies, n) for n in "fg"]
    graph = helper.make_graph(nodes, "g", given, made, initializer)
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "m.onnx")
    half = to_half(tmp_path / "m.onnx", tmp_path / "half.onnx")
    network = Session(str(half), "cpu", 1)
    time = np.float32(951.3)
    out = network(whole=np.array([900]), timestep=np.array([time - 900], np.float32))
    np.testing.assert_allclose(out["sine"], np.sin(time * frequencies), atol=1e-3)
    off = np.abs(out["product"] - out["sine"] * frequencies)
    assert 1e-5 < off.max() < 1e-3


@pytest.mark.parametrize(("kind", "time"), [(np.float32, 951.3), (np.float16, 999)])
def test_angles_in_digits_are_those_of_the_timestep(kind, time, tmp_path):
    """Where there is float16 alone, whose product is half a radian off."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    from sdlite.exporters.rewrites.angles import in_digits

    frequencies = np.linspace(0.5, 1, 64, dtype=np.float32)
    nodes = [
        helper.make_node("Mul", ["t", "f"], ["angle"], name="angle"),
        helper.make_node("Sin", ["angle"], ["sine"], name="sine"),
        helper.make_node("Cos", ["angle"], ["cosine"], name="cosine"),
        helper.make_node("Concat", ["sine", "cosine"], ["out"], name="out", axis=0),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("t", "out")]
    initializer = [numpy_helper.from_array(frequencies, "f")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer)
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")

    def off(path):
        model = onnx.load(path)
        for i in model.graph.initializer:
            i.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(i).astype(kind), i.name))
        (made,) = ReferenceEvaluator(model).run(None, {"t": np.array([time], kind)})
        angles = np.float64(kind(time)) * frequencies
        return np.abs(made - np.concatenate([np.sin(angles), np.cos(angles)])).max()

    apart = in_digits(tmp_path / "m.onnx")
    assert off(apart) < (1e-4 if kind == np.float32 else 0.03)
    assert kind == np.float32 or off(tmp_path / "m.onnx") > 0.1
    del graph.node[1:]
    graph.output[0].name = "angle"
    onnx.save(helper.make_model(graph), tmp_path / "none.onnx")
    assert in_digits(tmp_path / "none.onnx") == tmp_path / "none.onnx"


@pytest.mark.parametrize("kept", [True, False])
def test_ncnn_computes_a_timesteps_angles_in_float32_when_asked_for_less(kept, tmp_path):
    """And would not by itself."""
    ncnn = pytest.importorskip("ncnn", reason="needs ncnn")
    from sdlite.exporters.targets.ncnn import _wide_angles

    frequencies = np.linspace(0.5, 1, 8, dtype=np.float32)
    lines = [
        "7767517",
        "5 5",
        "Input in0 0 1 in0",
        "MemoryData f 0 1 1 0=8",
        "BinaryOp angle 2 1 in0 1 2 0=2",
        "UnaryOp sine 1 1 2 3 0=9",
        "Swish out 1 1 3 out0",
        "",
    ]
    param = "\n".join(lines)
    (tmp_path / "m.param").write_text(_wide_angles(param) if kept else param)
    (tmp_path / "m.bin").write_bytes(frequencies.tobytes())
    net = ncnn.Net()
    net.opt.use_bf16_storage = True  # as float16 on a phone, with fewer bits
    assert net.load_param(str(tmp_path / "m.param")) == 0
    assert net.load_model(str(tmp_path / "m.bin")) == 0
    time = np.float32(951.3)
    with net.create_extractor() as run:
        run.input("in0", ncnn.Mat(np.array([time])).clone())
        made = np.array(run.extract("3")[1])
    error = np.abs(made - np.sin(time * frequencies)).max()
    assert error < 1e-3 if kept else error > 0.1


def test_half_arithmetic_leaves_norms_in_float32(tmp_path):
    import onnx

    from sdlite.exporters.rewrites.float16 import FLOAT32, to_half

    export(
        EMOJI,
        tmp_path / "out",
        target="onnx-fixed",
        prompts=PROMPTS[:1],
        num_inference_steps=1,
        threads=1,
    )
    source = tmp_path / "out/unet/model.onnx"
    half = onnx.load(str(to_half(source, tmp_path / "half.onnx")))
    types = {i.name: i.data_type for i in half.graph.initializer}
    weights = {
        types[n.input[1]]
        for n in half.graph.node
        if n.op_type in ("Conv", "MatMul", "Gemm") and n.input[1] in types
    }
    assert weights == {onnx.TensorProto.FLOAT16}
    scales = {
        types[x]
        for n in half.graph.node
        if n.op_type in FLOAT32
        for x in n.input
        if x in types and "norm" in x
    }
    assert scales == {onnx.TensorProto.FLOAT}
    assert {i.type.tensor_type.elem_type for i in (*half.graph.input, *half.graph.output)} == {
        onnx.TensorProto.FLOAT
    }
    from sdlite.backends.ort import Session

    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.normal(size=(1, 8, 8, 8)),
        "timestep": np.array(500.0),
        "encoder_hidden_states": rng.normal(size=(1, 28, 192)),
    }
    inputs = {k: v.astype(np.float32) for k, v in inputs.items()}
    paths = (source, tmp_path / "half.onnx")
    want, got = (Session(str(p), "cpu", 1)(**inputs)["out_sample"] for p in paths)
    error = 10 * np.log10((want**2).sum() / ((got - want) ** 2).sum())
    assert 40 < error < 100  # near, and not the same arithmetic


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"precision = 'fp32'", "profile p: target is missing"),
        (b"target = ['onnx']", "target=.*a string"),
        (b"target = 'onnx'\nbatch = '1'", "batch='1'"),
        (b"target = 'onnx'\nbatch = -1", "batch=-1"),
        (b"target = 'onnx'\nheight = 1000000", "height=1000000"),
        (b"target = 'onnx'\nwidth = 64.5", "width=64.5"),
        (b"target = 'onnx'\ndynamic = 1", "dynamic=1"),
        (b"target = 'onnx'\nabout = 3", "about=3"),
        (b"target = 'onnx'\ngate = 40", "gate=40; accepted: a table"),
        (b"target = 'onnx'\noptions = [1]", "options=.*accepted: a table"),
        (b"target = 'onnx'\n[gate]\npsnr = nan", "gate.psnr=nan; accepted: a finite number"),
        (b"target = 'onnx'\n[gate]\npsnr = '40'", "gate.psnr='40'; accepted: a finite number"),
        (b"about = '\xff'", "not UTF-8"),
        (b"a = " + b"[" * 5000, "not TOML"),
    ],
)
def test_a_profiles_values_are_looked_at(tmp_path, text, says):
    (tmp_path / "p.toml").write_bytes(text)
    with pytest.raises((InputError, UnknownNameError), match=says):
        profile.load(tmp_path / "p.toml")
