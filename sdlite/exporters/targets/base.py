"""What a target is: the runtime that an export is made for. One class, one file, for each runtime.

A subclass says what it is in its class attributes and overrides the steps that it has. The default
of a step is that there is nothing to do.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypedDict, TypeVar, cast

import numpy as np

from sdlite import settings
from sdlite.artifact import Artifact
from sdlite.backends import Network
from sdlite.errors import InputError, MissingExtraError, PrecisionError
from sdlite.spec import SPECS, IOSpec

if TYPE_CHECKING:
    import torch

    from sdlite.exporters.profile import Profile
    from sdlite.pipeline import Pipeline

Options = TypeVar("Options", covariant=True)
Graphs = dict[str, Path]  # part -> ONNX file
Facts = dict[str, object]  # what a calibration was: goes into the report


@settings.settings
@dataclass(frozen=True)
class NoOptions:
    """The options of a target that has none."""


class NotRunnable(Exception):
    """The runtime of an export does not exist on this machine; the message says why. The report
    says `not run`.
    """


@dataclass(frozen=True)
class Runtime:
    """What the README of an export says of its runtime.

    Attributes:
        title: the runtime's name.
        install: what pip installs for `code`.
        code: Python code with `load(part)`, which gives a function of a network's inputs by name,
            for one row, that gives its outputs by name; "" where the networks do not run in Python.
            It imports nothing of sdlite. See `Target.named`.
        usage: Markdown that stands in place of the Python code.
        note: said above the code.
        batch_axis: False where tensors have no batch axis and are called in0, in1, ..., out0.
        narrow_ids: token ids are int32.
        scalars: False where a scalar has the shape (1,).
    """

    title: str
    install: str = ""
    code: str = ""
    usage: str = ""
    note: str = ""
    batch_axis: bool = True
    narrow_ids: bool = False
    scalars: bool = True


class Seconds(TypedDict):
    """How long the target's own images take, in seconds.

    `load`: opening the networks. `first`: the first image, loading included. `later`: the images
    after it.
    """

    load: float
    first: float
    later: list[float]
    steps: int
    guidance: float


@dataclass(frozen=True)
class Running:
    """All networks of an export in one process of the runtime.

    Attributes:
        networks: part -> network of one row.
        close: ends the process.
        image: (prompt, seed, steps or None for the model's own) -> uint8 (H, W, 3), made by the
            target's own tokenizer, noise and sampler.
        clock: (prompt, steps) -> seconds of such images.
        edit: (prompt, image uint8 (H, W, 3), strength, seed, steps or None) -> uint8 (H, W, 3),
            edited by the target itself.
    """

    networks: Mapping[str, Network]
    close: Callable[[], None]
    image: Callable[[str, int, int | None], np.ndarray]
    clock: Callable[[str, int | None], Seconds]
    edit: Callable[[str, np.ndarray, float, int, int | None], np.ndarray]


class Target(Generic[Options]):
    """A runtime, with the profile that it exports for.

    Attributes:
        name: what a profile's `target` says.
        extra: extras of sdlite, separated by commas, that install what `packages` names.
        packages: distributions that the export needs; their versions go into the report.
        precisions: what it can make.
        dynamic: whether shapes can stay free.
        free_size: False where only the batch can stay free.
        from_torch: whether `convert_torch` is called, with torch networks, in place of `convert`.
        opened_by: names of the backends with which `Pipeline.from_pretrained` opens the export.
        sample: its file in `export/samples`, in C++; the export holds what that reads, see
            `sdlite.exporters.device`. "": none.
        options_type: dataclass of what a profile's `[options]` may say, see `sdlite.settings`.
        profile, options: of this export. specs: part -> what the model's own takes and gives.
        overflowing: part -> what says that float16 is too narrow for it; see `precision`.
    """

    name: ClassVar[str]
    extra: ClassVar[str] = "quantize"
    packages: ClassVar[tuple[str, ...]] = ()
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    dynamic: ClassVar[bool] = False
    free_size: ClassVar[bool] = True
    from_torch: ClassVar[bool] = False
    opened_by: ClassVar[tuple[str, ...]] = ()
    sample: ClassVar[str] = ""
    options_type: ClassVar[type] = NoOptions

    def __init__(self, profile: Profile):
        """Raises: InputError, PrecisionError: the target cannot do what the profile asks for."""
        self.specs: Mapping[str, IOSpec] = SPECS
        self.overflowing: Mapping[str, str] = {}
        if profile.precision not in self.precisions:
            raise PrecisionError(
                f"target {self.name} makes {', '.join(self.precisions)}, not {profile.precision}."
            )
        if profile.dynamic and not self.dynamic:
            raise InputError(
                f"target {self.name} has fixed shapes only; set dynamic = false and a batch."
            )
        self.profile = profile
        self.options = cast(Options, self._read_options())

    def _read_options(self) -> object:
        given, label = self.profile.options, f"profile {self.profile.name}, options"
        if given and not dataclasses.fields(self.options_type):
            raise InputError(
                f"{label}: {', '.join(given)} is not known; target {self.name} has no options."
            )
        read: object = settings.read(self.options_type, given, label)
        return read

    def need_packages(self) -> None:
        """Raises: MissingExtraError: what the export needs is not installed."""
        asked = dict.fromkeys(("onnx", "onnxruntime", *self.packages))
        if missing := [p for p in asked if version(p) is None]:
            raise MissingExtraError(
                f"target {self.profile.name} needs {', '.join(missing)}: pip install"
                f" 'sdlite[{self.extra}]'."
            )

    def runtime(self) -> Runtime:
        """What the README says."""
        raise NotImplementedError

    def precision(self, part: str) -> str:
        """The profile's; of a float16 export float32 for what overflows in float16."""
        narrow = self.profile.precision == "fp16" and part in self.overflowing
        return "fp32" if narrow else self.profile.precision

    def named(self, code: str) -> str:
        """`code` with tables in place of `@INPUTS@` and `@OUTPUTS@`: part -> the names of what it
        takes and gives, in order.
        """
        for word, tensors in (
            ("INPUTS", {p: s.inputs for p, s in self.specs.items()}),
            ("OUTPUTS", {p: s.outputs for p, s in self.specs.items()}),
        ):
            rows = [f'    "{p}": {json.dumps([t.name for t in ts])},' for p, ts in tensors.items()]
            code = code.replace(f"@{word}@", "\n".join(["{", *rows, "}"]))
        return code

    def lacks(self, part: str) -> str:
        """Why a network that a model need not have is left out; "" where it is exported."""
        return ""

    def check(self, artifact: Artifact) -> None:
        """Refuse a model that the target cannot run, before any work.

        Raises:
            InputError: it cannot.
        """

    def quantize(
        self,
        graphs: Graphs,
        pipe: Pipeline,
        shown: Sequence[str],
        steps: int | None,
        threads: int | None,
    ) -> tuple[Graphs, Facts | None]:
        """Integer graphs, calibrated on prompts other than `shown`, and what the report says."""
        return graphs, None

    def prepare(self, part: str, graph: Path) -> Path:
        """The graph that the converter and the quality check are given."""
        return graph

    def judged(self, part: str, graph: Path) -> Path:
        """What the quality check runs instead of `graph` where the runtime does not run."""
        return graph

    def convert(self, part: str, graph: Path, out: Path) -> list[Path]:
        """An ONNX file of the profile's shapes to files in `out`, the network's own first.

        Raises:
            ExportError: the converter refuses it.
        """
        raise NotImplementedError

    def convert_torch(
        self, part: str, network: torch.nn.Module, example: tuple[torch.Tensor, ...], out: Path
    ) -> list[Path]:
        """The same from a torch network and one set of its inputs."""
        raise NotImplementedError

    def finish(self, out: Path, artifact: Artifact, latent_shape: tuple[int, ...]) -> list[Path]:
        """Write what the folder holds besides the networks; `latent_shape` is (B, C, h, w)."""
        return []

    def run_all(self, folder: Path, threads: int | None) -> Running | None:
        """All networks in one process; None where each runs alone.

        Raises:
            NotRunnable: not on this machine.
        """
        return None

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """One network, as a backend's.

        Raises:
            NotRunnable: not on this machine.
        """
        raise NotRunnable(f"sdlite does not run {self.name}")


def version(package: str) -> str | None:
    """The installed version of a distribution; onnxruntime-gpu counts as onnxruntime."""
    names = (package, "onnxruntime-gpu") if package == "onnxruntime" else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
