"""Cached teacher targets: the same losses without the teacher, made anew when anything that
determines them changes.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from sdlite.distill import teacher_cache  # noqa: E402
from sdlite.distill.tasks.few_step import (  # noqa: E402
    Adversarial,
    Consistency,
    Guidance,
    Progressive,
)
from sdlite.distill.tasks.student import Output  # noqa: E402
from sdlite.distill.teacher_cache import cache_targets  # noqa: E402
from sdlite.distill.train import TrainConfig, fit, step_generator  # noqa: E402
from sdlite.errors import InputError  # noqa: E402
from tests.unit.test_stages import real  # noqa: E402
from tests.unit.test_train import interrupt_after, last  # noqa: E402

STAGES = [
    (Output, {"feature_weight": 0.0}),
    (Output, {"feature_weight": 0.0, "mask": True, "timestep_power": 0.6}),
    (Output, {"feature_weight": 0.0, "article": True}),
    (Guidance, {"guidance_scale": 3.0}),
    (Progressive, {"steps": (4,), "guidance_scale": 2.0}),
    (Consistency, {"grid": 10, "guidance_scale": 2.0}),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def changed(made, by=0.1):
    """The student is no copy of its teacher any more, so that losses are not 0."""
    torch.manual_seed(5)
    for m in made.modules.values():
        for p in m.parameters():
            p.data += by * torch.randn_like(p)
    return made


def forbid(*args, **kwargs):
    raise AssertionError("the teacher ran")


@pytest.mark.parametrize(("cls", "options"), STAGES)
def test_losses_with_the_cache_equal_those_without_and_the_teacher_does_not_run(
    cls, options, tmp_path
):
    made = changed(real(cls, **options))
    cache_targets(made, 40, tmp_path / "t.safetensors")
    batch = made.batch(16, step_generator(0, 3))
    without = made.loss(made.modules, {k: v for k, v in batch.items() if k != "wanted"}, 0)
    made.teacher.forward = forbid
    cached = made.loss(made.modules, batch, 0)
    assert cached["loss"] > 1e-3
    for k in without:
        torch.testing.assert_close(cached[k], without[k], rtol=1e-4, atol=1e-6)
    wrong = made.loss(made.modules, {**batch, "wanted": batch["wanted"].roll(1, 0)}, 0)
    assert abs(wrong["loss"] - without["loss"]) > 1e-3 * without["loss"]


def test_file_is_read_again_and_not_computed_again(tmp_path):
    first = cache_targets(real(Guidance, guidance_scale=2.0), 20, tmp_path / "t.safetensors")
    again = real(Guidance, guidance_scale=2.0)
    again.teacher.forward = forbid
    second = cache_targets(again, 20, tmp_path / "t.safetensors")
    assert all(torch.equal(first.tensors[k], v) for k, v in second.tensors.items())
    assert len(second) == 20


@pytest.mark.parametrize("what", ["guidance", "teacher", "text encoder", "data", "size", "seed"])
def test_another_teacher_data_or_option_makes_it_anew(what, tmp_path):
    path = tmp_path / "t.safetensors"
    before = cache_targets(real(Guidance, guidance_scale=2.0), 20, path)
    other = real(Guidance, guidance_scale=3.0 if what == "guidance" else 2.0)
    if what == "teacher":
        next(other.teacher.parameters()).data += 0.5
    if what == "text encoder":
        other.encode.text_encoder.table.weight.data += 0.5
    if what == "data":
        draw = other.source.draw
        other.source.draw = lambda size, generator: {
            **draw(size, generator),
            "latents": torch.ones(size, 4, 4, 4),
        }
    after = cache_targets(other, 24 if what == "size" else 20, path, seed=int(what == "seed"))
    batch = after.draw(8, step_generator(0, 0))
    torch.testing.assert_close(batch["wanted"], other.targets(batch), rtol=1e-4, atol=1e-5)
    assert len(after) != len(before) or not torch.equal(
        after.tensors["wanted"], before.tensors["wanted"]
    )


def test_a_key_that_forgets_the_options_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "_stamp", lambda task, drawn: "always the same")
    path = tmp_path / "t.safetensors"
    cache_targets(real(Guidance, guidance_scale=2.0), 20, path)
    other = real(Guidance, guidance_scale=5.0)
    batch = cache_targets(other, 20, path).draw(8, step_generator(0, 0))
    assert (batch["wanted"] - other.targets(batch)).abs().max() > 1e-3


def test_draws_are_one_from_each_noise_level_and_depend_on_the_generator_alone(tmp_path):
    made = real(Guidance, guidance_scale=2.0)
    pool = cache_targets(made, 50, tmp_path / "t.safetensors")
    a, b = (made.batch(10, step_generator(0, 4)) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["t"], made.batch(10, step_generator(0, 5))["t"])
    slices = [(pool.tensors["t"] <= t).sum() - 1 for t in a["t"].sort().values]
    assert sorted(int(s) // 5 for s in slices) == list(range(10))


def test_interrupted_training_with_the_cache_resumes_bit_for_bit(tmp_path):
    config = TrainConfig(
        max_images=48,
        batch_size=8,
        lr=1e-3,
        warmup_images=16,
        sample_every=0,
        checkpoint_minutes=60,
    )

    def task():
        made = changed(real(Guidance, guidance_scale=2.0))
        cache_targets(made, 32, tmp_path / "t.safetensors")
        return made

    fit(task(), config, tmp_path / "whole")
    fit(interrupt_after(task(), 3), config, tmp_path / "parts")
    fit(task(), config, tmp_path / "parts", resume=True)
    a, b = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (Output, {}, "feature_weight = 0"),
        (Output, {"feature_weight": 0.0, "output_weight": 0.0}, "no term needs the teacher"),
        (Adversarial, {}, "what the student makes"),
    ],
)
def test_stages_that_need_the_teacher_itself_refuse(cls, options, words, tmp_path):
    with pytest.raises(InputError, match=words):
        cache_targets(real(cls, **options), 8, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="at least 1 draw"):
        cache_targets(real(Guidance), 0, tmp_path / "t.safetensors")


def test_frozen_networks_go_to_the_device_together():
    made = real(Guidance)
    made.encode(torch.zeros(1, 4, dtype=torch.int64))
    made.parts = {"vae": torch.nn.Linear(2, 2)}
    made.to(torch.device("meta"))
    networks = [made.teacher, made.encode.text_encoder, made.parts["vae"]]
    assert all(p.device.type == "meta" for m in networks for p in m.parameters())
    assert all(x.device.type == "meta" for v in made.encode._seen.values() for x in v)
