"""Every numpy sampler against diffusers' scheduler of the same name, over whole loops."""

from __future__ import annotations

import importlib
import types

import numpy as np
import pytest

from sdlite.sampling import SAMPLERS, Noise, Schedule, get_sampler, sampler_of

torch = pytest.importorskip("torch", reason="needs the torch extra")
diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")

SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
DPM = "DPMSolverMultistepScheduler"
PLAIN = {
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "pndm-rk": ("PNDMScheduler", {"skip_prk_steps": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm++2m": (DPM, {}),
    "dpm++2m-sde": (DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++3m": (DPM, {"solver_order": 3}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
CASES = {
    name: (PLAIN[base][0], {**PLAIN[base][1], **({"use_karras_sigmas": True} if karras else {})})
    for name in SAMPLERS
    if not name.startswith("dpm++sde")  # its draws are torchsde's: test_step_control.py
    for base, karras in [(name.removesuffix("-karras"), name.endswith("-karras"))]
}
PREDICTIONS = {  # diffusers has no others there
    "pndm": ("epsilon", "v_prediction"),
    "pndm-rk": ("epsilon", "v_prediction"),
    "euler-ancestral": ("epsilon", "v_prediction"),
}
ZERO_SNR = {"ddim", "ddpm", "euler", "euler-karras", "euler-ancestral", "lcm", "tcd"} | {
    n for n in CASES if n.startswith(("dpm++2m", "dpm++3m", "unipc"))
}
NOISY = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", DPM)
SHAPE = (2, 4, 8, 8)


def network(x: np.ndarray, t: float) -> np.ndarray:
    """Any fixed smooth function of latents and timestep will do."""
    return (np.sin(x + t / 400) * 0.7).astype(np.float32)


class TorchNoise:
    """torch's own draw, so that this file's tolerance is about the samplers; `Noise` is compared
    below.
    """

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape):
        return torch.randn(tuple(shape), generator=self.generator).numpy()


_NUMBERS = np.linspace(0, 1, 10_000, dtype=np.float32)
ROOT_IS_EXACT = np.array_equal(
    torch.from_numpy(_NUMBERS).sqrt().numpy(), np.sqrt(_NUMBERS)
)  # of this CPU's torch


def scheduler_class(name: str):
    """diffusers' class. Its LMS takes one integral of a cubic from scipy; where that is missing,
    Gauss's points give it exactly.
    """
    if name != "LMSDiscreteScheduler":
        return getattr(diffusers, name)
    module = importlib.import_module("diffusers.schedulers.scheduling_lms_discrete")
    if not hasattr(module, "integrate"):
        points, weights = np.polynomial.legendre.leggauss(8)

        def quad(f, a, b, **_):
            half = (b - a) / 2
            return (
                float(
                    sum(
                        w * half * f(a + half * (p + 1))
                        for p, w in zip(points, weights, strict=True)
                    )
                ),
            )

        module.integrate = types.SimpleNamespace(quad=quad)
    return module.LMSDiscreteScheduler


def reference(name: str, config: dict, steps: int, x: np.ndarray) -> np.ndarray:
    scheduler = scheduler_class(name).from_config(config)
    scheduler.set_timesteps(steps)
    if name.startswith("Euler") and config.get("rescale_betas_zero_snr"):
        # At sigma = 4096 one step of float32 moves the picture by 1e-4, and torch's square root is
        # exact on some CPUs, one step off on others; the rescaling then subtracts roots that are
        # nearly equal, which makes tens of steps of it (20 seen, 2.4e-6). So the two tables are
        # compared by themselves, and the loops from the same table.
        own = get_sampler(sampler_of(config), Schedule.from_config(config), steps).sigmas
        if ROOT_IS_EXACT:
            np.testing.assert_array_max_ulp(scheduler.sigmas.numpy(), own, maxulp=2)
        np.testing.assert_allclose(own, scheduler.sigmas.numpy(), rtol=1e-5)
        scheduler.sigmas = torch.from_numpy(own.copy())
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(
            0
        )  # Karras sigmas repeat timesteps, and diffusers would look the index up by timestep
    generators = [torch.Generator().manual_seed(100 + i) for i in range(len(x))]
    x = torch.from_numpy(x) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = torch.from_numpy(network(scheduler.scale_model_input(x, t).numpy(), float(t)))
        extra = (
            {"generator": generators}
            if name in NOISY
            else {"eta": 0.0}
            if name == "TCDScheduler"
            else {}
        )
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x.numpy()


def ours(sampler: str, config: dict, steps: int, x: np.ndarray) -> np.ndarray:
    solver = get_sampler(sampler, Schedule.from_config(config), steps)
    noise = [TorchNoise(100 + i) for i in range(len(x))]
    x = x * np.float32(solver.init_noise_sigma)
    for i, t in enumerate(solver.timesteps):
        x = solver.step(i, network(solver.scale_model_input(i, x), float(t)), x, noise)
    assert x.dtype == np.float32
    return x


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 25])
@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero-snr"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", CASES)
def test_sampler_equals_diffusers_over_the_whole_loop(
    sampler, prediction, spacing, zero_snr, steps
):
    name, extra = CASES[sampler]
    if prediction not in PREDICTIONS.get(sampler, (prediction,)):
        pytest.skip(f"diffusers' {name} has no {prediction} prediction to compare with")
    if zero_snr and sampler not in ZERO_SNR:
        pytest.skip(f"diffusers' {name} has no rescale_betas_zero_snr")
    if sampler.startswith("dpm++2s") and spacing != "linspace":
        pytest.skip("diffusers' DPMSolverSinglestepScheduler has no timestep_spacing")
    if sampler == "pndm-rk" and steps < 4:
        pytest.skip("diffusers fails there, and we say so below")
    if zero_snr and prediction == "epsilon" and (spacing != "leading" or sampler in ("lcm", "tcd")):
        pytest.skip("epsilon prediction says nothing about x_0 at zero SNR: both divide by zero")
    config = {
        **SD,
        "_class_name": name,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        **extra,
    }
    if zero_snr:
        config["rescale_betas_zero_snr"] = True
    assert sampler_of(config) == sampler
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    want, got = reference(name, config, steps, x), ours(sampler, config, steps, x)
    assert np.isfinite(want).all()
    scale = max(1.0, float(np.abs(want).max()))
    # Where float32 itself is the difference. At sigma = 4096 the ancestral split subtracts two
    # numbers that agree to seven digits; Heun's second call divides by a last sigma of 0.03 what
    # its first step of 14 multiplies, and DEIS's first step multiplies x by 14.
    atol = (
        5e-4
        if zero_snr and sampler == "euler-ancestral"
        else 2e-5
        if sampler.startswith(("heun", "deis")) and steps <= 2
        else 1e-5
    )
    np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=atol)


