"""scheduler_config.json as people have them: the image is that of diffusers' pipeline, or a refusal
in one line that names the key.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shutil

import numpy as np
import pytest

from sdlite.errors import InputError, SdliteError, UnknownNameError
from sdlite.sampling import SAMPLERS, Schedule, get_sampler, sampler_of
from sdlite.sampling.schedule import DEFAULTS
from sdlite.spec import latent_size
from tests.helpers import psnr

torch = pytest.importorskip("torch", reason="needs the torch extra")
diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")

B = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
}
DDIM, PNDM, LCM = ({"_class_name": f"{n}Scheduler", **B} for n in ("DDIM", "PNDM", "LCM"))
EULER, HEUN = (
    {"_class_name": f"{n}DiscreteScheduler", **B, "steps_offset": 1} for n in ("Euler", "Heun")
)
DPM, SINGLE = (
    {"_class_name": f"DPMSolver{n}Scheduler", **B, "steps_offset": 1}
    for n in ("Multistep", "Singlestep")
)
DEIS, UNIPC = (
    {"_class_name": f"{n}MultistepScheduler", **B, "steps_offset": 1} for n in ("DEIS", "UniPC")
)
EQUAL = {
    "SD-1.5's PNDM": {
        **PNDM,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    },
    "SD-2.1's DDIM": {
        **DDIM,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "SD-Turbo's Euler": {
        **EULER,
        "timestep_spacing": "trailing",
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    },
    "small-sd's DEIS": {
        **DEIS,
        "algorithm_type": "deis",
        "solver_order": 2,
        "solver_type": "logrho",
        "timestep_spacing": "leading",
    },
    "DDIM without clip_sample and steps_offset": DDIM,
    "DDIM, clip_sample true, steps_offset 0": {
        **DDIM,
        "clip_sample": True,
        "steps_offset": 0,
        "set_alpha_to_one": False,
    },
    "DDIM of betas' defaults": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "PNDM without steps_offset": {**PNDM, "skip_prk_steps": True},
    "PNDM without skip_prk_steps": {**PNDM, "steps_offset": 1},
    "PNDM with a key of another class": {
        **PNDM,
        "skip_prk_steps": True,
        "rescale_betas_zero_snr": True,
    },
    "LCM": {
        **LCM,
        "original_inference_steps": 50,
        "steps_offset": 1,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
    },
    "LCM of defaults, clipped": {"_class_name": "LCMScheduler", "clip_sample": True},
    "TCD": {"_class_name": "TCDScheduler", "steps_offset": 1},
    "Euler, leading, no steps_offset": {
        "_class_name": "EulerDiscreteScheduler",
        **B,
        "timestep_spacing": "leading",
    },
    "Euler, karras": {**EULER, "use_karras_sigmas": True},
    "Euler, karras, sigma_min and sigma_max": {
        **EULER,
        "use_karras_sigmas": True,
        "sigma_min": 0.1,
        "sigma_max": 10.0,
    },
    "Euler, final sigma_min": {**EULER, "final_sigmas_type": "sigma_min"},
    "Euler, log_linear": {**EULER, "interpolation_type": "log_linear"},
    "Euler ancestral": {"_class_name": "EulerAncestralDiscreteScheduler", **B},
    "Heun": HEUN,
    "Heun of defaults": {"_class_name": "HeunDiscreteScheduler"},
    "DPM++ 2M": {**DPM, "algorithm_type": "dpmsolver++", "solver_order": 2},
    "DPM++ 2M of DEIS's word": {**DPM, "solver_type": "logrho"},
    "DPM++ 2M, solver heun": {**DPM, "solver_type": "heun"},
    "DPM++ 2M, lower_order_final false": {**DPM, "lower_order_final": False},
    "DPM++ 2M, euler_at_final, sigma_min": {
        **DPM,
        "euler_at_final": True,
        "final_sigmas_type": "sigma_min",
    },
    "DPM++ 2M, sigma_min, no lower order": {
        **DPM,
        "lower_order_final": False,
        "final_sigmas_type": "sigma_min",
    },
    "DPM++ 2M, karras, leading": {**DPM, "use_karras_sigmas": True, "timestep_spacing": "leading"},
    "DPM++ 3M": {**DPM, "solver_order": 3},
    "DPM++ sde": {**DPM, "algorithm_type": "sde-dpmsolver++"},
    "DPM++ sde, heun, karras": {
        **DPM,
        "algorithm_type": "sde-dpmsolver++",
        "solver_type": "heun",
        "use_karras_sigmas": True,
    },
    "DPM++ with every key": {
        **DPM,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
        "rescale_betas_zero_snr": False,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "DPM++, lambda_min_clipped, cosine": {
        **DPM,
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": -5.1,
    },
    "DPM++, lambda_min_clipped, trailing": {
        **DPM,
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": -0.5,
        "timestep_spacing": "trailing",
    },
    "DPM++ single": SINGLE,
    "DPM++ single, sigma_min, heun": {
        **SINGLE,
        "final_sigmas_type": "sigma_min",
        "solver_type": "heun",
    },
    "DPM++ single, lambda_min_clipped": {
        **SINGLE,
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": -5.1,
    },
    "UniPC": UNIPC,
    "UniPC, order 3": {**UNIPC, "solver_order": 3},
    "UniPC, karras, sigma_min": {
        **UNIPC,
        "use_karras_sigmas": True,
        "final_sigmas_type": "sigma_min",
        "sigma_min": 0.2,
    },
    "DEIS, karras": {**DEIS, "use_karras_sigmas": True},
    "DDPM": {"_class_name": "DDPMScheduler", **B, "steps_offset": 1, "clip_sample": False},
    "DDPM of defaults": {"_class_name": "DDPMScheduler", **B},
    "v, zero SNR, trailing DDIM": {
        **DDIM,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    },
    "trained_betas": {
        **DDIM,
        "trained_betas": np.linspace(0.0009, 0.012, 1000).tolist(),
        "clip_sample": False,
    },
    "500 training timesteps": {**DDIM, "num_train_timesteps": 500},
    "an unknown key that is off": {**DDIM, "some_new_option": None},
}
REFUSED = {
    "thresholding": {**DDIM, "thresholding": True},
    "use_beta_sigmas": {**EULER, "use_beta_sigmas": True},
    "use_exponential_sigmas": {**UNIPC, "use_exponential_sigmas": True},
    "use_lu_lambdas": {**DPM, "use_lu_lambdas": True},
    "use_flow_sigmas": {**DPM, "use_flow_sigmas": True},
    "timestep_type": {**EULER, "timestep_type": "continuous"},
    "algorithm_type": {**DPM, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    "solver_order": {**SINGLE, "solver_order": 3},
    "solver_type": {**UNIPC, "solver_type": "bh1"},
    "predict_x0": {**UNIPC, "predict_x0": False},
    "variance_type": {"_class_name": "DDPMScheduler", **B, "variance_type": "learned_range"},
    "some_new_option": {**DDIM, "some_new_option": 3},
    "'KDPM2DiscreteScheduler'": {"_class_name": "KDPM2DiscreteScheduler", **B},
    "'FlowMatchEulerDiscreteScheduler'": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": 3.0,
    },
}


@pytest.fixture(scope="module")
def both(plain, tmp_path_factory):
    """config, steps -> PSNR of our image, torch networks, to that of diffusers' pipeline, equal
    seeds.
    """
    import sdlite
    from sdlite.artifact import Artifact

    model = tmp_path_factory.mktemp("configs") / "model"
    shutil.copytree(plain, model)
    networks = sdlite.Pipeline.from_pretrained(model, backend="torch", threads=1).networks
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    parts = {k: getattr(theirs, k) for k in ("vae", "text_encoder", "tokenizer", "unet")}

    def run(config, steps):
        (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        pipe = sdlite.Pipeline(Artifact.open(model), networks)
        got = np.asarray(
            pipe("pizza", num_inference_steps=steps, guidance_scale=3.0, seed=3).images[0]
        )
        scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(model / "scheduler")
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        reference = diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, **none)
        reference.set_progress_bar_config(disable=True)
        seed = torch.Generator("cpu").manual_seed(3)
        want = reference(
            "pizza", num_inference_steps=steps, guidance_scale=3.0, generator=seed, output_type="np"
        ).images[0]
        return psnr(got, (want * 255).round().astype(np.uint8))

    return run


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EQUAL)
def test_a_config_means_what_diffusers_pipeline_makes_of_it(both, name):
    assert both(EQUAL[name], 4) >= 60


@pytest.mark.parity
@pytest.mark.parametrize("key", REFUSED)
def test_what_we_do_not_have_is_refused_with_a_way_out(key):
    config = REFUSED[key]
    with pytest.raises((InputError, UnknownNameError)) as refused:
        sampler_of(config)
    text = str(refused.value)
    assert key in text
    assert "\n" not in text
    near = text.split("the nearest is ")[1].split(",")[0].strip("'")
    assert near in SAMPLERS
    get_sampler(near, Schedule.from_config(config), 4)  # and it is one


@pytest.mark.parity
@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_signatures_of_diffusers(name):
    module = {"DPMSolverSDEScheduler": "dpmsolver_sde", "LMSDiscreteScheduler": "lms_discrete"}.get(
        name
    )
    try:
        kind = (
            getattr(importlib.import_module(f"diffusers.schedulers.scheduling_{module}"), name)
            if module
            else getattr(diffusers, name)
        )
    except ModuleNotFoundError as e:
        pytest.skip(f"diffusers' {name} needs {e.name}")
    signature = inspect.signature(inspect.unwrap(kind.__init__)).parameters
    assert {k: p.default for k, p in signature.items() if k != "self"} == DEFAULTS[name]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", [8, 32, 63, 64, 96, [16, 24]])
@pytest.mark.parametrize(
    "version",
    [None, "0.2.2", "0.6.0.dev0", "0.8.1", "0.9.0.dev0", "0.9.0", "0.10.0.dev0", "0.39.0"],
)
def test_the_size_of_a_model_is_diffusers(side, version):
    unet = diffusers.UNet2DConditionModel(
        sample_size=side,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=1,
        mid_block_type=None,
        layers_per_block=1,
    )
    unet.register_to_config(**({} if version is None else {"_diffusers_version": version}))
    config = dict(unet.config)
    none = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    )
    want = diffusers.StableDiffusionPipeline(
        **none, unet=unet, requires_safety_checker=False
    ).unet.config.sample_size
    assert latent_size(config) == (tuple(want) if isinstance(want, list) else (want, want))


# --- numbers of steps


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [1, 2, 3, 999, 1000])
@pytest.mark.parametrize(
    "name",
    [
        "SD-1.5's PNDM",
        "PNDM without skip_prk_steps",
        "SD-2.1's DDIM",
        "SD-Turbo's Euler",
        "Euler ancestral",
        "Heun",
        "DPM++ 2M",
        "small-sd's DEIS",
        "UniPC",
        "DDPM",
        "LCM",
        "TCD",
        "DPM++ single",
    ],
)
def test_any_number_of_steps_is_diffusers_or_a_range_error(name, steps):
    """The whole loop with a network of one number; where diffusers fails or divides by zero, we say
    the range.
    """
    from tests.parity.test_samplers import ours, reference

    config = EQUAL[name] | {"clip_sample": False, "steps_offset": 1}
    x = np.random.default_rng(0).standard_normal((1, 4, 2, 2)).astype(np.float32)
    try:
        want = reference(config["_class_name"], config, steps, x)
    except (IndexError, ValueError):
        want = np.full_like(x, np.nan)
    if np.isfinite(want).all():
        got = ours(sampler_of(config), config, steps, x)
        np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, float(np.abs(want).max())))
    else:
        with pytest.raises(SdliteError, match=rf"num_inference_steps={steps}.*(1 to|or more)"):
            get_sampler(sampler_of(config), Schedule.from_config(config), steps)
