from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import sdlite
from sdlite.errors import InputError, UnknownNameError
from sdlite.families import LatentScale
from sdlite.sampling import (
    SAMPLERS,
    Control,
    Noise,
    Schedule,
    denoise,
    get_sampler,
    guide,
    guided,
    sampler_of,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = Schedule.from_config(
    {
        **SD,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
)
EPS = Schedule.from_config(SD)
ROUGH = {
    "pndm": 0.2,
    "pndm-rk": 0.2,
    "lms": 0.1,
    "lms-karras": 0.1,
    "ddpm": 0.05,
    "deis": 0.15,
    "deis-karras": 0.15,
    "tcd": 0.15,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_a_perfect_network_lands_on_the_picture(sampler, steps):
    """If the network always knows x_0, every solver must end at x_0; PNDM's, LMS's and DEIS's
    estimates nearly, with enough steps.
    """
    schedule = EPS if sampler.startswith(("pndm", "lms", "deis", "heun", "tcd")) else V
    if sampler.startswith(("pndm", "lms", "deis", "tcd")) and steps < 30:
        pytest.skip(
            "ends at the table's smallest sigma or extrapolates the slope: right in the limit of"
            " many steps"
        )
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
        out = eps if schedule is EPS else np.sqrt(a) * eps - np.sqrt(1 - a) * x0
        x = solver.step(i, out.astype(np.float32), x, noise)
    assert np.abs(x - x0).max() < ROUGH.get(sampler, 0.02)


def test_guidance_formula_at_its_fixed_points():
    u, c = np.float32([1.0]), np.float32([3.0])
    assert [float(guide(u, c, g)[0]) for g in (0, 1, 2, 0.5)] == [1, 3, 5, 2]


def test_guidance_up_to_one_is_none_as_in_diffusers():
    assert [guided(g) for g in (0, 0.0, 0.5, 1, 1.0, 1.01, 7.5)] == [False] * 5 + [True] * 2
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="0 to 1 is no guidance"):
            guided(bad)
    calls = []

    def unet(sample, timestep, encoder_hidden_states):
        calls.append(len(sample))
        return sample * encoder_hidden_states.mean()

    x, embeds = np.ones((1, 4, 4, 4), np.float32), np.ones((1, 2, 3), np.float32)
    for g, rows in ((0.0, 1), (0.5, 1), (1.0, 1), (2.0, 2)):
        calls.clear()
        made = list(
            denoise(
                unet,
                x,
                embeds,
                [Noise(0)],
                get_sampler("ddim", EPS, 2),
                uncond=0 * embeds,
                guidance_scale=g,
            )
        )
        assert calls == [rows] * 2
        if g <= 1:
            assert (
                made[-1]
                == list(denoise(unet, x, embeds, [Noise(0)], get_sampler("ddim", EPS, 2)))[-1]
            ).all()


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


@pytest.mark.parametrize(
    "bad", [{"prediction_type": "flow"}, {"beta_schedule": "sigmoid"}, {"timestep_spacing": "log"}]
)
def test_unknown_schedule_settings_are_refused(bad):
    with pytest.raises(UnknownNameError, match="accepted"):
        Schedule.from_config(bad)


@pytest.mark.parametrize(
    "bad",
    [{"num_train_timesteps": 0}, {"num_train_timesteps": 10.5}, {"trained_betas": [0.1, 0.2]}],
)
def test_a_schedule_of_no_or_other_length_is_refused(bad):
    with pytest.raises(InputError, match="num_train_timesteps"):
        Schedule.from_config(bad)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"_class_name": "KDPM2DiscreteScheduler"}, "nearest is 'heun-karras'"),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True},
            "use_beta_sigmas=True of EulerDiscreteScheduler",
        ),
        ({"_class_name": "DDIMScheduler", "new_knob": 3}, "new_knob=3 is not a setting"),
    ],
)
def test_a_scheduler_that_we_do_not_have_is_never_replaced(config, text):
    with pytest.raises((UnknownNameError, InputError), match=text) as refused:
        sampler_of(config)
    assert "sampler= (--sampler)" in str(refused.value)


def test_a_setting_that_a_sampler_reads_is_checked_there():
    schedule = Schedule.from_config(
        {"_class_name": "EulerDiscreteScheduler", **SD, "final_sigmas_type": "tiny"}
    )
    with pytest.raises(InputError, match="final_sigmas_type='tiny'; accepted: 'zero', 'sigma_min'"):
        get_sampler("euler", schedule, 4)
    assert len(get_sampler("ddim", schedule, 4)) == 4


def test_what_the_file_says_of_the_solver_goes_with_any_sampler_that_knows_the_key():
    """As in diffusers when a pipeline's scheduler is changed: spacing goes with all,
    `set_alpha_to_one` where there is one.
    """
    file = Schedule.from_config(
        {
            "_class_name": "PNDMScheduler",
            **SD,
            "timestep_spacing": "trailing",
            "set_alpha_to_one": False,
        }
    )
    assert get_sampler("ddim", file, 4).timesteps.tolist() == [999, 749, 499, 249]
    assert get_sampler("ddim", file, 4).final == file.alphas_cumprod()[0]
    assert (
        get_sampler("ddim", Schedule.from_config({"_class_name": "PNDMScheduler", **SD}), 4).final
        == 1
    )


