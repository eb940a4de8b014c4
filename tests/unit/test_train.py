"""The training loop on a tiny real UNet: exact resume, refusals, EMA, accumulation, two
processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from safetensors.torch import load_file  # noqa: E402

from sdlite.distill.encoders import CachedEncoder  # noqa: E402
from sdlite.distill.tasks.base import V_ZERO_SNR, Forward, stratified_timesteps  # noqa: E402
from sdlite.distill.tasks.student import TeacherTask  # noqa: E402
from sdlite.distill.train import TrainConfig, fit  # noqa: E402
from sdlite.errors import SdliteError, TrainingError  # noqa: E402
from sdlite.sampling import Schedule  # noqa: E402


class Source:
    empty_ids = torch.zeros(4, dtype=torch.int64)

    def draw(self, size, generator):
        ids = torch.randint(0, 16, (size,), generator=generator)
        latents = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(1))[ids]
        return {"ids": ids, "latents": latents, "input_ids": ids[:, None] + torch.arange(1, 5)}


class Text(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(32, 8)

    def forward(self, ids):
        return (self.table(ids),)


class Task(TeacherTask):
    def save(self, modules, folder):
        folder.mkdir(parents=True, exist_ok=True)

    def sample(self, modules, path):
        pass


def task():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )
    return Task(unet, Text(), Source(), parts={})


@pytest.fixture(autouse=True)
def one_thread():
    """Bit for bit means: with the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CONFIG = TrainConfig(
    max_images=48,
    batch_size=8,
    lr=1e-3,
    warmup_images=16,
    sample_every=0,
    log_every=1,
    checkpoint_minutes=60,
)


def last(out):
    return load_file(sorted(out.glob("checkpoint-*"))[-1] / "state.safetensors")


def interrupt_after(t, steps):
    """Ctrl-C as the user would press it, in the middle of a step: that step is finished, then the
    loop stops.
    """
    real, calls = t.batch, []

    def batch(size, generator):
        calls.append(1)
        if len(calls) == steps:
            signal.raise_signal(signal.SIGINT)
        return real(size, generator)

    t.batch = batch
    return t


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole = fit(task(), CONFIG, tmp_path / "whole")
    part = fit(interrupt_after(task(), 3), CONFIG, tmp_path / "parts")
    assert (part["step"], part["finished"]) == (3, False)
    rest = fit(task(), CONFIG, tmp_path / "parts", resume=True)
    assert whole["finished"]
    assert rest["step"] == 6
    a, b = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert set(a) == set(b)
    assert {k.split(".")[0] for k in a} == {"model", "ema", "optimizer"}
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_with_another_seed_is_refused_and_a_broken_resume_differs(tmp_path, monkeypatch):
    fit(interrupt_after(task(), 3), CONFIG, tmp_path / "a")
    from dataclasses import replace

    with pytest.raises(TrainingError, match="seed=0, now 1"):
        fit(task(), replace(CONFIG, seed=1), tmp_path / "a", resume=True)
    from sdlite.distill import train

    monkeypatch.setattr(
        train, "step_generator", lambda seed, step: torch.Generator().manual_seed(seed + step + 1)
    )
    fit(task(), CONFIG, tmp_path / "a", resume=True)
    monkeypatch.undo()
    fit(task(), CONFIG, tmp_path / "b")
    a, b = last(tmp_path / "a"), last(tmp_path / "b")
    assert not all(torch.equal(a[k], b[k]) for k in a)


