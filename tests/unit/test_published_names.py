"""The table of published models: what it says is what the results and configurations say."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

import sdlite
from benchmarks import published_models
from benchmarks.tables import rows
from sdlite import families, hub, published
from sdlite.cli import main
from sdlite.errors import ArtifactError, UnknownNameError
from tests.conftest import EMOJI

TABLE = published.table()
RAW = json.loads(published.TABLE.read_text())
FLOAT = ("torch fp32", "onnxruntime fp32", "openvino fp32")


@pytest.mark.parametrize("name", TABLE)
def test_a_row_is_pinned_and_its_layout_makes_diffusers_images_on_every_engine(name):
    row = TABLE[name]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", row.repo)
    assert row.family in families.known()
    assert (row.revision is None) == (name == "small-sd")
    last = {r["model"]: r for r in rows.read("published")}[row.layout]
    assert all(last["runs"][run] >= 60 for run in FLOAT)
    layout = published_models.MODELS[row.layout]
    assert (min(row.steps, 4), row.guidance) == (layout.steps, layout.guidance)


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_those_of_the_published_configuration(name):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")
    config = dict(published_models.MODELS[TABLE[name].layout].unet)
    stages = len(config["block_out_channels"])
    # narrow there, as published here
    text = {48: 768, 64: 1024, 128: 2048}[config["cross_attention_dim"]]
    config |= {
        "block_out_channels": [320, 640, 1280, 1280][:stages],
        "cross_attention_dim": text,
        "norm_num_groups": 32,
    }
    if "projection_class_embeddings_input_dim" in config:
        config["projection_class_embeddings_input_dim"] = 6 * 256 + 1280
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    assert sum(p.numel() for p in unet.parameters()) == TABLE[name].unet_parameters


def test_seconds_and_memory_are_those_of_the_committed_results():
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for r in rows.last_run([r for r in rows.read("speed") if r["suite"] == "zoo-512"]):
        case = r["case"]
        if case["engine"] == "sdlite-openvino" and case["batch"] == 1:
            key = (case["model"].removeprefix("shape:"), case["precision"])
            found[key] = (round(r["median_seconds"], 2), round(r["peak_mib"]))
            assert r["date"] in RAW["measured"]["where"]
            assert (case["steps"], case["size_px"], case["guidance"]) == (4, 512, 1.0)
    for shape, runs in RAW["measured"]["shapes"].items():
        for run in runs:
            measured = found[shape, run["precision"]]
            assert (run["seconds"], run["peak_mib"]) == pytest.approx(measured, abs=0.011)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("revision", "main", "accepted: a commit of 40 hex digits"),
        ("repo", "bk-sdm-tiny", "accepted: an id org/name"),
        ("steps", 0, "accepted: a whole number, 1 or more"),
    ],
)
def test_what_the_table_may_not_hold_is_refused(key, value, says):
    raw = copy.deepcopy(RAW)
    raw["models"]["bk-sdm-tiny"][key] = value
    with pytest.raises(ArtifactError, match=says):
        published.read(raw)


def test_models_lists_names_commits_licenses_and_what_was_measured(capsys):
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    for row in TABLE.values():
        assert row.pinned in said
        assert row.license.restrictions in said
    assert "small-sd, not pinned" in said
    assert "random weights" in said
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in found["embedded"]] == ["emoji"]
    assert {r["name"]: r["revision"] for r in found["published"]} == {
        name: row.revision for name, row in TABLE.items()
    }
    tiny = next(r for r in found["published"] if r["name"] == "bk-sdm-tiny")
    assert {m["precision"] for m in tiny["measured"]} == {"fp32", "int8-static"}


def test_a_folder_of_that_name_goes_first_and_says_so(tmp_path, monkeypatch, caplog):
    (tmp_path / "bk-sdm-tiny").symlink_to(EMOJI)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("bk-sdm-tiny") == Path("bk-sdm-tiny")
    assert hub.known("bk-sdm-tiny") is None
    assert caplog.messages == [
        "bk-sdm-tiny is a folder here; the published model is nota-ai/bk-sdm-tiny"
    ]
    assert hub.known("tiny-sd") is TABLE["tiny-sd"]
    with pytest.raises(UnknownNameError):  # a path is no name
        hub.resolve(Path("tiny-sd"))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("bk-sdm-tinny", "Did you mean bk-sdm-tiny"),
        ("BK-SDM-Tiny", "Did you mean bk-sdm-tiny"),
        ("emojis", "Did you mean emoji?"),
    ],
)
def test_a_mistyped_name_gets_near_ones(given, meant):
    with pytest.raises(UnknownNameError, match=re.escape(meant)) as e:
        hub.resolve(given)
    assert "`sdlite models`" in str(e.value)
    assert str(e.value).isprintable()


def test_a_name_that_is_near_to_none_gets_none():
    with pytest.raises(UnknownNameError, match=r"hub id like 'org/name'\.$"):
        hub.resolve("x" * 5000)


def test_convert_by_name_keeps_the_cards_steps_and_guidance(monkeypatch, tmp_path):
    given = {}

    def convert(source, out, **options):
        given.update(options)
        out.mkdir()
        return out

    monkeypatch.setitem(vars(sdlite), "convert", convert)
    monkeypatch.setattr(hub, "resolve", lambda *_: EMOJI)
    for name, steps in (("a", []), ("b", ["--steps", "2"])):
        assert main(["convert", "sd-turbo", "--out", str(tmp_path / name), *steps]) == 0
        wanted = int(steps[1]) if steps else 1
        assert given["sampler"] == {"num_inference_steps": wanted, "guidance_scale": 0.0}
