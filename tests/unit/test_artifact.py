from __future__ import annotations

import json
import shutil

import pytest

import sdlite
from sdlite.artifact import Artifact
from sdlite.errors import ArtifactError, InputError
from sdlite.io import writing


def edit_manifest(folder, change):
    path = folder / "sdlite.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def load(folder):
    return sdlite.Pipeline.from_pretrained(folder, backend="onnxruntime", threads=1)


def test_embedded_artefact_is_whole_and_within_its_budget():
    from tests.conftest import EMOJI

    artifact = Artifact.open(EMOJI)
    checked = artifact.verify()
    assert "unet/model.onnx" in checked
    assert {p.relative_to(EMOJI).as_posix() for p in EMOJI.rglob("*") if p.is_file()} == {
        *checked,
        "sdlite.json",
    }
    assert sum(f["bytes"] for f in artifact.manifest.files.values()) < 27e6
    assert artifact.manifest.student["unet_parameters"] < 10e6


@pytest.mark.parametrize(
    "name",
    ["unet/model.onnx", "unet/diffusion_pytorch_model.safetensors", "vae_decoder/model.onnx.data"],
)
def test_truncated_file_is_refused(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="cut off or changed"):
        load(copy)


@pytest.mark.parametrize("name", ["text_encoder/model.onnx", "text_encoder/model.safetensors"])
def test_one_changed_byte_is_refused(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ArtifactError, match="SHA-256"):
        load(copy)


def test_missing_file_is_refused(copy):
    (copy / "unet/model.onnx").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load(copy)


@pytest.mark.parametrize(
    "path", ["../evil.onnx", "/etc/passwd", "unet/../../evil.onnx", "C:evil", "a\\b"]
)
def test_path_that_leaves_the_folder_is_refused(copy, path):
    edit_manifest(copy, lambda d: d["files"].update({path: {"sha256": "0", "bytes": 1}}))
    with pytest.raises(ArtifactError, match="not a plain path inside"):
        load(copy)


def test_link_that_leaves_the_folder_is_refused(copy, tmp_path):
    outside = tmp_path / "outside.onnx"
    shutil.move(copy / "unet/model.onnx", outside)
    (copy / "unet/model.onnx").symlink_to(outside)
    with pytest.raises(ArtifactError, match="leaves the model folder"):
        load(copy)


def test_pickle_in_the_manifest_is_refused(copy):
    edit_manifest(
        copy, lambda d: d["files"].update({"unet/weights.bin": {"sha256": "0", "bytes": 1}})
    )
    with pytest.raises(ArtifactError, match="pickle"):
        load(copy)


def test_folder_with_only_pickled_weights_is_refused(plain, tmp_path):
    pytest.importorskip("torch", reason="needs the torch extra")
    folder = tmp_path / "pickled"
    shutil.copytree(plain, folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(
        folder / "unet/diffusion_pytorch_model.bin"
    )
    with pytest.raises(ArtifactError, match=r"only diffusion_pytorch_model\.bin"):
        sdlite.Pipeline.from_pretrained(folder, backend="torch")


@pytest.mark.parametrize("version", ["2.0", "", "x"])
def test_unknown_major_version_is_refused(copy, version):
    edit_manifest(copy, lambda d: d.update(format=version))
    with pytest.raises(ArtifactError, match="format"):
        load(copy)


def test_minor_version_is_accepted(copy):
    edit_manifest(copy, lambda d: d.update(format="1.9"))
    load(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(surprise=1),
        lambda d: d.update(files=[]),
        lambda d: d["files"].update({"x.json": {"bytes": 1}}),
        lambda d: d["variants"].update({"int3": {}}),
        lambda d: d["variants"]["fp16"]["unet"].update(file="other.onnx"),
    ],
    ids=["unknown key", "files is a list", "no hash", "unknown precision", "unlisted file"],
)
def test_malformed_manifest_is_refused(copy, change):
    edit_manifest(copy, change)
    with pytest.raises(ArtifactError):
        load(copy)


def test_manifest_that_is_not_json_is_refused(copy):
    (copy / "sdlite.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(copy)


def test_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"model_index\.json"):
        load(tmp_path)


def test_truncated_safetensors_in_a_plain_folder_is_refused(plain, tmp_path):
    pytest.importorskip("torch", reason="needs the torch extra")
    folder = tmp_path / "cut"
    shutil.copytree(plain, folder)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ArtifactError, match="cut off"):
        sdlite.Pipeline.from_pretrained(folder, backend="torch")


def test_writing_leaves_nothing_when_it_fails(tmp_path):
    def fail_half_way():
        with writing(tmp_path / "out") as tmp:
            (tmp / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_writing_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="not an empty folder"), writing(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_save_pretrained_gives_an_equal_artefact(emoji, tmp_path):
    out = emoji.save_pretrained(tmp_path / "saved")
    assert Artifact.open(out).verify() == emoji.artifact.verify()
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
