"""The published models in int8 and on export targets: what a cell says, and what is refused."""

from __future__ import annotations

import json

import pytest

from benchmarks import published_int8, targets
from benchmarks.cases import Case
from benchmarks.peers import model_folder
from benchmarks.tables import matrix
from sdlite.errors import ExportError, InputError, UnknownNameError


def test_a_narrow_model_is_asked_for_by_name(tmp_path):
    with pytest.raises(UnknownNameError, match=r"narrow:vegas: choose one of sd14, .*vega, "):
        model_folder(Case("narrow:vegas", "sdlite-ort", 2, 128), tmp_path)


def report(not_run):
    networks = {"unet": {"sqnr": 61.26}, "vae_decoder": {"sqnr": 70.0}}
    parity = {"psnr": [80.04, 90.0], "edit": [75.55], "networks": networks}
    return {"parity": parity, "not_run": not_run}


def test_a_cell_has_the_least_image_an_edit_among_them_and_the_least_network():
    assert targets.shown(report({})) == {"psnr": 75.5, "sqnr": 61.3, "run": True}
    assert targets.shown(report({"unet": "no GPU"}))["run"] is False


@pytest.mark.parametrize(
    ("raised", "kind"), [(InputError("no: DIR"), "refused"), (ExportError("the gate"), "failed")]
)
def test_what_is_not_exported_is_a_cell_with_the_words(tmp_path, monkeypatch, raised, kind):
    folder = tmp_path / "narrow-vega-onnx"

    def export(*_):
        kept = tmp_path / "scratch" / "out.failed"
        kept.mkdir(parents=True)
        (kept / "export-report.json").write_text(json.dumps(report({})))
        plain = folder.name.removesuffix("-onnx")
        raise type(raised)(f"{raised} of {folder}, {folder.name}, {plain}. No model was written; x")

    monkeypatch.setattr(targets, "exported", export)
    found = targets.cell(folder, "vega", "onnx", None, tmp_path / "scratch")
    assert found[kind] == f"{raised} of vega, vega, vega."
    assert ("psnr" in found) == (kind == "failed")


def test_a_target_that_asks_for_another_sampler_gets_it(monkeypatch):
    given = []

    def cell(folder, name, target, sampler, scratch):
        given.append(sampler)
        return {"psnr": 70.0} if sampler else {"refused": "export it with --sampler ddim."}

    monkeypatch.setattr(targets, "cell", cell)
    job = {"folder": "x", "model": "sd14", "target": "web"}
    assert targets.worker(job) == {"sampler": "ddim", "psnr": 70.0}
    assert given == [None, "ddim"]


def test_the_table_of_targets_takes_the_last_cell_of_each(monkeypatch):
    about = {"date": "d", "commit": "c"}
    works = {"psnr": 80.0, "sqnr": 90.0, "run": True}
    first = {"onnx": {"fault": "exit 1: x"}, "web": {"refused": "one encoder"}}
    rows = [
        {"model": "vega", "targets": first, **about},
        {"model": "vega", "targets": {"onnx": works | {"run": False}}, **about},
        {"model": "sd14", "targets": {"web": works | {"sampler": "ddim"}}, **about},
        {"model": "sd14", "targets": {"onnx": {"failed": "gate", "psnr": 1, "sqnr": 2}}, **about},
    ]
    export = {"parity": report({})["parity"], "not_run": "no Mac", "profile": "coreml", **about}
    exports = [export | {"model": m} for m in ("vega, narrow", "vega, narrow (int8)", "vega")]
    found = {"targets": rows, "exports": [*exports, export | {"model": "odd, narrow"}]}
    monkeypatch.setattr(matrix, "read", found.__getitem__)
    assert matrix.targets()[2:] == [
        "| `sd14` | failed (1) 1.0 / 2.0 | 80.0 / 90.0, ddim |  | d `c` |",
        "| `vega` | 80.0 / 90.0* | refused (2) | 75.5 / 61.3* | d `c` |",
        "",
        "1. gate",
        "2. one encoder",
    ]


def test_the_table_of_int8_names_the_network_that_is_changed_most(monkeypatch):
    runs: dict[str, float | str] = {str(run): 40.0 for run in published_int8.RUNS}
    assert len(matrix.RUNS) == 5
    assert set(matrix.RUNS) < set(runs)
    runs |= dict.fromkeys(set(runs) - set(matrix.RUNS), "refused: not there.")
    networks = {"int8-static": {"onnxruntime": {"unet": 21.0, "vae_decoder": 18.5}}}
    row = {
        "model": "vega",
        "runs": runs,
        "networks": networks,
        "apart": 50.0,
        "date": "d",
        "commit": "c",
        "cpu": "x",
        "versions": {"torch": "2"},
    }
    ends = {k: row[k] for k in ("date", "commit", "cpu", "versions")}
    refused = {"model": "odd", "refused": "odd.", **ends}
    found = {"published_int8": [refused, row], "published": [{"model": "vega"}]}
    monkeypatch.setattr(matrix, "read", found.__getitem__)
    lines = matrix.int8()
    assert "| 40.0 | 50.0 |  | 18.5, decoder |  | d `c` |" in lines[3]
    assert "refused (1) | refused (1)" in lines[2]
    assert lines[5] == "1. odd."
    assert lines[-1].endswith("torch int8-static: not there.")
