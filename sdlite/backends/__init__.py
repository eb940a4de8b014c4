"""Backends: (artefact, precision, device) -> three callables. They differ in arithmetic alone.

A `Network` maps the named arrays of its `IOSpec` to one array. Sampling, guidance, tokens and
pixels are shared and not here.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sdlite import graphs, running
from sdlite.artifact import Artifact
from sdlite.backends import auto
from sdlite.backends.checked import Checked
from sdlite.backends.checked import words_of as words_of
from sdlite.errors import MissingExtraError, PrecisionError, UnknownNameError
from sdlite.families import vae_stride
from sdlite.manifest import PARTS, PRECISIONS

if TYPE_CHECKING:
    from sdlite.exported import Export


class Network(Protocol):
    def __call__(self, **inputs: np.ndarray) -> np.ndarray: ...


ROW_BY_ROW = (
    "the rows of a batch run one by one, so that an image of a batch is its seed's image alone, bit"
    " by bit"
)


class RowByRow:
    """A network of batch 1 called once for each row: guidance as two calls. `seconds` is the time
    of one row.
    """

    def __init__(self, network: Callable[..., np.ndarray]):
        self.network = network

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        out = []
        for row in rows(inputs):
            running.check()
            out.append(self.network(**row))
        return np.concatenate(out)

    def close(self) -> None:
        _close(self.network)


OVERFLOWS = (
    "the VAE decoder overflows in float16 (NaN or infinity, well known of Stable Diffusion's):"
    " images for which it does are decoded in float32; precision='fp32' decodes all of them so"
)


class Overflowing:
    """A decoder in float16, whose images that are no numbers are decoded again in float32. Which
    one an image gets depends on nothing but the image.

    Args:
        whole: makes the decoder in float32, the first time that it is needed.
    """

    def __init__(self, half: Network, whole: Callable[[], Network]):
        self.half, self.whole = half, whole
        self._float32: Network | None = None
        self._lock = threading.Lock()

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """latent_sample (B, C, h, w) -> (B, 3, H, W)."""
        out = self.half(**inputs)
        bad = ~np.isfinite(out).reshape(len(out), -1).all(axis=1)
        if not bad.any():
            return out
        with self._lock:
            self._float32 = self._float32 or self.whole()
        running.say(OVERFLOWS)
        out = np.array(out)
        out[bad] = self._float32(latent_sample=np.ascontiguousarray(inputs["latent_sample"][bad]))
        return out

    def close(self) -> None:
        _close(self.half)
        _close(self._float32)


def _close(network: Any) -> None:
    """What an engine does not free by itself when nobody holds it."""
    if hasattr(network, "close"):
        network.close()


def rows(inputs: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Inputs with a batch -> inputs of one row each; scalars go along."""
    count = max(v.shape[0] for v in inputs.values() if v.ndim)
    for i in range(count):
        yield {k: np.ascontiguousarray(v[i : i + 1]) if v.ndim else v for k, v in inputs.items()}


@dataclass(frozen=True)
class NetworkReport:
    """What runs, as `pipe.report` shows it."""

    part: str
    file: str
    bytes: int  # weights on disk
    storage: str  # dtype of the weights on disk
    arithmetic: str  # dtype that the engine computes in
    load_seconds: float


@dataclass
class Report:
    """What the pipeline chose and why."""

    model: str
    backend: str
    device: str
    precision: str
    reason: str
    engine: str  # name and version
    networks: list[NetworkReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.precision} on {self.backend} ({self.engine}), {self.device};"
            f" {self.reason}"
        ]
        lines += [
            f"  {n.part:<13} {n.bytes / 1e6:8.2f} MB {n.storage:<8} -> {n.arithmetic:<8} loaded in"
            f" {n.load_seconds:.2f} s  {n.file}"
            for n in self.networks
        ]
        return "\n".join(lines + [f"  note: {n}" for n in self.notes])


@dataclass
class Networks:
    text_encoder: Network
    unet: Network
    vae_decoder: Network
    report: Report
    size_multiple: int
    size: tuple[int, int] | None = None  # (height, width), where the networks take no other

    def close(self) -> None:
        for part in PARTS:
            _close(getattr(self, part))


class Backend(Protocol):
    """What a backend module has. `load_part` returns the callable and its report row."""

    PRECISIONS: tuple[str, ...]
    DEVICES: tuple[str, ...]

    def engine(self) -> str: ...
    def load_part(
        self, artifact: Artifact, part: str, precision: str, device: str, threads: int | None
    ) -> tuple[Network, NetworkReport]: ...
    def notes(self, precision: str, device: str) -> list[str]: ...


