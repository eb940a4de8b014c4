"""The metrics on cases with known answers: a benchmark that cannot be wrong in our favour."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cases import FLOAT_ENGINES, PEERS, SETTINGS, SUITES, Case
from benchmarks.quality import fid, kid
from benchmarks.tables import ladder, machine, plots, speed, strategies
from benchmarks.tables.rows import footnotes


def test_fid_of_two_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5_000, 3)) * [1, 2, 3]
    y = rng.standard_normal((5_000, 3)) * [2, 2, 1] + [1, 0, 0]
    assert fid(x, y) == pytest.approx(1 + (1 - 2) ** 2 + (3 - 1) ** 2, rel=0.1)
    assert fid(x, x) == pytest.approx(0, abs=1e-8)


def test_kid_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(0)
    same = [kid(*rng.standard_normal((2, 100, 8))) for _ in range(20)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 20**0.5
    assert kid(rng.standard_normal((200, 8)), rng.standard_normal((200, 8)) + 1) > 10 * np.std(same)


def test_suites_compare_engines_on_equal_terms():
    for name, cases in SUITES.items():
        assert len(set(cases)) == len(cases), name
        assert {c.engine for c in cases} <= set(SETTINGS), name
        if name == "scaling":  # one thing at a time
            continue
        terms = {(c.steps, c.size_px, c.guidance, c.threads, c.repeats) for c in cases}
        assert len(terms) == (2 if name in ("emoji", "plumbing", "teacher", "best-512") else 1), (
            name
        )
    assert {(c.engine, c.precision) for c in SUITES["peers-512"]} == set(PEERS)
    assert {c.engine for c in SUITES["bk-tiny-512"]} == set(FLOAT_ENGINES)


def test_student_and_teacher_are_measured_by_the_same_engines(tmp_path):
    cases = {
        m: [c.engine for c in SUITES["teacher"] if c.model == m] for m in ("emoji", "emoji-teacher")
    }
    assert cases["emoji"] == cases["emoji-teacher"]
    about = {
        "suite": "teacher",
        "setting": "",
        "date": "d",
        "commit": "c",
        "command": "x",
        "round": 0,
    }
    rows = [
        {**about, "case": asdict(c), "samples_seconds": [0.02 if c.model == "emoji" else 1.0]}
        for c in SUITES["teacher"][:3]
    ]
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = speed.teacher(tmp_path)
    assert len(table) == 3, "a student without its teacher's row is not shown"
    assert table[-1] == "| `sdlite-ort` | 1,000 (1,000 to 1,000) | 20.0 (20.0 to 20.0) | 50x |"


def test_zoo_has_the_articles_ladder_and_scaling_changes_one_thing_a_row():
    zoo = {(c.model, c.precision) for c in SUITES["zoo-512"]}
    assert set(ladder.TWIN) <= zoo
    base = Case("shape:bk-tiny", "sdlite-openvino", 4, 512, precision="int8-static")
    for c in SUITES["scaling"]:
        changed = {
            k
            for k in ("steps", "batch", "threads", "size_px", "tile_px", "pipelines")
            if getattr(c, k) != getattr(base, k)
        }
        assert (
            len(
                changed - ({"size_px"} if "tile_px" in changed or "pipelines" in changed else set())
            )
            <= 1
        ), c


def test_tables_of_best_steps_and_least_memory(tmp_path):
    about = {"setting": "", "date": "d", "commit": "c", "command": "x", "round": 0}
    seconds = {
        "shape:sd14": 100.0,
        "shape:bk-tiny": 50.0,
        "shape:w0.62": 4.0,
        "shape:extreme-120m": 1.0,
    }
    rows = [
        {
            **about,
            "suite": "best-512",
            "case": asdict(c),
            "samples_seconds": [seconds[c.model]],
            "peak_mib": 1000,
        }
        for c in SUITES["best-512"]
    ]
    rows += [
        {
            **about,
            "suite": "memory-512",
            "case": asdict(c),
            "samples_seconds": [2.0],
            "peak_mib": 1000 - c.tile_px,
            "stage_seconds": {"vae_decoder": 1},
        }
        for c in SUITES["memory-512"]
    ]
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    best = "\n".join(ladder.best(tmp_path))
    assert (
        "| `w0.62` | sdlite-openvino int8-static | 4, one call each | 4.00 (4.00 to 4.00) | 1,000 |"
        " 25.0 |" in best
    )
    assert best.count("25, guided") == 2
    memory = speed.memory(tmp_path)
    assert (
        memory[2] == "| `sdlite-openvino` | at once | 1,000 | 1.05 | 2.00 (2.00 to 2.00) | 1.00 |"
    )
    assert memory[3].startswith("| `sdlite-openvino` | tiles of 320 px | 680 |")


# --- the report


def row(engine, precision, samples, round=0, suite="peers-512", **more):
    case = {
        **vars(Case("shape:bk-tiny", engine, 4, 512, precision=precision)),
        **more.pop("case", {}),
    }
    measured = {
        "samples_seconds": samples,
        "peak_mib": 100.0 * sum(samples),
        "load_seconds": 1.0,
        "first_call_seconds": 2.0,
        "bytes": 5e6,
        "parameters": {"unet": 3e8, "text_encoder": 1e8, "vae": 5e7},
        "stage_seconds": {"text_encoder": 0.1, "unet": 2.0, "vae_decoder": 1.0},
    }
    about = {
        "date": "2026-01-01",
        "commit": "abc",
        "dirty": False,
        "command": "run",
        "versions": {"numpy": "2"},
        "cpu": "x",
        "cores": 2,
    }
    return {
        "suite": suite,
        "round": round,
        "case": case,
        "setting": "as it is",
        **({} if "error" in more else measured),
        **about,
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    def write(name, rows):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return tmp_path

    return write


def test_rounds_are_one_row_and_failures_and_losses_are_shown(folder):
    rows = [
        row("sdlite-ort", "fp32", [4.0, 5.0]),
        row("diffusers", "fp32", [2.0]),
        row("sdlite-ort", "fp32", [6.0], round=1),
    ]
    rows.append(row("openvino-genai", "int8", [], error="RuntimeError: no | kernel"))
    there = folder("speed", [row("sdlite-ort", "fp32", [99.0], date="2020-01-01"), *rows])
    lines = speed.peers(folder=there)
    assert [line.split(" | ")[0].strip("| *") for line in lines[2:]] == [
        "diffusers",
        "sdlite-ort",
        "openvino-genai",
    ], "fastest first"
    assert "5.00 (4.00 to 6.00)" in lines[3]
    assert "0.40" in lines[3], "slower than diffusers is a ratio below 1"
    assert "failed: RuntimeError: no / kernel" in lines[4]
    assert len({line.count("|") for line in lines}) == 1
    assert (
        "Fastest: ours sdlite-ort fp32 5.00 s, best peer diffusers fp32 2.00 s: 0.40x"
        in "".join(speed.verdict(folder=there))
    )
    assert "N = 1 to 3" in footnotes("peers-512", there)[0]


def test_limit_divides_each_kind_of_operation_by_its_own_peak(folder):
    about = {"date": "d", "commit": "c", "command": "x", "cpu": "x"}
    peaks = [
        {"kind": "peak", "dtype": "int8", "op": op, "threads": 2, "gops": g, **about}
        for op, g in (("conv", 5), ("conv", 10), ("matmul", 20))
    ]
    parts = [
        {
            "kind": "demand",
            "shape": "bk-tiny",
            "size_px": 512,
            "part": p,
            "conv": c * 10**9,
            "matmul": m * 10**9,
            **about,
        }
        for p, c, m in (("text_encoder", 0, 20), ("unet", 10, 20), ("vae_decoder", 30, 0))
    ]
    there = folder("roofline", [*parts, *peaks])
    case = vars(Case("shape:bk-tiny", "sdlite-openvino", 4, 512, precision="int8-static"))
    assert machine.limit_seconds(case, there) == pytest.approx(1 + 4 * (1 + 1) + 3)
    assert machine.limit_seconds({**case, "guidance": 2.0}, there) == pytest.approx(2 * (1 + 8) + 3)
    assert machine.limit_seconds({**case, "precision": "fp32"}, there) is None
    assert machine.limit_seconds({**case, "size_px": 256}, there) is None


def test_scaling_reports_the_line_through_its_steps(folder):
    rows = [
        row("sdlite-openvino", "int8-static", [1.5 + 0.5 * n], suite="scaling", case={"steps": n})
        for n in (1, 2, 4, 8)
    ]
    rows.append(
        row(
            "sdlite-openvino",
            "int8-static",
            [2.0],
            suite="scaling",
            case={"size_px": 1024, "tile_px": 256},
        )
    )
    lines = machine.scaling(folder("speed", rows))
    assert "0.500 s a step + 1.500 s" in lines[0]
    assert any("size 1024, tile 256" in line for line in lines)


def test_articles_ratios_stand_beside_ours(folder):
    made = [
        ("shape:sd14", "fp32", 10.0),
        ("shape:w0.62", "fp32", 5.0),
        ("shape:extreme-120m", "int8-static", 1.0),
    ]
    rows = [row("sdlite-openvino", p, [s], suite="zoo-512", case={"model": m}) for m, p, s in made]
    there = folder("speed", rows)
    lines = ladder.article(there)
    assert "| 2.6x |" in lines[3]
    assert "| 2.0x | 2.0x |" in lines[3]
    assert "| 13.7x |" in lines[5]
    assert "| 10.0x |" in lines[5]
    assert lines[4].endswith("|  |  |  |  |  |"), "a rung that was not measured is empty"
    assert len({line.count("|") for line in ladder.zoo(there)}) == 1


def test_plots_are_equal_for_equal_results_and_stale_for_others(folder, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the distill or bench extra")
    there = folder("speed", [row("sdlite-ort", "fp32", [4.0]), row("diffusers", "fp32", [2.0])])
    a, b = tmp_path / "a", tmp_path / "b"
    assert [p.name for p in plots.draw(there, a)] == ["memory.svg"]
    plots.draw(there, b)
    assert (a / "memory.svg").read_bytes() == (b / "memory.svg").read_bytes()
    assert plots.stale_plots(there, a) == []
    folder("speed", [row("sdlite-ort", "fp32", [3.0])])
    assert plots.stale_plots(there, a) == ["memory"]
    assert plots.stale_plots(there, tmp_path / "none") == ["memory"]


# --- measuring


def test_stages_come_from_the_times_at_which_steps_end():
    from benchmarks.peers import stages

    got = stages(10.0, [11.5, 12.5, 13.5, 14.5], 16.0)
    assert got == pytest.approx(
        {"text_encoder": 0.5, "unet": 4.0, "vae_decoder": 1.5, "total": 6.0}
    )
    assert stages(0.0, [1.0], 2.0) == {}, "one step does not tell itself from the text encoder"


def test_error_of_a_child_is_its_exception():
    from benchmarks.run import _reason

    assert (
        _reason(
            "W0 x.py:3] note\nTraceback (most recent call last):\n  File 'x'\nRuntimeError: no"
            " kernel\n[W] bye"
        )
        == "RuntimeError: no kernel"
    )
    assert _reason("") == "no output"
    assert (
        _reason("RuntimeError: Check failed at /home/someone/src/ddim.cpp:180")
        == "RuntimeError: Check failed at ddim.cpp:180"
    )


def test_a_case_that_cannot_be_made_is_a_row(tmp_path, monkeypatch):
    from benchmarks import run

    cases = [Case("shape:mini", "openvino-genai", 2, 64, precision="int8", repeats=1)]
    monkeypatch.setattr(
        run,
        "child",
        lambda case, **job: {"error": "ModuleNotFoundError: No module named 'openvino_genai'"},
    )
    jobs = run.made(cases, tmp_path)
    run.run_suite("broken", cases, jobs, 2, tmp_path / "rows.jsonl", {"commit": "x"})
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["round"], r["error"][:19]) for r in rows] == [
        (0, "ModuleNotFoundError"),
        (1, "ModuleNotFoundError"),
    ]


@pytest.mark.parity
def test_demand_counts_two_operations_a_multiplication():
    pytest.importorskip("diffusers", reason="needs the torch extra")
    from benchmarks.roofline import demand

    small, large = (demand("mini", px) for px in (64, 128))
    by_part = {r["part"]: r for r in small}
    conv_in = 2 * 9 * 4 * 32 * 8 * 8
    assert by_part["unet"]["conv"] > conv_in
    assert by_part["text_encoder"]["conv"] == 0 < by_part["text_encoder"]["matmul"]
    assert {r["part"]: r for r in large}["vae_decoder"]["conv"] == 4 * by_part["vae_decoder"][
        "conv"
    ]


def distilled(strategy, seed, kid, images=100, **more):
    row = {
        "table": "size",
        "strategy": strategy,
        "seed": seed,
        "images": images,
        "prompts": 128,
        "heldout": 64,
        "parameters": 5e6,
        "macs": 6e7,
        "calls": 50,
        "steps": 25,
        "identity@1": 0.5,
        "colour": 1.0,
        "heldout@1": 0.1,
        "kid": kid,
        "fid": 300.0,
        "paired_psnr": 15.0,
        "seconds_per_image": 0.5,
        "minutes": 2.0,
        "date": "d",
        "commit": "c",
        "cpu": "x",
        "cores": 2,
        "command": "run",
    }
    return {**row, **more}


def test_strategies_are_shown_with_spread_and_aids_are_judged_by_the_same_seeds(tmp_path):
    teacher = distilled("teacher", 0, 40.0, 0, parameters=3e7, seconds_per_image=2.0)
    kids = {
        "task": (700, 720),
        "feature + output": (600, 610),
        "feature + output + mask": (580, 592),
        "feature + output + multi-scale": (590, 630),
    }
    rows = [teacher] + [distilled(n, s, k) for n, both in kids.items() for s, k in enumerate(both)]
    rows += [
        distilled("task", 1, 999.0, images=10)
    ]  # a smaller budget is not shown beside a larger one
    (tmp_path / "distil.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = "\n".join(strategies.strategies(tmp_path))
    assert "| task | 5.0M | 83% | 60 | 25 (50) | 0.500 | 4.0x | 710.0 ± 14.1 |" in text
    assert "999" not in text
    assert (
        "feature + output against task: KID lower by 105.0 ± 7.1, the same 2 seeds: it helps."
        in text
    )
    assert (
        "mask against feature + output: KID lower by 19.0 ± 1.4, the same 2 seeds: it helps."
        in text
    )
    assert (
        "multi-scale against feature + output: KID lower by -5.0 ± 21.2, the same 2 seeds: it makes"
        " no difference beyond" in text
    )


def test_seeds_of_the_embedded_student_hardly_differ_and_prompts_do(emoji):
    """docs/use.md says so where seeds are explained; of a student whose seeds differ that sentence
    is wrong.
    """
    from benchmarks.seeds import RESULTS, apart, paint

    assert 28 < apart(paint(emoji, ["a house"] * 4, [0, 1, 2, 3]))["psnr_mean"] < 45
    assert apart(paint(emoji, ["a house", "a cat", "a rocket"], [0, 0, 0]))["psnr_mean"] < 12
    assert [
        r["images"]
        for r in map(json.loads, RESULTS.read_text().splitlines())
        if r["prompt"] == "a house"
    ] == [16]


def test_the_teacher_comes_from_a_folder_or_an_error_says_how(tmp_path, monkeypatch):
    """It is not in the repository: `--teacher`, or the released asset."""
    from benchmarks.peers import TEACHER, plain_folder
    from sdlite.errors import HubError

    case = next(c for c in SUITES["teacher"] if c.model == TEACHER)
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text("{}")
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    made = plain_folder(case, tmp_path, unet)
    assert (made / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == b"weights"
    assert (made / "tokenizer" / "vocab.json").exists()
    monkeypatch.delenv("SDLITE_ASSETS", raising=False)
    monkeypatch.setenv("SDLITE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(HubError, match=r"SDLITE_ASSETS.*train it as benchmarks/emoji/README\.md"):
        plain_folder(case, tmp_path)


def test_every_name_that_benchmarks_import_exists():
    """Late imports too: what they import moves, and nothing else looks."""
    root = Path(__file__).parents[2]
    missing = []
    for path in sorted((root / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdlite"):
                names = [a.name for a in node.names]
                missing += [f"{path.name}: {n}" for n in names if not known(node.module, n)]
    assert not missing


def known(module: str, name: str) -> bool:
    """Whether a module has a name, or a submodule of it."""
    found = importlib.import_module(module)
    if hasattr(found, name) or not hasattr(found, "__path__"):
        return hasattr(found, name)
    return importlib.util.find_spec(f"{module}.{name}") is not None
