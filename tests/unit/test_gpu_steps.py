"""The steps of benchmarks/gpu on the CPU, on a small model: they run, and their rows say what."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("diffusers", reason="needs the torch extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")
from benchmarks import distil, real_teacher
from benchmarks.gpu import common, graphs, images, kernels, strategies, student, tensorrt, training


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
    kinds = ["fp32", "fp16 nhwc"]
    made = rows(graphs, tmp_path, monkeypatch, *small, "--kinds", *kinds)[-2:]
    assert [r["kind"] for r in made] == kinds
    assert min(r["psnr_to_cpu_fp32"] for r in made) >= 40
    found = rows(kernels, tmp_path, monkeypatch, "--models", "emoji", "--size", "64")
    limits, spent = found[-2:]
    assert all(o["share"] == o["floor"] / o["seconds"] for o in limits["operations"].values())
    assert limits["ceilings"]["operations"] > 0 < limits["ceilings"]["bytes"]
    assert spent["milliseconds"]["convolution"] > 0


def test_what_does_not_fit_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError):  # no row was made
        rows(images, tmp_path, monkeypatch, "--minutes", "0")
    assert "no time was left for: emoji; sd14; bk-tiny; ssd-1b" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_both_sides_call_the_unet_as_often():
    """The embedded student needs no guidance; diffusers' own default would call it twice a step."""
    import torch

    counts = []
    for make, kind in ((images.ours, "fp32"), (images.theirs, "diffusers fp32")):
        rows = []
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda m, given, rows=rows: (
                rows.append(len(given[0])) if "UNet2D" in type(m).__name__ else None
            )
        )
        try:
            make(common.folder("emoji", None), "cpu", kind)(64, 2)
        finally:
            hook.remove()
        counts.append(rows)
    assert counts[0] == counts[1] == [2] * images.STEPS


def test_options_reach_a_gpus_provider(monkeypatch):
    opened = []
    monkeypatch.setattr(graphs.ort, "InferenceSession", lambda *a, **k: opened.append(k))
    for device in ("cuda", "cpu"):
        with graphs.told(device, {"prefer_nhwc": "1"}):
            graphs.ort.InferenceSession("m", None, providers=[("Name", {"use_tf32": "0"})])
    assert opened == [
        {"providers": [("Name", {"use_tf32": "0", "prefer_nhwc": "1"})]},
        {"providers": [("Name", {"use_tf32": "0"})]},
    ]


def test_a_library_that_is_missing_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "LIBRARIES", {"tensorrt": "no_rt", "tensorrt-rtx": "no_rtx"})
    found = rows(tensorrt, tmp_path, monkeypatch)
    assert [r["missing"] for r in found] == [
        "tensorrt is not installed",
        "tensorrt-rtx is not installed",
    ]


@pytest.mark.filterwarnings("ignore")
def test_engines_are_built_and_run_by_the_exporters_own_code(tmp_path, monkeypatch):
    """With stand-ins for the library: its builder copies the graph, its runtime is onnxruntime."""
    from sdlite.exporters import handed, targets
    from sdlite.exporters.targets import tensorrt_rtx
    from sdlite.onnx_graph import Graph

    def build(self, part, graph, out):
        Graph.load(graph).save(out / "model.engine", whole=True)
        return [out / "model.engine", out / "model.engine.data"]

    version = {"library": "tensorrt-rtx", "library_version": "0"}
    monkeypatch.setattr(tensorrt, "library", lambda target: version)
    monkeypatch.setattr(targets.base, "version", lambda package: "0")
    monkeypatch.setattr(tensorrt.TensorRT, "convert", build)
    run = lambda self, part, files, threads: handed.run_graph(files[0], threads)  # noqa: E731
    monkeypatch.setattr(tensorrt_rtx.TensorRTRTX, "run", run)
    monkeypatch.setattr(common, "LEAST", 1)
    asked = ["--models", "emoji", "--kinds", "fp16", "--libraries", "tensorrt-rtx"]
    [row] = rows(tensorrt, tmp_path, monkeypatch, *asked, "--batches", "1")
    assert "error" not in row, row
    assert set(row["build_seconds"]) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert row["bytes"] > 10**6
    assert min(row["psnr_to_source"], row["psnr_to_cpu_fp32"]) >= 40
    assert row["batch_1"]["seconds"] > 0 < row["batch_1"]["torch_seconds"]
    assert tensorrt.TensorRT.convert is build  # given back


