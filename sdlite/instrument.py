"""Networks that are watched while a pipeline runs: their calls kept, all their tensors seen, or
opened only while they are called. For quantizing and for the checks of exports.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdlite import image_input, memory
from sdlite.artifact import Artifact
from sdlite.backends import Network, Networks, Report, fixed_tokens, ready
from sdlite.backends.held import entry
from sdlite.metrics import sqnr
from sdlite.onnx_graph import Graph
from sdlite.pipeline import Pipeline
from sdlite.spec import Arrays, IOSpec, latent_size

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from PIL.Image import Image

LARGE, TOGETHER = 1 << 30, 1.3  # see OnDemand
Visit = Callable[[str, int, str, np.ndarray], None]  # (part, step, tensor, values)


class NamedOutputs:
    """A graph on onnxruntime's CPU provider that returns all its outputs by name. Opened at its
    first call, and again after `close`. Its weights are written in float32: see `on_demand`.
    Outputs are computed as soon as they can be: see `Graph.earliest_first`.
    """

    def __init__(self, graph: Graph, path: Path, threads: int | None = None):
        files = graph.earliest_first().save(path, whole=True)
        # the last rewriting: see `ort.sparing`; and it would undo the order of the file
        large = sum(f.stat().st_size for f in files) >= LARGE
        self.sparing = large or len(graph.ends()) > 1
        self.path, self.threads = path, threads
        self._open: tuple[InferenceSession, list[str]] | None = None

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        if self._open is None:
            import onnxruntime as ort

            options = ort.SessionOptions()
            options.log_severity_level = 3
            # hundreds of outputs: the arena would keep the largest of each
            options.enable_cpu_mem_arena = False
            if self.sparing:
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            if self.threads is not None:
                options.intra_op_num_threads = self.threads
            session = ort.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"]
            )
            self._open = session, [o.name for o in session.get_outputs()]
        session, names = self._open
        return dict(zip(names, session.run(None, inputs), strict=True))

    def close(self) -> None:
        """Free the session or network until the next call."""
        if self._open is not None:
            self._open = None
            memory.trim()


@dataclass
class Watched:
    """A network whose session returns more than its outputs: the rest goes to `visit`."""

    spec: IOSpec
    session: NamedOutputs
    visit: Visit
    step: int = field(default=0)

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        out = self.session(**inputs)
        result = {t.name: out[t.name] for t in self.spec.outputs}
        for name in list(out):
            self.visit(self.spec.part, self.step, name, out.pop(name))
        self.step += 1
        return result


Call = tuple[Arrays, Arrays]  # what a network was given, and its answer


@dataclass
class Tape:
    """A network that keeps its calls."""

    network: Network
    calls: list[Call]

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        out = self.network(**inputs)
        copies = [{k: v.copy() for k, v in arrays.items()} for arrays in (inputs, out)]
        self.calls.append((copies[0], copies[1]))
        return out


def closeness(network: Network, calls: Sequence[Call]) -> tuple[float, float]:
    """A network over the calls of another: its SQNR in dB, of several outputs the lowest, and its
    largest absolute error.

    Mean and log variance of an encoder's latents are two outputs: the numbers of the second are
    the larger ones, and would hide a wrong mean.
    """
    signal, noise, worst = defaultdict[str, float](float), defaultdict[str, float](float), 0.0
    for inputs, wanted in calls:
        got = network(**inputs)
        for output, right in wanted.items():
            parts = 2 if output == "latent_parameters" else 1
            halves = (np.split(np.asarray(x, np.float64), parts, 1) for x in (right, got[output]))
            for i, (a, b) in enumerate(zip(*halves, strict=True)):
                name = f"{output}.{i}"
                signal[name] += float(np.square(a).sum())
                noise[name] += float(np.square(b - a).sum())
                worst = max(worst, float(np.abs(b - a).max()))
    return min(sqnr(signal[name], noise[name]) for name in signal), worst


class OnDemand:
    """A network that is opened when it is called and can be let go: a second copy of a UNet in
    memory is one too many.

    Of a model of `LARGE` bytes, those that are open together have at most `TOGETHER` times the
    bytes of the largest; the others are opened again when they are called again.

    Attributes:
        opener: opens it; it is told whether the model is large.
        size: bytes of its files.
        tokens: see `backends.fixed_tokens`, once it was open.
        all: the networks of its model, see `of_one_model`.
    """

    def __init__(self, opener: Callable[[bool], Network], size: int):
        self.opener, self.size = opener, size
        self.tokens: int | None = None
        self.all: list[OnDemand] = [self]
        self._network: Network | None = None

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        return self.opened()(**inputs)

    def opened(self) -> Network:
        """The network, which is opened where it is not."""
        from sdlite.backends.ort import sparing

        if self._network is None:
            sizes = [x.size for x in self.all]
            large = sum(sizes) >= LARGE
            if large:
                self._make_room(TOGETHER * max(sizes))
            with sparing() if large else nullcontext():
                self._network = self.opener(large)
            self.tokens = fixed_tokens(self._network)
        return self._network

    def _make_room(self, limit: float) -> None:
        """Close the others where they and this one are more than `limit` bytes."""
        held = [x for x in self.all if x.is_open]
        if sum(x.size for x in held) + self.size > limit:
            for other in held:
                other.close()

    @property
    def is_open(self) -> bool:
        """Whether it is in memory."""
        return self._network is not None

    def close(self) -> None:
        """Free the session or network until the next call."""
        if self._network is not None:
            self._network = None
            memory.trim()  # SD-1.4's shape: 1.5 GB that onnxruntime freed and the C library kept


def of_one_model(networks: Iterable[OnDemand]) -> None:
    """Networks that make room for each other."""
    held = list(networks)
    for network in held:
        network.all = held


def _from_model(
    artifact: Artifact,
    part: str,
    precision: str,
    threads: int | None,
    aside: Path | None,
    large: bool,
) -> Network:
    """A model's network on onnxruntime. What a large model stores in float16 is opened from a copy
    in float32 in `aside`: onnxruntime reads both into memory while it casts (SSD-1B's UNet: 9.1 GiB
    and 34 s, from the copy 5.1 GiB and 6 s).
    """
    stored = artifact.network(precision, part)["storage"]
    if not (large and stored == "float16" and aside):
        return ready("onnxruntime").load_part(artifact, part, precision, "cpu", threads)[0]
    from sdlite.backends.ort import Session

    path, size = aside / f"{part}.onnx", artifact.bytes_of(artifact.network_files(precision, part))
    if not path.exists():
        entry(artifact, part, precision)  # verified before it is read
        aside.mkdir(exist_ok=True)
        Graph.load(artifact.graph(precision, part)).save(path, whole=True)
    names = [t.name for t in artifact.spec(part).outputs]
    return Session(str(path), "cpu", threads, 2 * size, names)


def on_demand(
    artifact: Artifact, threads: int | None, precision: str = "fp32", aside: Path | None = None
) -> Pipeline:
    """A pipeline on onnxruntime whose networks are opened when they are called; `let_go` closes
    them.

    Args:
        aside: a folder for a large model's networks in float32; None: they are cast in memory.
    """
    own = artifact.required_manifest()
    report = Report(
        artifact.name,
        "onnxruntime",
        "cpu",
        precision,
        "the reference",
        ready("onnxruntime").engine(),
    )
    networks = {
        p: OnDemand(
            partial(_from_model, artifact, p, precision, threads, aside),
            artifact.bytes_of(artifact.network_files(precision, p)),
        )
        for p in artifact.held_parts(precision)
    }
    of_one_model(networks.values())
    return Pipeline(artifact, Networks({**networks}, report, own.size_multiple))


def let_go(pipe: Pipeline) -> None:
    """Close the networks of an `on_demand` pipeline until they are called again."""
    pipe.networks.close()


def asked(pipe: Pipeline, height: int | None = None, width: int | None = None) -> dict[str, Any]:
    """What a call is given besides the prompt where nobody says: an inpainting model has to have
    an image and a mask (`image_input.example`); others nothing.

    Args:
        height, width: pixels; None: the size that the model was made for.
    """
    if not pipe.inpaints:
        return {}
    image, mask = _example(pipe, height, width)
    return {"image": image, "mask_image": mask}


def controlled(
    pipe: Pipeline, height: int | None = None, width: int | None = None
) -> dict[str, Any]:
    """`asked`, and a control image where the model has a ControlNet: `image_input.example`'s."""
    out = asked(pipe, height, width)
    if pipe.holds("controlnet"):
        out["control_image"], _ = _example(pipe, height, width)
    return out


def _example(pipe: Pipeline, height: int | None, width: int | None) -> tuple[Image, Image]:
    tall, wide = pipe.networks.size or [s * pipe.stride for s in latent_size(pipe.unet_config)]
    return image_input.example(height or tall, width or wide)


def with_networks(pipe: Pipeline, networks: Mapping[str, Network]) -> Pipeline:
    """The same pipeline with other callables."""
    own = pipe.networks
    return Pipeline(
        pipe.artifact, Networks(dict(networks), pipe.report, own.size_multiple, opener=own.opener)
    )