_TORCH_HAS = ("fp32", "fp16", "int8-dynamic")  # their modules' PRECISIONS, without importing them
_OPENVINO_HAS = ("fp32", "fp16", "int8-static")
ENGINES_ONLY = ("bf16",)  # precisions of exported engines that no artefact holds as ONNX
# name -> (module, the package that it needs, the extra that installs it)
_BACKENDS = {
    "onnxruntime": ("sdlite.backends.ort", "onnxruntime", "cpu"),
    "openvino": ("sdlite.backends.openvino", "openvino", "openvino"),
    "tensorrt": ("sdlite.backends.tensorrt", "tensorrt", "tensorrt"),
    "torch": ("sdlite.backends.torch", "torch", "torch"),
}


def get_backend(name: str) -> Any:
    if name not in _BACKENDS:
        raise UnknownNameError(
            f"backend={name!r} is not known; choose one of auto, {', '.join(_BACKENDS)}."
        )
    module, _, extra = _BACKENDS[name]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("sdlite"):
            raise
        gpu = " (or 'sdlite[cuda]' for NVIDIA GPUs; never both)" if name == "onnxruntime" else ""
        raise MissingExtraError(
            f"backend {name!r} needs {e.name!r}: pip install 'sdlite[{extra}]'{gpu}."
        ) from e


def installed(name: str) -> bool:
    """Whether the package of a known backend can be found."""
    return importlib.util.find_spec(_BACKENDS[name][1]) is not None


def installed_with(precision: str) -> list[str]:
    """Installed backends that run ONNX graphs of this precision, in the order that "auto"
    prefers.
    """
    return [
        n
        for n in _BACKENDS
        if n not in ("torch", "tensorrt")
        and installed(n)
        and precision in get_backend(n).PRECISIONS
    ]


def choose(artifact: Artifact, precision: str, arithmetic: str | None = None) -> tuple[str, str]:
    """`backend="auto"`: (name, reason). The fastest installed engine that holds the precision
        (`sdlite.backends.auto`), else torch.

    Raises:
        MissingExtraError: no engine that could run it is installed. PrecisionError: nothing here
            could run this precision.
        ArtifactError: an export that no backend opens.
    """
    if artifact.export:
        return _opener(artifact, artifact.export)
    if not artifact.has_onnx(precision):
        if _float_weights(artifact) and precision in _TORCH_HAS and installed("torch"):
            why = (
                f"{artifact.name} holds no {precision} ONNX graphs"
                if artifact.manifest
                else "a plain diffusers folder"
            )
            return "torch", f"auto: {why}, and torch runs its weights"
        raise lacking(artifact, precision)
    if arithmetic is not None:
        return "openvino", f"auto: arithmetic={arithmetic!r} is openvino's to choose"
    able = [
        n
        for n in auto.ENGINES
        if installed(n) and not (n == "openvino" and precision not in _OPENVINO_HAS)
    ]
    if able and (found := auto.rule(artifact, precision)):
        if found.engine in able:
            return found.engine, f"auto: {found}"
        return (
            able[0],
            (
                f"auto: installed; {found.engine} would be faster ({found}): pip install"
                f" 'sdlite[{_BACKENDS[found.engine][2]}]'"
            ),
        )
    if able:
        other = "" if able[0] == "onnxruntime" else "; onnxruntime is not installed"
        return able[0], f"auto: the fastest installed engine for {precision} here{other}"
    if _float_weights(artifact) and precision in _TORCH_HAS and installed("torch"):
        return "torch", "auto: neither onnxruntime nor openvino is installed"
    also = " or 'sdlite[openvino]'" if precision in _OPENVINO_HAS else ""
    raise MissingExtraError(
        f"no engine for {precision} is installed: pip install 'sdlite[cpu]'{also}."
    )


def _opener(artifact: Artifact, export: Export) -> tuple[str, str]:
    if not export.backends:
        raise export.refusal(artifact.folder, "auto")
    name = next((n for n in export.backends if installed(n)), None)
    if name is None:
        first = export.backends[0]
        raise MissingExtraError(
            f"{artifact.folder} was exported for {export.target}: pip install"
            f" 'sdlite[{_BACKENDS[first][2]}]'."
        )
    return name, f"auto: exported for {export.target}"


def _float_weights(artifact: Artifact) -> bool:
    return any((artifact.folder / "unet").glob("*.safetensors")) or artifact.manifest is None


