"""What a pipeline runs on and why, as `pipe.report` shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class NetworkReport:
    """One network.

    Attributes:
        part: "text_encoder", "unet" or "vae_decoder".
        file: path in the model folder.
        bytes: weights on disk.
        storage: dtype of the weights on disk.
        arithmetic: dtype that the engine computes in.
        load_seconds: filled in when all three networks are loaded.
    """

    part: str
    file: str
    bytes: int
    storage: str
    arithmetic: str
    load_seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.part:<13} {self.bytes / 1e6:8.2f} MB {self.storage:<8} ->"
            f" {self.arithmetic:<8} loaded in {self.load_seconds:.2f} s  {self.file}"
        )


@dataclass
class Report:
    """What the pipeline chose and why. `engine` is the name and version of the backend's engine."""

    model: str
    backend: str
    device: str
    precision: str
    reason: str
    engine: str
    networks: list[NetworkReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """The report as JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        head = (
            f"{self.model}: {self.precision} on {self.backend} ({self.engine}), {self.device};"
            f" {self.reason}"
        )
        networks = [f"  {n}" for n in self.networks]
        return "\n".join([head, *networks, *(f"  note: {n}" for n in self.notes)])
