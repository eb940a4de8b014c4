"""Timesteps, sigmas and eta of a call, and the samplers of few-step students, against diffusers'
schedulers over whole loops.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types

import numpy as np
import pytest

from sdlite.errors import InputError
from sdlite.sampling import SAMPLERS, Control, Schedule, get_sampler, sampler_of
from tests.parity.test_samplers import CASES, SD, SHAPE, TorchNoise, network

torch = pytest.importorskip("torch", reason="needs the torch extra")
diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")
pytestmark = pytest.mark.parity

NOISE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
# Align Your Steps, arXiv:2404.14507, as diffusers.schedulers.AysSchedules has them.
AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
AYS_SIGMAS = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
# scheduler_config.json of SDXL base, in the words of the students' cards: ByteDance/SDXL-Lightning
# (Euler, trailing; the 1-step UNet predicts x_0), ByteDance/Hyper-SD (TCD with eta, DDIM trailing,
# LCM at 800 in one step), h1t/TCD-SDXL-LoRA (TCD, eta 0.3).
SDXL = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
TRAILING = {**SDXL, "timestep_spacing": "trailing"}
STUDENTS = {
    "Lightning, 1 step": (
        {**TRAILING, "_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"},
        {"num_inference_steps": 1},
    ),
    "Lightning, 4 steps": (
        {**TRAILING, "_class_name": "EulerDiscreteScheduler"},
        {"num_inference_steps": 4},
    ),
    "Lightning, 8 steps": (
        {**TRAILING, "_class_name": "EulerDiscreteScheduler"},
        {"num_inference_steps": 8},
    ),
    "Hyper-SD, 1 step": ({**SDXL, "_class_name": "LCMScheduler"}, {"timesteps": [800]}),
    "Hyper-SD, 1 step, unified": (
        {**SDXL, "_class_name": "TCDScheduler"},
        {"num_inference_steps": 1, "eta": 1.0},
    ),
    "Hyper-SD, 2 steps": ({**TRAILING, "_class_name": "DDIMScheduler"}, {"num_inference_steps": 2}),
    "Hyper-SD, 8 steps, unified": (
        {**SDXL, "_class_name": "TCDScheduler"},
        {"num_inference_steps": 8, "eta": 0.5},
    ),
    "TCD, 4 steps": (
        {**SDXL, "_class_name": "TCDScheduler"},
        {"num_inference_steps": 4, "eta": 0.3},
    ),
}


def reference(scheduler, x, eta=0.0, **times):
    """diffusers' loop of a pipeline that was given `times`."""
    scheduler.set_timesteps(**times)
    known = inspect.signature(scheduler.step).parameters
    generators = [torch.Generator().manual_seed(100 + i) for i in range(len(x))]
    more = {"eta": eta} if "eta" in known else {}
    more |= {"generator": generators} if "generator" in known else {}
    x = torch.from_numpy(x) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = torch.from_numpy(network(scheduler.scale_model_input(x, t).numpy(), float(t)))
        x = scheduler.step(out, t, x, **more).prev_sample
    return x.numpy()


def ours(name, config, x, num_inference_steps=None, **asked):
    control = Control.of(**asked)
    steps = control.steps(num_inference_steps, 4)
    solver = get_sampler(name, Schedule.from_config(config), steps, control)
    noise = [TorchNoise(100 + i) for i in range(len(x))]
    x = x * np.float32(solver.init_noise_sigma)
    for i, t in enumerate(solver.timesteps):
        x = solver.step(i, network(solver.scale_model_input(i, x), float(t)), x, noise)
    assert x.dtype == np.float32
    return x


def compare(got, want, atol=1e-5):
    assert np.isfinite(want).all()
    scale = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=atol)


def config_of(sampler, prediction, spacing="leading"):
    kind, extra = CASES[sampler]
    return {
        **SD,
        "_class_name": kind,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        **extra,
    }


def made(config):
    return getattr(diffusers, config["_class_name"]).from_config(config)


def takers(what):
    return [n for n, kind in SAMPLERS.items() if what in kind.takes]


