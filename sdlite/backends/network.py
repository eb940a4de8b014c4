"""A network as a function of named arrays, and networks made of networks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from sdlite import running
from sdlite.spec import Arrays

ROW_BY_ROW = (
    "the rows of a batch run one by one, so that an image of a batch is its seed's image alone, bit"
    " by bit"
)
AUTOENCODER = {"vae_decoder": "decoded", "vae_encoder": "encoded"}  # parts that overflow
OVERFLOWS = (
    "the {name} overflows in float16 (NaN or infinity, well known of Stable Diffusion's): images"
    " for which it does are {done} in float32; precision='fp32' does all of them so"
)


class Network(Protocol):
    """Maps the named arrays of its `IOSpec` to its named outputs, float32."""

    def __call__(self, **inputs: np.ndarray) -> Arrays: ...


@runtime_checkable
class Closable(Protocol):
    """A network that holds what its engine does not free by itself."""

    def close(self) -> None: ...


def close(network: object) -> None:
    """Free what a network holds, if it is `Closable`."""
    if isinstance(network, Closable):
        network.close()


def tokens_of(shapes: Mapping[str, Sequence[object]]) -> int | None:
    """How many hidden states of text a network takes, where its engine says one number.

    Args:
        shapes: input -> its sides, numbers where they are fixed.
    """
    sides = shapes.get("encoder_hidden_states", ())
    held = sides[1] if len(sides) == 3 else None
    return held if isinstance(held, int) and held > 0 else None


def fixed_tokens(network: object) -> int | None:
    """How many hidden states of text a UNet takes; None: any number."""
    held: int | None = getattr(network, "tokens", None)
    return held


def rows(inputs: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Split inputs (B, ...) into B inputs (1, ...); scalars go with each."""
    count = max(v.shape[0] for v in inputs.values() if v.ndim)
    for i in range(count):
        yield {k: np.ascontiguousarray(v[i : i + 1]) if v.ndim else v for k, v in inputs.items()}


class RowByRow:
    """Calls a network of batch 1 once for each row; guidance is then two calls."""

    def __init__(self, network: Network):
        self.network, self.tokens = network, fixed_tokens(network)

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        out = []
        for row in rows(inputs):
            running.check()
            out.append(self.network(**row))
        return {name: np.concatenate([o[name] for o in out]) for name in out[0]}

    def close(self) -> None:
        """Free what the networks inside hold."""
        close(self.network)


class Overflowing:
    """A decoder or encoder in float16 that does an image again in float32 where the result is not
    finite. Which of the two an image gets depends on that image alone.

    Args:
        half: the network in float16.
        whole: makes the network in float32, the first time that it is needed.
        part: of `AUTOENCODER`.
    """

    def __init__(self, half: Network, whole: Callable[[], Network], part: str = "vae_decoder"):
        self.half, self.whole, self.part = half, whole, part
        self._float32: Network | None = None
        self._lock = threading.Lock()

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        """One array with a row for each image -> one of the same kind."""
        [(name, out)], [(key, given)] = self.half(**inputs).items(), inputs.items()
        bad = ~np.isfinite(out).reshape(len(out), -1).all(axis=1)
        if not bad.any():
            return {name: out}
        with self._lock:
            self._float32 = self._float32 or self.whole()
        what = self.part.replace("vae", "VAE").replace("_", " ")
        running.say(OVERFLOWS.format(name=what, done=AUTOENCODER[self.part]))
        out = np.array(out)
        out[bad] = self._float32(**{key: np.ascontiguousarray(given[bad])})[name]
        return {name: out}

    def close(self) -> None:
        """Free what the networks inside hold."""
        close(self.half)
        close(self._float32)
