"""`backend="auto"`: the fastest installed engine, by what was measured, and why.

Float models run on onnxruntime: in float32 the two engines are within 5% of each other (BK-Tiny's
shape at 512 px 15.4 and 14.6 s, the embedded student 16 and 17 ms, with AMX), and OpenVINO compiles
for seconds first. Its bfloat16 is 4 times faster with AMX, but gives other pictures (51 dB), so it is
taken only when `arithmetic` asks for it. int8 goes by RULES.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdlite import cpu
from sdlite.artifact import PARTS, Artifact

ENGINES = ("onnxruntime", "openvino")  # that run ONNX graphs, in the order that "auto" asks them


@dataclass(frozen=True)
class Rule:
    """`engine` is faster than onnxruntime where all of it holds.

    Attributes:
        feature: of the processor, by Linux' name.
        least_mb: of the three networks' files; the embedded student (10 MB) is faster on onnxruntime.
        least_px: side of the model's own image; at 256 px without AMX the gain does not pay for compiling.
        seconds: onnxruntime's and the engine's for one image, medians of `rows`.
        rows: (suite, CPU in it, model, image's side) of benchmarks/results/speed.jsonl.
    """

    precision: str
    feature: str
    least_mb: float
    least_px: int
    engine: str
    seconds: tuple[float, float]
    rows: tuple[str, str, str, int]

    def holds(self, artifact: Artifact, precision: str) -> bool:
        return (
            precision == self.precision
            and self.feature in cpu.features()
            and megabytes(artifact, precision) >= self.least_mb
            and side(artifact) >= self.least_px
        )

    def __str__(self) -> str:
        theirs, ours = self.seconds
        return f"with {self.feature}, {self.precision} of this size was measured at {ours:.1f} s an image against {theirs:.1f} s"


RULES = (
    Rule("int8-static", "amx_int8", 200, 512, "openvino", (7.82, 2.83), ("peers-512", "amx", "shape:bk-tiny", 512)),
    Rule("int8-static", "avx512_vnni", 500, 512, "openvino", (10.17, 7.63), ("memory-512", "avx512_vnni", "shape:bk-tiny", 512)),
)


def megabytes(artifact: Artifact, precision: str) -> float:
    """Of the files of a precision's three networks."""
    listing = artifact.listing
    if listing is None:
        return 0.0
    parts = listing.variants[precision]
    files = {f for p in PARTS for f in (parts[p]["file"], *parts[p]["weights"])}
    return sum(int(listing.files[f]["bytes"]) for f in files) / 1e6


def side(artifact: Artifact) -> int:
    """The shorter side of the model's own image, in pixels."""
    sample = artifact.config("unet").get("sample_size") or 64
    latent = sample if isinstance(sample, int) else min(sample)
    blocks = artifact.config("vae").get("block_out_channels") or [0] * 4
    return int(latent) * 2 ** (len(blocks) - 1)


def checked(artifact: Artifact, engine: str) -> bool:
    """Whether the int8 model's quality check ran on `engine`."""
    quality = (artifact.manifest.quality if artifact.manifest else None) or {}
    return engine in quality.get("engines", {})


def rule(artifact: Artifact, precision: str) -> Rule | None:
    """The first that holds, of an engine whose pictures were checked when the model was quantized."""
    return next((r for r in RULES if r.holds(artifact, precision) and checked(artifact, r.engine)), None)
