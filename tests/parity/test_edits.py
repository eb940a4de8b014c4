"""Image to image and inpainting against diffusers: a part of each sampler's schedule, noise added
to an image, and a mask that blends after each step.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import sdlite
from sdlite.errors import InputError
from sdlite.sampling import Schedule, denoise, get_sampler

torch = pytest.importorskip("torch", reason="needs the torch extra")
diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")

from benchmarks import published_models  # noqa: E402
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


# --- whole pipelines

CALLS = {"4 steps": (4, 0.0, 0.5), "guided": (25, 5.0, 0.3)}


@pytest.fixture(scope="module")
def painted():
    """A colorful image of 64 px, and a mask of its middle."""
    rng = np.random.default_rng(0)
    image = np.kron(rng.random((8, 8, 3)), np.ones((8, 8, 1)))
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:56] = 255
    return Image.fromarray((image * 255).astype(np.uint8)), Image.fromarray(mask)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("edits")

    def write(name):
        out = root / name
        return out if out.exists() else published_models.write(name, out)

    return write


@pytest.mark.skipif(
    published_models.merges_file() is None,
    reason="CLIP's merges: pip install --no-deps open_clip_torch",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize("name", ["bk-sdm-v2-tiny", "vega"])
def test_an_edited_image_is_that_of_diffusers(folder, painted, name, masked):
    image, mask = painted
    kind = diffusers.AutoPipelineForInpainting if masked else diffusers.AutoPipelineForImage2Image
    theirs = kind.from_pipe(diffusers.DiffusionPipeline.from_pretrained(folder(name)))
    theirs.set_progress_bar_config(disable=True)
    where = np.asarray(mask) > (0 if masked else -1)
    more = {"mask_image": mask, "height": 64, "width": 64} if masked else {}
    with sdlite.Pipeline.from_pretrained(folder(name), backend="torch", threads=1) as ours:
        for steps, guidance, strength in CALLS.values():
            call = {"num_inference_steps": steps, "guidance_scale": guidance, **more}
            call |= {"strength": strength, "image": image, "output_type": "np"}
            draws = torch.Generator().manual_seed(3)
            right = theirs("a red fox", generator=draws, **call).images[0]
            got = ours("a red fox", seed=3, **call).images[0]
            assert -10 * np.log10(np.square(right - got)[where].mean()) >= 60
            plain = ours("a red fox", seed=3, **{**call, "strength": 1.0}).images[0]
            assert np.abs(plain - got).max() > 0.02
            if masked:
                assert (np.round(got * 255) == np.asarray(image))[~where].all()


@pytest.mark.skipif(
    published_models.merges_file() is None,
    reason="CLIP's merges: pip install --no-deps open_clip_torch",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True], ids=["lcm", "ancestral"])
def test_few_step_samplers_edit_as_in_diffusers(folder, painted, masked):
    """An LCM makes all its steps on less noise; inpainting draws what it draws there."""
    image, mask = painted
    name = "bk-sdm-v2-tiny" if masked else "lcm-dreamshaper"
    kind = diffusers.AutoPipelineForInpainting if masked else diffusers.AutoPipelineForImage2Image
    checker = {} if masked else {"safety_checker": None}
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder(name), **checker)
    theirs = kind.from_pipe(theirs)
    theirs.set_progress_bar_config(disable=True)
    more = {"mask_image": mask, "height": 64, "width": 64} if masked else {}
    sampler = None
    if masked:
        sampler, config = "euler-ancestral", theirs.scheduler.config
        theirs.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(config)
    where = np.asarray(mask) > (0 if masked else -1)
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "strength": 0.5, "image": image}
    call |= {"output_type": "np", **more}
    draws = torch.Generator().manual_seed(3)
    right = theirs("a red fox", generator=draws, **call).images[0]
    with sdlite.Pipeline.from_pretrained(folder(name), backend="torch", threads=1) as ours:
        out = ours("a red fox", seed=3, sampler=sampler, **call)
    assert out.calls == (2 if masked else 4)
    assert -10 * np.log10(np.square(right - out.images[0])[where].mean()) >= 60


@pytest.mark.skipif(
    published_models.merges_file() is None,
    reason="CLIP's merges: pip install --no-deps open_clip_torch",
)
@pytest.mark.filterwarnings("ignore")
def test_an_inpainting_model_paints_as_in_diffusers(folder, painted):
    """Its UNet has nine channels: latents, mask, and the latents of what is kept."""
    image, mask = painted
    source = folder("sd-inpainting")
    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(source, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    where = np.asarray(mask) > 0
    call = {"image": image, "mask_image": mask, "height": 64, "width": 64, "output_type": "np"}
    with sdlite.Pipeline.from_pretrained(source, backend="torch", threads=1) as ours:
        for steps, guidance, strength in ((4, 0.0, 0.5), (4, 5.0, 1.0), (25, 5.0, 0.6)):
            call |= {"num_inference_steps": steps, "guidance_scale": guidance}
            draws = torch.Generator().manual_seed(3)
            right = theirs("a red fox", generator=draws, strength=strength, **call).images[0]
            got = ours("a red fox", seed=3, strength=strength, **call).images[0]
            assert -10 * np.log10(np.square(right - got)[where].mean()) >= 60
            assert (np.round(got * 255) == np.asarray(image))[~where].all()
        for more, lacks in (
            ({}, "give image and mask_image"),
            ({"image": image}, "give mask_image"),
        ):
            with pytest.raises(InputError, match=f"is an inpainting model.*{lacks}"):
                ours("a red fox", **more)
        zero = ours("a red fox", seed=3, **call | {"strength": 0.0})
        assert zero.calls == 0


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_backends_edit_as_torch_does(painted, backend):
    pytest.importorskip(backend, reason=f"needs {backend}")
    image, mask = painted
    made = []
    for name in ("torch", backend):
        with sdlite.Pipeline.from_pretrained(
            "emoji", precision="fp32", backend=name, threads=1
        ) as pipe:
            call = {"image": image, "seed": 1, "output_type": "np"}
            made.append(
                [
                    pipe("a red apple", strength=0.5, **call).images[0],
                    pipe("a red apple", mask_image=mask, **call).images[0],
                ]
            )
    for a, b in zip(*made, strict=True):
        assert -10 * np.log10(np.square(a - b).mean()) >= 60
