"""A backend without an engine, zeros of the right shapes: a pipeline's readers run quickly."""

from __future__ import annotations

import numpy as np
from sdlite.artifact import Artifact
from sdlite.backends import Backend, Network, NetworkReport, entry, names

WIDTH, ROWS, STRIDE = 192, 3000, 8  # of the embedded model; rows: more than its embeddings


def _text_encoder(input_ids: np.ndarray) -> np.ndarray:
    if not 0 <= input_ids.min() <= input_ids.max() < ROWS:
        raise IndexError(f"id {input_ids.max()} has no embedding")
    return np.zeros((*input_ids.shape, WIDTH), np.float32)


def _unet(sample: np.ndarray, **_: np.ndarray) -> np.ndarray:
    return np.zeros_like(sample)


def _vae_decoder(latent_sample: np.ndarray) -> np.ndarray:
    batch, _, height, width = latent_sample.shape
    return np.zeros((batch, 3, height * STRIDE, width * STRIDE), np.float32)


_NETWORKS = {"text_encoder": _text_encoder, "unet": _unet, "vae_decoder": _vae_decoder}


class Stub(Backend):
    name = "stub"
    package = "numpy"
    precisions = ("fp32", "fp16", "int8-dynamic", "int8-static")

    def engine(self) -> str:
        return "none"

    def load_part(
        self,
        artifact: Artifact,
        part: str,
        precision: str,
        device: str,
        threads: int | None,
        arithmetic: str | None = None,
    ) -> tuple[Network, NetworkReport]:
        row, size = entry(artifact, part, precision)
        about = NetworkReport(part, row["file"], size, row["storage"], row["arithmetic"])
        return _NETWORKS[part], about


def register() -> None:
    """Pipelines can be loaded with backend="stub"."""
    from sdlite import backends, exported

    if "stub" in names():
        return
    backends.register(Stub())
    for target, opened_by in exported.OPENED_BY.items():
        exported.OPENED_BY[target] = (*opened_by, "stub")