def test_killed_run_loses_at_most_one_interval(tmp_path):
    """SIGKILL while checkpoints are written after every step: the newest whole one is resumed, and
    the end is the same.
    """
    code = (
        "from tests.unit.test_train import *; from dataclasses import replace; from pathlib import"
        " Path; torch.set_num_threads(1)\nfit(task(), replace(CONFIG, checkpoint_minutes=0,"
        f" max_images=80_000), Path({str(tmp_path / 'killed')!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while (
        not list(tmp_path.glob("killed/checkpoint-0000000[3-9]"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.kill()
    process.wait()
    reached = max(
        int(p.name.split("-")[1])
        for p in tmp_path.glob("killed/checkpoint-*")
        if not p.name.endswith(".tmp")
    )
    from dataclasses import replace

    config = replace(CONFIG, max_images=80_000)
    rest = fit(interrupt_after(task(), 3), config, tmp_path / "killed", resume=True)
    assert rest["step"] == reached + 3
    fit(interrupt_after(task(), reached + 3), config, tmp_path / "whole")
    a, b = last(tmp_path / "killed"), last(tmp_path / "whole")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_half_written_checkpoint_is_ignored(tmp_path):
    fit(interrupt_after(task(), 3), CONFIG, tmp_path)
    broken = tmp_path / "checkpoint-00000099.tmp"
    broken.mkdir()
    (broken / "state.safetensors").write_bytes(b"half")
    assert fit(task(), CONFIG, tmp_path, resume=True)["step"] == 6


def test_existing_checkpoints_are_not_overwritten(tmp_path):
    fit(task(), CONFIG, tmp_path, max_minutes=0)
    with pytest.raises(TrainingError, match="resume=True"):
        fit(task(), CONFIG, tmp_path)


def test_max_minutes_zero_stops_at_once(tmp_path):
    assert fit(task(), CONFIG, tmp_path, max_minutes=0)["step"] == 0


def test_nonfinite_loss_stops_with_step_and_samples(tmp_path):
    t = task()
    real = t.batch

    def batch(size, generator):
        out = real(size, generator)
        out["latents"][0] = float("nan")
        return out

    t.batch = batch
    with pytest.raises(TrainingError, match=r"step 0 .*samples tensor"):
        fit(t, CONFIG, tmp_path)


def test_accumulation_equals_the_whole_batch(tmp_path):
    from dataclasses import replace

    fit(task(), CONFIG, tmp_path / "whole")
    fit(task(), replace(CONFIG, micro_batch_size=2), tmp_path / "micro")
    a, b = last(tmp_path / "whole"), last(tmp_path / "micro")
    for k in a:
        if k.startswith("model."):
            torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)


def test_statistics_are_one_json_object_per_line(tmp_path):
    fit(task(), CONFIG, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [r["images"] for r in rows] == [8, 16, 24, 32, 40, 48]
    assert {"loss", "lr", "grad_norm", "images_per_second"} <= set(rows[0])


def two_processes(code, **environment):
    """`code` in two processes on gloo, as Accelerate's launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = (
        "from tests.unit.test_train import *; from dataclasses import replace; from pathlib import"
        " Path; torch.set_num_threads(1)\n"
    )
    procs = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", start + code],
            env={
                **os.environ,
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "ACCELERATE_USE_CPU": "true",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.getcwd(),
                **environment,
            },
        )
        for r in range(2)
    ]
    try:
        assert [p.wait(timeout=300) for p in procs] == [0, 0]
    finally:
        for p in procs:
            p.kill()


def same_networks(one, two):
    a, b = last(one), last(two)
    assert set(a) == set(b)
    for k in a:
        if not k.startswith("optimizer."):
            torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)


def test_two_processes_equal_one(tmp_path):
    fit(task(), CONFIG, tmp_path / "one")
    two_processes(f"fit(task(), CONFIG, Path({str(tmp_path / 'two')!r}))")
    same_networks(tmp_path / "one", tmp_path / "two")


def test_two_processes_on_the_same_samples_differ_from_one(tmp_path):
    """The test of the test: when each process trains on the first half of the batch, the comparison
    fails.
    """
    fit(task(), CONFIG, tmp_path / "one")
    wrong = (
        "import sdlite.distill.train as train; split = train._split; train._split = lambda b, i, j:"
        " split(b, 0, j - i)\n"
    )
    two_processes(wrong + f"fit(task(), CONFIG, Path({str(tmp_path / 'two')!r}))")
    with pytest.raises(AssertionError):
        same_networks(tmp_path / "one", tmp_path / "two")


def test_processes_stop_and_checkpoint_in_the_same_step(tmp_path):
    """Ctrl-C reaches one process only, and clocks differ: both must act together, or one waits for
    ever.
    """
    two_processes(
        "t = task()\nif os.environ['RANK'] == '0': interrupt_after(t, 3)\ndone = fit(t,"
        " replace(CONFIG, checkpoint_minutes=1e9 if os.environ['RANK'] == '0' else 0),"
        f" Path({str(tmp_path / 'two')!r}))\nassert (done['step'], done['finished']) == (3, False),"
        " done"
    )
    assert (
        sorted(p.name for p in (tmp_path / "two").glob("checkpoint-*"))[-1] == "checkpoint-00000003"
    )


def test_sharded_processes_equal_one_and_are_resumed_by_one(tmp_path):
    """FSDP2 on gloo, by the launcher's flag: same networks, whole checkpoints, and each process
    holds a share.
    """
    pytest.importorskip("torch.distributed.fsdp", reason="needs a torch with fully_shard")
    fit(task(), CONFIG, tmp_path / "one")
    two_processes(
        "t = interrupt_after(task(), 4)\n"
        f"fit(t, CONFIG, Path({str(tmp_path / 'two')!r}))\n"
        "p = t.modules['unet'].conv_in.weight\n"
        "assert p.to_local().shape[0] * 2 == p.shape[0], p",
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
    )
    assert fit(task(), CONFIG, tmp_path / "two", resume=True)["step"] == 6
    same_networks(tmp_path / "one", tmp_path / "two")
    two_processes(
        f"fit(task(), CONFIG, Path({str(tmp_path / 'three')!r}))",
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
    )
    same_networks(tmp_path / "one", tmp_path / "three")


def test_one_sharded_process_equals_an_unsharded_one_and_goes_on(tmp_path, monkeypatch):
    """As on one GPU: `--use_fsdp` is not left aside, and what goes on equals what was not stopped,
    bit for bit.
    """
    pytest.importorskip("torch.distributed.fsdp", reason="needs a torch with fully_shard")
    fit(task(), CONFIG, tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    try:
        fit(task(), CONFIG, tmp_path / "whole")
        first = interrupt_after(task(), 3)
        assert fit(first, CONFIG, tmp_path / "parts")["step"] == 3
        assert all(hasattr(p, "placements") for p in first.modules["unet"].parameters())
        assert fit(task(), CONFIG, tmp_path / "parts", resume=True)["step"] == 6
    finally:
        torch.distributed.destroy_process_group()
    a, b = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert set(a) == set(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    same_networks(tmp_path / "plain", tmp_path / "whole")


def test_what_a_checkpoint_holds_goes_to_the_device_of_its_parameter():
    """An optimizer's moments and its step, which a GPU's fused AdamW wants beside the weights."""
    from sdlite.distill import fsdp

    weight = torch.empty(2, 3, device="meta")
    for held in (torch.ones(2, 3), torch.ones(())):
        assert fsdp.like(held, weight).device == weight.device
        assert fsdp.like(held, weight).shape == held.shape


def test_gradient_checkpointing_computes_blocks_again_and_changes_nothing(tmp_path):
    from dataclasses import replace

    calls, states = [], []
    for on in (False, True):
        t, count = task(), []
        t.modules["unet"].down_blocks[0].resnets[0].conv1.register_forward_hook(
            lambda *_, c=count: c.append(1)
        )
        fit(t, replace(CONFIG, gradient_checkpointing=on), tmp_path / str(on))
        calls.append(len(count))
        states.append(last(tmp_path / str(on)))
    assert calls == [6, 12]  # once more for the backward
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_gradient_checkpointing_of_a_network_that_has_none_is_said(tmp_path):
    from dataclasses import replace

    t = task()
    t.modules = {"unet": torch.nn.Linear(2, 2)}
    with pytest.raises(TrainingError, match="gradient_checkpointing: no network of Task"):
        fit(t, replace(CONFIG, gradient_checkpointing=True), tmp_path)


def test_bfloat16_keeps_float32_weights_and_comes_near(tmp_path):
    from dataclasses import replace

    whole = fit(task(), CONFIG, tmp_path / "whole")
    half = fit(
        task(), replace(CONFIG, mixed_precision="bf16", plain_attention=True), tmp_path / "half"
    )
    assert half["loss"] == pytest.approx(whole["loss"], rel=0.05)
    assert half["loss"] != whole["loss"]
    assert {
        t.dtype for k, t in last(tmp_path / "half").items() if k.startswith(("model.", "ema."))
    } == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "words"),
    [("fp16", "'fp16' needs CUDA"), ("fp8", "accepted: 'no', 'bf16' or 'fp16'")],
)
def test_precisions_that_cannot_be(precision, words, tmp_path):
    if precision == "fp16" and torch.cuda.is_available():
        pytest.skip("fp16 is possible here")
    from dataclasses import replace

    with pytest.raises(SdliteError, match=words):
        fit(task(), replace(CONFIG, mixed_precision=precision), tmp_path)


def test_learning_rate_warms_up_holds_and_decays():
    c = TrainConfig(max_images=1000, lr=1.0, final_lr=0.1, warmup_images=100, decay_from=0.5)
    assert c.lr_at(0) < 0.02
    assert c.lr_at(100) == c.lr_at(500) == 1.0
    assert abs(c.lr_at(1000) - 0.1) < 1e-9
    assert c.lr_at(2000) == c.lr_at(1000)


def test_forward_at_zero_snr_is_pure_noise_and_v_is_minus_x0():
    f = Forward(Schedule.from_config(V_ZERO_SNR))
    x0, noise = torch.ones(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    x, v = f(x0, noise, torch.tensor([999]))
    torch.testing.assert_close(x, noise)
    torch.testing.assert_close(v, -x0)


def test_timesteps_are_one_from_each_slice():
    t = stratified_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert [int(i) // 100 for i in t] == list(range(10))


class Counted(Text):
    rows = 0

    def forward(self, ids):
        self.rows += len(ids)
        return super().forward(ids)


def test_cached_encoder_equals_the_encoder_and_asks_once():
    text = Counted()
    encode, ids = (
        CachedEncoder(text, capacity=3),
        torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [7, 8]]),
    )
    assert torch.equal(encode(ids), text.table(ids))
    assert text.rows == CachedEncoder.GROUP  # four different captions, filled up to one group
    assert torch.equal(encode(ids[:4].flip(0)), text.table(ids[:4].flip(0)))
    assert text.rows == CachedEncoder.GROUP  # the first three were kept
    assert torch.equal(encode(ids[4:]), text.table(ids[4:]))
    assert text.rows == 2 * CachedEncoder.GROUP  # the fourth was one too many