@pytest.mark.parametrize("timesteps", [AYS, [800], [999, 500], [999, 749, 499, 249], [7, 3, 0]])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", takers("timesteps"))
def test_timesteps_equal_diffusers(sampler, prediction, timesteps):
    config = config_of(sampler, prediction)
    want = reference(made(config), NOISE, timesteps=timesteps)
    compare(ours(sampler, config, NOISE, timesteps=timesteps), want, 2e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", takers("sigmas"))
def test_sigmas_equal_diffusers(sampler, prediction, spacing):
    config = config_of(sampler, prediction, spacing)
    for sigmas in (AYS_SIGMAS, [14.6, 0.0], [3.0, 1.5, 0.5, 0.2]):
        want = reference(made(config), NOISE, sigmas=sigmas)
        compare(ours(sampler, config, NOISE, sigmas=sigmas), want)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 25])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", ["ddim", "tcd"])
def test_eta_equals_diffusers(sampler, prediction, steps, eta):
    config = config_of(sampler, prediction)
    want = reference(made(config), NOISE, eta, num_inference_steps=steps)
    compare(ours(sampler, config, NOISE, steps, eta=eta), want)


@pytest.mark.parametrize("student", STUDENTS)
def test_few_step_students_sample_as_their_cards_say(student):
    config, call = STUDENTS[student]
    want = reference(made(config), NOISE, **call)
    compare(ours(sampler_of(config), config, NOISE, **call), want)


class Brownian:
    """torchsde's BrownianInterval as far as the scheduler asks: the noise of half a step, then that
    of the whole one, of the same draws as ours.
    """

    seeds = iter(())

    def __init__(self, size, **_):
        self.size, self.half = tuple(size), None
        self.noise = TorchNoise(next(Brownian.seeds))

    def __call__(self, low, high):
        drawn = torch.from_numpy(self.noise.normal(self.size))
        if self.half is None:
            self.half = (low, drawn * (high - low) ** 0.5)
            return -self.half[1]
        middle, first = self.half
        self.half = None
        return -(first + drawn * (middle - low) ** 0.5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 25])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["dpm++sde", "dpm++sde-karras"])
def test_the_brownian_sampler_equals_diffusers_at_equal_draws(
    sampler, prediction, spacing, steps, monkeypatch
):
    fake = types.SimpleNamespace(BrownianInterval=Brownian)
    monkeypatch.setitem(sys.modules, "torchsde", fake)
    name = "diffusers.schedulers.scheduling_dpmsolver_sde"
    monkeypatch.delitem(sys.modules, name, raising=False)
    kind = importlib.import_module(name).DPMSolverSDEScheduler
    monkeypatch.delitem(sys.modules, name)
    seeds = [100 + i for i in range(len(NOISE))]
    Brownian.seeds = iter(seeds)
    config = {
        **SD,
        "_class_name": "DPMSolverSDEScheduler",
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "use_karras_sigmas": sampler.endswith("karras"),
        "noise_sampler_seed": seeds,
    }
    scheduler = kind(**{k: v for k, v in config.items() if k != "_class_name"})
    scheduler.set_begin_index(0)
    want = reference_from(scheduler, steps)
    compare(ours(sampler, config, NOISE, steps), want, 2e-5)


def reference_from(scheduler, steps):
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    x = torch.from_numpy(NOISE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = torch.from_numpy(network(scheduler.scale_model_input(x, t).numpy(), float(t)))
        x = scheduler.step(out, t, x).prev_sample
    return x.numpy()


def test_a_wrong_eta_is_caught():
    config = config_of("ddim", "epsilon")
    want = reference(made(config), NOISE, 0.3, num_inference_steps=4)
    with pytest.raises(AssertionError):
        compare(ours("ddim", config, NOISE, 4, eta=0.31), want)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_a_sampler_does_not_take_is_refused_as_by_diffusers(sampler):
    schedule = Schedule.from_config(SD)
    lists = {"timesteps": [999, 500], "sigmas": [14.0, 1.0, 0.0], "eta": 0.5}
    for what, value in lists.items():
        if what in SAMPLERS[sampler].takes:
            get_sampler(sampler, schedule, 2, Control.of(**{what: value}))
            continue
        said = rf"sampler '{sampler}' takes no {what}=.*choose one of .*, or leave {what} out"
        said = said.replace("+", r"\+")
        with pytest.raises(InputError, match=said):
            get_sampler(sampler, schedule, 2, Control.of(**{what: value}))
