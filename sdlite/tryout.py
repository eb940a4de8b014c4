"""Try a model that was just written: open it and call each network once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdlite import backends, families
from sdlite.artifact import Artifact
from sdlite.errors import ArtifactError
from sdlite.families import vae_stride
from sdlite.sampling import Noise
from sdlite.spec import Arrays
from sdlite.tokenizer import ClipTokenizer


def try_out(folder: Path) -> None:
    """Open a model that was just written and call each network once on small inputs, before it
    counts as done.

    It runs on the first installed backend that runs graphs, else on torch, with one network in
    memory at a time.

    Raises:
        ArtifactError, and what the backend raises: it does not open, or a network answers NaN,
            infinity or another shape.
    """
    artifact = Artifact.open(folder)
    stride = vae_stride(artifact.config("vae"))
    multiple = artifact.manifest.size_multiple if artifact.manifest else 1
    side = max(8 * stride, multiple)
    channels = artifact.config("unet")["in_channels"]
    sample = np.stack([Noise(0).normal((channels, side // stride, side // stride))])
    latents = sample[:, : families.latent_channels(artifact.config("vae"))]
    conditions, _ = artifact.family.conditions(
        _Encoders(artifact), families.Call([""], [], 1.0, side, side)
    )
    given = {"sample": sample, "timestep": np.array(500, np.float32), **conditions}
    given |= artifact.family.uncontrolled(artifact.config("unet"), latents)
    if "controlnet" in artifact.family.optional:
        own = {k: given[k] for k in ("sample", "timestep", "encoder_hidden_states")}
        image = np.full((1, 3, side, side), 0.5, np.float32)
        made = _answer(artifact, "controlnet", **own | {"sample": latents}, controlnet_cond=image)
        given |= {families.taken_by_unet(k): v for k, v in made.items()}
    _answer(artifact, "unet", **given)
    image = _answer(artifact, "vae_decoder", latent_sample=latents)["sample"]
    if image.shape != (1, 3, side, side):
        raise ArtifactError(
            f"the decoder of {artifact.name} makes {image.shape} of {side} px: vae/config.json is"
            " not its own."
        )


class _Encoders:
    """What of a pipeline makes conditions, with one network in memory at a time."""

    def __init__(self, artifact: Artifact):
        self._artifact, self.index = artifact, artifact.index
        self.unet_config = artifact.config("unet")

    def tokenize(self, prompts: Sequence[str], part: str = "text_encoder") -> np.ndarray:
        """prompts -> ids int64 (B, L)."""
        folder = self._artifact.files.part(self._artifact.family.tokenizers[part])
        return ClipTokenizer.from_pretrained(folder, self._artifact.config(part))(prompts)

    def encode(self, part: str, ids: np.ndarray) -> Arrays:
        """ids -> what a text encoder gives."""
        return _answer(self._artifact, part, input_ids=ids)


def _answer(artifact: Artifact, part: str, **inputs: np.ndarray) -> Arrays:
    """One network's answer; the network is freed then."""
    name = next((n for n in backends.installed_with("fp32") if artifact.has_onnx("fp32")), "torch")
    backend = backends.ready(name)
    with backend.once():
        network, _ = backend.load_part(artifact, part, "fp32", "cpu", None)
    stride = vae_stride(artifact.config("vae"))
    checked = backends.Checked(network, artifact.spec(part), stride, backend.engine())
    out = checked(**inputs)
    if not all(np.isfinite(x).all() for x in out.values()):
        raise ArtifactError(
            f"{part} of {artifact.name} answers NaN or infinity to noise: its weights are damaged."
        )
    return out