def test_profiles_have_the_asked_size_and_rows_and_no_gate(tmp_path):
    from sdlite.exporters import profile

    for name in tensorrt.PROFILES.values():
        found = profile.load(tensorrt.written(name, 512, 16, tmp_path / f"{name}.toml"))
        assert (found.height, found.width, found.options["max"]) == (512, 512, 16)
        assert not found.gate.wanted()
        assert found.precision == profile.load(name).precision


def test_training_rows_are_of_the_steps_after_the_first(tmp_path, monkeypatch):
    asked = []

    def measure(teacher, scratch, **how):
        asked.append(how)
        if how["batch_size"] == 128:
            raise SystemExit("sdlite distill failed:\nsdlite: memory ran out at step 0")
        return {"step_seconds": [60.0, 9.0, 9.0, 2.0, 2.0, 4.0], **how["how"].__dict__}

    monkeypatch.setattr(real_teacher, "measure", measure)
    monkeypatch.setattr(common, "folder", lambda model, scratch: tmp_path / model)
    found = rows(training, tmp_path, monkeypatch, "--steps", "3")
    assert [r["run"] for r in found] == list(training.RUNS)
    assert found[0]["images_per_second"] == 16
    assert found[2]["error"] == "sdlite: memory ran out at step 0"
    assert asked[3]["how"] == real_teacher.How(plain_attention=False, sharded=True)
    text = real_teacher.recipe_text("bk-tiny", 3, 8, None, "bf16", asked[0]["how"])
    assert "plain_attention = false\ngradient_checkpointing = false\ncompile = false" in text


CHILD = """
import json, sys
from pathlib import Path
[results, marks, table, strategy, seed, images, stops] = sys.argv[1:]
mark = Path(marks) / f"{strategy}-{seed}"
mark.write_text(mark.read_text() + "x" if mark.exists() else "x")
if len(mark.read_text()) <= int(stops):
    sys.exit("was stopped after 7 images")
row = {"table": table, "strategy": strategy, "seed": int(seed), "images": int(images)}
with open(results, "a") as f:
    f.write(json.dumps(row) + "\\n")
"""


def test_strategies_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    """Trainings by stand-ins: each is stopped once, what follows another waits for it, and the next
    call begins with the rows there are.
    """
    out, state = tmp_path / "rows.jsonl", tmp_path / "state"

    def command(args, job, minutes):
        stops = 1 if job.strategy == "guidance" else 0
        told = [args.table, job.strategy, job.seed, args.images, stops]
        return [sys.executable, "-c", CHILD, str(args.out), str(state), *map(str, told)]

    monkeypatch.setattr(strategies, "command", command)
    monkeypatch.setattr(strategies, "prepare", lambda args: None)
    monkeypatch.setattr(strategies, "show", lambda args: None)
    (tmp_path / "model").mkdir()
    asked = ["--teacher", "T", "--state", str(state), "--table", "steps", "--seeds", "2"]
    asked += ["--student", str(tmp_path / "model"), "--images", "100"]
    asked += ["--only", "guidance", "progressive 8", "progressive 4"]
    own = ["--device", "cpu", "--out", str(out)]
    said = []
    for minutes in ("0", "7", "7"):
        monkeypatch.setattr(sys, "argv", ["x", *own, *asked, "--minutes", minutes])
        assert strategies.main() == 0
        said.append(capsys.readouterr().out)
    assert [next(w for w in text.splitlines() if "are measured" in w) for text in said] == [
        "0 of 6 are measured",
        "0 of 6 are measured",
        "6 of 6 are measured",
    ]
    assert "guidance, seed 0: exit 1; was stopped after 7 images" in said[1]
    order = [(r["strategy"], r["seed"]) for r in distil.rows_of(out)]
    for seed in (0, 1):
        names = [name for name, s in order if s == seed]
        assert names == ["guidance", "progressive 8", "progressive 4"]


def test_steps_begin_from_a_student_whose_training_ended(tmp_path, monkeypatch, capsys):
    """A training that was stopped leaves a model too."""
    start, state = strategies.START, tmp_path / "state"
    (state / "runs" / distil.run_name(start, 0, 100, 32) / "model").mkdir(parents=True)
    out = tmp_path / "rows.jsonl"
    asked = ["--out", str(out), "--teacher", "T", "--state", str(state), "--images", "100"]
    monkeypatch.setattr(sys, "argv", ["x", *asked, "--table", "steps"])
    with pytest.raises(SystemExit):
        strategies.arguments()
    assert "is not trained: run --table size first" in capsys.readouterr().err
    row = {"table": "size", "strategy": start, "seed": 0, "images": 100}
    out.write_text(json.dumps(row) + "\n")
    assert strategies.arguments().student.name == "model"


