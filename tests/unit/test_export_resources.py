"""Too little disk or memory, an interrupt, a converter's own error: a clear message and nothing
left behind.
"""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

pytest.importorskip("onnx", reason="needs the quantize extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

from sdlite import disk, memory
from sdlite.artifact import Artifact
from sdlite.cli import main
from sdlite.errors import ExportError
from sdlite.exporters import profile, targets
from sdlite.exporters.export import export
from sdlite.exporters.targets.onnx import Onnx as target
from tests.conftest import EMOJI

GIB = 1 << 30


def run(tmp_path):
    return export(
        EMOJI,
        tmp_path / "out",
        target="onnx-fixed",
        prompts=["red apple"],
        num_inference_steps=1,
        threads=1,
    )


def failing_at(monkeypatch, error, part="vae_decoder"):
    """The converter writes a file for every network and raises at `part`."""
    seen = []

    def convert(self, name, graph, out):
        (out / "half").write_bytes(b"half")
        seen.append(out)
        if name == part:
            raise error
        return [out / "half"]

    monkeypatch.setattr(target, "convert", convert)
    return seen


def test_sizes_open_float16_weights_to_float32():
    sizes = disk.sizes(Artifact.open(EMOJI), "fp32")
    stored = {
        p: (EMOJI / p / "diffusion_pytorch_model.safetensors").stat().st_size for p in ("unet",)
    }
    assert sizes["unet"] == pytest.approx(2 * stored["unet"], rel=0.1)
    assert set(sizes) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}


def test_too_little_disk_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_disk", lambda path: 5 << 20)
    with pytest.raises(
        ExportError,
        match=(
            r"too little disk for onnx-fixed: about \d+ MiB are needed in .*, 5 MiB are"
            r" free.*Nothing was written"
        ),
    ):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 3 << 20)
    with pytest.raises(
        ExportError,
        match=(
            r"too little memory for onnx-fixed: at least \d+ MiB .* 3 MiB are free.*Nothing was"
            r" written"
        ),
    ):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_enough_room_and_systems_that_do_not_tell_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    monkeypatch.setattr(disk, "free_disk", lambda path: GIB)
    assert run(tmp_path)["parity"]["psnr"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "the disk ran out during the export of onnx-fixed",
        ),
        (MemoryError(), "the memory ran out during the export of onnx-fixed"),
        (
            RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
            "the memory ran out during the export of onnx-fixed",
        ),
        (
            RuntimeError("unsupported operator Mystery"),
            r"onnx could not convert vae_decoder \(RuntimeError\): unsupported operator Mystery",
        ),
    ],
)
def test_what_goes_wrong_half_way_is_told_and_leaves_nothing(tmp_path, monkeypatch, error, words):
    seen = failing_at(monkeypatch, error)
    with pytest.raises(ExportError, match=words):
        run(tmp_path)
    assert len(seen) == 3
    assert list(tmp_path.iterdir()) == []


def test_memory_that_ends_in_onnxruntime_is_told(tmp_path, monkeypatch):
    def record(*_args, **_settings):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr("sdlite.exporters.parity.record", record)
    with pytest.raises(ExportError, match="the memory ran out during the export of onnx-fixed"):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_system_stay_what_they_are(tmp_path, monkeypatch):
    failing_at(monkeypatch, PermissionError(errno.EACCES, "no"))
    with pytest.raises(PermissionError):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_half_way_leaves_nothing_and_exits_1(tmp_path, monkeypatch, capsys):
    seen = failing_at(monkeypatch, KeyboardInterrupt())
    command = [
        "export",
        str(EMOJI),
        "--target",
        "onnx-fixed",
        "--steps",
        "1",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 1
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not any(p.exists() for p in seen)
    assert list(tmp_path.iterdir()) == []


def mystery(tmp_path):
    """A network with an operator that nobody has."""
    import onnx
    from onnx import TensorProto, helper

    node = helper.make_node(
        "Mystery", ["latent_sample"], ["sample"], name="the_node", domain="custom"
    )
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 3, 8, 8))
        for n in ("latent_sample", "sample")
    ]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("custom", 1)]
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=9), str(tmp_path / "m.onnx")
    )
    return tmp_path / "m.onnx"


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("openvino", "openvino"),
        ("mnn", "MNN"),
        ("ncnn", "ncnn"),
        ("tensorrt-rtx", "tensorrt_rtx"),
        ("qnn-fp16", "onnxruntime_qnn"),
    ],
)
def test_an_unsupported_operator_is_an_error_of_every_converter(tmp_path, name, package):
    pytest.importorskip(package, reason=f"needs {package}")
    from sdlite.exporters import export as exporting

    settings = profile.load(name)
    target = targets.of(settings)
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(ExportError, match=r"vae_decoder|Mystery") as e,
        exporting._refusals("vae_decoder", settings),
    ):
        target.convert("vae_decoder", mystery(tmp_path), tmp_path / "out")
    assert "Traceback" not in str(e.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not Linux")
def test_a_process_has_a_peak_of_its_own():
    """Linux's `ru_maxrss` begins with that of the process that started it."""
    own = "from sdlite.memory import peak_mib; print(peak_mib())"
    code = "import subprocess, sys; x = bytearray(300 << 20); x[::4096] = b'1' * (len(x) // 4096)"
    code += f"; subprocess.run([sys.executable, '-c', {own!r}], check=True)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < float(made.stdout) < 150
