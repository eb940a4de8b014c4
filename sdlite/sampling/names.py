"""Samplers by name, and diffusers' scheduler configs as those names, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping

from sdlite.errors import InputError, UnknownNameError, printable
from sdlite.sampling import exponential, solvers
from sdlite.sampling.control import Control
from sdlite.sampling.schedule import DEFAULTS, HARMLESS, KEYS, Schedule
from sdlite.schema import Config, shown


def _with_karras(plain: dict[str, type[solvers.SigmaSampler]]) -> dict[str, type[solvers.Sampler]]:
    out: dict[str, type[solvers.Sampler]] = {}
    for name, kind in plain.items():
        out[name] = kind
        # timesteps of one's own and Karras' are two answers to one question
        takes = tuple(t for t in kind.takes if t != "timesteps")
        changed = {"karras": True, "takes": takes}
        out[f"{name}-karras"] = type(f"{kind.__name__}Karras", (kind,), changed)
    return out


SAMPLERS: dict[str, type[solvers.Sampler]] = {
    "ddim": solvers.DDIM,
    "ddpm": solvers.DDPM,
    "pndm": solvers.PNDM,
    "pndm-rk": solvers.PNDMRungeKutta,
    "euler-ancestral": solvers.EulerAncestral,
    **_with_karras(
        {
            "euler": solvers.Euler,
            "heun": solvers.Heun,
            "lms": solvers.LMS,
            "dpm++2m": exponential.DPMSolverPP2M,
            "dpm++2m-sde": exponential.DPMSolverPP2MSDE,
            "dpm++3m": exponential.DPMSolverPP3M,
            "dpm++2s": exponential.DPMSolverPP2S,
            "dpm++sde": solvers.DPMSolverPPSDE,
            "deis": exponential.DEIS,
            "unipc": exponential.UniPC,
        }
    ),
    "lcm": solvers.LCM,
    "tcd": solvers.TCD,
}
_CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "DPMSolverSinglestepScheduler": "dpm++2s",
    "DEISMultistepScheduler": "deis",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
_NEAREST = {
    "KDPM2DiscreteScheduler": "heun-karras",
    "KDPM2AncestralDiscreteScheduler": "euler-ancestral",
    "DPMSolverSDEScheduler": "dpm++sde",
    "IPNDMScheduler": "pndm",
    "EDMEulerScheduler": "euler-karras",
    "SASolverScheduler": "unipc",
    "DDIMParallelScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
}
# What settings may be that no sampler reads. Another class's word is read as the class does.
_ONLY: dict[str, tuple[object, ...]] = {
    "thresholding": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_dynamic_shifting": (False,),
    "timestep_type": ("discrete",),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "shift_terminal": (None,),
    "variance_type": (None, "fixed_small", "fixed_small_log"),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint", "logrho", "bh2", "heun"),
}
_ONLY_OF: dict[str, dict[str, tuple[object, ...]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_order": (2, 3),
        "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    },
    "DPMSolverSinglestepScheduler": {"solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2")},
    "DEISMultistepScheduler": {
        "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
        "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
    },
    "UniPCMultistepScheduler": {"solver_order": (1, 2, 3), "lower_order_final": (True,)},
}


def _way_out(nearest: str) -> str:
    every = ", ".join(SAMPLERS)
    return f"choose another with sampler= (--sampler); the nearest is {nearest!r}, all are {every}."


def sampler_of(config: Config) -> str:
    """diffusers' scheduler config -> our sampler's name.

    Raises:
        UnknownNameError, InputError: a class or a setting that we do not have: never a stand-in.
    """
    kind = str(config.get("_class_name"))
    if kind not in _CLASSES:
        way_out = _way_out(_NEAREST.get(kind, "dpm++2m"))
        raise UnknownNameError(f"scheduler {shown(kind)} is not supported; {way_out}")
    name = _CLASSES[kind]
    read = {k: v for k, v in config.items() if k in DEFAULTS[kind] and v is not None}
    settings = {**DEFAULTS[kind], **read}
    if kind == "PNDMScheduler" and not settings["skip_prk_steps"]:
        name = "pndm-rk"
    if kind == "DPMSolverMultistepScheduler":
        sde = settings["algorithm_type"] == "sde-dpmsolver++"
        name = "dpm++2m-sde" if sde else "dpm++3m" if settings["solver_order"] == 3 else name
    if settings.get("use_karras_sigmas"):
        name += "-karras"
    _refuse(kind, settings, config, name)
    return name


def _refuse(kind: str, settings: Mapping[str, object], config: Config, nearest: str) -> None:
    for key, accepted in {**_ONLY, **_ONLY_OF.get(kind, {})}.items():
        if nearest.startswith("dpm++2m-sde") and key == "solver_order":
            accepted = (2,)
        if key in settings and settings[key] not in accepted:
            raise InputError(
                f"scheduler config: {key}={shown(settings[key])} of {kind} is not supported "
                f"(accepted: {', '.join(map(repr, accepted))}); {_way_out(nearest)}"
            )
    for key, value in config.items():
        known = key in KEYS or key in HARMLESS or key.startswith("_")
        if not known and value not in (None, False, [], {}):
            raise InputError(
                f"scheduler config: {printable(key, 80)}={shown(value)} is not a setting that"
                " sdlite knows, and it might change the image; remove it from the file, or"
                f" {_way_out(nearest)}"
            )


def known_sampler(name: str) -> type[solvers.Sampler]:
    """The sampler of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in SAMPLERS:
        every = ", ".join(SAMPLERS)
        raise UnknownNameError(f"sampler={name!r} is not known; choose one of {every}.")
    return SAMPLERS[name]


def get_sampler(
    name: str, schedule: Schedule, num_inference_steps: int, control: Control | None = None
) -> solvers.Sampler:
    """The sampler of that name over a schedule.

    Args:
        control: timesteps, sigmas or eta of the call; of as many steps.

    Raises:
        UnknownNameError: no such sampler. InputError: not with so many steps, on this schedule or
            with what `control` asks for.
    """
    kind = known_sampler(name)
    asked = {
        "timesteps": control is not None and control.timesteps is not None,
        "sigmas": control is not None and control.sigmas is not None,
        "eta": control is not None and control.eta != 0,
    }
    for what in (a for a, given in asked.items() if given and a not in kind.takes):
        able = ", ".join(n for n, k in SAMPLERS.items() if what in k.takes)
        raise InputError(
            f"sampler {name!r} takes no {what}=, as its scheduler in diffusers; choose one of"
            f" {able} (sampler=, --sampler), or leave {what} out."
        )
    return kind(schedule, num_inference_steps, control)
