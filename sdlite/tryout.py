"""Whether a model that was just written can be used: opened, and each network called once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdlite import backends
from sdlite.artifact import PARTS, Artifact
from sdlite.errors import ArtifactError
from sdlite.pipeline import Pipeline
from sdlite.sampling import Noise


def try_out(folder: Path) -> None:
    """Open a model that was just written and call each network once, small, before it may be called
    done.

    On the first installed engine that has its graphs, else torch; one network in memory at a time.

    Raises:
        ArtifactError, and what `Pipeline` raises: it does not open, or a network answers NaN,
        infinity or another shape.
    """
    artifact = Artifact.open(folder)
    name = next((n for n in backends.installed_with("fp32") if artifact.has_onnx("fp32")), "torch")
    backend = backends.get_backend(name)

    def once(part: str) -> backends.Network:
        def network(**inputs: np.ndarray) -> np.ndarray:
            out: np.ndarray = backend.load_part(artifact, part, "fp32", "cpu", None)[0](**inputs)
            if not np.isfinite(out).all():
                raise ArtifactError(
                    f"{part} of {artifact.name} answers NaN or infinity to noise: its weights are"
                    " damaged."
                )
            return out

        return network

    report = backends.Report(artifact.name, name, "cpu", "fp32", "tried out", backend.engine())
    multiple = artifact.manifest.size_multiple if artifact.manifest else 1
    pipe = Pipeline(
        artifact,
        backends.Networks(
            **{p: once(p) for p in PARTS}, report=report, size_multiple=multiple, size=None
        ),
    )
    side = max(8 * pipe.stride, multiple)
    embeds, x = pipe.encode_text(pipe.tokenize([""])), pipe.init_latents([Noise(0)], side, side)
    pipe.networks.unet(sample=x, timestep=np.array(500, np.float32), encoder_hidden_states=embeds)
    if (shape := pipe.decode(x).shape) != (1, side, side, 3):
        raise ArtifactError(
            f"the decoder of {artifact.name} makes {shape} of {side} px: vae/config.json is not its"
            " own."
        )
