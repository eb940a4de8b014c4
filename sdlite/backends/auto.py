"""`backend="auto"`: the fastest installed backend by what was measured, and why.

Float models run on onnxruntime: in float32 it and OpenVINO are within 5% of each other (BK-Tiny's
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
from sdlite.backends import registry
from sdlite.backends.base import Backend
from sdlite.backends.held import lacking
from sdlite.errors import MissingExtraError
from sdlite.exported import Export
from sdlite.families import vae_stride


@dataclass(frozen=True)
class Rule:
    """`engine`, a backend, makes images faster than onnxruntime where all of this holds.

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
        """Whether the rule is about this precision, processor, model and size."""
        return (
            precision == self.precision
            and self.feature in cpu.features()
            and artifact.bytes_held(precision) / 1e6 >= self.least_mb
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


def side(artifact: Artifact) -> int:
    """The shorter side of the model's own image, in pixels."""
    sample = artifact.config("unet").get("sample_size") or 64
    latent = sample if isinstance(sample, int) else min(sample)
    return int(latent) * vae_stride(artifact.config("vae"))


def rule(artifact: Artifact, precision: str) -> Rule | None:
    """The first rule that holds, of a backend whose images were checked when the model was
    quantized.
    """
    able = (r for r in RULES if r.holds(artifact, precision))
    return next((r for r in able if artifact.checked_on(r.engine)), None)


def choose(artifact: Artifact, precision: str, arithmetic: str | None = None) -> tuple[str, str]:
    """The backend that "auto" takes, and the reason that the report gives: the fastest installed
    one that runs the graphs, else one that runs the weights.

    Raises:
        MissingExtraError: no backend that could run it is installed. PrecisionError: nothing here
            could run this precision.
        ArtifactError: an export that no backend opens.
    """
    if artifact.export:
        return _opener(artifact, artifact.export)
    if not artifact.has_onnx(precision):
        if (other := _of_weights(artifact, precision)) is None:
            raise lacking(artifact, precision)
        plain = "a plain diffusers folder"
        why = f"{artifact.name} holds no {precision} ONNX graphs" if artifact.manifest else plain
        return other.name, f"auto: {why}, and {other.name} runs its weights"
    if arithmetic is not None and (told := _told(arithmetic)):
        return told.name, f"auto: arithmetic={arithmetic!r} is {told.name}'s to choose"
    if able := registry.installed_with(precision):
        return _fastest(artifact, precision, able)
    if other := _of_weights(artifact, precision):
        every = [b.name for b in registry.ordered() if b.graphs]
        return other.name, f"auto: neither {' nor '.join(every)} is installed"
    missing = [b.install for b in registry.ordered() if b.graphs and precision in b.precisions]
    raise MissingExtraError(
        f"no engine for {precision} is installed: pip install {' or '.join(missing)}."
    )


def _fastest(artifact: Artifact, precision: str, able: list[str]) -> tuple[str, str]:
    """Of these installed backends, and why."""
    if found := rule(artifact, precision):
        if found.engine in able:
            return found.engine, f"auto: {found}"
        install = registry.get_backend(found.engine).install
        return able[0], (
            f"auto: installed; {found.engine} would be faster ({found}): pip install {install}"
        )
    first = next(b.name for b in registry.ordered() if b.graphs)
    other = "" if able[0] == first else f"; {first} is not installed"
    return able[0], f"auto: the fastest installed engine for {precision} here{other}"


def _of_weights(artifact: Artifact, precision: str) -> Backend | None:
    """An installed backend that runs the model's float weights in this precision."""
    able = (b for b in registry.ordered() if not b.graphs and b.runs(artifact, precision))
    return next((b for b in able if registry.installed(b.name)), None)


def _told(arithmetic: str) -> Backend | None:
    """The backend that can be told to compute in `arithmetic`, else one that can be told at all."""
    able = [b for b in registry.ordered() if b.arithmetic]
    return next((b for b in able if arithmetic in b.arithmetic), able[0] if able else None)


def _opener(artifact: Artifact, export: Export) -> tuple[str, str]:
    """The installed backend that opens an export, and why."""
    if not export.backends:
        raise export.refusal(artifact.folder, "auto")
    name = next((n for n in export.backends if registry.installed(n)), None)
    if name is None:
        install = registry.get_backend(export.backends[0]).install
        raise MissingExtraError(
            f"{artifact.folder} was exported for {export.target}: pip install {install}."
        )
    return name, f"auto: exported for {export.target}"
