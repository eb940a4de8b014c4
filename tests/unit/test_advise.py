"""`advise`: what it says comes from the table or is said to be unmeasured; its recipes can be
run.
"""

from __future__ import annotations

import functools
import tomllib

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from benchmarks import distil  # noqa: E402
from sdlite.distill import advise as module  # noqa: E402
from sdlite.distill.advise import (  # noqa: E402
    DEVICES,
    SD14,
    SD14_TEXT,
    SD14_VAE,
    WISHES,
    Table,
    advise,
    decoder_macs,
    macs,
)
from sdlite.distill.recipe import Recipe  # noqa: E402
from sdlite.distill.students import PRESETS, StudentSpec, parameters, shape  # noqa: E402
from sdlite.errors import InputError, UnknownNameError  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def once():
    """SD's networks are built once for all tests, not for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_teacher", functools.cache(module._teacher))
        patch.setattr(module, "shape", functools.cache(module.shape))
        patch.setattr(module, "macs", functools.cache(module.macs))
        yield


def row(table, strategy, seed, kid, *, images=100, calls=50, minutes=10.0, macs=50_000_000):
    return {
        "table": table,
        "strategy": strategy,
        "seed": seed,
        "images": images,
        "kid": kid,
        "identity@1": 0.5,
        "exact@1": 0.4,
        "colour": 0.9,
        "heldout@1": 0.1,
        "paired_psnr": 15.0,
        "seconds_per_image": 0.1,
        "loss": 0.1,
        "parameters": 5_000_000,
        "macs": macs,
        "calls": calls,
        "steps": 25,
        "guidance": 2.0,
        "sampler": "ddim",
        "minutes": minutes,
        "date": "2026-01-01",
        "commit": "abc",
        "cpu": "a CPU",
        "cores": 2,
    }


def rows(**kids):
    """Three seeds each, a spread of 1; the table that a benchmark would leave."""
    out = [
        row(t, "teacher", s, 20.0, images=0, macs=600_000_000)
        for t in ("size", "steps")
        for s in range(3)
    ]
    size = {
        "from scratch": 80,
        "task": 60,
        "output": 50,
        "feature": 50.2,
        "feature + output": 45,
        "feature + output + mask": 55,
    }
    steps = {
        "guidance": (30, 25),
        "progressive 8": (31, 8),
        "progressive 4": (34, 4),
        "progressive 2": (60, 2),
        "adversarial 2": (38, 2),
    }
    for s in range(3):
        d = s - 1
        out += [row("size", n, s, kids.get(n, k) + d) for n, k in size.items()]
        out += [row("steps", "start", s, 30 + d, images=0)] + [
            row("steps", n, s, k + d, calls=c) for n, (k, c) in steps.items()
        ]
    return out


def measured(**kids):
    return Table(distil.summary(rows(**kids)))


ASK = {"device": "cpu", "memory_gb": 3.0, "minutes": 60.0, "wish": "balanced"}


def test_shipped_table_is_what_the_summary_command_makes():
    assert distil.SUMMARY.read_text() == distil.summary_text(distil.RESULTS), (
        "run python -m benchmarks.distil summary"
    )


def test_without_a_table_nothing_is_claimed():
    said = advise(**ASK, table=Table({}))
    text = "\n".join(said.reasons)
    assert text.count("not measured yet") >= 10
    assert "KID" not in text
    assert "--images-per-second" in text
    assert 'preset = "bk-tiny"' in said.recipe


def test_every_answer_is_a_recipe():
    for device in DEVICES:
        for wish in WISHES:
            for table in (Table({}), measured()):
                said = advise(device=device, memory_gb=8.0, minutes=60.0, wish=wish, table=table)
                assert Recipe.parse(tomllib.loads(str(said))).stages  # reasons are comments
                assert "sdlite" in said.then


def test_measured_rows_choose_losses_and_steps():
    balanced, speed, quality = (
        advise(**{**ASK, "wish": w}, table=measured()) for w in ("balanced", "speed", "quality")
    )
    assert "losses: feature + output: KID 45.00 ± 1.00" in "\n".join(balanced.reasons)
    steps = [
        next(s for s in r.reasons if s.startswith("steps:")) for r in (balanced, speed, quality)
    ]
    assert "progressive 4: 4 network calls" in steps[0]  # 34 is within 1.15 x 30, 38 is not
    assert "adversarial 2: 2 network calls" in steps[1]  # 38 is within 1.3 x 30, 60 is not
    assert "guidance: 25 network calls" in steps[2]
    assert [s["kind"] for s in tomllib.loads(speed.recipe)["stage"]] == [
        "output",
        "guidance",
        "progressive",
        "adversarial",
        "tiny-decoder",
    ]
    assert tomllib.loads(speed.recipe)["stage"][2]["steps"] == [8, 4, 2]


def test_a_strategy_within_the_spread_of_the_best_is_taken_when_it_trains_faster():
    table = measured(output=46.0)
    for r in table.rows:
        r["minutes"] = 2.0 if r["strategy"] == "output" else 10.0
    assert any(s.startswith("losses: output:") for s in advise(**ASK, table=table).reasons)
    table = measured(output=60.0)
    for r in table.rows:
        r["minutes"] = 2.0 if r["strategy"] == "output" else 10.0
    assert any(
        s.startswith("losses: feature + output:") for s in advise(**ASK, table=table).reasons
    )


def test_aids_help_harm_or_do_neither():
    said = {a.split(",")[0]: a for a in measured(task=50.1).aids()}
    assert said["from scratch"].endswith("harms")
    assert said["feature + output"].endswith("helps")
    assert said["output"].endswith("no difference beyond the seeds' spread")
    assert said["article's literal loss"].endswith("not measured yet")
    one = Table(distil.summary([r for r in rows() if r["seed"] == 0]))
    assert any("no verdict" in a for a in one.aids())


def test_time_becomes_images_and_a_short_budget_is_said():
    given = tomllib.loads(advise(**ASK, table=Table({}), images_per_second=10.0).recipe)["stage"]
    assert given[0]["images"] == 18_000  # half of 10 x 3600
    assert (
        given[1]["images"] == given[2]["images"] == 4_500
    )  # guidance and three halvings share the rest
    said = advise(**{**ASK, "minutes": 1.0}, table=measured())
    assert any("estimate" in r or "multiply-accumulates" in r for r in said.reasons)
    assert any(r.startswith("short:") for r in said.reasons)


def test_arguments_that_are_not_accepted():
    for changed, words in (
        ({"device": "toaster"}, "choose one of cpu, gpu, phone, browser"),
        ({"wish": "all"}, "choose one of quality"),
    ):
        with pytest.raises(UnknownNameError, match=words):
            advise(**{**ASK, **changed})
    for changed, words in (
        ({"minutes": 0.0}, "minutes=0"),
        ({"memory_gb": float("nan")}, "memory_gb=nan"),
        ({"memory_gb": 0.1}, "no student fits"),
    ):
        with pytest.raises(InputError, match=words):
            advise(**{**ASK, **changed}, table=Table({}))


def test_sizes_are_those_of_the_real_networks():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        teacher = UNet2DConditionModel(**SD14)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49_408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
        vae = AutoencoderKL(**SD14_VAE)
    assert parameters(text) == SD14_TEXT
    assert parameters(vae.decoder) == 49_490_179
    assert decoder_macs(vae, (32, 32)) == pytest.approx(decoder_macs(vae, (64, 64)) / 4, rel=0.05)
    assert {
        n: parameters(shape(teacher, PRESETS[n])) for n in ("bk-tiny", "w0.62", "extreme-120m")
    } == {"bk-tiny": 323_384_964, "w0.62": 340_352_604, "extreme-120m": 123_234_244}
    assert macs(shape(teacher, StudentSpec(one_layer=True))) < 0.75 * macs(teacher)


def test_every_attention_product_is_counted():
    """By hand, for each token of text: keys and values of 12 features, scores and sums over the
    positions; (layers, channels, positions).
    """
    from tests.unit.test_students import small

    layers = [(5, 16, 64), (5, 32, 16), (6, 32, 4)]
    one = sum(n * (2 * 12 * c + 2 * p * c) for n, c, p in layers)
    assert macs(small(), tokens=77) - macs(small(), tokens=2) == 75 * one


def test_command_line(tmp_path, capsys, monkeypatch):
    from sdlite.cli import main

    monkeypatch.setattr(module, "TABLE", tmp_path / "none.json")
    assert main(["distill", "advise", "--memory", "3", "--wish", "speed"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# size:")
    assert Recipe.parse(tomllib.loads(out)).stages
    target = tmp_path / "r.toml"
    assert main(["distill", "advise", "--memory", "3", "--out", str(target)]) == 0
    assert Recipe.load(target).name == "balanced-cpu"
    assert main(["distill", "advise", "--out", str(target)]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["distill", "advise", "--wish", "all"]) == 1
    for wrong in (["distill", "a.toml"], ["distill", "doctor", "a.toml", "--teacher", "t"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "--data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(
            ["distill", "a.toml", "--teacher", "t", "--data", "d", "--out", "o", "--device", "gpu"]
        )
    assert "--device" in capsys.readouterr().err
