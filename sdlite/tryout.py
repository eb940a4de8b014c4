"""Try a model that was just written: open it and call each network once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdlite import backends
from sdlite.artifact import Artifact
from sdlite.errors import ArtifactError
from sdlite.families import vae_stride
from sdlite.sampling import Noise
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
    files, text, unet = artifact.files, artifact.config("text_encoder"), artifact.config("unet")
    ids = ClipTokenizer.from_pretrained(files.part("tokenizer"), text)([""])
    shape = (1, unet["in_channels"], side // stride, side // stride)
    latents = np.stack([Noise(0).normal(shape[1:])])
    embeds = _answer(artifact, "text_encoder", input_ids=ids)
    more = {
        t.name: np.zeros([1, *map(int, t.shape[1:])], t.dtype)
        for t in artifact.family.unet_inputs(unet)
    }
    given = {"timestep": np.array(500, np.float32), "encoder_hidden_states": embeds, **more}
    _answer(artifact, "unet", sample=latents, **given)
    image = _answer(artifact, "vae_decoder", latent_sample=latents)
    if image.shape != (1, 3, side, side):
        raise ArtifactError(
            f"the decoder of {artifact.name} makes {image.shape} of {side} px: vae/config.json is"
            " not its own."
        )


def _answer(artifact: Artifact, part: str, **inputs: np.ndarray) -> np.ndarray:
    """One network's answer; the network is freed then."""
    name = next((n for n in backends.installed_with("fp32") if artifact.has_onnx("fp32")), "torch")
    backend = backends.ready(name)
    with backend.once():
        network, _ = backend.load_part(artifact, part, "fp32", "cpu", None)
    stride = vae_stride(artifact.config("vae"))
    checked = backends.Checked(network, artifact.spec(part), stride, backend.engine())
    out: np.ndarray = checked(**inputs)
    if not np.isfinite(out).all():
        raise ArtifactError(
            f"{part} of {artifact.name} answers NaN or infinity to noise: its weights are damaged."
        )
    return out
