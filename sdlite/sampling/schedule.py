"""What a scheduler_config.json means: the noise schedule, and what the file says of the solver.

A key that the file lacks has the default of the file's scheduler class, as in diffusers; a key that
the class does not know is not read. Two keys are what diffusers' `StableDiffusionPipeline` makes of
them whatever the file says, so neither is read: `steps_offset` is 1, `clip_sample` is false.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Never

import numpy as np

from sdlite.errors import ArtifactError, InputError, UnknownNameError
from sdlite.schema import (
    BOOL,
    Config,
    Rule,
    each,
    either,
    number,
    one_of,
    optional,
    refused,
    rule,
    text,
    whole,
)

Array = np.ndarray
F32 = np.float32

FILE = "scheduler_config.json"  # in messages
STEPS_OFFSET = 1  # of "leading" timesteps

# --- diffusers' own defaults, class by class: signatures of diffusers 0.39 (tests/parity)

_BETAS: dict[str, object] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_K_BETAS = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_LCM_BETAS = _K_BETAS | {"beta_schedule": "scaled_linear"}
_SPACED: dict[str, object] = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEADING: dict[str, object] = {"timestep_spacing": "leading", "steps_offset": 0}
_CLIP: dict[str, object] = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD: dict[str, object] = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_SIGMAS: dict[str, object] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_FLOW: dict[str, object] = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_ZERO_SNR: dict[str, object] = {"rescale_betas_zero_snr": False}
_DPM: dict[str, object] = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -float("inf"),
    "variance_type": None,
}
_CONSISTENCY: dict[str, object] = {
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "clip_sample_range": 1.0,
}
_PIXELS = _BETAS | _LEADING | _CLIP | _THRESHOLD | _ZERO_SNR
_SINGLE = _BETAS | _SIGMAS | _FLOW | _THRESHOLD | _DPM
DEFAULTS: dict[str, dict[str, object]] = {
    "DDIMScheduler": _PIXELS | {"set_alpha_to_one": True},
    "DDPMScheduler": _PIXELS | {"variance_type": "fixed_small"},
    "PNDMScheduler": _BETAS | _LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": (
        _BETAS
        | _SPACED
        | _SIGMAS
        | _ZERO_SNR
        | {
            "interpolation_type": "linear",
            "sigma_min": None,
            "sigma_max": None,
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
        }
    ),
    "EulerAncestralDiscreteScheduler": _BETAS | _SPACED | _ZERO_SNR,
    "HeunDiscreteScheduler": _K_BETAS | _SPACED | _SIGMAS | _CLIP | {"clip_sample": False},
    "LMSDiscreteScheduler": _BETAS | _SPACED | _SIGMAS,
    "KDPM2DiscreteScheduler": _K_BETAS | _SPACED | _SIGMAS,
    "KDPM2AncestralDiscreteScheduler": _K_BETAS | _SPACED | _SIGMAS,
    "DPMSolverMultistepScheduler": (
        _BETAS
        | _SPACED
        | _SIGMAS
        | _FLOW
        | _ZERO_SNR
        | _THRESHOLD
        | _DPM
        | {"lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False}
    ),
    "DPMSolverSinglestepScheduler": _SINGLE | {"lower_order_final": False},
    "DPMSolverSDEScheduler": _K_BETAS | _SPACED | _SIGMAS | {"noise_sampler_seed": None},
    "DEISMultistepScheduler": (
        _BETAS
        | _SPACED
        | _SIGMAS
        | _FLOW
        | _THRESHOLD
        | {
            "solver_order": 2,
            "algorithm_type": "deis",
            "solver_type": "logrho",
            "lower_order_final": True,
        }
    ),
    "UniPCMultistepScheduler": (
        _BETAS
        | _SPACED
        | _SIGMAS
        | _FLOW
        | _ZERO_SNR
        | _THRESHOLD
        | {
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "lower_order_final": True,
            "disable_corrector": [],
            "solver_p": None,
            "final_sigmas_type": "zero",
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
        }
    ),
    "LCMScheduler": _LCM_BETAS | _LEADING | _THRESHOLD | _ZERO_SNR | _CONSISTENCY,
    "TCDScheduler": _LCM_BETAS | _LEADING | _THRESHOLD | _ZERO_SNR | _CONSISTENCY,
}
KEYS = {k for keys in DEFAULTS.values() for k in keys}
HARMLESS = {"tensor_format", "timestep_values", "format"}  # of files from before diffusers 0.3

# Published models have 1000; 100 times that is a table of 1 MB, made for each call.
MOST_TIMESTEPS = 100_000
# float32 holds 1 - beta apart from 1 down to 6e-8; published betas begin at 0.0001. A beta of 1 is
# the end of trained_betas that were rescaled to no signal at all.
_BETA, _TRAINED = number(1e-6, 0.9999), number(1e-6, 1)
_NAMES = ("prediction_type", "beta_schedule", "timestep_spacing")
_ACCEPTED: dict[str, Rule] = {
    "prediction_type": one_of(("epsilon", "v_prediction", "sample")),
    "beta_schedule": one_of(("linear", "scaled_linear", "squaredcos_cap_v2")),
    "timestep_spacing": one_of(("leading", "trailing", "linspace")),
    "num_train_timesteps": whole(2, MOST_TIMESTEPS),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "trained_betas": optional(each(_TRAINED, 2, MOST_TIMESTEPS)),
    "steps_offset": whole(0, MOST_TIMESTEPS),
    "clip_sample": BOOL,
    "clip_sample_range": number(1e-6, 1e6),
    "thresholding": BOOL,
    "dynamic_thresholding_ratio": number(0, 1),
    "sample_max_value": number(0, 1e6),
    "set_alpha_to_one": BOOL,
    "skip_prk_steps": BOOL,
    "rescale_betas_zero_snr": BOOL,
    "use_karras_sigmas": BOOL,
    "use_exponential_sigmas": BOOL,
    "use_beta_sigmas": BOOL,
    "use_flow_sigmas": BOOL,
    "use_lu_lambdas": BOOL,
    "use_dynamic_shifting": BOOL,
    "lower_order_final": BOOL,
    "euler_at_final": BOOL,
    "predict_x0": BOOL,
    "flow_shift": number(0, 1e6),
    "interpolation_type": text(),
    "timestep_type": text(),
    "final_sigmas_type": text(),
    "algorithm_type": text(),
    "solver_type": text(),
    "time_shift_type": text(),
    "variance_type": optional(text()),
    "solver_order": whole(1, 3),
    "sigma_min": optional(number(1e-6, 1e6)),
    "sigma_max": optional(number(1e-6, 1e6)),
    "lambda_min_clipped": either(
        "a number, or -Infinity", number(-1e6, 1e6), rule("", lambda v: v == -math.inf)
    ),
    "original_inference_steps": whole(1, MOST_TIMESTEPS),
    "timestep_scaling": number(1e-6, 1e6),
    "_class_name": text(),
}


def _check(config: Config, defaults: Config) -> None:
    """Every value that is there, used or not.

    A null has no meaning where the class's default is not off: diffusers would take it for false.

    Raises:
        UnknownNameError, InputError: the first that is not what it may be.
    """
    for key, accepts in _ACCEPTED.items():
        if key not in config:
            continue
        value, default = config[key], defaults.get(key)
        if (
            value is None
            and key != "_class_name"
            and (key not in defaults or default in (None, False))
        ):
            continue
        try:
            accepts(FILE, key, value)
        except ArtifactError as e:
            raise (UnknownNameError if key in _NAMES else InputError)(str(e)) from None
    total = config.get("num_train_timesteps", 1000)
    if (betas := config.get("trained_betas")) is not None and len(betas) != total:
        _refuse(
            "trained_betas",
            betas,
            f"{total} of them, as num_train_timesteps says; there are {len(betas)}",
        )
    if (offset := config.get("steps_offset") or 0) >= total:
        _refuse("steps_offset", offset, f"less than num_train_timesteps, {total}")
    known = {**defaults, **config}
    start, end = known["beta_start"], known["beta_end"]
    if betas is None and start > end:
        _refuse("beta_start", start, f"at most beta_end, {end}")


def _refuse(key: str, value: object, accepted: str) -> Never:
    raise InputError(str(refused(FILE, key, value, accepted)))


@dataclass(frozen=True)
class Schedule:
    """The training noise schedule under diffusers' names.

    Attributes:
        settings: what the file says of the solver, under diffusers' names. A sampler takes its own
            class's default for what is not there.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    settings: Config = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Config) -> Schedule:
        """A scheduler_config.json, of any class.

        Raises:
            UnknownNameError, InputError: a noise schedule that is not one of ours.
        """
        kind = config.get("_class_name")
        defaults = DEFAULTS.get(kind if isinstance(kind, str) else "", _BETAS | _ZERO_SNR)
        _check(config, defaults)
        given = {k: v for k, v in config.items() if v is not None and not k.startswith("_")}
        read = {k: given.get(k, default) for k, default in defaults.items()}
        betas = read["trained_betas"]
        noise = {k: read[k] for k in ("rescale_betas_zero_snr", *_BETAS) if k in read}
        noise["trained_betas"] = None if betas is None else tuple(betas)
        return cls(**noise, settings={k: v for k, v in given.items() if k not in noise})

    def alphas_cumprod(self) -> Array:
        """(T,) float32, decreasing; the last one is 0 with `rescale_betas_zero_snr`.

        Source of the rescaling: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
        """
        one, betas = F32(1), self._betas()
        if self.rescale_betas_zero_snr:
            root = np.sqrt(_cumprod32(one - betas))
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            bar32 = root**2
            betas = one - np.concatenate([bar32[:1], bar32[1:] / bar32[:-1]])
        return _cumprod32(one - betas)

    def _betas(self) -> Array:
        n = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, F32)
        if self.beta_schedule == "linear":
            return _linspace32(self.beta_start, self.beta_end, n)
        if self.beta_schedule == "scaled_linear":
            return _linspace32(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
        bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(F32)


def _linspace32(start: float, end: float, n: int) -> Array:
    """torch.linspace in float32, to the last bit: from both ends, with fused multiply-add.

    The fused multiply-add goes by way of float64.
    """
    i = np.arange(n)
    step = np.float64((F32(end) - F32(start)) / F32(n - 1))
    rising = np.float64(F32(start)) + step * i
    return np.where(i < n // 2, rising, np.float64(F32(end)) - step * (n - 1 - i)).astype(F32)


def _cumprod32(x: Array) -> Array:
    """torch.cumprod of float32 on the CPU: accumulated in float64."""
    return np.cumprod(x.astype(np.float64)).astype(F32)
