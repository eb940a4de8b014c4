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
from benchmarks.tables import strategies as tables  # noqa: E402
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
from sdlite.distill.evidence import judge  # noqa: E402
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
    assert "BK-SDM, arXiv:2305.15798: 50,000 steps of 256 images" in text


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
        if r["strategy"] == "output":  # the best one has 44, 45 and 46
            r["kids"] = {"0": 43.0, "1": 46.0, "2": 49.0}
    assert any(s.startswith("losses: output:") for s in advise(**ASK, table=table).reasons)
    table = measured(output=60.0)
    for r in table.rows:
        r["minutes"] = 2.0 if r["strategy"] == "output" else 10.0
    assert any(
        s.startswith("losses: feature + output:") for s in advise(**ASK, table=table).reasons
    )


def test_aids_help_harm_or_do_neither():
    said = {a.split(" against ")[0]: a for a in measured(task=50.1).aids()}
    assert said["from scratch"].endswith("harms")
    assert said["feature + output"].endswith("helps")
    assert said["output"].endswith("helps")  # by 0.1 in every seed: it is judged seed by seed
    assert said["article's literal loss"].endswith("not measured yet")
    one = Table(distil.summary([r for r in rows() if r["seed"] == 0]))
    assert any("no verdict" in a for a in one.aids())


def test_the_tables_and_advise_judge_the_same_rows_alike():
    """Every verdict of docs/benchmarks.md is said by `advise`, figures and words."""
    shown = "\n".join(tables.strategies())
    said = Table.load().aids()
    judged = [line.removeprefix("- ").removesuffix(".") for line in shown.splitlines()]
    judged = [line for line in judged if " seeds: it " in line]
    assert len(judged) == 4
    assert set(judged) <= set(said)


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ((3.0, 4.0, 5.0), "helps"),
        ((-3.0, -4.0, -5.0), "harms"),
        ((-1.0, 0.0, 2.0), "makes no difference beyond the seeds' spread"),
        ((1.0, -1.0), "makes no difference beyond the seeds' spread"),
    ],
)
def test_verdicts(gains, word):
    base = {seed: 10.0 * seed for seed in range(4)}
    verdict = judge(base, {seed: base[seed] - gain for seed, gain in enumerate(gains)})
    assert verdict is not None
    assert verdict.word == word
    assert verdict.seeds == len(gains)
    assert judge(base, {0: 1.0}) is None
    assert judge(base, {8: 1.0, 9: 1.0}) is None


def test_students_that_draw_nothing_are_no_evidence():
    table = measured()
    for r in table.rows:
        r["mean"]["identity@1"] = 0.04 if r["table"] == "size" else 0.5
    said = advise(**ASK, table=table)
    losses = next(r for r in said.reasons if r.startswith("losses:"))
    assert "as published (BK-SDM, arXiv:2305.15798" in losses
    assert "13 days of an A100" in losses
    assert "no measured student draws anything" in losses
    (first, *_) = tomllib.loads(said.recipe)["stage"]
    assert first == {"kind": "output", "feature_weight": 0.1, "images": 12_800_000}
    for r in table.rows:
        r["mean"]["identity@1"] = 0.04
    steps = next(r for r in advise(**ASK, table=table).reasons if r.startswith("steps:"))
    assert "not measured yet" in steps


def test_the_plain_task_is_never_advised():
    table = measured(task=10.0)
    assert any(
        s.startswith("losses: feature + output:") for s in advise(**ASK, table=table).reasons
    )


def test_the_shipped_table_gives_another_number_of_steps_for_each_wish():
    calls = {}
    for wish in WISHES:
        said = advise(**{**ASK, "wish": wish, "minutes": 1e9})
        calls[wish] = min(s["steps"][-1] for s in stages_of(said) if s["kind"] == "progressive")
        assert all(s["images"] > 1000 for s in stages_of(said))
        if wish != "quality":  # the teacher's own size has nothing to learn
            assert stages_of(said)[0]["feature_weight"] == 0.1
    assert calls["quality"] >= 8 > calls["balanced"] >= 4 > calls["speed"]


def stages_of(said):
    return tomllib.loads(said.recipe)["stage"]


def test_time_becomes_images_in_proportion_to_what_stages_need():
    given = {**ASK, "minutes": 30 * 24 * 60.0}
    stages = stages_of(advise(**given, table=Table({}), images_per_second=10.0))
    needed = 12_800_000 + 4 * 50_000  # guidance, and three halvings
    total = 10.0 * 30 * 24 * 3600
    assert stages[0]["images"] == int(12_800_000 * total / needed)
    assert stages[1]["images"] == stages[2]["images"] == int(50_000 * total / needed)


def test_a_time_that_is_too_short_is_said_and_stages_are_not_shrunk():
    said = advise(**ASK, table=Table({}), images_per_second=10.0)
    line = next(r for r in said.reasons if r.startswith("not on this machine"))
    assert "in 60 minutes: the recipe needs 13,000,000 images, which take 15.0 days" in line
    assert "at 10.00 images/s" in line
    assert "enough for 36,000" in line
    assert [s["images"] for s in stages_of(said)] == [12_800_000, 50_000, 50_000]
    said = advise(**{**ASK, "minutes": 1e-6}, table=measured())
    assert any(r.startswith("not on this machine") for r in said.reasons)
    assert min(s["images"] for s in stages_of(said)) >= 100  # those of the measured rows


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
