"""`backend="auto"`: the fastest installed engine, by what was measured, and why.

Float models run on onnxruntime: in float32 the two engines are within 5% of each other (BK-Tiny's
shape at 512 px 15.4 and 14.6 s, the embedded student 16 and 17 ms, with AMX), and OpenVINO compiles
for seconds first. Its bfloat16 is 4 times faster with AMX, but gives other images (51 dB), so it is
taken only when `arithmetic` asks for it. int8 goes by RULES: for a model of the embedded student's
size (10 MB; 17 and 21 ms) and at 256 px (1.75 and 1.53 s, but the first after 3.4 and 5.8 s)
compiling is not worth it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdlite import cpu
from sdlite.artifact import Artifact
from sdlite.families import vae_stride
from sdlite.manifest import PARTS

ENGINES = ("onnxruntime", "openvino")  # that run ONNX graphs, in the order that "auto" asks them


@dataclass(frozen=True)
class Rule:
    """`engine` makes images faster than onnxruntime where all of it holds.

    Attributes:
        feature: of the processor, by Linux' name.
        least_mb: of the three networks' files.
        least_px: side of the model's own image.
        seconds: onnxruntime's and the engine's for one image, medians.
        first: the same for a process' first image with loading, where nothing is in the cache.
        rows: file in benchmarks/results, suite (or ""), model and side: where the seconds are from.
    """

    precision: str
    feature: str
    least_mb: float
    least_px: int
    engine: str
    seconds: tuple[float, float]
    first: tuple[float, float]
    rows: tuple[str, str, str, int]

    def holds(self, artifact: Artifact, precision: str) -> bool:
        return (
            precision == self.precision
            and self.feature in cpu.features()
            and megabytes(artifact, precision) >= self.least_mb
            and side(artifact) >= self.least_px
        )

    def __str__(self) -> str:
        ort, this = self.seconds
        late = self.first[1] - self.first[0]
        after = f", the first one {late:.0f} s later" if late > 0 else ""
        fast = f"{ort / this:.1f} times as fast as onnxruntime"
        return f"{fast} for large {self.precision} with {self.feature}{after}"


RULES = (
    Rule(
        "int8-static",
        "amx_int8",
        500,
        512,
        "openvino",
        (7.82, 2.83),
        (9.63, 7.78),
        ("speed.jsonl", "peers-512", "shape:bk-tiny", 512),
    ),
    Rule(
        "int8-static",
        "avx512_vnni",
        500,
        512,
        "openvino",
        (8.94, 7.46),
        (11.79, 14.92),
        ("engines.jsonl", "", "shape:bk-tiny", 512),
    ),
    Rule(
        "int8-static",
        "avx512_vnni",
        250,
        512,
        "openvino",
        (2.37, 1.53),
        (3.65, 5.39),
        ("engines.jsonl", "", "shape:extreme-120m", 512),
    ),
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
    return int(latent) * vae_stride(artifact.config("vae"))


def checked(artifact: Artifact, engine: str) -> bool:
    """Whether the int8 model's quality check ran on `engine`."""
    quality = (artifact.manifest.quality if artifact.manifest else None) or {}
    return engine in quality.get("engines", {})


def rule(artifact: Artifact, precision: str) -> Rule | None:
    """The first that holds, of an engine whose images were checked when the model was quantized."""
    able = (r for r in RULES if r.holds(artifact, precision))
    return next((r for r in able if checked(artifact, r.engine)), None)
