"""One quantized model while it is searched for: its graphs, what stays in float, and how close its
images are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, TypeVar

import numpy as np

from sdlite.instrument import let_go
from sdlite.onnx_graph import Graph
from sdlite.pipeline import Pipeline
from sdlite.quant.calibrate import Calibration
from sdlite.quant.gate import Comparison, Gate

T = TypeVar("T")


class LayerRow(TypedDict):
    """What the report says of a layer that can become integer. `sqnr` is in dB, None where nothing
    is lost; ranges are (low, high) of an activation.
    """

    name: str
    op: str
    parameters: int
    scheme: str
    sqnr: float | None
    input_seen: NotRequired[list[float]]
    input_range: NotRequired[list[float]]
    output_range: NotRequired[list[float]]
    input_seen_per_step: NotRequired[list[list[float]]]


@dataclass
class Part:
    """One network of a candidate.

    Attributes:
        scheme: a name of `insert.SCHEMES`; or "dynamic", "dynamic u8s8".
        arithmetic: what the manifest says that it is computed in.
        float_bytes: bytes of the float network's weights.
        float_share: share of the weights that stays in float.
        rewrites: what was changed in the float graph before.
    """

    graph: Graph
    scheme: str
    arithmetic: str
    float_bytes: int
    float_share: float
    rewrites: dict[str, object]
    layers: list[LayerRow]
    files: list[Path] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of the quantized network's weights."""
        return self.graph.total_bytes()


Parts = dict[str, Part]


class Builder(Protocol):
    """Makes candidates of one float model.

    Attributes:
        order: layers ("part/name") that can go back to float, the one that loses most first.
        sizes: layer -> its parameters.
    """

    order: list[str]
    sizes: dict[str, int]

    def build(self, back: Collection[str]) -> Parts:
        """The networks with the layers of `back` in float."""
        ...


class SearchRow(TypedDict):
    """One candidate in the report: how many layers are back in float, PSNR by backend, and what of
    the gate fails.
    """

    float_layers: int
    psnr_mean: dict[str, float]
    failures: list[str]


@dataclass
class Candidate:
    """A quantized model with some layers back in float, compared with the float model.

    Attributes:
        back: layers that went back to float.
        comparisons: one for each backend.
        images: uint8 (N, H, W, 3) of the first backend.
    """

    parts: Parts
    back: list[str]
    comparisons: list[Comparison]
    images: np.ndarray
    failures: list[str]

    def row(self) -> SearchRow:
        """What the report says of it."""
        return {
            "float_layers": len(self.back),
            "psnr_mean": {c.engine: c.psnr_mean for c in self.comparisons},
            "failures": self.failures,
        }


@dataclass(frozen=True)
class Work:
    """What a quantization works with: the float pipeline, and how it is asked to be quantized.

    Attributes:
        scratch: folder for the graphs of calibration.
        threads: CPU threads of the sessions.
        warnings: what is known to be doubtful before it begins.
    """

    pipe: Pipeline
    precision: str
    scratch: Path
    calibration: Calibration
    gate: Gate
    threads: int | None = None
    progress: bool = False
    warnings: Sequence[str] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The model's networks, those that edit images included."""
        return self.pipe.artifact.held_parts("fp32")

    def let_go(self) -> None:
        """Close the float networks and remove the graphs of finished passes."""
        let_go(self.pipe)
        for path in self.scratch.glob("*.onnx*"):
            path.unlink()

    def graph(self, part: str) -> Graph:
        """A network's float graph."""
        names = [t.name for t in self.pipe.artifact.spec(part).outputs]
        return Graph.load(self.pipe.artifact.graph("fp32", part)).answers(names)

    def bar(self, run: Iterable[T], total: int, text: str) -> Iterable[T]:
        """`run` with a progress bar, where one is asked for."""
        if not self.progress:
            return run
        from tqdm import tqdm

        bar: Iterable[T] = tqdm(run, total=total, desc=text)
        return bar
