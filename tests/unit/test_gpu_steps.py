"""The steps of benchmarks/gpu on the CPU, on a small model: they run, and their rows say what."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("diffusers", reason="needs the torch extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")
from benchmarks.gpu import common, graphs, images, kernels


def rows(step, tmp_path, monkeypatch, *options):
    out = tmp_path / "rows.jsonl"
    own = ["--device", "cpu", "--scratch", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [step.__name__, *own, *options])
    assert step.main() == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")
def test_images_graphs_and_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "LEAST", 1)
    small = ["--models", "emoji", "--batches", "1"]
    near, *speeds = rows(images, tmp_path, monkeypatch, *small, "--kinds", "fp16", "diffusers fp32")
    assert near["psnr_to_cpu_fp32"]["fp32"] >= 60
    assert 22 <= near["psnr_to_cpu_fp32"]["bf16"] < 60
    assert [r["kind"] for r in speeds] == ["fp16", "diffusers fp32"]
    assert all(r["seconds"] > 0 and "error" not in r and r["commit"] for r in speeds)
    made = rows(graphs, tmp_path, monkeypatch, *small)[-2:]
    assert [r["kind"] for r in made] == ["fp32", "fp16"]
    assert min(r["psnr_to_cpu_fp32"] for r in made) >= 40
    [spent] = rows(kernels, tmp_path, monkeypatch, "--models", "emoji", "--size", "64")[-1:]
    assert spent["milliseconds"]["convolution"] > 0


def test_what_does_not_fit_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError):  # no row was made
        rows(images, tmp_path, monkeypatch, "--minutes", "0")
    assert "no time was left for: emoji; sd14; bk-tiny; ssd-1b" in capsys.readouterr().out
