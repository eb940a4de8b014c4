"""Damaged checkpoints: noticed, named, and the one before is taken; what stops a training says what
is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from sdlite.distill import checkpoints  # noqa: E402
from sdlite.distill.train import TrainConfig, fit  # noqa: E402
from sdlite.errors import InputError, SdliteError, SdliteWarning, TrainingError  # noqa: E402
from tests.unit.test_train import (  # noqa: E402, F401
    CONFIG,
    interrupt_after,
    last,
    one_thread,
    task,
)

EACH_STEP = replace(CONFIG, checkpoint_minutes=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 4 of 6 steps with checkpoints of steps 3 and 4, and the whole run's last state."""
    root = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    fit(interrupt_after(task(), 4), EACH_STEP, root / "part")
    fit(task(), CONFIG, root / "whole")
    return root


@pytest.fixture
def part(trained, tmp_path):
    return shutil.copytree(trained / "part", tmp_path / "part")


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def meta(**changes):
    def change(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


DAMAGE = {
    "state cut": (
        lambda f: (f / "state.safetensors").write_bytes(
            (f / "state.safetensors").read_bytes()[:500]
        )
    ),
    "state empty": lambda f: (f / "state.safetensors").write_bytes(b""),
    "state missing": lambda f: (f / "state.safetensors").unlink(),
    "state a folder": lambda f: (
        (f / "state.safetensors").unlink(),
        (f / "state.safetensors").mkdir(),
    ),
    "state a pipe": lambda f: (
        (f / "state.safetensors").unlink(),
        os.mkfifo(f / "state.safetensors"),
    ),
    "state with a flipped byte": lambda f: flip(f / "state.safetensors"),
    "meta empty": lambda f: (f / "meta.json").write_bytes(b""),
    "meta cut": lambda f: (f / "meta.json").write_bytes((f / "meta.json").read_bytes()[:30]),
    "meta missing": lambda f: (f / "meta.json").unlink(),
    "meta a list": lambda f: (f / "meta.json").write_text("[1]"),
    "meta no text": lambda f: (f / "meta.json").write_bytes(b"\xff\xfe"),
    "meta deep": lambda f: (f / "meta.json").write_text("[" * 50_000),
    "step a string": meta(step="4"),
    "step null": meta(step=None),
    "step another": meta(step=3),
    "images negative": meta(images=-8),
    "config a list": meta(config=[]),
    "folder empty": lambda f: (shutil.rmtree(f), f.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_is_taken_and_the_end_is_the_same(damage, part, trained):
    DAMAGE[damage](part / "checkpoint-00000004")
    with pytest.warns(
        SdliteWarning,
        match=(
            r"checkpoint-00000004 is damaged \(.*\): going on from checkpoint-00000003, 24 images"
        ),
    ):
        assert fit(task(), CONFIG, part, resume=True)["step"] == 6
    a, b = last(part), last(trained / "whole")
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert (part / "damaged-checkpoint-00000004").is_dir()


def test_a_damaged_step_is_written_again(part):
    flip(part / "checkpoint-00000004" / "state.safetensors")
    with pytest.warns(SdliteWarning, match="is damaged"):
        fit(interrupt_after(task(), 1), CONFIG, part, resume=True)
    assert checkpoints.newest(part).step == 4


def test_other_folders_of_a_similar_name_are_no_checkpoints(part):
    for name in (
        "checkpoint-old",
        "checkpoint-9",
        "checkpoint-00000099.tmp",
        "my-checkpoint-00000099",
    ):
        (part / name).mkdir()
    (part / "checkpoint-00000098").write_text("a file")
    assert fit(task(), CONFIG, part, resume=True)["step"] == 6
    assert (part / "checkpoint-old").is_dir()


def test_steps_are_ordered_by_number(tmp_path):
    for step in (99_999_999, 100_000_000):
        (tmp_path / f"checkpoint-{step:08d}").mkdir()
    assert [p.name for p in checkpoints.folders(tmp_path)] == [
        "checkpoint-99999999",
        "checkpoint-100000000",
    ]


def test_none_whole_is_one_clear_error_and_nothing_is_moved(part):
    flip(part / "checkpoint-00000004" / "state.safetensors")
    (part / "checkpoint-00000003" / "meta.json").unlink()
    with pytest.raises(
        TrainingError,
        match=(
            r"no checkpoint in .* is whole \(checkpoint-00000004: state.*; checkpoint-00000003:"
            r" meta.*missing"
        ),
    ):
        fit(task(), CONFIG, part, resume=True)
    assert len(checkpoints.folders(part)) == 2


def test_checkpoints_of_an_earlier_version_have_no_hash_and_are_taken(part):
    path = part / "checkpoint-00000004" / "meta.json"
    about = json.loads(path.read_text())
    del about["sha256"]
    path.write_text(json.dumps(about))
    assert fit(task(), CONFIG, part, resume=True)["step"] == 6


def test_a_checkpoint_of_another_network_is_named(part):
    other = task()
    other.modules["unet"].conv_in = torch.nn.Conv2d(4, 8, 1)
    with pytest.raises(
        TrainingError, match=r"checkpoint-00000004 is of another network .*size mismatch"
    ):
        fit(other, CONFIG, part, resume=True)


def test_a_full_disk_keeps_the_checkpoint_before(part, monkeypatch):
    def full(tensors, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        fit(interrupt_after(task(), 1), CONFIG, part, resume=True)
    monkeypatch.undo()
    assert [p.name for p in checkpoints.folders(part)] == [
        "checkpoint-00000003",
        "checkpoint-00000004",
    ]
    assert not [p for p in part.iterdir() if p.name.startswith(".")]


# --- what stops a training


def failing(error, step):
    t = task()
    real, calls = t.loss, []

    def loss(*args):
        calls.append(1)
        if len(calls) == step:
            raise error
        return real(*args)

    t.loss = loss
    return t


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_says_what_is_kept_and_what_to_do(error, part, tmp_path):
    with pytest.raises(
        TrainingError,
        match=(
            r"ran out at step 5; checkpoint-00000004 in .* is kept, go on with --resume"
            r" .*micro_batch_size"
        ),
    ):
        fit(failing(error, 2), CONFIG, part, resume=True)
    with pytest.raises(TrainingError, match=r"ran out at step 0; there is no checkpoint in"):
        fit(failing(error, 1), CONFIG, tmp_path / "new")
    done = fit(
        task(), replace(CONFIG, micro_batch_size=4, gradient_checkpointing=True), part, resume=True
    )
    assert done["finished"]


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"):
        fit(failing(RuntimeError("shapes do not fit"), 1), CONFIG, tmp_path)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_lost(tmp_path):
    t = task()
    real = t.loss

    def loss(modules, batch, step):
        terms = real(modules, batch, step)
        wrong = next(modules["unet"].parameters()).sum() * 0
        return {
            **terms,
            "loss": terms["loss"] + (wrong.abs().sqrt() if step == 3 else wrong),
        }  # 0, with a gradient of infinity x 0

    t.loss = loss
    with pytest.raises(
        TrainingError,
        match=r"the gradient's norm is nan at step 3 .*checkpoint-00000003 in .* is kept",
    ):
        fit(t, EACH_STEP, tmp_path)
    assert all(v.isfinite().all() for v in last(tmp_path).values())


def test_a_closed_terminal_asks_for_a_checkpoint_and_nohup_is_respected(tmp_path):
    t = task()
    real = t.batch
    t.batch = lambda *args: (signal.raise_signal(signal.SIGHUP), real(*args))[1]
    before = signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # the tests themselves may run under nohup
    try:
        assert fit(t, CONFIG, tmp_path / "a")["step"] == 1
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert fit(t, CONFIG, tmp_path / "b")["finished"]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_images", 0, "at least 1"),
        ("batch_size", -8, "at least 1"),
        ("batch_size", 4.0, "a whole number"),
        ("batch_size", True, "a whole number"),
        ("micro_batch_size", 0, "at least 1"),
        ("lr", float("nan"), "a finite number"),
        ("lr", 0, "at least 1e-12"),
        ("lr", "1e-4", "a finite number"),
        ("final_lr", -1, "at least 0"),
        ("warmup_images", -1, "at least 0"),
        ("decay_from", 1.5, "at most 1"),
        ("betas", 0.9, "a list"),
        ("betas", (0.9, 1.0), "at most 0.999999"),
        ("weight_decay", float("inf"), "a finite number"),
        ("grad_clip", 0, "at least 1e-12"),
        ("ema_decay", 1, "at most 0.999999"),
        ("compile", 1, "true or false"),
        ("seed", -1, "at least 0"),
        ("log_every", 0, "at least 1"),
        ("sample_every", -1, "at least 0"),
        ("checkpoint_minutes", None, "a finite number"),
        ("keep_checkpoints", 0, "at least 1"),
    ],
)
def test_values_that_cannot_be_are_named_with_what_is_accepted(field, value, words):
    with pytest.raises(InputError, match=rf"^TrainConfig: {field}.*; accepted: {words}"):
        TrainConfig(**{"max_images": 8, field: value})


def test_an_unknown_precision():
    with pytest.raises(SdliteError, match="accepted: 'no', 'bf16' or 'fp16'"):
        TrainConfig(max_images=8, mixed_precision="fp8")
