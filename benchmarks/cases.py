"""What is measured: one frozen row per case. Engines that make the same pictures from the same weights, steps and threads."""

from __future__ import annotations

from dataclasses import dataclass

ENGINES = ("sdlite-ort", "sdlite-openvino", "sdlite-torch", "diffusers", "diffusers-compile", "optimum-ort")


INT8 = [  # the float rows are the measure
    ("sdlite-ort", "fp32"), ("sdlite-ort", "int8-static"), ("sdlite-ort", "int8-dynamic"), ("sdlite-openvino", "fp32"),
    ("sdlite-openvino", "int8-static"), ("diffusers", "fp32"),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: str  # embedded name, or "shape:<name>" of benchmarks.shapes (random weights)
    engine: str
    steps: int
    size_px: int
    guidance: float = 1.0
    batch: int = 1
    threads: int = 2
    precision: str = "fp32"
    repeats: int = 5

    @property
    def key(self) -> str:
        return f"{self.model} {self.size_px}px {self.steps} steps g={self.guidance:g} b={self.batch} {self.engine} {self.precision}"


SUITES: dict[str, list[Case]] = {
    "emoji": [Case("emoji", e, 4, 64, repeats=20) for e in ENGINES] + [Case("emoji", e, 25, 64, guidance=4.0, repeats=5) for e in ENGINES],
    "bk-tiny-256": [Case("shape:bk-tiny", e, 4, 256, repeats=3) for e in ENGINES],
    "bk-tiny-512": [Case("shape:bk-tiny", e, 4, 512, repeats=3) for e in ENGINES],
    "int8-emoji": [Case("emoji", e, 4, 64, precision=p, repeats=20) for e, p in INT8],
    "int8-bk-tiny-512": [Case("shape:bk-tiny", e, 4, 512, precision=p, repeats=3) for e, p in INT8],
}
