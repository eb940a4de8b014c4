"""What each network takes and gives: used by every backend, the exporter and the tests.

Names are optimum's, so that its ORT pipelines open our files. Shape letters: B batch, L tokens, D
text width, C latent channels, h,w latent size (h/2: half of it, rounded up), H,W pixels (8h, 8w for
an SD autoencoder).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sdlite.errors import ArtifactError
from sdlite.schema import Config

Arrays = dict[str, np.ndarray]  # name -> what a network is given, or gives


@dataclass(frozen=True)
class Tensor:
    """One input or output: name, shape letters, dtype and range of its values."""

    name: str
    shape: tuple[str, ...]  # () is a scalar
    dtype: str
    range: str


@dataclass(frozen=True)
class IOSpec:
    """What one network takes and gives."""

    part: str  # our name, and the folder of its model.onnx
    source: str  # the folder of its config and safetensors in a diffusers pipeline
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    also: tuple[str, ...] = ()  # further outputs of its graph, which optimum's pipelines read

    @property
    def output(self) -> Tensor:
        """The first of its outputs, which most networks have alone."""
        return self.outputs[0]


TEXT_ENCODER = IOSpec(
    "text_encoder",
    "text_encoder",
    (Tensor("input_ids", ("B", "L"), "int64", "0 to vocabulary size - 1"),),
    (Tensor("last_hidden_state", ("B", "L", "D"), "float32", "after the final layer norm"),),
)
UNET = IOSpec(
    "unet",
    "unet",
    (
        Tensor(
            "sample",
            ("B", "C", "h", "w"),
            "float32",
            "scaled latents at the timestep's noise level",
        ),
        Tensor("timestep", (), "float32", "0 to num_train_timesteps - 1, fractions allowed"),
        Tensor("encoder_hidden_states", ("B", "L", "D"), "float32", "text encoder output"),
    ),
    (
        Tensor(
            "out_sample",
            ("B", "C", "h", "w"),
            "float32",
            "eps, v or x_0, as the scheduler's prediction_type says",
        ),
    ),
)
VAE_DECODER = IOSpec(
    "vae_decoder",
    "vae",
    (
        Tensor(
            "latent_sample", ("B", "C", "h", "w"), "float32", "latents divided by scaling_factor"
        ),
    ),
    (Tensor("sample", ("B", "3", "H", "W"), "float32", "pixels, about -1 to 1"),),
)


VAE_ENCODER = IOSpec(
    "vae_encoder",
    "vae",
    (Tensor("sample", ("B", "3", "H", "W"), "float32", "pixels, -1 to 1"),),
    (
        Tensor(
            "latent_parameters",
            ("B", "2C", "h", "w"),
            "float32",
            "mean and log variance of latents divided by scaling_factor",
        ),
    ),
)
# of an autoencoder that gives one answer, such as AutoencoderTiny
LATENT_SAMPLE = Tensor(
    "latent_sample", ("B", "C", "h", "w"), "float32", "latents divided by scaling_factor"
)


def side_of(letter: str, sides: Mapping[str, int]) -> int:
    """The size of an axis from those that are known: "h/4" is h halved twice, rounded up."""
    name, _, divisor = letter.partition("/")
    side = int(name) if name.isdigit() else sides[name]
    return -(-side // int(divisor or 1))


def latent_size(unet: Config) -> tuple[int, int]:
    """(height, width) of the latents that a U-Net was made for, from its config.json.

    As diffusers' pipeline has it: in files from before diffusers 0.9 a size below 64 is an
    oversight and means 64 (`StableDiffusionPipeline.__init__`).

    Raises:
        ArtifactError: `sample_size` is neither a number nor a pair of them.
    """
    side = unet.get("sample_size")
    if type(side) is int and side > 0:
        version = re.match(r"0\.(\d+)", str(unet.get("_diffusers_version", "")))
        side = 64 if version and int(version[1]) < 9 and side < 64 else side
        return side, side
    if isinstance(side, (list, tuple)) and len(side) == 2:
        height, width = side
        if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
            return height, width
    raise ArtifactError(
        f"unet/config.json: sample_size={side!r}; accepted: a whole number, or [height, width], in "
        "latents (64 for SD-1.x). Correct the file."
    )


SPECS: dict[str, IOSpec] = {s.part: s for s in (TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER)}


def spec_of(part: str | IOSpec) -> IOSpec:
    """A model's own spec as it is; of a name the one that all models share."""
    return SPECS[part] if isinstance(part, str) else part