def test_lcm_takes_at_most_its_training_grid():
    with pytest.raises(InputError, match="original_inference_steps=50"):
        get_sampler("lcm", EPS, 51)


def test_heun_calls_the_network_twice_a_step():
    assert get_sampler("heun", EPS, 3).timesteps.tolist() == [999, 499.5, 499.5, 0, 0]


# --- conventions that occur once


def test_latents_go_to_the_decoder_and_back():
    scale = LatentScale.of({"scaling_factor": 0.5, "shift_factor": 0.25})
    latents = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
    there = scale.to_decoder(latents)
    np.testing.assert_array_equal(there, latents * 2 + 0.25)
    assert there.dtype == np.float32
    np.testing.assert_array_equal(scale.from_encoder(there), latents)
    assert LatentScale.of({}).factor == 0.18215, "SD-1.4's file has none"
    assert LatentScale.of({"_class_name": "AutoencoderTiny"}).factor == 1


def test_guidance_of_arrays_and_tensors_is_one_formula():
    u, c = np.array([1, 2], np.float32), np.array([3, 0], np.float32)
    np.testing.assert_array_equal(guide(u, c, 7.5), [16, -13])
    np.testing.assert_array_equal(guide(u, c, 1.0), c)
    assert guide(u, c, 7.1).dtype == np.float32
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    made = guide(torch.from_numpy(u), torch.from_numpy(c), 7.5)
    np.testing.assert_array_equal(made.numpy(), [16, -13])


def test_no_other_line_scales_latents_or_guides():
    """Each of the two formulas is written once in the package."""
    formulas = {
        r"[*/] *[\w.]*scaling_factor": [],
        r"\* \((cast\(Any, )?(cond|with_prompt|text)\)? - (u|uncond|without)": ["loop.py"],
    }
    root = Path(sdlite.__file__).parent
    for formula, expected in formulas.items():
        files = [f.name for f in sorted(root.rglob("*.py")) if re.search(formula, f.read_text())]
        assert files == expected, formula


# --- timesteps, sigmas and eta of a call


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"timesteps": [1, 2]}, r"timesteps\[1\]=2 comes after 1; accepted: descending numbers"),
        ({"timesteps": [5, 5]}, r"timesteps\[1\]=5 comes after 5"),
        ({"timesteps": []}, "timesteps is an empty list"),
        ({"timesteps": 800}, r"timesteps=800; accepted: a list of finite numbers, at least 0"),
        ({"timesteps": "800"}, r"timesteps='800' \(str\)"),
        ({"timesteps": [-1]}, r"timesteps\[0\]=-1; accepted: a finite number, at least 0"),
        ({"timesteps": [float("nan")]}, r"timesteps\[0\]=nan"),
        ({"timesteps": [True]}, r"timesteps\[0\]=True"),
        ({"sigmas": [1.0]}, "sigmas has 1 entry; accepted: at least 2, the noise at the start"),
        ({"sigmas": [0.0, 1.0]}, r"sigmas\[1\]=1 comes after 0"),
        ({"sigmas": [1.0, 0.0], "timesteps": [1]}, "timesteps and sigmas are both given"),
        ({"eta": 1.5}, "eta=1.5; accepted: a finite number, 0 to 1"),
        ({"eta": "0.3"}, r"eta='0.3' \(str\)"),
    ],
)
def test_lists_of_steps_are_checked(asked, words):
    with pytest.raises(InputError, match=words):
        Control.of(**asked)


def test_a_list_of_steps_says_how_many_there_are():
    assert Control.of().steps(None, 25) == 25
    assert Control.of().steps(3, 25) == 3
    assert Control.of(timesteps=np.array([999, 1])).steps(None, 25) == 2
    assert Control.of(sigmas=(14.0, 1.0, 0.0)).steps(2, 25) == 2
    with pytest.raises(InputError, match="num_inference_steps=3, but 2 timesteps are 2 steps"):
        Control.of(timesteps=[999, 1]).steps(3, 25)
    with pytest.raises(InputError, match="num_inference_steps=3, but 3 sigmas, the last of which"):
        Control.of(sigmas=[14.0, 1.0, 0.0]).steps(3, 25)


def test_lists_are_of_the_models_schedule():
    with pytest.raises(InputError, match=r"timesteps\[0\]=1000; accepted: descending whole.*999"):
        get_sampler("lcm", EPS, 1, Control.of(timesteps=[1000]))
    with pytest.raises(InputError, match=r"timesteps\[1\]=10.5; accepted: descending whole"):
        get_sampler("dpm++2m", EPS, 2, Control.of(timesteps=[800, 10.5]))
    half = get_sampler("euler", EPS, 2, Control.of(timesteps=[800, 10.5]))
    assert half.timesteps.tolist() == [800.0, 10.5]
    with pytest.raises(InputError, match=r"sigmas\[0\]=100; accepted: up to 14.61"):
        get_sampler("euler", EPS, 1, Control.of(sigmas=[100.0, 0.0]))