@pytest.mark.parity
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alphas_cumprod_equal_diffusers(beta_schedule):
    for zero in (False, True):
        config = {**SD, "beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero}
        want = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
        np.testing.assert_allclose(
            Schedule.from_config(config).alphas_cumprod(), want, rtol=0, atol=1e-6
        )


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**40 + 5])
@pytest.mark.parametrize("shape", [(16,), (4, 64, 64), (3, 7), (8, 8, 8), (1, 101)])
def test_noise_equals_torch_cpu_generator(seed, shape):
    generator, noise = torch.Generator().manual_seed(seed), Noise(seed)
    for _ in range(3):
        np.testing.assert_allclose(
            noise.normal(shape), torch.randn(shape, generator=generator).numpy(), rtol=0, atol=1e-5
        )


@pytest.mark.parity
def test_a_sampler_with_one_wrong_step_is_caught(monkeypatch):
    from sdlite.sampling import solvers

    config = {
        **SD,
        "_class_name": "DDIMScheduler",
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    want = reference("DDIMScheduler", config, 4, x)
    monkeypatch.setattr(
        solvers.DDIM, "_alpha_before", lambda self, t: self.alpha_bar[max(t, 0)] * np.float32(0.999)
    )
    assert np.abs(ours("ddim", config, 4, x) - want).max() > 1e-4
