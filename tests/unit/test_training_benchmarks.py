"""Benchmarks of training, on networks of some thousand weights: they run, write what they say, and
notice what is not equal.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from benchmarks import real_teacher, throughput  # noqa: E402
from sdlite.distill.latent_cache import CachedLatents  # noqa: E402
from sdlite.distill.students import StudentSpec, build  # noqa: E402
from sdlite.distill.tasks.base import V_ZERO_SNR  # noqa: E402
from sdlite.distill.teacher import Teacher  # noqa: E402
from tests.unit.test_parts import small  # noqa: E402, F401


@pytest.fixture
def setup(small):  # noqa: F811
    teacher = Teacher(small)
    g = torch.Generator().manual_seed(0)
    pictures = torch.rand(8, 3, 16, 16, generator=g) * 2 - 1
    latents, ids = (
        teacher.encode(list(pictures.numpy())),
        torch.from_numpy(teacher.tokenizer([f"picture {i}" for i in range(8)])),
    )
    source = CachedLatents(latents, ids, torch.from_numpy(teacher.tokenizer([""]))[0], [], {})

    def student():
        torch.manual_seed(1)
        return build(teacher.unet, StudentSpec(width=0.5)).requires_grad_(True)

    return throughput.Setup(
        teacher.unet.requires_grad_(False),
        teacher.text_encoder.requires_grad_(False),
        teacher.vae,
        source,
        {},
        student,
        lambda batch: pictures[batch["ids"]],
        V_ZERO_SNR,
    )


def compare(setup, tmp_path):
    return throughput.compare(
        setup, steps=3, batch_size=4, repeats=1, pool_size=16, warmup=1, lr=1e-4, scratch=tmp_path
    )


def test_throughput_compares_equal_work(setup, tmp_path):
    row = compare(setup, tmp_path)
    assert set(row["images_per_second"]) == set(throughput.VARIANTS)
    assert row["ratio"]["plain"] == 1
    assert [len(row["step_seconds"][v]) for v in throughput.VARIANTS] == [
        2,
        1,
        1,
        1,
    ]  # a step of ours ends where the next begins
    assert row["losses"]["cached"] == pytest.approx(row["losses"]["plain"], rel=1e-3)
    assert row["losses"]["targets"] != row["losses"]["plain"]  # bfloat16 it is


def test_throughput_refuses_a_loop_that_does_other_work(setup, tmp_path):
    setup.vae.register_to_config(
        scaling_factor=5.0
    )  # ten times what the cached latents were scaled by
    with pytest.raises(SystemExit, match="not the same work"):
        compare(setup, tmp_path)


def test_real_teacher_runs_the_real_command_and_reads_its_peak(small, tmp_path):  # noqa: F811
    row = real_teacher.measure(
        small,
        tmp_path,
        student="width = 0.5",
        steps=3,
        batch_size=2,
        micro=1,
        precision="bf16",
        pictures=2,
        px=16,
        threads=1,
    )
    assert row["steps"] == len(row["step_seconds"]) == 3
    assert 0.1 < row["peak_gb"] < 5
    assert 0 < row["student_parameters"] < row["teacher_parameters"]
    assert row["gradient_checkpointing"]


def test_real_teacher_says_why_the_command_failed(small, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit, match=r"(?s)sdlite distill failed.*do not divide"):
        real_teacher.measure(
            small,
            tmp_path,
            student="width = 0.3",
            steps=1,
            batch_size=1,
            micro=None,
            precision="no",
            pictures=1,
            px=16,
            threads=1,
        )