def lacking(artifact: Artifact, precision: str) -> PrecisionError:
    """What a model holds instead of `precision`, and how one comes to it."""
    held = list(artifact.listing.variants) if artifact.listing else []
    has = f"holds {', '.join(held)}, not {precision}" if held else f"has no {precision} ONNX graphs"
    if held and not artifact.export and all(h.startswith("int8") for h in held):
        has = f"was quantized and {has}"
        how = "leave precision out, or load the float model that it was made from"
    elif artifact.export:
        how = f"leave precision out, or export the model again as {precision}"
    elif precision.startswith("int8"):
        how = f"make it: sdlite quantize {artifact.folder} --precision {precision} --out NEW"
    elif not held:
        torch = "" if installed("torch") else " (pip install 'sdlite[torch]')"
        how = f"convert it (sdlite.convert(folder, out)), or use backend='torch'{torch}"
    elif precision == "fp16" and "fp32" in held:
        how = f"make it: sdlite export {artifact.folder} --target onnx-fp16 --out NEW"
    else:
        how = "choose one that it holds"
    return PrecisionError(f"{artifact.name} {has}; {how}.")


def entry(artifact: Artifact, part: str, precision: str) -> tuple[dict[str, Any], int]:
    """The listing's row of a network, its files verified and looked into, and their bytes.

    Raises:
        PrecisionError: the folder does not hold the precision. ArtifactError: a file is missing,
            cut off or changed, or holds what an engine may not open.
    """
    listing = artifact.listing
    if listing is None or not set(PARTS) <= set(listing.variants.get(precision, {})):
        raise lacking(artifact, precision)
    row = listing.variants[precision][part]
    files = [row["file"], *row["weights"]]
    artifact.verify(files)
    graphs.check_row(artifact.folder, files)
    return row, sum(int(listing.files[f]["bytes"]) for f in files)


def load(
    artifact: Artifact,
    precision: str,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    arithmetic: str | None = None,
) -> Networks:
    """Load the three networks of an artefact. `arithmetic` is what float layers are computed in;
    None is the backend's choice.

    Raises:
        UnknownNameError: precision, backend or device is not one that exists. PrecisionError: it
            exists, but not here.
        MissingExtraError: the engine is not installed. ArtifactError: a file is missing, cut off or
            changed.
    """
    if precision not in (known := (*PRECISIONS, *ENGINES_ONLY)):
        raise UnknownNameError(
            f"precision={precision!r} is not known; choose one of {', '.join(known)}."
        )
    name, reason = (
        choose(artifact, precision, arithmetic) if backend == "auto" else (backend, "as asked")
    )
    module = get_backend(name)
    if artifact.export and name not in artifact.export.backends:
        raise artifact.export.refusal(artifact.folder, name)
    if name == "torch" and not _float_weights(artifact):
        raise lacking(artifact, precision)
    if backend == "auto" and name == "openvino" and precision == "fp16" and arithmetic is None:
        # what every other engine computes fp16 files in: "auto" does not choose other images
        arithmetic = "float32"
        reason += (
            "; arithmetic='bfloat16' is faster where the CPU has it, with slightly other images"
        )
    if device not in module.DEVICES:
        raise UnknownNameError(
            f"device={device!r} is not known to backend {name!r}; choose one of"
            f" {', '.join(module.DEVICES)}."
        )
    if precision not in module.PRECISIONS:
        others = [
            n
            for n in _BACKENDS
            if n != name and installed(n) and precision in get_backend(n).PRECISIONS
        ]
        raise PrecisionError(
            f"backend {name!r} has no {precision}; it has {', '.join(module.PRECISIONS)}"
            + (f", and {', '.join(others)} has it." if others else ".")
        )
    more = {} if arithmetic is None else {"arithmetic": arithmetic}
    if arithmetic is not None and arithmetic not in (able := getattr(module, "ARITHMETIC", ())):
        raise PrecisionError(
            f"backend {name!r} cannot be told to compute in {arithmetic!r}; "
            + (
                f"choose one of {', '.join(able)}."
                if able
                else "leave arithmetic out, or use backend='openvino'."
            )
        )
    report = Report(
        artifact.name,
        name,
        device,
        precision,
        reason,
        module.engine(),
        notes=module.notes(precision, device, **more),
    )
    loaded: dict[str, Any] = {}
    stride = vae_stride(artifact.config("vae"))
    for part in PARTS:
        start = time.perf_counter()
        network, row = module.load_part(artifact, part, precision, device, threads, **more)
        loaded[part] = Checked(network, part, stride, report.engine)
        report.networks.append(
            NetworkReport(**{**asdict(row), "load_seconds": time.perf_counter() - start})
        )
    multiple = artifact.listing.size_multiple if artifact.listing and name != "torch" else stride
    return Networks(
        **loaded,
        report=report,
        size_multiple=multiple,
        size=artifact.export.size if artifact.export else None,
    )
