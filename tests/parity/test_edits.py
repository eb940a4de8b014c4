"""Image to image and inpainting against diffusers: a part of each sampler's schedule, noise added
to an image, and a mask that blends after each step.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdlite.errors import InputError
from sdlite.sampling import Schedule, denoise, get_sampler

torch = pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("diffusers", reason="needs the torch extra")

from tests.parity.test_samplers import (  # noqa: E402
    CASES,
    NOISY,
    SD,
    SHAPE,
    TorchNoise,
    network,
    scheduler_class,
)

pytestmark = pytest.mark.parity
# Where it begins later, diffusers' LMS weighs slopes that it does not have: too short steps.
STARTS = {n: c for n, c in CASES.items() if n != "pndm-rk" and not n.startswith("lms")}


def arrays():
    """An image's latents, noise, and a mask (1 is painted)."""
    rng = np.random.default_rng(0)
    x0, noise = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    return x0, noise, (rng.random((2, 1, 8, 8)) > 0.5).astype(np.float32)


def by_diffusers(name, config, steps, strength, masked):
    """The loops of StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline."""
    scheduler = scheduler_class(name).from_config(config)
    scheduler.set_timesteps(steps)
    x0, noise, mask = (torch.from_numpy(a) for a in arrays())
    first = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    generators = [torch.Generator().manual_seed(100 + i) for i in range(len(x0))]
    extra = {"generator": generators} if name in NOISY else {}
    extra = {"eta": 0.0} if name == "TCDScheduler" else extra
    x = scheduler.add_noise(x0, noise, timesteps[:1])
    for i, t in enumerate(timesteps):
        out = torch.from_numpy(network(scheduler.scale_model_input(x, t).numpy(), float(t)))
        x = scheduler.step(out, t, x, **extra).prev_sample
        if masked:
            kept = x0
            if i < len(timesteps) - 1:
                kept = scheduler.add_noise(x0, noise, timesteps[i + 1 : i + 2])
            x = (1 - mask) * kept + mask * x
    return x.numpy()


def by_sdlite(sampler, config, steps, strength, masked):
    solver = get_sampler(sampler, Schedule.from_config(config), steps)
    x0, noise, mask = arrays()
    solver.begin_at(solver.first_call(strength))

    def after(call, x):
        kept = x0 if call == len(solver) else solver.add_noise(call, x0, noise)
        return (1 - mask) * kept + mask * x

    *_, x = denoise(
        lambda sample, timestep, **_: network(sample, float(timestep)),
        solver.add_noise(solver.begin, x0, noise),
        {},
        [TorchNoise(100 + i) for i in range(len(x0))],
        solver,
        noised=True,
        after=after if masked else None,
    )
    return x


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (4, 0.8), (25, 0.3), (25, 0.76)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", STARTS)
def test_a_part_of_the_schedule_equals_diffusers(sampler, prediction, steps, strength, masked):
    name, extra = STARTS[sampler]
    config = {**SD, "_class_name": name, "prediction_type": prediction, **extra}
    want = by_diffusers(name, config, steps, strength, masked)
    got = by_sdlite(sampler, config, steps, strength, masked)
    assert got.dtype == np.float32
    assert np.abs(want).max() < 100
    scale = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("steps", "strength", "made"),
    [(4, 1.0, 4), (4, 0.0, 0), (4, 0.24, 0), (4, 0.25, 1), (3, 0.9, 2)],
)
def test_how_many_steps_are_made(steps, strength, made):
    for sampler in ("ddim", "heun", "dpm++sde"):
        config = {**SD, "_class_name": "DDIMScheduler"}
        solver = get_sampler(sampler, Schedule.from_config(config), steps)
        calls = len(solver) - solver.first_call(strength)
        assert calls == max(0, solver.calls * made - (solver.calls == 2))


def test_runge_kuttas_steps_are_no_part_of_a_schedule():
    solver = get_sampler("pndm-rk", Schedule.from_config({**SD, "_class_name": "PNDMScheduler"}), 8)
    solver.begin_at(0)
    with pytest.raises(InputError, match=r"'pndm-rk' begins with its Runge-Kutta steps.* 'pndm'"):
        solver.begin_at(3)
