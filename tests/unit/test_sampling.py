from __future__ import annotations

import numpy as np
import pytest

from sdlite.errors import InputError, UnknownNameError
from sdlite.sampling import SAMPLERS, Noise, Schedule, get_sampler, guide, sampler_of

V = Schedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_spacing="trailing",
             rescale_betas_zero_snr=True, clip_sample=False)  # fmt: skip
EPS = Schedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_a_perfect_network_lands_on_the_picture(sampler, steps):
    """If the network always knows x_0, every solver must end at x_0 (PNDM's multistep estimate: nearly, with enough steps)."""
    schedule = EPS if sampler == "pndm" else V
    if sampler == "pndm" and steps < 30:
        pytest.skip("pndm extrapolates the slope: it is only right in the limit of many steps")
    x0 = np.random.default_rng(1).standard_normal((2, 4, 4, 4)).astype(np.float32)
    solver = get_sampler(sampler, schedule, steps)
    noise = [Noise(0), Noise(1)]
    x = np.stack([n.normal((4, 4, 4)) for n in noise]) * np.float32(solver.init_noise_sigma)
    bar = schedule.alphas_cumprod().astype(np.float64)
    for i, t in enumerate(solver.timesteps):
        xt = solver.scale_model_input(i, x).astype(np.float64)
        a = np.interp(t, np.arange(1000), bar)
        if hasattr(solver, "sigmas"):
            a = 1 / (1 + float(solver.sigmas[i]) ** 2)
        eps = (xt - np.sqrt(a) * x0) / np.sqrt(1 - a)
        out = eps if sampler == "pndm" else np.sqrt(a) * eps - np.sqrt(1 - a) * x0
        x = solver.step(i, out.astype(np.float32), x, noise)
    assert np.abs(x - x0).max() < (0.2 if sampler == "pndm" else 0.02)


def test_guidance_formula_at_its_fixed_points():
    u, c = np.float32([1.0]), np.float32([3.0])
    assert [float(guide(u, c, g)[0]) for g in (0, 1, 2, 0.5)] == [1, 3, 5, 2]


def test_noise_of_a_batch_is_noise_of_its_seeds():
    assert (Noise(5).normal((4, 8, 8)) == Noise(5).normal((4, 8, 8))).all()
    assert (Noise(5).normal((4, 8, 8)) != Noise(6).normal((4, 8, 8))).any()
    x = Noise(0).normal((8, 64, 64))
    assert abs(x.mean()) < 0.02
    assert abs(x.std() - 1) < 0.02


def test_zero_terminal_snr_ends_at_zero_signal():
    assert V.alphas_cumprod()[-1] == 0
    assert EPS.alphas_cumprod()[-1] > 0
    assert (np.diff(V.alphas_cumprod()) < 0).all()


@pytest.mark.parametrize("bad", [{"prediction_type": "flow"}, {"beta_schedule": "sigmoid"}, {"timestep_spacing": "log"}])
def test_unknown_schedule_settings_are_refused(bad):
    with pytest.raises(UnknownNameError, match="accepted"):
        Schedule.from_config(bad)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"_class_name": "HeunDiscreteScheduler"}, "choose one with sampler="),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order=3"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps"),
    ],
)
def test_a_scheduler_that_we_do_not_have_is_never_replaced(config, text):
    with pytest.raises((UnknownNameError, InputError), match=text):
        sampler_of(config)


def test_lcm_takes_at_most_its_training_grid():
    with pytest.raises(InputError, match="original_inference_steps=50"):
        get_sampler("lcm", EPS, 51)
