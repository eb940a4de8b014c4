"""Families of models: which kind a pipeline folder is, and whether sdlite runs it, read from its
JSON files before any weights.

    base.py     class Family: parts, inputs of the UNet, what a prompt becomes
    sd.py       Stable Diffusion 1.x, 2.x and their students, LCM too
    controlled.py  sd with a ControlNet
    sdxl.py     SDXL and its students: two text encoders
    configs.py  what a configuration may say

`register` adds one from outside.
"""

from __future__ import annotations

from typing import Any

from sdlite.families.base import CONTROLS as CONTROLS
from sdlite.families.base import NEGATIVE as NEGATIVE
from sdlite.families.base import Call as Call
from sdlite.families.base import Conditions as Conditions
from sdlite.families.base import Config, Configs
from sdlite.families.base import Encoders as Encoders
from sdlite.families.base import Family as Family
from sdlite.families.base import unet_arguments as unet_arguments
from sdlite.families.configs import LatentScale as LatentScale
from sdlite.families.configs import check_config as check_config
from sdlite.families.configs import inpaints as inpaints
from sdlite.families.configs import latent_channels as latent_channels
from sdlite.families.configs import vae_config as vae_config
from sdlite.families.configs import vae_stride as vae_stride
from sdlite.families.controlled import ControlledStableDiffusion
from sdlite.families.controlled import taken_by_unet as taken_by_unet
from sdlite.families.sd import StableDiffusion, components
from sdlite.families.sdxl import CLIP_SKIP as CLIP_SKIP
from sdlite.families.sdxl import StableDiffusionXL

_FAMILIES: list[Family] = [ControlledStableDiffusion(), StableDiffusionXL(), StableDiffusion()]
RUNS = (
    "sdlite runs text-to-image models with the parts of Stable Diffusion 1.x and 2.x (a"
    " CLIPTextModel, a UNet2DConditionModel, an AutoencoderKL or AutoencoderTiny, a"
    " ControlNetModel if there is one) or of SDXL (a CLIPTextModelWithProjection besides)"
)
# in model_index.json: the folder has a list of its files; diffusers and optimum pass over it
MARK = "_sdlite"


def register(family: Family) -> None:
    """Make a family known; it is asked before those that were known."""
    _FAMILIES.insert(0, family)


def known() -> list[str]:
    """Names of the families."""
    return [f.name for f in _FAMILIES]


def networks() -> tuple[str, ...]:
    """Folders of networks that some family has."""
    return tuple(dict.fromkeys(p for f in _FAMILIES for p in f.networks))


def tokenizers() -> tuple[str, ...]:
    """Folders of tokenizers that some family has."""
    return tuple(dict.fromkeys(t for f in _FAMILIES for t in f.tokenizers.values()))


def folders() -> tuple[str, ...]:
    """Folders of a diffusers pipeline that some family runs with."""
    return (*networks(), *tokenizers(), "scheduler")


def family_of(index: Config, configs: Configs) -> Family:
    """The family of a pipeline that is not refused; of another one, the family that comes last."""
    return next((f for f in _FAMILIES if not f.refusal(index, configs)), _FAMILIES[-1])


def class_name(index: Config) -> str:
    """The pipeline's class as model_index.json names it."""
    name = index.get("_class_name") or "pipeline of no named class"
    return str(name[-1] if isinstance(name, list) else name)  # a custom pipeline is [module, class]


def own_index(index: Config) -> dict[str, Any]:
    """model_index.json of a folder that holds what a model runs with and nothing else: other
    components are none.
    """
    kept = folders()
    out = {
        k: [None, None] if isinstance(v, list) and k not in kept and not k.startswith("_") else v
        for k, v in index.items()
    }
    return {**out, **({"requires_safety_checker": False} if "safety_checker" in index else {})}


def listed_index(index: Config) -> dict[str, Any]:
    """`own_index` of a folder whose files are listed: without its list it is refused."""
    return {**own_index(index), MARK: "1.0"}


def refusal(folder: str, index: Config, configs: Configs) -> str:
    """One line that says why sdlite does not run a pipeline; "" where it does.

    Args:
        folder: what the line calls the model.
        index: content of model_index.json.
        configs: part -> content of its config.json; asked only where the parts are those of a
            family.
    """
    whys = [f.refusal(index, configs) for f in _FAMILIES]
    if not all(whys):
        return ""
    # the reason of the family whose networks it has, or else of the last one
    named = components(index)
    own = next((w for f, w in zip(_FAMILIES, whys, strict=True) if {*f.networks} <= named), None)
    return f"{folder} is a {class_name(index)}, which is not supported: {own or whys[-1]}. {RUNS}."
