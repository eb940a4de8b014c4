"""What a backend is: its data, which can be read without its engine, and how it loads a network."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

from sdlite.artifact import Artifact
from sdlite.backends.network import Network
from sdlite.backends.report import NetworkReport
from sdlite.errors import MissingExtraError
from sdlite.families import vae_stride


class Backend(ABC):
    """An engine that turns (model, precision, device) into networks. Backends differ in arithmetic
    alone; tokens, sampling, guidance and pixels are shared.

    A subclass states the attributes and imports its engine inside its methods only.

    Attributes:
        name: what `backend=` says.
        package: module that it needs.
        precisions: what it can run.
        extra: sdlite's extra that installs it; "" for a backend of another distribution.
        also: what an error adds to how it is installed.
        devices: what `device=` may be.
        arithmetic: what `arithmetic=` may be; () where it cannot be told.
        order: its place in what "auto" tries, lowest first.
        graphs: it runs the ONNX graphs of a model; others read weights or engines.
    """

    name: str
    package: str
    precisions: tuple[str, ...]
    extra: str = ""
    also: str = ""
    devices: tuple[str, ...] = ("cpu",)
    arithmetic: tuple[str, ...] = ()
    order: int = 100
    graphs: bool = True

    @abstractmethod
    def engine(self) -> str:
        """Import the engine; its name and version.

        Raises:
            ModuleNotFoundError: it is not installed.
        """

    @abstractmethod
    def load_part(
        self,
        artifact: Artifact,
        part: str,
        precision: str,
        device: str,
        threads: int | None,
        arithmetic: str | None = None,
    ) -> tuple[Network, NetworkReport]:
        """One network and what the report says of it.

        Args:
            part: "text_encoder", "unet" or "vae_decoder".
            precision, device: of `precisions` and `devices`.
            threads: CPU threads of a call; None is the engine's own choice.
            arithmetic: of `arithmetic`; None is the backend's own choice.

        Raises:
            PrecisionError: the model does not hold it. ArtifactError: a file is missing, damaged or
                not what the network is. UnknownNameError: this machine does not have the device.
        """

    def once(self) -> AbstractContextManager[None]:
        """Networks that are loaded within it are called once: an engine may leave out what makes
        further calls fast and costs memory.
        """
        return nullcontext()

    def notes(self, precision: str, device: str, arithmetic: str | None = None) -> list[str]:
        """Sentences for the report about how these are run."""
        return []

    def runs(self, artifact: Artifact, precision: str) -> bool:
        """Whether the model holds what this backend reads in this precision."""
        return self.graphs and precision in self.precisions and artifact.has_onnx(precision)

    def size_multiple(self, artifact: Artifact) -> int:
        """Height and width of an image are multiples of this, in pixels."""
        if artifact.listing is not None:
            return artifact.listing.size_multiple
        return vae_stride(artifact.config("vae"))

    def unasked(self, precision: str) -> tuple[str | None, str]:
        """The arithmetic that "auto" asks for where the caller did not, and what the report's
        reason says of it.
        """
        return None, ""

    @property
    def install(self) -> str:
        """What `pip install` takes for it."""
        return f"'sdlite[{self.extra}]'" if self.extra else self.package

    def installed(self) -> bool:
        """Whether the package that it needs can be found."""
        return importlib.util.find_spec(self.package) is not None

    def require(self) -> None:
        """Import the engine.

        Raises:
            MissingExtraError: a module is not installed; the message says how to install it.
        """
        try:
            self.engine()
        except ModuleNotFoundError as e:
            if (e.name or "").startswith("sdlite"):
                raise
            raise MissingExtraError(
                f"backend {self.name!r} needs {e.name!r}: pip install {self.install}{self.also}."
            ) from e
