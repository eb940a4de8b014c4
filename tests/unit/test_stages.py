"""Guidance, progressive, consistency and adversarial distillation: targets that can be checked
exactly.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from sdlite.distill.encoders import STATES  # noqa: E402
from sdlite.distill.features import Taps  # noqa: E402
from sdlite.distill.tasks.base import V_ZERO_SNR, Forward, Given  # noqa: E402
from sdlite.distill.tasks.few_step import (  # noqa: E402
    Adversarial,
    Consistency,
    Guidance,
    Progressive,
    Solver,
    trailing_timesteps,
)
from sdlite.distill.tasks.student import Output  # noqa: E402
from sdlite.distill.train import TrainConfig, fit  # noqa: E402
from sdlite.errors import InputError  # noqa: E402
from sdlite.sampling import Schedule  # noqa: E402
from tests.unit.test_train import Source, Text, task  # noqa: E402

KINDS = ["v_prediction", "epsilon", "sample"]


def schedule(kind="v_prediction"):
    zero = kind == "v_prediction"  # epsilon says nothing about x_0 where there is no signal
    return {**V_ZERO_SNR, "prediction_type": kind, "rescale_betas_zero_snr": zero}


class Perfect(torch.nn.Module):
    """The exact network for data that is one point."""

    def __init__(self, solver, point):
        super().__init__()
        self.solver, self.point, self.calls = solver, point, 0
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, embeds):
        self.calls += 1
        out = self.solver.target(self.point.expand_as(x), x, t) + 0 * self.unused
        return type("Out", (), {"sample": out})


def batch_of(stage, size=8, seed=0):
    return stage.batch(size, torch.Generator().manual_seed(seed))


class OnePoint(Source):
    def draw(self, size, generator):
        return {**super().draw(size, generator), "latents": torch.full((size, 4, 4, 4), 0.7)}


def perfect(cls, kind="v_prediction", **kwargs):
    solver = Solver(Schedule.from_config(schedule(kind)))
    network = Perfect(solver, torch.full((1, 4, 4, 4), 0.7))
    teacher = Perfect(solver, network.point)
    given = Given(network, teacher, Text(), OnePoint(), {}, schedule(kind))
    return cls(**kwargs).task(given), network


def real(cls, scheduler=V_ZERO_SNR, **options):
    """The task of a stage kind, on tiny networks."""
    student, teacher = task().modules["unet"], task().modules["unet"]
    made = cls(**options).task(Given(student, teacher, Text(), Source(), {}, scheduler))
    made.save = lambda modules, folder: folder.mkdir(parents=True, exist_ok=True)
    made.sample = lambda modules, path: None
    return made


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25, 50])
def test_trailing_timesteps_are_those_of_diffusers(steps):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    assert trailing_timesteps(steps, 1000).tolist() == [*theirs.timesteps.tolist(), -1]


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_undo_each_other(kind):
    solver = Solver(Schedule.from_config(schedule(kind)))
    x0, noise = torch.randn(5, 4, 4, 4), torch.randn(5, 4, 4, 4)
    t = torch.tensor([1, 200, 500, 800, 990])
    x, target = Forward(solver_schedule := Schedule.from_config(schedule(kind)))(x0, noise, t)
    assert solver_schedule.prediction_type == kind
    torch.testing.assert_close(solver.target(x0, x, t), target, rtol=1e-3, atol=2e-3)
    got, eps = solver.x0_noise(target, x, t)
    torch.testing.assert_close(got, x0, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(eps, noise, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_to_the_halved_target_equals_two_steps(kind):
    solver = Solver(Schedule.from_config(schedule(kind)))
    fine = trailing_timesteps(8, 1000)
    first = 0 if kind == "v_prediction" else 2
    index = torch.arange(first, 8, 2)
    t, half, end = fine[index], fine[index + 1], fine[index + 2]
    x, one, two = (
        torch.randn(len(index), 4, 4, 4, generator=torch.Generator().manual_seed(k))
        for k in range(3)
    )
    z = solver.ddim(one, x, t, half)
    z = solver.ddim(two, z, half, end)
    x0 = solver.halved_target(x, z, t, end)
    again = solver.ddim(solver.target(x0, x, t), x, t, end)
    torch.testing.assert_close(again, z, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(
        x0[-1], z[-1], rtol=1e-5, atol=1e-5
    )  # the last step ends at x_0 itself


@pytest.mark.parametrize("loss_type", ["v", "x0"])
@pytest.mark.parametrize("kind", KINDS)
def test_progressive_loss_is_zero_for_the_exact_network(kind, loss_type):
    stage, network = perfect(Progressive, kind, steps=(4,), loss_type=loss_type)
    batch = batch_of(stage)
    assert set(batch["index"].tolist()) == {0, 2, 4, 6}
    assert stage.loss(stage.modules, batch, 0)["loss"] < 1e-4
    network.point = network.point + 0.1
    assert stage.loss(stage.modules, batch, 0)["loss"] > 1e-4


def test_guidance_target():
    stage = real(Guidance, guidance_scale=1.0)
    batch = batch_of(stage)
    assert (
        stage.loss(stage.modules, batch, 0)["loss"] == 0
    )  # the student is a copy, and 1 is no guidance
    stage = real(Guidance, guidance_scale=3.0)
    loss = stage.loss(stage.modules, batch, 0)["loss"]
    x, _ = stage.forward(batch["latents"], batch["noise"], batch["t"])
    with torch.no_grad():
        c = stage.teacher(x, batch["t"], stage.embeds(batch["input_ids"])).sample
        u = stage.teacher(
            x, batch["t"], stage.embeds(Source.empty_ids[None]).expand(8, -1, -1)
        ).sample
    torch.testing.assert_close(loss, (2 * (c - u)).pow(2).mean(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5, 8.0])
def test_guidance_scale_is_lcms_w_plus_one(scale):
    """LCM says c + w (c - u); its pipeline is given guidance_scale = w + 1. Ours is guidance_scale
    everywhere; below 1 it is none.
    """
    stage = real(Guidance, guidance_scale=scale)
    x, t, w = torch.randn(3, 4, 4, 4), torch.tensor([3, 500, 999]), max(scale, 1) - 1
    embeds = stage.embeds(torch.arange(12).view(3, 4))
    with torch.no_grad():
        c, u = (
            stage.teacher(x, t, e).sample
            for e in (embeds, stage.embeds(Source.empty_ids[None]).expand(3, -1, -1))
        )
    torch.testing.assert_close(
        stage.teach(x, t, {STATES: embeds}), c + w * (c - u), rtol=1e-4, atol=1e-5
    )


def test_reconstruction_keeps_to_the_start_when_there_is_one():
    import copy

    plain, kept = real(Adversarial), real(Adversarial)
    for p in kept.modules["unet"].parameters():
        p.data += 0.1
    plain.modules["unet"].load_state_dict(kept.modules["unet"].state_dict())
    kept.start = copy.deepcopy(kept.modules["unet"])
    batch = batch_of(kept)
    assert kept.loss(kept.modules, batch, 0)["reconstruction"] < 1e-10
    assert plain.loss(plain.modules, batch, 0)["reconstruction"] > 1e-3


def test_consistency_boundary_and_exact_network():
    stage, network = perfect(Consistency, grid=10)
    x = torch.randn(3, 4, 4, 4)
    clean = torch.full((3,), -1)
    assert torch.equal(stage.consistency(network, x, clean, {STATES: torch.zeros(3, 4, 8)}), x)
    assert stage.loss(stage.modules, batch_of(stage), 0)["loss"] < 1e-3
    stage = real(Consistency, grid=10)
    loss = stage.loss(stage.modules, batch_of(stage), 0)["loss"]
    loss.backward()
    assert loss > 0
    assert all(p.grad is None for p in stage.teacher.parameters())


def test_adversarial_terms_reach_only_their_own_network():
    stage = real(Adversarial, weight=1.0, ramp=0, reconstruction=0.0)
    unet, judge = stage.modules["unet"], stage.modules["discriminator"]
    batch = batch_of(stage)
    terms = stage.loss(stage.modules, batch, 0)
    terms["generator"].backward(retain_graph=True)
    assert all(p.grad is None for p in judge.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())
    unet.zero_grad(set_to_none=True)
    terms["discriminator"].backward()
    assert all(p.grad is None for p in unet.parameters())
    assert any(p.grad is not None for p in judge.parameters())
    assert all(p.grad is None for p in stage.teacher.parameters())


def test_discriminator_learns_to_tell_and_the_generator_term_rises():
    stage = real(Adversarial, weight=0.0, reconstruction=0.0)
    judge = stage.modules["discriminator"]
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    first = last = None
    for step in range(40):
        terms = stage.loss(stage.modules, batch_of(stage, 16, step), step)
        optimizer.zero_grad()
        terms["discriminator"].backward()
        optimizer.step()
        first, last = first or terms, terms
    assert last["discriminator"] < 0.7 * first["discriminator"]
    assert last["generator"] > first["generator"]


@pytest.mark.parametrize(
    "stage",
    [
        (Guidance, {"guidance_scale": 2.0}),
        (Progressive, {"steps": (4,)}),
        (Consistency, {}),
        (Adversarial, {}),
    ],
)
def test_every_stage_trains_in_the_loop(stage, tmp_path):
    made = real(stage[0], **stage[1])
    result = fit(
        made, TrainConfig(max_images=24, batch_size=8, lr=1e-3, sample_every=0), tmp_path / "run"
    )
    assert result["finished"]
    assert torch.isfinite(torch.tensor(result["loss"]))


# --- the output stage and what may be added to it


def test_teacher_gradients_are_the_mean_over_batches_and_leave_the_teacher():
    from sdlite.distill.tasks.student import TeacherTask, teacher_gradients

    unet, text = task().modules["unet"].requires_grad_(False), Text()
    found = teacher_gradients(unet, text, Source(), V_ZERO_SNR, batches=2, size=4)
    assert not any(p.requires_grad for p in unet.parameters())
    made = TeacherTask(
        unet.requires_grad_(True), text, Source(), parts={}, train_text_encoder=False
    )
    sum(made.loss(made.modules, batch_of(made, 4, k), 0)["loss"] for k in range(2)).backward()
    for k, p in unet.named_parameters():
        torch.testing.assert_close(
            found[k],
            p.grad / 2 if p.grad is not None else torch.zeros_like(p),
            rtol=1e-4,
            atol=1e-6,
        )


def student_task(**kwargs):
    made = real(Output, **kwargs)
    return made, made.loss(made.modules, batch_of(made), 0)


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"output_weight": 0, "feature_weight": 0}, {"task"}),
        ({}, {"task", "output", "feature"}),
        ({"mask": True}, {"task", "output", "feature"}),
        ({"multi_scale_weight": 0.1, "feature_weight": 0}, {"task", "output", "multi_scale"}),
        ({"channel_weight": 0.1}, {"task", "output", "feature", "channel"}),
        ({"article": True, "feature_weight": 0}, {"task", "article"}),
    ],
)
def test_terms_of_the_output_stage(options, terms):
    made, losses = student_task(**options)
    assert set(losses) == {"loss", *terms}
    losses["loss"].backward()
    assert all(p.grad is not None for p in made.modules["student"].parameters())
    assert all(p.grad is None for p in made.teacher.parameters())


def test_task_loss_alone_does_not_run_the_teacher():
    made = real(Output, output_weight=0, feature_weight=0)
    made.teacher = None
    made.loss(made.modules, batch_of(made), 0)


def test_each_term_counts_with_its_weight():
    _, one = student_task(feature_weight=0.5, multi_scale_weight=2.0, channel_weight=3.0)
    wanted = (
        one["task"]
        + one["output"]
        + 0.5 * one["feature"]
        + 2 * one["multi_scale"]
        + 3 * one["channel"]
    )
    torch.testing.assert_close(one["loss"], wanted)


def test_temperature_falls_with_the_step():
    made = real(Output, channel_weight=1.0, temperature=(4.0, 1.0), temperature_steps=10)
    torch.manual_seed(0)
    for p in made.modules["student"].parameters():
        p.data += 0.1 * torch.randn_like(p)
    batch = batch_of(made)
    early, late, after = (made.loss(made.modules, batch, k)["channel"].item() for k in (0, 10, 99))
    assert early != late == after


def test_tap_weights_choose_the_taps():
    made, _ = student_task(tap_weights={"mid": 1.0})
    assert set(made.teacher_taps) == {"mid"}
    with pytest.raises(InputError, match=r"'middle'.*known:.*mid"):
        real(Output, tap_weights={"middle": 1.0})


def test_a_copy_of_the_student_keeps_features_of_its_own_and_the_teacher_is_left_without_hooks():
    import copy

    made = real(Output)
    student, twin = made.modules["student"], copy.deepcopy(made.modules["student"])
    x, t, embeds = torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.randn(2, 4, 8)
    _, mine = student(x, t, embeds)
    before = {k: v.clone() for k, v in mine.items()}
    twin(-x, t, embeds)
    assert all(
        torch.equal(v, before[k])
        for k, v in student.tapped.features.items()
        if k not in student.projectors
    )
    teacher = made.teacher
    assert any(m._forward_hooks for m in teacher.modules())
    del made
    assert not any(m._forward_hooks for m in teacher.modules())


def test_attached_taps_go_with_their_owner():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3))
    taps = Taps(net, {"first": "0"}).attach()
    net(torch.ones(1, 2))
    assert taps.features["first"].shape == (1, 3)
    del taps
    assert not net[0]._forward_hooks


@pytest.mark.slow
def test_compiled_distillation_compiles_once():
    made = real(Output)
    for m in (made.modules["student"], made.teacher):
        m.compile()
    torch._dynamo.reset()
    plain, _ = student_task()
    for k in range(4):
        batch = batch_of(made, seed=k)
        wanted = plain.loss(plain.modules, batch, 0)["loss"]
        torch.testing.assert_close(
            made.loss(made.modules, batch, 0)["loss"], wanted, rtol=1e-4, atol=1e-5
        )
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 4