def test_a_training_is_told_its_strategy_seed_and_minutes(tmp_path):
    args = argparse.Namespace(
        table="size",
        teacher="T",
        state=tmp_path,
        out="o",
        images=5,
        batch_size=32,
        seeds=3,
        mixed_precision="bf16",
        prompts=8,
        heldout=4,
        device="cuda",
        student=None,
    )
    told = strategies.command(args, strategies.Job("article's literal loss", 2), 1.5)
    ours = told[told.index("benchmarks.distil") + 1 :]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["distil", *ours])
        read = distil.arguments()
    assert (read.only, read.only_seeds) == (["article's literal loss"], [2])
    assert (read.max_minutes, read.device, read.images) == (1.5, "cuda", 5)


def quality(**changed):
    mean = {"identity@1": 0.8, "kid": 2.0, "exact@1": 0.5, "colour": 0.9, "heldout@1": 0.4}
    std = {"identity@1": 0.01, "kid": 0.2, "exact@1": 0.02, "colour": 0.01, "heldout@1": 0.05}
    return {"mean": mean | changed, "std": std}


@pytest.mark.parametrize(
    ("changed", "size", "against"),
    [
        ({"identity@1": 0.85, "kid": 1.0}, 1.0, []),
        ({"identity@1": 0.81, "kid": 1.0}, 1.0, ["identity@1 is not clearly better"]),
        ({"identity@1": 0.85, "kid": 3.0}, 1.0, ["kid is not clearly better"]),
        ({"identity@1": 0.85, "kid": 1.0, "colour": 0.8}, 1.0, ["colour is clearly worse"]),
        ({"identity@1": 0.85, "kid": 1.0}, 1.1, ["1.10 times as large, at most 1.02"]),
    ],
)
def test_a_student_replaces_todays_only_if_clearly_better(changed, size, against):
    found = student.verdict(quality(), quality(**changed), size)
    assert (found["against"], found["replace"]) == (against, not against)


def test_stages_go_on_in_order_and_a_state_keeps_its_recipe(tmp_path, monkeypatch, capsys):
    """Trainings by stand-ins that count to what they are asked for, the second in two calls."""
    ran, images = [], {}

    def run(command, env):
        names = [
            "grow_teacher",
            "train_teacher",
            "train_student",
            "train_few_step",
            "train_decoder",
        ]
        script = next(n for n in [*names, "ship"] if any(n in w for w in command))
        ran.append(script)
        if script == "train_student" and ran.count(script) == 1:
            return SimpleNamespace(returncode=0)  # time was over
        folder = Path(command[command.index("--out") + 1])
        if script == "grow_teacher":
            folder = folder / "unet"
            folder.mkdir(parents=True)
            (folder / "config.json").touch()
        elif script != "ship":
            images[folder] = int(command[command.index("--images") + 1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(student, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(student, "seen", lambda folder: images.get(folder, 0))
    own = ["x", "--device", "cpu", "--out", str(tmp_path / "o"), "--state", str(tmp_path / "s")]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*own, "--times", "2", "--until", "decoder"])
        assert student.main() == 0
    assert ran == [
        "grow_teacher",
        "train_teacher",
        "train_student",
        "train_student",
        "train_few_step",
        "train_few_step",
        "train_few_step",
        "train_decoder",
    ]
    assert "student is not done: the same command goes on" in capsys.readouterr().out
    assert [f.name for f in images] == ["teacher", "student", "guided", "p8", "p4", "decoder"]
    assert list(images.values()) == [220_000, 120_000, 160_000, 60_000, 120_000, 24_000]
    monkeypatch.setattr(sys, "argv", [*own, "--times", "3"])
    with pytest.raises(SystemExit, match="was begun with"):
        student.main()


def test_what_goes_home_is_in_parts_that_tar_opens(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(range(256)) * 1000)
    monkeypatch.setattr(common, "PART", 100_000)
    parts = common.pack(folder, tmp_path / "out" / "student")
    assert len(parts) == 3
    assert all(p.stat().st_size <= 100_000 for p in parts)
    with tarfile.open(fileobj=io.BytesIO(b"".join(p.read_bytes() for p in parts))) as tar:
        tar.extractall(tmp_path / "back", filter="data")
    assert (tmp_path / "back" / "model" / "weights").read_bytes() == bytes(range(256)) * 1000
